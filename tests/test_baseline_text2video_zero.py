"Text2Video-Zero by its mechanisms: the motion field on latents, keys of the first frame, and a ControlNet that is heard."

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.backbones.schedule import Level, Prediction
from tokenflow_nb.backbones.unet import self_attentions
from tokenflow_nb.clip import Clip
from tokenflow_nb.compare import text2video_zero
from tokenflow_nb.compare.job import Job
from tokenflow_nb.compare.text2video_zero import Text2VideoZero, add_noise, canny, global_motion, residuals, translate
from tokenflow_nb.compare.tune_a_video import FrameMemory, cross_frame, predict_clip
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.measure.flow import Flow, estimate_flow
from tokenflow_nb.store import Store
from tokenflow_nb.support.memory import Blocks
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(64, 64), radius=24, pan=(3, 0))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def processors(network):
    return {name: id(layer.processor) for name, layer in self_attentions(network).items()}


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=3, size=64)


@pytest.fixture
def job(model, store, clip):
    config = EditConfig("a gold star on grass", source_prompt=SCENE.caption, num_inference_steps=2)
    return Job(model, clip, config, store=store)


@pytest.fixture
def controlnet(model):
    "Of the toy model's shape, with random last layers: as it is made it would add nothing."
    channels = (16, 32, 96, 256)[: int(math.log2(model.latent_scale)) + 1]
    made = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=channels).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for layer in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.05, generator=generator)
    torch.nn.init.normal_(made.controlnet_cond_embedding.conv_out.weight, std=0.5, generator=generator)
    return made


@given(st.integers(-40, 40), st.integers(-40, 40))
def test_a_pattern_moves_by_the_known_amount(right, down):
    pattern = rand(1, 2, 9, 7)
    moved = translate(pattern, torch.tensor([[right, down]]))[0]
    mirrored = np.pad(pattern[0].numpy(), ((0, 0), (63, 63), (49, 49)), mode="symmetric")
    assert torch.equal(moved, torch.from_numpy(mirrored[:, 63 - down : 72 - down, 49 - right : 56 - right].copy()))


def test_every_frame_moves_by_its_own_amount():
    pattern = rand(1, 4, 8, 8)
    moved = translate(pattern, torch.tensor([[0, 0], [2, 0], [0, -3]]))
    assert torch.equal(moved[0], pattern[0])
    assert torch.equal(moved[1, :, :, 2:], pattern[0, :, :, :-2])
    assert torch.equal(moved[2, :, :-3], pattern[0, :, 3:])
    assert translate(pattern, torch.zeros(0, 2, dtype=torch.long)).shape == (0, 4, 8, 8)


def test_forward_noise_has_the_level_and_the_share():
    latents = rand(1, 4, 64, 64).expand(2, -1, -1, -1)
    clear, noisy, half = (Level(kept**0.5, (1 - kept) ** 0.5) for kept in (0.6, 0.15, 0.3))
    noised = add_noise(latents, clear, noisy, torch.Generator().manual_seed(1))
    assert noised.var().item() == pytest.approx(1, abs=0.05)
    assert (noised[0] * noised[1]).mean().item() == pytest.approx(0.25, abs=0.05)
    again = add_noise(latents, clear, noisy, torch.Generator().manual_seed(1))
    assert torch.equal(noised, again) and torch.equal(add_noise(latents, half, half, torch.Generator()), latents)


@pytest.mark.parametrize("step", [(2, 0), (-1, 3)])
def test_the_median_flow_is_the_cameras(step):
    "A textured plane moves by whole pixels; a patch that stands still must not count."
    grain = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    plane = np.kron(grain, np.ones((4, 4, 1), np.uint8))
    frames = np.stack([np.roll(plane, (k * step[1], k * step[0]), axis=(0, 1))[16:112, 16:112] for k in range(4)])
    frames[:, 30:60, 30:60] = plane[30:60, 30:60]
    motion = global_motion(estimate_flow(Clip(frames)))
    assert motion.shape == (4, 2)
    assert np.abs(motion - np.arange(4)[:, None] * np.array(step)).max() < 0.5


def test_hidden_pixels_do_not_vote():
    flow = np.zeros((1, 4, 4, 2), np.float32)
    seen = np.zeros((1, 4, 4), bool)
    flow[0, 0], seen[0, 0] = (5, 1), True
    assert global_motion(Flow(flow, -flow, seen, seen)).tolist() == [[0, 0], [5, 1]]
    assert global_motion(Flow(flow, -flow, ~seen & seen, seen)).tolist() == [[0, 0], [0, 0]]


