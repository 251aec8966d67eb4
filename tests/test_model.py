"The model against diffusers' own pipeline, and loading: folders, aliases with fall-backs, precisions."

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file
from transformers.utils import logging

import tokenflow_nb.backbones.load as model_module
from tokenflow_nb.attention import TokenFlowAttention
from tokenflow_nb.backbones.base import Model
from tokenflow_nb.backbones.load import MODELS, TOY_FOLDER, load_model, quiet_reading
from tokenflow_nb.backbones.schedule import ModelError, NoiseSchedule, Prediction, lifted
from tokenflow_nb.backbones.unet import STABLE_DIFFUSION, decoder_layers
from tokenflow_nb.edit import Edit, EditConfig, edit_video
from tokenflow_nb.inversion import invert
from tokenflow_nb.measure.metrics import ClipJudge
from tokenflow_nb.store import Store
from tokenflow_nb.toy.evaluate import paint
from tokenflow_nb.toy.world import Scene


@pytest.fixture(scope="module")
def toy():
    return load_model("toy", device="cpu")


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    "A folder in Stable Diffusion's layout with a small random UNet that predicts the noise, saved by diffusers."
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(TOY_FOLDER, torch_dtype=torch.float32)
    config = dict(pipeline.unet.config) | dict(block_out_channels=(16, 32, 32, 32), norm_num_groups=8, attention_head_dim=4, sample_size=16)
    pipeline.register_modules(
        unet=UNet2DConditionModel.from_config(config),
        scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon"),
    )
    folder = tmp_path_factory.mktemp("models") / "random"
    pipeline.save_pretrained(folder)
    return folder


def painted_by_diffusers(folder, prompts, steps, guidance_scale, side):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(0))
    options = dict(num_inference_steps=steps, guidance_scale=guidance_scale, latents=latents, output_type="np")
    return pipeline(prompts, **options).images


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_painting_is_what_diffusers_paints(kind, random_folder):
    "Tokenizer, text encoder, schedule, guidance, VAE: all as in StableDiffusionPipeline, for both kinds of prediction."
    folder = TOY_FOLDER if kind == "v_prediction" else random_folder
    model, prompts = load_model(folder, device="cpu"), ["a gold star on grass", "a red circle in the sky"]
    assert model.schedule.prediction_type == kind
    theirs = painted_by_diffusers(folder, prompts, 4, 3.0, model.unet.config.sample_size)
    ours = paint(model, prompts, steps=4, guidance_scale=3.0, seed=0) / 255
    assert np.abs(ours - theirs).max() < 0.01


def test_encode_is_the_vaes_and_decode_undoes_it(toy):
    frames = Scene.random(0).render(frames=2).frames
    latents = toy.encode(frames)
    assert latents.shape == (2, 4, 32, 32) and latents.dtype == torch.float32 and torch.equal(latents, toy.encode(frames))
    assert np.abs(toy.decode(latents).astype(int) - frames).mean() < 8


def test_every_timestep_of_the_whole_schedule_can_be_walked(toy):
    for steps in (2, 3, 7, 50, 999, 1000):
        timesteps = toy.schedule.timesteps(steps)
        assert len(set(timesteps)) == steps and timesteps == sorted(timesteps, reverse=True) and 0 <= timesteps[-1] and timesteps[0] < 1000
        levels = [toy.schedule.level(timestep).alpha for timestep in [*timesteps, None]]
        assert levels[:-1] == sorted(levels[:-1])


def test_a_folder_made_by_diffusers_edits_a_clip(random_folder, tmp_path):
    clip = Scene("star", "blue", "grass").render(frames=3, size=64)
    options = dict(num_inference_steps=3, size=(64, 64), keyframe_interval=2, store=Store(tmp_path), progress=False, device="cpu")
    result = edit_video(clip, "a gold star", model=str(random_folder), **options)
    assert result.edited.frames.shape == (3, 64, 64, 3) and result.config.guidance_scale == 7.5


def test_a_folder_is_read_without_bars_and_downloads_keep_theirs(capfd, tmp_path):
    assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    load_model("toy", device="cpu")
    ClipJudge.load("toy")
    with pytest.raises(ModelError):
        load_model(tmp_path, device="cpu")
    assert "Loading" not in capfd.readouterr().err and logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    with quiet_reading("openai/clip-vit-base-patch32"):
        assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("shown", [True, False])
