"The corrections of inversion: on the random UNet of `reference`, where nothing is smooth, and in the store."

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tokenflow_nb.backbones.base import Model, Prompt
from tokenflow_nb.backbones.schedule import Level, NoiseSchedule, Prediction
from tokenflow_nb.backbones.unet import StableDiffusion
from tokenflow_nb.inversion import CORRECTIONS, denoise, invert, invert_steps, inverting
from tokenflow_nb.toy.world import Scene

FOLDER, STEPS = Path(__file__).parent / "reference", 20
SCENE = Scene("star", "marble", "grass")


def level(kept: float) -> Level:
    "The level at which this share of the picture's variance is left."
    return Level(kept**0.5, (1 - kept) ** 0.5)


def move(latents: torch.Tensor, noise: torch.Tensor, source: Level, target: Level) -> torch.Tensor:
    "DDIM's equation 12, in one expression."
    return target.alpha * ((latents - source.sigma * noise) / source.alpha) + target.sigma * noise


def sees(latents: torch.Tensor, noise: torch.Tensor, at: Level) -> Prediction:
    "What a model says of latents when it sees this noise in them."
    return Prediction((latents - at.sigma * noise) / at.alpha, noise)


@pytest.fixture(scope="module")
def walks():
    "For each correction: evaluations, the reconstruction's error, and the largest residual of a step's equation, of two frames."
    unet = UNet2DConditionModel.from_config(json.loads((FOLDER / "config.json").read_text()))
    unet.load_state_dict(load_file(FOLDER / "unet.safetensors"))
    golden, schedule = load_file(FOLDER / "golden.safetensors"), json.loads((FOLDER / "golden.json").read_text())["scheduler"]
    model = StableDiffusion(unet.eval(), None, None, None, NoiseSchedule(schedule), name="random")
    return {name: _walk(model, golden["latents"][:2], Prompt(golden["source_embeds"]), name) for name in CORRECTIONS}


def _walk(model: Model, clean: torch.Tensor, prompt: Prompt, correction: str) -> dict[str, float]:
    down, evaluations = model.schedule.timesteps(STEPS), []

    def predict(latents, timestep):
        evaluations.append(timestep)
        return model.predict(latents, timestep, prompt)

    path = {None: clean} | dict(invert_steps(model, clean, down[::-1], predict, correction))
    count, residuals = len(evaluations), []
    for timestep, below in zip(down[2::5], down[3::5]):
        moved = predict(path[timestep], timestep).at(model.schedule.level(below))
        residuals.append(float((moved - path[below]).norm()))
    back = denoise(model, path[down[0]], down, predict)
    return dict(evaluations=count, error=float((back - clean).norm() / clean.norm()), residual=max(residuals))


def test_a_correction_lowers_the_error_of_the_reconstruction(walks):
    errors = [walks[name]["error"] for name in ("none", "predicted", "repeated")]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[1], errors


def test_a_correction_solves_the_equation_of_the_step_better(walks):
    residuals = [walks[name]["residual"] for name in ("none", "predicted", "repeated")]
    assert residuals[1] < 0.8 * residuals[0] and residuals[2] < 0.8 * residuals[1], residuals


def test_a_prediction_costs_no_evaluation(walks):
    assert {name: walk["evaluations"] for name, walk in walks.items()} == {"none": STEPS, "predicted": STEPS, "repeated": 2 * STEPS}