def test_motion_in_cells(job, model):
    scale = model.latent_scale
    cells = Text2VideoZero(motion=(scale, -2 * scale)).cells(job)
    assert cells.tolist() == [[0, 0], [1, -2], [2, -4]]
    own = Text2VideoZero().cells(job)
    assert own.tolist() == np.round(global_motion(job.flow) / scale).astype(int).tolist()


def test_the_start_is_the_first_frame_moved(job, model):
    "What the frames share at the start is the first frame's latents moved; with a fall of a whole step and no noise left it is all."
    method, timesteps = Text2VideoZero(motion=(2 * model.latent_scale, 0)), model.schedule.timesteps(2)
    first = job.trajectory.at(timesteps[0], [0])
    level = model.schedule.level
    nothing = lambda latents, timestep: Prediction(latents / level(timestep).alpha, torch.zeros_like(latents))  # noqa: E731
    start = method._start(job, first, timesteps, nothing)
    low, high = level(timesteps[0] - method.fall).alpha ** 2, level(timesteps[0]).alpha ** 2
    assert torch.equal(start[0], first[0])
    fresh = rand(2, *first.shape[1:], seed=job.config.seed)
    for frame in (1, 2):  # without predicted noise, falling only scales; fresh noise is known by its seed
        moved = (start[frame] - (1 - high / low) ** 0.5 * fresh[frame - 1])
        assert torch.allclose(moved[:, :, 2 * frame :], first[0, :, :, : -2 * frame], atol=1e-4)


@torch.no_grad()
def test_frames_attend_to_the_first_alone(model, clip):
    latents, words, memory = model.encode(clip.frames), model.embed("a blue star"), FrameMemory(("first",))
    with cross_frame(model.unet, memory):
        def noise(x, size=8):
            return predict_clip(model, memory, Blocks(size), x, 500, words).noise

        plain, blocks = noise(latents), noise(latents, 1)
        assert torch.allclose(plain, blocks, atol=1e-4)
        for frame, reached in ((0, [True, True, True]), (1, [False, True, False])):
            other = latents.clone()
            other[frame] = rand(*latents.shape[1:])
            difference = (noise(other, 1) - blocks).abs().amax((1, 2, 3))
            assert (difference > 1e-4).tolist() == reached
    assert torch.allclose(model.predict(latents[:1], 500, words).noise, plain[:1], atol=1e-4)  # the first frame sees itself


def test_residuals_reach_the_unet(model, clip, controlnet, monkeypatch):
    latents, words, given = model.encode(clip.frames), model.embed("a blue star"), []
    hear = lambda module, arguments, kwargs: given.append(kwargs)  # noqa: E731
    handle = model.unet.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        plain = model.predict(latents, 500, words).noise
        extra = residuals(controlnet, canny(clip.frames), latents, 500, words.states, 1.0, model)
        steered = model.predict(latents, 500, words, **extra).noise
    finally:
        handle.remove()
    assert given[0].get("mid_block_additional_residual") is None
    assert given[1]["mid_block_additional_residual"] is extra["mid_block_additional_residual"]
    assert not torch.allclose(steered, plain, atol=1e-3)
    none = residuals(controlnet, canny(clip.frames), latents, 500, words.states, 0.0, model)
    assert torch.allclose(model.predict(latents, 500, words, **none).noise, plain, atol=1e-5)
    black = residuals(controlnet, np.zeros_like(clip.frames), latents, 500, words.states, 1.0, model)
    assert not torch.allclose(black["mid_block_additional_residual"], extra["mid_block_additional_residual"])


def test_each_frame_gets_its_own_condition(model, clip, job, controlnet, monkeypatch):
    "Blocks of one frame, both sentences: the pictures that the ControlNet is shown are those of the frame."
    shown, real = [], text2video_zero.residuals

    def listening(network, pictures, latents, timestep, states, scale, model):
        shown.append((pictures.copy(), scale))
        return real(network, pictures, latents, timestep, states, scale, model)

    monkeypatch.setattr(text2video_zero, "residuals", listening)
    marked = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones_like(clip.frames)
    method = Text2VideoZero(controlnet=controlnet, condition=lambda frames: marked, control_scale=0.5)
    before = processors(model.unet), processors(controlnet)
    monkeypatch.setattr(Job, "execution", Execution(store=job.store, source_branch="live", keep=False, block_size=1))
    edited = method(job)
    assert [int(pictures[0, 0, 0, 0]) for pictures, _ in shown] == [0, 1, 2] * 4  # two sentences, two steps
    assert {scale for _, scale in shown} == {0.5} and edited.frames.shape == clip.frames.shape
    assert (processors(model.unet), processors(controlnet)) == before


