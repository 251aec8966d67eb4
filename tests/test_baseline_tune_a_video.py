"Tune-A-Video by its mechanisms: who attends to whom, attention along time that starts at nothing, tuning on a copy."

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.backbones.schedule import ModelError, NoiseSchedule, Prediction
from tokenflow_nb.backbones.unet import self_attentions
from tokenflow_nb.compare.job import Job
from tokenflow_nb.compare.tune_a_video import CrossFrameAttention, FrameMemory, TemporalAttention, TuneAVideo
from tokenflow_nb.compare.tune_a_video import VideoUNet, cross_frame, denoising_loss, predict_clip, tune
from tokenflow_nb.edit import EditConfig
from tokenflow_nb.support.memory import Blocks
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", radius=30, velocity=(3, 0), spin=0.04)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(unet):
    hasher = hashlib.sha256()
    for name, value in unet.state_dict().items():
        hasher.update(name.encode() + value.numpy().tobytes())
    return hasher.hexdigest()


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=3, size=64)


@pytest.fixture(scope="module")
def latents(model, clip):
    return model.encode(clip.frames)


@pytest.fixture(scope="module")
def words(model):
    return model.embed(SCENE.caption).states


@pytest.fixture
def job(model, store, clip):
    config = EditConfig("a gold star on grass", source_prompt=SCENE.caption, num_inference_steps=2)
    return Job(model, clip, config, store=store)


@pytest.fixture(scope="module")
def layer(model):
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    return name, self_attentions(model.unet)[name]


def attend(layer, tokens, reach=("first", "previous"), size=100):
    name, attn = layer
    memory, pieces = FrameMemory(reach), []
    for memory.start in range(0, len(tokens), size):
        pieces.append(CrossFrameAttention(name, memory)(attn, tokens[memory.start : memory.start + size]))
    return torch.cat(pieces)


@torch.no_grad()
def test_attention_is_the_plain_one_over_first_and_previous_frame(layer):
    tokens, attn = rand(4, 9, layer[1].to_q.in_features), layer[1]
    query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    for frame, found in enumerate(attend(layer, tokens)):
        keys, values = (torch.cat([part[0], part[max(frame - 1, 0)]]) for part in (key, value))
        heads = []
        for q, k, v in zip(*(part.chunk(attn.heads, -1) for part in (query[frame], keys, values))):
            heads.append(torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v)
        assert torch.allclose(found, attn.to_out[0](torch.cat(heads, -1)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reach, changed", [
    (("first", "previous"), {0: {0, 1, 2, 3}, 1: {1, 2}, 2: {2, 3}, 3: {3}}),
    (("first",), {0: {0, 1, 2, 3}, 1: {1}, 2: {2}, 3: {3}}),
])
def test_a_frame_reaches_those_that_may_see_it(layer, reach, changed):
    tokens = rand(4, 9, layer[1].to_q.in_features)
    for frame, expected in changed.items():  # a frame's own change reaches it through its queries
        other = tokens.clone()
        other[frame] = rand(*tokens.shape[1:], seed=1)
        difference = (attend(layer, other, reach) - attend(layer, tokens, reach)).abs().amax((1, 2))
        assert {place for place, size in enumerate(difference) if size > 1e-6} == expected


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([("first",), ("previous",), ("first", "previous")]))
def test_blocks_change_nothing(frames, size, reach):
    rows, memory = rand(2, frames, 2, 3), FrameMemory(reach)
    whole, pieces = FrameMemory(reach).seen("a", rows), []
    for memory.start in range(0, frames, size):
        pieces.append(memory.seen("a", rows[:, memory.start : memory.start + size]))
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_a_block_may_be_tried_again_shorter():
    rows, memory = rand(2, 6, 2, 3), FrameMemory()
    whole = FrameMemory().seen("a", rows)
    memory.seen("a", rows[:, :2])
    memory.start = 2
    memory.seen("a", rows[:, 2:])  # ran out of memory after this layer
    assert torch.equal(memory.seen("a", rows[:, 2:4]), whole[:, 2:4])
    memory.start = 4
    assert torch.equal(memory.seen("a", rows[:, 4:]), whole[:, 4:])


