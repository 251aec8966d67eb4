"Nothing is lost: edits that are killed, interrupted, short of room, or made by two processes at once."

import errno
import json
import random
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kept import run_kept
import tokenflow_nb.edit as room
from tokenflow_nb.config import EditConfig
from tokenflow_nb.edit import Edit, edit_video
from tokenflow_nb.inversion import invert, inverting
from tokenflow_nb.store import Store, StoreError, drafts
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)
FEW_KILLS, KILLS = dict(SIGKILL=6, SIGINT=2, SIGTERM=2), dict(SIGKILL=20, SIGINT=6, SIGTERM=6)


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=5, size=64)


@pytest.fixture
def edit(model, clip, tmp_path, monkeypatch):
    "Makes an edit in four steps, in a store of its own, with a checkpoint at every step."
    monkeypatch.setattr(room, "CHECKPOINT_SECONDS", 0.0)

    def make(root=tmp_path / "cache", **options):
        options = dict(num_inference_steps=4, size=(64, 64), keyframe_interval=2, block_size=2, progress=False) | options
        return edit_video(clip, "a gold star on grass", source_prompt=SCENE.caption, model=model, store=Store(root), **options)

    return make


def stop_at(monkeypatch, step: int, error: BaseException):
    "Lets the next edit raise at a step, once."
    take = Edit.step

    def until(self):
        if self.index == step:
            monkeypatch.setattr(Edit, "step", take)
            raise error
        return take(self)

    monkeypatch.setattr(Edit, "step", until)


@pytest.mark.parametrize("kills_of", [FEW_KILLS, pytest.param(KILLS, marks=pytest.mark.slow)], ids=lambda kinds: str(sum(kinds.values())))
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL; run it on Linux or macOS")
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path, kills_of):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    kinds = [f"{name}={count}" for name, count in kills_of.items()]
    command = [sys.executable, str(Path(__file__).with_name("killed_edits.py")), str(tmp_path), str(seed), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200 + 60 * sum(kills_of.values()))
    assert done.returncode == 0, done.stderr
    *kills, together = map(json.loads, done.stdout.splitlines())
    print(*kills, sep="\n")
    assert Counter(each["kind"] for each in kills) == kills_of
    for each in kills:
        assert not each["broken"] and each["ended"] == 0 and each["same"] and each["others"] == [], (seed, each)
    assert sum(bool(each["left"]) for each in kills) >= len(kills) // 2, "too few moments fell into the work"

    assert together["ended"] == [0, 0, 0] and not together["broken"]
    assert len(together["edits"]) == 2 and set(together["wanted"]) <= set(together["edits"])


def test_an_interrupt_leaves_a_checkpoint(edit, tmp_path, monkeypatch):
    whole = edit(tmp_path / "other")
    stop_at(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        edit()
    resumed = edit()
    assert resumed.resumed_at == 2 and resumed.record()["resumed_at"] == 2 and whole.resumed_at == 0
    assert np.array_equal(resumed.edited.frames, whole.edited.frames)


def test_a_death_between_the_last_checkpoint_and_the_end_of_the_one_before_leaves_no_trace(edit, tmp_path, monkeypatch):
    whole, drop, drops = edit(tmp_path / "other"), drafts.Draft.drop, []

    def dies(self, name):
        drops.append(name)
        if len(drops) == 3:
            raise KeyboardInterrupt
        drop(self, name)

    monkeypatch.setattr(drafts.Draft, "drop", dies)
    with pytest.raises(KeyboardInterrupt):
        edit()
    resumed = edit()
    assert resumed.resumed_at == 4 and np.array_equal(resumed.edited.frames, whole.edited.frames)
    (entry,) = (entry for entry in Store(tmp_path / "cache").entries() if entry.meta["kind"] == "edit")
    assert [name.partition(".")[0] for name in entry.manifest["files"]] == ["step-0004"]


def test_what_is_done_is_read_unless_it_shall_not_be(edit, monkeypatch):
    first = edit()
    stop_at(monkeypatch, 0, AssertionError("not one step is to be taken"))
    again = edit()
    assert again.resumed_at == 4 and np.array_equal(again.edited.frames, first.edited.frames)
    with pytest.raises(AssertionError, match="not one step"):
        edit(resume=False)
    assert edit(resume=False).resumed_at == 0


def test_any_setting_makes_another_edit(edit):
    edit()
    for change in (dict(seed=1), dict(guidance_scale=2.0), dict(negative_prompt="a circle"), dict(max_joint_keyframes=2), dict(rule="linear")):
        assert edit(**change).resumed_at == 0, change


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(edit, tmp_path, monkeypatch):
    whole, save, room_left = edit(tmp_path / "other"), drafts.save_file, [2 + 4 * 2 + 2]  # parts of trajectory and record, checkpoints

    def until_full(tensors, path):
        room_left[0] -= 1
        if room_left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(drafts, "save_file", until_full)
    with pytest.raises(StoreError, match="disk is full"):
        edit()
    assert {entry.meta["kind"] for entry in Store(tmp_path / "cache").entries()} == {"trajectory", "source"}
    room_left[0] = 10**6
    resumed = edit()
    assert resumed.resumed_at == 2 and np.array_equal(resumed.edited.frames, whole.edited.frames)


def test_an_inversion_goes_on_block_by_block(model, clip, tmp_path, monkeypatch):
    store, encoded, encode = Store(tmp_path), [], type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda self, frames: (encoded.append(len(frames)), encode(self, frames))[1])
    walk = inverting(model, clip, SCENE.caption, 3, block_size=2, store=store)
    for _, done, _ in walk:
        if done > 4 * 3:  # in the second part
            break
    walk.close()
    assert encoded == [2, 2, 1] and list(store.drafts())
    invert(model, clip, SCENE.caption, 3, block_size=3, store=store, progress=False)
    assert encoded == [2, 2, 1, 1] and not store.drafts()  # the second part again, in blocks of another size; the first is kept