def test_who_has_switched_bars_off_finds_them_off(monkeypatch, shown):
    monkeypatch.setattr(logging, "_tqdm_active", shown)
    with pytest.raises(OSError), quiet_reading(TOY_FOLDER):
        assert not logging.is_progress_bar_enabled()
        raise OSError
    assert logging.is_progress_bar_enabled() is shown


def test_an_alias_falls_back_to_its_next_id(monkeypatch, toy):
    tried = []

    def load(place, device, dtype, added):
        tried.append(place)
        if len(tried) < len(MODELS["sd1.5"].ids):
            raise OSError(f"{place} is not there any more")
        return dict(unet=toy.unet, vae=toy.vae, text_encoder=toy.text_encoder, tokenizer=toy.tokenizer, schedule=toy.schedule)

    monkeypatch.setattr(model_module, "_load_parts", load)
    assert load_model("sd1.5", device="cpu").name == "sd1.5" and tried == list(MODELS["sd1.5"].ids)


def test_when_no_id_is_left_all_that_was_tried_is_named(monkeypatch):
    def gone(place, device, dtype, added):
        raise OSError(f"{place} is not there any more")

    monkeypatch.setattr(model_module, "_load_parts", gone)
    with pytest.raises(ModelError) as caught:
        load_model("sd2.1", device="cpu")
    assert all(place in str(caught.value) for place in MODELS["sd2.1"].ids) and "model='toy'" in str(caught.value)


def test_bfloat16_edits_like_float32(tmp_path, toy):
    clip, options = Scene("star", "blue", "grass").render(frames=2, size=64), dict(num_inference_steps=3, size=(64, 64), progress=False)
    half = load_model("toy", device="cpu", dtype=torch.bfloat16)
    edits = [edit_video(clip, "a gold star on grass", model=m, store=Store(tmp_path), **options).edited.frames.astype(int) for m in (toy, half)]
    assert np.abs(edits[0] - edits[1]).mean() < 12


def test_digest_tells_weights_and_schedules_apart(toy):
    again, other = load_model("toy", device="cpu"), load_model("toy", device="cpu")
    with torch.no_grad():
        other.vae.decoder.conv_out.bias[0] += 1e-3
    assert again.digest == toy.digest != other.digest


def test_an_unknown_prediction_type_is_refused(toy):
    with pytest.raises(ModelError, match="prediction_type='sample'"):
        NoiseSchedule(toy.schedule.config | dict(prediction_type="sample"))


def test_the_injectable_layers_exist(toy):
    modules = dict(toy.unet.named_modules())
    assert all(name in modules for name in (*STABLE_DIFFUSION.attention, *STABLE_DIFFUSION.features))


# ---- plug-and-play's layers in UNets of other shapes


def small_unet(**changes) -> UNet2DConditionModel:
    options = dict(sample_size=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, cross_attention_dim=96, attention_head_dim=4)
    return UNet2DConditionModel(**options | changes).eval()