def test_processors_come_back_after_an_error(model, latents, words):
    before = {name: id(attn.processor) for name, attn in self_attentions(model.unet).items()}
    with pytest.raises(ZeroDivisionError), cross_frame(model.unet, FrameMemory()):
        1 / 0
    assert {name: id(attn.processor) for name, attn in self_attentions(model.unet).items()} == before


def test_other_attention_is_refused(layer):
    tokens = rand(2, 4, layer[1].to_q.in_features)
    with pytest.raises(ValueError, match="mid_block.*not a plain self-attention"):
        CrossFrameAttention(layer[0], FrameMemory())(layer[1], tokens, encoder_hidden_states=tokens)


@torch.no_grad()
def test_time_is_the_only_axis_of_temporal_attention(monkeypatch):
    attention = TemporalAttention(8, 2, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(attention.to_out.weight, generator=torch.Generator().manual_seed(1))
    tokens = rand(4, 7, 8)
    whole = attention(tokens)
    normed = attention.norm(tokens)
    query, key, value = (part(normed) for part in (attention.to_q, attention.to_k, attention.to_v))
    for place in range(7):
        heads = [
            torch.softmax(q @ k.T / 4**0.5, -1) @ v
            for q, k, v in zip(*(part[:, place].chunk(2, -1) for part in (query, key, value)))
        ]
        assert torch.allclose(whole[:, place] - tokens[:, place], attention.to_out(torch.cat(heads, -1)), atol=1e-5)
    monkeypatch.setattr("tokenflow_nb.compare.tune_a_video._PLACES", 3)
    assert torch.allclose(attention(tokens), whole, atol=1e-6)


def test_the_inflated_unet_is_the_image_model_with_other_keys(model, latents, words):
    "Before any tuning, attention along time adds nothing; after a nudge it does, in every block."
    video, memory = VideoUNet(model.unet), FrameMemory()
    with torch.no_grad():
        inflated = video.unet(latents, 400, words.expand(3, -1, -1)).sample
        with cross_frame(model.unet, memory):
            plain = model.unet(latents, 400, words.expand(3, -1, -1)).sample
        assert torch.equal(inflated, plain)
        assert len(video.temporal) == len(self_attentions(model.unet))
        torch.nn.init.eye_(video.temporal[-1].to_out.weight)
        assert not torch.allclose(video.unet(latents, 400, words.expand(3, -1, -1)).sample, plain, atol=1e-4)


def test_what_is_tuned(model):
    video, count = VideoUNet(model.unet), len(self_attentions(model.unet))
    names = list(video.tuned())
    assert sum(".attn1.to_q." in name for name in names) == sum(".attn2.to_q." in name for name in names) == count
    assert len(names) == 2 * count + 5 * count  # temporal: to_q, to_k, to_v, to_out's weight and bias
    state = torch.random.get_rng_state()
    again = VideoUNet(model.unet)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(again.tuned()[name], value) for name, value in video.tuned().items())


def test_tuning_lowers_the_loss_and_leaves_the_model_alone(model, latents, words):
    before, video = weights(model.unet), VideoUNet(model.unet)
    draws = [(timestep, rand(*latents.shape, seed=timestep)) for timestep in (200, 500, 800)]

    @torch.no_grad()
    def loss():
        return sum(denoising_loss(video, model.schedule, latents, words, *draw).item() for draw in draws)

    tuned, fixed = video.tuned(), {name: value.clone() for name, value in video.unet.state_dict().items()}
    at_first = loss()
    losses = tune(video, model.schedule, latents, words, 8, 1e-3)
    assert len(losses) == 8 and loss() < at_first
    assert weights(model.unet) == before and not any(p.requires_grad for p in model.unet.parameters())
    moved = {name for name, value in video.unet.state_dict().items() if not torch.equal(value, fixed[name])}
    assert moved == {name for name in tuned if not name.startswith("temporal.")}


