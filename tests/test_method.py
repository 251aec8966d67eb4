"Properties of the method's pure functions, for any sizes: search, joint attention, keyframes, plans."

import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflow_nb import propagation
from tokenflow_nb.backbones.schedule import Level, Prediction, lifted
from tokenflow_nb.denoiser import turns
from tokenflow_nb.keyframes import intervals, joint_attention, joint_groups, keyframe_table
from tokenflow_nb.propagation import RULES, make_plan, nearest, nearest_fields, normalise_keys
from tokenflow_nb.support.memory import Blocks

sizes, seeds = st.integers(1, 40), st.integers(0, 2**31)


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(sizes, sizes, st.integers(1, 16), st.integers(1, 3000), seeds)
def test_search_is_brute_force(queries, keys, channels, largest, seed):
    "The key that is found is as near, in float64, as the nearest: ties may fall either way."
    query, key = rand(queries, channels, seed=seed), rand(keys, channels, seed=seed + 1)
    found = nearest(query, normalise_keys(key), largest)
    cosines = F.cosine_similarity(query.double()[:, None], key.double()[None], dim=-1)
    best, got = cosines.max(1).values, cosines.gather(1, found[:, None])[:, 0]
    assert found.shape == (queries,) and found.dtype == torch.int64
    assert (best - got).max() < 1e-5


@given(sizes, sizes, st.integers(1, 3000), seeds)
def test_search_finds_the_first_of_a_tie(queries, keys, largest, seed):
    "Whole numbers multiply exactly, so ties are ties; the copies of all keys that follow are never chosen."
    query, key = (rand(rows, 6, seed=seed + rows).mul(3).round() for rows in (queries, keys))
    found = nearest(query, torch.cat([key, key]), largest)
    assert found.tolist() == [row.index(max(row)) for row in (query @ key.T).tolist()]


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float64]), st.integers(1, 3000), seeds)
def test_search_is_in_float32_whatever_is_given(dtype, largest, seed):
    query, key = rand(30, 8, seed=seed).to(dtype), normalise_keys(rand(20, 8, seed=seed + 1))
    assert torch.equal(nearest(query, key, largest), nearest(query.float(), key))
    assert torch.equal(nearest(query.requires_grad_(), key.clone().requires_grad_(), largest), nearest(query.float(), key))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("largest", [1, 149, 500, 3000])