def test_a_process_does_not_wait_for_itself(model, clip, tmp_path):
    store = Store(tmp_path)
    paused = inverting(model, clip, SCENE.caption, 3, store=store)
    next(paused)
    invert(model, clip, SCENE.caption, 3, store=store, progress=False)
    assert len(store.entries()) == 1
    deque(paused, maxlen=0)
    assert len(store.entries()) == 1 and not store.drafts()


def test_a_recorded_source_gives_the_same_edit(edit, tmp_path):
    live, recorded = edit(tmp_path / "live", source_branch="live"), edit(source_branch="recorded")
    assert recorded.resumed_at == 0 and "record" in recorded.timings
    difference = live.edited.frames.astype(int) - recorded.edited.frames
    assert np.abs(difference).max() <= 2 and (difference != 0).mean() < 0.05


def test_a_second_prompt_records_nothing_again(edit, model, monkeypatch):
    edit()
    branches, rows = [], room.Denoiser._rows

    def seen(self, branch, *rest):
        branches.append(branch)
        return rows(self, branch, *rest)

    monkeypatch.setattr(room.Denoiser, "_rows", seen)
    edit(negative_prompt="a circle")
    guided, then = ["source", "negative", "positive", *["negative", "positive"] * 3], ["source", "positive", *["positive"] * 3]
    assert branches == 2 * guided + 2 * then  # keyframes, frames; guidance acts at two of four steps


@pytest.mark.parametrize("written, said", [(1, "format 1"), (3, "format 3")])
def test_a_cache_of_another_version_is_not_read(edit, tmp_path, written, said):
    first = edit()
    for path in (tmp_path / "cache").glob("edit-*/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": written}))
    with pytest.warns(UserWarning, match=said):
        again = edit()
    assert again.resumed_at == 0 and np.array_equal(again.edited.frames, first.edited.frames)