def test_tuning_is_seeded(model, latents, words):
    def first_losses(seed):
        return tune(VideoUNet(model.unet, seed), model.schedule, latents, words, 2, 1e-3, window=2, seed=seed)

    assert first_losses(3) == first_losses(3) != first_losses(4)


def test_gradients_do_not_depend_on_checkpointing(model, latents, words):
    found = []
    for checkpointing in (False, True):
        video = VideoUNet(model.unet)
        if checkpointing:
            video.unet.enable_gradient_checkpointing()
        parameters = [p.requires_grad_() for p in video.tuned().values()]
        denoising_loss(video, model.schedule, latents, words, 300, rand(*latents.shape)).backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert found[0].abs().max() > 0 and torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_has_the_models_own_target(model, latents, words, kind):
    "A UNet that answers with the right target has no loss."
    schedule = NoiseSchedule(model.schedule.config | dict(prediction_type=kind))
    video, noise, (alpha, sigma) = VideoUNet(model.unet), rand(*latents.shape), schedule.level(600)
    noised = alpha * latents + sigma * noise
    target = noise if kind == "epsilon" else alpha * noise - sigma * latents
    video.unet.forward = lambda sample, timestep, embeds, return_dict: (target if torch.allclose(sample, noised) else sample,)
    assert denoising_loss(video, schedule, latents, words, 600, noise) == 0
    found = schedule.prediction(target, noised, 600)
    assert torch.allclose(found.noise, noise, atol=1e-5)
    assert torch.equal(schedule.target(Prediction(latents, noise), 600), target)


def test_tuning_that_diverges_is_told(model, latents, words):
    with pytest.raises(ModelError, match="loss is nan at tuning step 1: give a rate below"):
        tune(VideoUNet(model.unet), model.schedule, latents * float("nan"), words, 2, 1e-3)


def test_an_edit_leaves_the_job_as_it_was(model, job):
    before = weights(model.unet), {name: id(attn.processor) for name, attn in self_attentions(model.unet).items()}
    edited = TuneAVideo(steps=1)(job)
    assert edited.frames.shape == job.clip.frames.shape and edited.fps == job.clip.fps
    assert edited.frames.std() > 5
    assert (weights(model.unet), {name: id(attn.processor) for name, attn in self_attentions(model.unet).items()}) == before
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_windows_and_one_frame(job, clip):
    short = TuneAVideo(steps=1, window=2)(job)  # three frames in windows of two and one
    assert short.frames.shape == clip.frames.shape
    one = TuneAVideo(steps=0)(replace(job, clip=clip[:1]))
    assert len(one) == 1


def test_frames_of_a_long_clip_see_first_and_previous_over_the_border(model, latents):
    memory, prompt = FrameMemory(), model.embed(SCENE.caption)
    with cross_frame(model.unet, memory):
        whole, pieces = (predict_clip(model, memory, Blocks(size), latents, 500, prompt) for size in (3, 2))
    assert torch.allclose(whole.noise, pieces.noise, atol=1e-4)


def test_rule():
    assert TuneAVideo(rate=3e-5).plan(None)[0] == 500 and TuneAVideo(rate=1.0).plan(None) == (1, 1.0)


@pytest.mark.parametrize("wrong, says", [
    (dict(steps=-1), "steps=-1"), (dict(steps=2.5), "steps=2.5"), (dict(steps=True), "steps=True"),
    (dict(rate=0), "rate=0"), (dict(rate=float("nan")), "rate=nan"), (dict(rate="fast"), "rate='fast'"), (dict(window=0), "window=0"),
])
def test_bad_settings(wrong, says):
    with pytest.raises(ValueError, match=says):
        TuneAVideo(**wrong)