def test_search_in_chunks_holds_one_chunk(largest, threads, monkeypatch):
    "No product is larger than the chunk that is allowed, and each is gone before the next is made."
    query, key, sizes, products = rand(100, 8, seed=0), normalise_keys(rand(50, 8, seed=1)), [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" not in str(function):
                return function(*args, **(kwargs or {}))
            assert not [product for product in products if product() is not None]
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel())
            products.append(weakref.ref(result))
            return result

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with Watch():
        found = nearest(query, key, largest)
    assert torch.equal(found, nearest(query, key))
    assert sum(sizes) == 100 * 50 and max(sizes) <= max(largest, 50)  # at least one query's


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queries, keys", [(1000, 300), (257, 1024), (3, 30_000), (1, 70_000)])
def test_search_is_brute_force(queries, keys, threads):
    "At any size and number of threads; the copies of all keys that follow are never chosen."
    query, key = rand(queries, 16, seed=0), normalise_keys(rand(keys, 16, seed=1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = nearest(query, torch.cat([key, key]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, (query.double() @ key.double().T).argmax(1))


FUSED = """
import torch
from tokenflow_nb.propagation import fused_nearest, nearest, normalise_keys
for rows, columns, channels in ((1, 1, 1), (70, 65, 16), (130, 200, 48)):
    query, key = (torch.randn(n, channels, generator=torch.Generator().manual_seed(n)) for n in (rows, columns))
    key = normalise_keys(torch.cat([key, key]))
    assert torch.equal(fused_nearest(query, key), nearest(query, key)), (rows, columns, channels)
"""


def test_fused_search_in_tritons_interpreter():
    "The kernel's arithmetic, its masks and its ties, without a GPU."
    pytest.importorskip("triton", reason="needs Triton, which torch brings for CUDA: `pip install triton`")
    environment = os.environ | dict(TRITON_INTERPRET="1")
    result = subprocess.run([sys.executable, "-c", FUSED], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("rows, columns, channels", [(1, 1, 1), (4096, 4096, 320), (1000, 77, 640)])
def test_search_on_a_gpu_is_that_of_the_cpu(rows, columns, channels):
    query, key = rand(rows, channels, seed=0), normalise_keys(rand(columns, channels, seed=1))
    found, exact = nearest(query.cuda(), key.cuda()).cpu(), query.double() @ key.double().T
    assert ((exact.max(1).values - exact.gather(1, found[:, None])[:, 0]) / query.norm(dim=1)).max() < 1e-5


def test_fused_search_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(propagation, "triton", None)
    with pytest.raises(RuntimeError, match="needs Triton"):
        propagation.fused_nearest(torch.ones(1, 2), torch.ones(1, 2))


def test_a_kernel_that_fails_or_errs_is_not_used(monkeypatch):
    "Whatever Triton raises, the chunked search serves, and a warning says why."
    works = propagation._fused_works.__wrapped__
    monkeypatch.setattr(propagation, "triton", object())
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    for kernel, reason in ((lambda q, k: 1 / 0, "ZeroDivisionError"), (lambda q, k: torch.zeros(len(q)), "errs")):
        monkeypatch.setattr(propagation, "fused_nearest", kernel)
        with pytest.warns(UserWarning, match=reason):
            assert not works()
    monkeypatch.setattr(propagation, "fused_nearest", nearest)
    assert works()


@given(sizes, sizes, seeds, st.floats(0.1, 100))
def test_search_ignores_the_length_of_queries_and_keys(queries, keys, seed, scale):
    query, key = rand(queries, 8, seed=seed), rand(keys, 8, seed=seed + 1)
    lengths = 0.5 + torch.rand(keys, 1, generator=torch.Generator().manual_seed(seed))
    one, two = nearest(query, normalise_keys(key)), nearest(query * scale, normalise_keys(key * lengths))
    cosines = F.cosine_similarity(query.double()[:, None], key.double()[None], dim=-1)
    assert (cosines.gather(1, one[:, None]) - cosines.gather(1, two[:, None])).abs().max() < 1e-5


@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.integers(1, 6), seeds)
def test_joint_attention_is_attention_over_concatenated_tokens(frames, tokens, heads, width, seed):
    query, key, value = (rand(frames, tokens, heads * width, seed=seed + i).double() for i in range(3))
    joint = joint_attention(query, key, value, heads)
    keys, values = key.reshape(-1, heads, width), value.reshape(-1, heads, width)
    for frame in range(frames):
        scores = torch.einsum("shd,thd->hst", query[frame].unflatten(-1, (heads, width)), keys) / width**0.5
        expected = torch.einsum("hst,thd->shd", scores.softmax(-1), values).flatten(1)
        assert torch.allclose(joint[frame], expected, atol=1e-9)


@given(st.integers(1, 60), st.data(), st.integers(1, 20), seeds)
def test_keyframes_lie_in_their_intervals(frames, data, steps, seed):
    interval = data.draw(st.integers(1, frames))
    table = keyframe_table(frames, interval, steps, seed)
    assert table.shape == (steps, -(-frames // interval))
    for row in table:
        assert all(int(keyframe) in piece for keyframe, piece in zip(row, intervals(frames, interval)))


def test_every_frame_has_its_turn():
    assert set(keyframe_table(24, 8, 200, seed=0).flatten().tolist()) == set(range(24))


@given(st.integers(1, 60), st.data(), seeds, st.sampled_from(list(RULES)))
def test_plans_are_valid(frames, data, seed, rule):
    interval = data.draw(st.integers(1, frames))
    keyframes = keyframe_table(frames, interval, 1, seed)[0]
    plan = make_plan(rule, frames, keyframes, interval)
    assert len(plan) == frames
    for which in (plan.first, plan.second):
        assert which.dtype == torch.int64 and 0 <= which.min() and which.max() < len(keyframes)
    assert 0 <= plan.weight.min() and plan.weight.max() <= 1


@given(st.integers(2, 60), st.data(), seeds)
def test_neighbours_enclose_their_frame(frames, data, seed):
    interval = data.draw(st.integers(1, frames))
    keyframes = keyframe_table(frames, interval, 1, seed)[0]
    plan = make_plan("linear", frames, keyframes, interval)
    for frame in range(frames):
        before, after = int(keyframes[plan.second[frame]]), int(keyframes[plan.first[frame]])
        inside = keyframes[0] <= frame <= keyframes[-1]
        assert (before <= frame <= after) if inside else before == after
        assert not any(before < keyframe < frame or frame < keyframe < after for keyframe in keyframes.tolist())
        if frame in keyframes:  # a keyframe keeps its own features
            own = int((keyframes == frame).nonzero())
            weight = float(plan.weight[frame])
            assert (plan.first[frame] == own) * weight + (plan.second[frame] == own) * (1 - weight) == 1


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 20), seeds)
def test_fields_find_shuffled_tokens(frames, keyframes, tokens, seed):
    keys = rand(keyframes, tokens, 16, seed=seed)
    which = torch.randint(keyframes, (frames,), generator=torch.Generator().manual_seed(seed))
    orders = torch.stack([torch.randperm(tokens, generator=torch.Generator().manual_seed(seed + i)) for i in range(frames)])
    shuffled = torch.stack([keys[k][order] for k, order in zip(which, orders)])
    assert torch.equal(nearest_fields(shuffled, normalise_keys(keys), which), orders)


@pytest.mark.parametrize("shape", [(8, 64, 48), (5, 64, 48), (6, 40, 640), (5, 300, 16), (1, 64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fields_are_each_frames_own_search(shape, dtype):
    "However frames are put together: in pairs, one by one, by keyframe; of keyframes in any order, and out of memory that others share."
    keys = normalise_keys(rand(3, *shape[1:], seed=1))
    tokens = rand(2 * shape[0], *shape[1:], seed=0).to(dtype)[::2].requires_grad_()
    for which in (torch.arange(shape[0]) * 2 // shape[0], torch.tensor([2, 0, 2, 1, 1, 0, 0, 2])[: shape[0]]):
        exact = torch.einsum("fsc,fmc->fsm", tokens.double(), keys[which].double()).argmax(-1)
        assert torch.equal(nearest_fields(tokens, keys, which), exact)


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), seeds)
def test_a_move_and_its_inverse(source, target, seed):
    latents, noise = rand(2, 4, 4, seed=seed).double(), rand(2, 4, 4, seed=seed + 1).double()
    source, target = (Level(kept**0.5, (1 - kept) ** 0.5) for kept in (source, target))
    sees = lambda x, level: Prediction((x - level.sigma * noise) / level.alpha, noise)  # noqa: E731
    lower = sees(latents, source).at(target)
    there_and_back = lifted(lower, sees(latents, source), target, source)
    assert torch.allclose(there_and_back, latents, atol=1e-6)
    assert torch.allclose(sees(lower, target).at(source), latents, atol=1e-6)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 20))
def test_blocks_cover_all_rows_whatever_fits(count, size, fits):
    def work(rows):
        if rows.stop - rows.start > fits:
            raise torch.OutOfMemoryError("no room")
        return torch.arange(count)[rows]

    with pytest.warns(UserWarning, match="out of memory") if min(size, count) > fits else _quiet():
        assert torch.cat(list(Blocks(size).map(work, count))).tolist() == list(range(count))


def _quiet():
    import contextlib

    return contextlib.nullcontext()


def test_blocks_pass_on_what_no_halving_helps():
    def too_large(rows):
        raise torch.OutOfMemoryError("no room")

    def broken(rows):
        raise RuntimeError("something else")

    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        list(Blocks(4).map(too_large, 8))
    with pytest.raises(RuntimeError, match="something else"):
        list(Blocks(4).map(broken, 8))


# ---- groups of keyframes


@given(keyframes=st.integers(1, 300), most=st.none() | st.integers(2, 40))
def test_groups_cover_every_keyframe_once_and_never_hold_too_many(keyframes, most):
    groups = joint_groups(keyframes, most)
    assert [each for group in groups for each in group.members] == list(range(keyframes))
    for group in groups:
        assert len(group.everybody) <= (most or keyframes) and group.everybody == sorted(set(group.everybody))
        assert group.everybody[group.rows] == list(group.members)
        assert 0 in group.everybody  # what all see keeps the clip to one look
        assert group is groups[0] or (most or 0) < 8 or group.members.start - 1 in group.everybody  # with room for two guests neighbours agree too
    assert len(groups) == 1 or (most is not None and keyframes > most)


@given(
    frames=st.integers(1, 60), interval=st.integers(1, 9), most=st.none() | st.integers(2, 9), rule=st.sampled_from([*RULES]), size=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_every_frame_finds_its_keyframes_among_those_that_are_held(frames, interval, most, rule, size, seed):
    "Groups of keyframes and frames take turns; frames that wait for a full block hold back no more keyframes than they need."
    interval = min(interval, frames)
    keyframes = keyframe_table(frames, interval, 1, seed)[0]
    plan, start, held = make_plan(rule, frames, keyframes, interval), 0, []
    for group, base, now in turns(plan, joint_groups(len(keyframes), most), Blocks(size)):
        held = [*held[len(held) - (group.members.start - base) :], *group.members]
        behind = 1 + -(-(size - 1) // interval)  # keyframes in the window of those frames: they may lie at the near ends of their intervals
        assert held[0] == base and len(held) <= len(group.members) + behind + 1  # and the one before the window
        assert now.start == start and (len(now) % size == 0 or now.stop == frames)
        part = plan[now.start : now.stop].counted_from(base)
        for chosen, whole in ((part.first, plan.first), (part.second, plan.second)):
            assert [held[place] for place in chosen.tolist()] == whole[now.start : now.stop].tolist()
        start = now.stop
    assert start == frames