def test_a_cache_that_cannot_be_written_says_so_before_the_work(edit, tmp_path, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(drafts.FileLock, "acquire", refused)
    stop_at(monkeypatch, 0, AssertionError("not one step is to be taken"))
    with pytest.raises(StoreError, match="Read-only file system.*TOKENFLOW_HOME"):
        edit()


def test_run_kept_goes_on_from_the_last_checkpoint_only(model, clip, tmp_path, monkeypatch):
    "Checkpoints are dropped when a newer one is there; by the clock, not at every step."
    store = Store(tmp_path)
    trajectory = invert(model, clip, SCENE.caption, 4, store=store, progress=False)
    config = EditConfig("a gold star on grass", source_prompt=SCENE.caption, num_inference_steps=4, keyframe_interval=2)
    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr(room.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(room, "CHECKPOINT_SECONDS", 5.0)
    put, puts = drafts.Draft.put, []
    monkeypatch.setattr(drafts.Draft, "put", lambda self, name, tensors: (puts.append(name), put(self, name, tensors))[1])
    stop_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_kept(Edit(model, trajectory, config, clip, keep_history=False), store)
    (draft,) = tmp_path.glob(".draft-edit-*")
    assert sorted(path.name for path in draft.iterdir()) == ["journal.jsonl", "step-0003.safetensors"]
    assert puts == ["step-0002", "step-0003"]  # by the clock, and by the interrupt
    edit = Edit(model, trajectory, config, clip, keep_history=False)
    assert run_kept(edit, store) == 3 and torch.equal(edit.latents, Edit(model, trajectory, config, clip).run().latents)


# ---- two containers, and threads, on one cache

CONTAINER = """
    import os, platform, sys
    os.getpid = lambda: 4_194_305  # no process has this number, and both containers have it
    platform.node = lambda: "container"
    import torch
    from tokenflow_nb.store import Store
    store, part = Store(sys.argv[1]), {"x": torch.ones(3)}
"""
WRITES = """
    with store.writing("flow-mine") as writer, store.scratch() as folder, store.drafting("edit-mine") as draft:
        writer.put("first", part)
        draft.put("first", part)
        (folder / "film.npy").write_bytes(b"abc")
        print("writing", flush=True)
        sys.stdin.readline()
        assert (folder / "film.npy").read_bytes() == b"abc"
        writer.put("second", part)
        draft.put("second", part)
    print(*sorted(store.get("flow-mine").names + store.get("edit-mine").names), flush=True)
"""
USES_ALL = """
    with store.writing("flow-theirs") as writer:
        writer.put("first", part)
    with store.drafting("edit-theirs") as draft:
        draft.put("first", part)
    with store.scratch() as folder:
        repr(store), store._repr_html_(), store.prune(10**9)
    print(len(store.others()), sorted(store.clear()), flush=True)
"""


def container(root: Path, work: str) -> subprocess.Popen:
    "A process that thinks that it is the same one on the same machine as all others of its kind."
    code, pipe = textwrap.dedent(CONTAINER) + textwrap.dedent(work), subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, str(root)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_two_containers_on_one_cache_harm_nothing(tmp_path):
    mine = container(tmp_path, WRITES)
    assert mine.stdout.readline().strip() == "writing"
    said, errors = container(tmp_path, USES_ALL).communicate(timeout=300)
    assert said.strip() == "3 ['edit-theirs', 'flow-theirs']", errors  # the draft and both scratch folders are seen, and left
    said, errors = mine.communicate("go on\n", timeout=300)
    assert said.strip() == "first first second second", errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "edit-mine", "flow-mine"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_what_a_killed_container_leaves_is_counted_and_then_cleaned_by_another(tmp_path):
    mine = container(tmp_path, WRITES)
    assert mine.stdout.readline().strip() == "writing"
    mine.kill()
    mine.communicate(timeout=300)
    assert len(Store(tmp_path).others()) == 3 and "left behind" in repr(Store(tmp_path))
    said, errors = container(tmp_path, USES_ALL).communicate(timeout=300)
    assert said.strip() == "1 ['edit-mine', 'edit-theirs', 'flow-theirs']", errors  # the draft could have gone on; nobody is at work on it
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_threads_that_ask_for_one_entry_all_get_it(tmp_path):
    "A thread cannot tell whether the one before it works or is paused, so it waits for none; whichever ends first is believed."

    def make(store, number):
        start.wait()
        with store.drafting("edit-1") as draft:
            for part in () if draft.finished else range(3):
                if f"part-{part}" not in draft:
                    draft.put(f"part-{part}", {"x": torch.full((3,), float(part))})
        return [store.get("edit-1").tensor(f"part-{part}", "x")[0].item() for part in range(3)]

    for repetition in range(20):
        store, start = Store(tmp_path / str(repetition)), threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda number: make(store, number), range(8))) == 8 * [[0.0, 1.0, 2.0]]
        assert sorted(path.name for path in store.root.iterdir()) == [".locks", "edit-1"] and not drafts._OURS


def test_a_paused_draft_keeps_its_lock_whatever_others_do(tmp_path):
    "Nobody but its owner gives a lock back: another process still waits."
    store, asked = Store(tmp_path), Store(tmp_path)
    with store.drafting("edit-1") as paused:
        paused.put("first", {"x": torch.ones(3)})
        for _ in range(3):
            with pytest.raises(KeyError), asked.drafting("edit-1") as draft:
                draft.put("first", {"x": torch.ones(3)})
                raise KeyError
        assert asked.clear() == [] and list(asked.drafts()) == ["edit-1"]
        other = container(tmp_path, 'print(store.clear(), store.remove("edit-1"), list(store.drafts()), flush=True)')
        said, errors = other.communicate(timeout=300)
        assert said.strip() == "[] False ['edit-1']", errors
    assert store.get("edit-1").names == ["first"] and store.drafts() == {}