@given(st.floats(0.2, 0.95), st.floats(0.5, 0.99), st.integers(0, 2**31), st.sampled_from(list(CORRECTIONS)))
def test_constant_noise_needs_no_correction(lower, ratio, seed, name):
    "Where the noise does not depend on the latents, every correction takes the same exact step."
    latents, noise = (torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed + i)).double() for i in range(2))
    low, high = level(lower), level(lower * ratio)
    upper, seen = CORRECTIONS[name](latents, sees(latents, -noise, low), low, high, lambda x: sees(x, noise, high))
    assert seen.noise is noise and torch.equal(upper, move(latents, noise, low, high))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_inversion_up_to_noise_alone_and_back_is_exact_where_the_model_knows_the_picture(name):
    "Without a signal at the last timestep, v is what leads there and back. A network that always sees this picture loses nothing."
    zero = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    schedule = NoiseSchedule(json.loads((FOLDER / "golden.json").read_text())["scheduler"] | zero)
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = UNet2DConditionModel.from_config(json.loads((FOLDER / "config.json").read_text()))
    model, down = StableDiffusion(unet, None, None, None, schedule), schedule.timesteps(8)

    def predict(latents, timestep):
        alpha, sigma = schedule.level(timestep)
        if alpha == 0:
            return schedule.prediction(-clean, latents, timestep)  # v = −x₀
        return sees(latents, (latents - alpha * clean) / sigma, Level(alpha, sigma))

    start = schedule.level(None).alpha * clean + 0.1 * clean.roll(1)
    path = dict(invert_steps(model, start, down[::-1], predict, name))
    assert schedule.level(down[0]) == (0, 1) and path[down[0]].isfinite().all() and path[down[0]].std() > 0.1
    again = denoise(model, path[down[0]], down[:1], predict, down[1])
    assert torch.allclose(again, path[down[1]], atol=1e-5)  # the step from noise alone undoes the step to it
    assert denoise(model, path[down[0]], down, predict).isfinite().all()


def test_a_random_network_is_inverted_up_to_noise_alone_and_back():
    "The step to noise alone and the step from it solve one equation: a correction that is repeated comes nearer to it."
    unet = UNet2DConditionModel.from_config(json.loads((FOLDER / "config.json").read_text()))
    unet.load_state_dict(load_file(FOLDER / "unet.safetensors"))
    golden, settings = load_file(FOLDER / "golden.safetensors"), json.loads((FOLDER / "golden.json").read_text())["scheduler"]
    zero = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    model = StableDiffusion(unet.eval(), None, None, None, NoiseSchedule(settings | zero))
    errors = {name: _walk(model, golden["latents"][:1], Prompt(golden["source_embeds"]), name)["error"] for name in ("none", "repeated")}
    assert all(error < 1 for error in errors.values()) and errors["repeated"] < errors["none"], errors


def test_the_noise_that_is_returned_is_what_the_model_saw_last():
    asked, low, high = [], level(0.8), level(0.6)

    def predict(x):
        asked.append(x)
        return sees(x, x.sin(), high)

    latents = torch.linspace(-2, 2, 8).reshape(1, 2, 2, 2)
    upper, seen = CORRECTIONS["repeated"](latents, sees(latents, latents.cos(), low), low, high, predict)
    assert torch.equal(asked[0], move(latents, latents.cos(), low, high))
    assert torch.equal(asked[1], move(latents, asked[0].sin(), low, high))
    assert torch.equal(seen.noise, asked[1].sin()) and torch.equal(upper, move(latents, seen.noise, low, high))


def test_the_store_tells_trajectories_by_their_correction(model, store):
    clip = SCENE.render(1)
    paths = {name: invert(model, clip, SCENE.caption, 3, store=store, progress=False, correction=name) for name in CORRECTIONS}
    assert len({path.entry.path for path in paths.values()}) == len(CORRECTIONS)
    assert {name: path.entry.meta["correction"] for name, path in paths.items()} == {name: name for name in CORRECTIONS}
    tops = [path.at(path.noisiest) for path in paths.values()]
    assert not torch.equal(tops[0], tops[1]) and not torch.equal(tops[1], tops[2])
    assert invert(model, clip, SCENE.caption, 3, store=store, progress=False).entry.path == paths["predicted"].entry.path


@pytest.mark.parametrize("wrong, hint", [("predict", "did you mean 'predicted'"), (1, "none, predicted, repeated"), (None, "none, predicted, repeated")])
def test_an_unknown_correction_is_named_before_any_work(model, store, monkeypatch, wrong, hint):
    monkeypatch.setattr(StableDiffusion, "encode", lambda *a: pytest.fail("work began"))
    with pytest.raises(ValueError, match=f"correction={wrong!r}.*{hint}"):
        next(inverting(model, SCENE.render(1), "", 3, store=store, correction=wrong))
    with pytest.raises(ValueError, match="correction="):
        next(invert_steps(model, torch.zeros(1, 4, 16, 16), [1], lambda x, t: x, wrong))