DECODERS = {  # options, and how many self-attentions plug-and-play injects; the convolution whose output it injects
    "Stable Diffusion": ({}, 8, "up_blocks.1.resnets.1.conv2"),
    "one layer a block": (dict(layers_per_block=1), 5, "up_blocks.1.resnets.1.conv2"),
    "three layers a block": (dict(layers_per_block=3), 11, "up_blocks.1.resnets.1.conv2"),
    "attention at the top only": (dict(up_block_types=("UpBlock2D",) * 3 + ("CrossAttnUpBlock2D",)), 2, "up_blocks.3.resnets.1.conv2"),
    "attention in all blocks": (
        dict(down_block_types=("CrossAttnDownBlock2D",) * 4, up_block_types=("CrossAttnUpBlock2D",) * 4), 11, "up_blocks.0.resnets.1.conv2",
    ),
    "two levels": (
        dict(block_out_channels=(8, 8), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        2, "up_blocks.0.resnets.1.conv2",
    ),
    "two transformer blocks": (dict(transformer_layers_per_block=2), 17, "up_blocks.1.resnets.0.conv2"),
}


@pytest.mark.parametrize("name", DECODERS)
def test_plug_and_plays_layers_come_from_the_unet(name, toy):
    options, count, features = DECODERS[name]
    unet = small_unet(**options)
    layers = replace(toy, unet=unet, injectable=None).injectable
    assert set(layers.attention) | set(layers.features) <= {name for name, _ in unet.named_modules()}
    assert len(layers.attention) == len(set(layers.attention)) == count and layers.features == (features,)


def test_stable_diffusions_layers_are_those_that_its_authors_chose(toy):
    assert toy.injectable == STABLE_DIFFUSION == decoder_layers(small_unet())


def test_layers_of_another_unet_is_refused(toy):
    with pytest.raises(ModelError, match=r"injectable names layers that this UNet does not have \(up_blocks.1.attentions.2.*leave it out"):
        replace(toy, unet=small_unet(layers_per_block=1))
    with pytest.raises(ModelError, match="no self-attention in its decoder"):
        replace(toy, unet=small_unet(up_block_types=("UpBlock2D",) * 4), injectable=None)


def test_every_layer_of_a_smaller_unet_is_injected(toy, tmp_path):
    "With all steps injected, what the source has replaces what the prompt asks for, in each layer of the decoder but the first."
    model, seen = replace(toy, unet=small_unet(layers_per_block=1), injectable=None), set()

    class Noting(TokenFlowAttention):
        def _attend(self, attn, tokens):
            if self.layer in self.context.injection.attention:
                seen.add(self.layer)
            return super()._attend(attn, tokens)

    clip = Scene("star", "blue", "grass").render(frames=2, size=64)
    config = EditConfig("a gold star", num_inference_steps=2, pnp_attn_t=1.0, pnp_f_t=1.0)
    edit = Edit(model, invert(model, clip, "", steps=2, store=Store(tmp_path), progress=False), config, clip)
    model.processor = Noting
    edit.run()
    assert seen == set(model.injectable.attention) and len(seen) == 5


# ---- what is no number


PARTS = {"VAE encoder": "vae.encoder.conv_out.bias", "VAE decoder": "vae.decoder.conv_out.bias", "text encoder": "text_encoder.final_layer_norm.bias"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_no_number_names_the_part_and_nothing_is_stored(part, value, tmp_path):
    model = load_model("toy", device="cpu")
    model.get = dict(model.vae.named_parameters(prefix="vae")) | dict(model.text_encoder.named_parameters(prefix="text_encoder"))
    model.get[PARTS[part]].data[0] = value
    clip, store = Scene("star", "blue", "grass").render(frames=2, size=64), Store(tmp_path)
    with pytest.raises(ModelError, match=f"the {part} gives is not finite in torch.float32, its weights are damaged") as caught:
        edit_video(clip, "a gold star", model=model, num_inference_steps=2, size=(64, 64), store=store, progress=False)
    assert len(str(caught.value).splitlines()) == 1
    assert all(tensor.isfinite().all() for path in tmp_path.rglob("*.safetensors") for tensor in load_file(path).values())


def test_latents_that_are_no_numbers_are_not_decoded(toy):
    with pytest.raises(ModelError, match="VAE decoder"):
        toy.decode(torch.full((1, 4, 8, 8), float("nan")))


def test_half_precision_that_overflows_names_the_remedy_and_that_helps():
    half = load_model("toy", device="cpu", dtype="float16")
    half.vae.decoder.conv_in.weight.data.fill_(6e4)
    half.text_encoder.final_layer_norm.weight.data.fill_(6e4)
    for part, work in (("VAE decoder", lambda model: model.decode(torch.ones(1, 4, 8, 8))), ("text encoder", lambda model: model.embed("a star"))):
        with pytest.raises(ModelError, match=f"the {part} gives .*too large for half precision: load the model with dtype=torch.float32"):
            work(half)
        work(load_model("toy", device="cpu", dtype=torch.float32))


# ---- schedules


ZERO = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps_has_as_many_timesteps(toy, spacing, offset):
    schedule = NoiseSchedule(toy.schedule.config | dict(timestep_spacing=spacing, steps_offset=offset))
    for steps in (*range(2, 250), 333, 487, 499, 500, 997, 998, 999, 1000):
        timesteps = schedule.timesteps(steps)
        assert len(timesteps) == len(set(timesteps)) == steps and timesteps == sorted(timesteps, reverse=True), steps
        assert timesteps[0] <= 999 and timesteps[-1] >= 0, steps
    assert schedule.timesteps(4) == {
        "leading": [750 + offset, 500 + offset, 250 + offset, offset], "trailing": [999, 749, 499, 249], "linspace": [999, 666, 333, 0]
    }[spacing]


def test_from_noise_alone_the_step_is_that_of_diffusers_and_exact():
    "The latents of a known picture and noise, and a network that knows both: each step down from each level is exact, also from ᾱ = 0."
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    config = dict(load_model("toy", device="cpu").schedule.config) | ZERO
    schedule, theirs = NoiseSchedule(config), DDIMScheduler.from_config(config)
    theirs.set_timesteps(10)
    assert schedule.timesteps(10) == theirs.timesteps.tolist() and schedule.level(999) == (0, 1)
    for timestep, below in zip(schedule.timesteps(10), [*schedule.timesteps(10)[1:], None]):
        level, lower_level = schedule.level(timestep), schedule.level(below)
        latents, velocity = level.alpha * clean + level.sigma * noise, level.alpha * noise - level.sigma * clean
        predicted = schedule.prediction(velocity, latents, timestep)
        lower = predicted.at(lower_level)
        assert torch.allclose(lower, lower_level.alpha * clean + lower_level.sigma * noise, atol=2e-5)
        assert torch.allclose(lower, theirs.step(velocity, timestep, latents).prev_sample, atol=2e-5)
        assert torch.allclose(predicted.clean, clean, atol=2e-5) and torch.allclose(predicted.noise, noise, atol=2e-5)
        assert torch.allclose(lifted(lower, predicted, lower_level, level), latents, atol=2e-5)
        assert torch.equal(schedule.target(Prediction(clean, noise), timestep), velocity)


def test_painting_from_noise_alone_is_what_diffusers_paints(tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(TOY_FOLDER)
    pipeline.register_modules(scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, **ZERO))
    pipeline.save_pretrained(tmp_path)
    model, prompts = load_model(tmp_path, device="cpu"), ["a gold star on grass"]
    assert model.schedule.level(model.schedule.timesteps(4)[0]).alpha == 0
    ours, theirs = paint(model, prompts, steps=4, guidance_scale=3.0, seed=0) / 255, painted_by_diffusers(tmp_path, prompts, 4, 3.0, 32)
    assert np.abs(ours - theirs).max() < 0.01


@pytest.mark.parametrize("options", [{}, dict(method="sdedit", strength=1.0, correction="none"), dict(remeasure=True, inversion_steps=4)], ids=str)
def test_a_schedule_that_ends_in_noise_alone_edits(toy, tmp_path, options):
    model = replace(toy, schedule=NoiseSchedule(toy.schedule.config | ZERO))
    clip = Scene("star", "blue", "grass").render(frames=3, size=64)
    how = dict(num_inference_steps=3, size=(64, 64), keyframe_interval=2, store=Store(tmp_path), progress=False)
    result = edit_video(clip, "a gold star on grass", model=model, **how | options)
    assert result.edited.frames.shape == (3, 64, 64, 3) and 20 < result.edited.frames.mean() < 235
    assert np.abs(result.edited.frames.astype(int) - clip.frames).mean() < 60  # a picture of the same scene, though the model was not trained so


@pytest.mark.gpu
def test_a_gpu_edits_like_the_cpu(tmp_path):
    clip = Scene("star", "blue", "grass").render(frames=9, size=128)
    edits = []
    for device in ("cpu", "cuda"):
        model = load_model("toy", device=device, dtype=torch.float32)
        result = edit_video(clip, "a gold star on grass", model=model, num_inference_steps=5, store=Store(tmp_path), progress=False)
        edits.append(result.edited.frames.astype(int))
    assert np.abs(edits[0] - edits[1]).mean() < 2


@pytest.mark.hub
@pytest.mark.parametrize("alias", [name for name in MODELS if name != "toy"])
def test_the_hub_has_what_the_aliases_name(alias):
    assert isinstance(load_model(alias, device="cpu"), Model)