def test_with_a_condition_all_frames_start_alike(job, model, controlnet):
    timesteps = model.schedule.timesteps(2)
    first = job.trajectory.at(timesteps[0], [0])
    start = Text2VideoZero(controlnet=controlnet)._start(job, first, timesteps, None)
    assert torch.equal(start, first.expand(3, -1, -1, -1))


def test_canny_finds_the_outline_of_a_square():
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    frames[:, 8:24, 8:24] = 255
    edges = canny(frames)
    assert edges.shape == frames.shape and set(np.unique(edges)) == {0, 255}
    inside, border = edges[:, 12:20, 12:20], edges[:, 6:26, 6:26]
    assert not inside.any() and border.sum() == edges.sum() > 0


def test_the_inversion_is_the_plain_models(model, clip, tmp_path):
    "The trajectory is read by every method: it must not be computed under cross-frame attention."
    config = EditConfig("a gold star on grass", source_prompt=SCENE.caption, num_inference_steps=2)
    ours, plain = (Job(model, clip, config, store=Store(tmp_path / name)) for name in ("ours", "plain"))
    Text2VideoZero()(ours)
    assert torch.equal(ours.trajectory.at(ours.trajectory.noisiest), plain.trajectory.at(plain.trajectory.noisiest))


def test_an_edit_is_seeded_and_leaves_the_model_as_it_was(job, model):
    before = processors(model.unet)
    edited = Text2VideoZero()(job)
    assert edited.frames.shape == job.clip.frames.shape and edited.fps == job.clip.fps and edited.frames.std() > 5
    assert np.array_equal(edited.frames, Text2VideoZero()(job).frames)
    assert not np.array_equal(edited.frames, Text2VideoZero()(replace(job, config=replace(job.config, seed=1))).frames)
    assert processors(model.unet) == before
    one = Text2VideoZero()(replace(job, clip=job.clip[:1]))
    assert len(one) == 1


def test_an_error_leaves_the_model_as_it_was(job, model, controlnet, monkeypatch):
    job.trajectory
    before = processors(model.unet), processors(controlnet)
    monkeypatch.setattr(text2video_zero, "predict_clip", lambda *_: 1 / 0)
    for method in (Text2VideoZero(), Text2VideoZero(controlnet=controlnet)):
        with pytest.raises(ZeroDivisionError):
            method(job)
        assert (processors(model.unet), processors(controlnet)) == before


@pytest.mark.parametrize("wrong, says", [
    (dict(motion=3), "motion=3"), (dict(motion=(1, 2, 3)), "motion="), (dict(motion=(1, float("inf"))), "motion="),
    (dict(motion=("a", "b")), "motion="), (dict(fall=0), "fall=0"), (dict(fall=60.5), "fall=60.5"),
])
def test_bad_settings(wrong, says):
    with pytest.raises(ValueError, match=says):
        Text2VideoZero(**wrong)


def test_motion_and_condition_exclude_each_other(controlnet):
    with pytest.raises(ValueError, match="the condition gives the motion"):
        Text2VideoZero(motion=(1, 0), controlnet=controlnet)


@pytest.mark.parametrize("condition, says", [
    (lambda frames: frames[:1], r"condition gave uint8 \(1, 64, 64, 3\)"), (lambda frames: frames / 255, "condition gave float64"),
    (lambda frames: None, "condition gave NoneType"),
])
def test_bad_conditions(job, controlnet, condition, says):
    with pytest.raises(ValueError, match=says):
        Text2VideoZero(controlnet=controlnet, condition=condition)(job)


def test_a_controlnet_of_another_model(job, model, controlnet):
    controlnet.register_to_config(cross_attention_dim=768)
    with pytest.raises(ValueError, match="controlnet reads text states of 768 channels"):
        Text2VideoZero(controlnet=controlnet)(job)
    other = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(16, 32, 96, 256, 256))
    with pytest.raises(ValueError, match="controlnet makes pictures 16 times smaller"):
        Text2VideoZero(controlnet=other)(job)
