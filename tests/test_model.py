"The model against diffusers' own pipeline, and loading: folders, aliases with fall-backs, precisions."

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging

import tokenflow_nb.model as model_module
from tokenflow_nb.edit import edit_video
from tokenflow_nb.metrics import ClipJudge
from tokenflow_nb.model import MODELS, STABLE_DIFFUSION, TOY_FOLDER, Backbone, Model, ModelError, NoiseSchedule, load_model, quiet_reading
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
        levels = [toy.schedule.level(timestep) for timestep in [*timesteps, None]]
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

    def load(place, device, dtype):
        tried.append(place)
        if len(tried) < len(MODELS["sd1.5"].ids):
            raise OSError(f"{place} is not there any more")
        return dict(unet=toy.unet, vae=toy.vae, text_encoder=toy.text_encoder, tokenizer=toy.tokenizer, schedule=toy.schedule)

    monkeypatch.setattr(model_module, "_load_parts", load)
    assert load_model("sd1.5", device="cpu").name == "sd1.5" and tried == list(MODELS["sd1.5"].ids)


def test_when_no_id_is_left_all_that_was_tried_is_named(monkeypatch):
    def gone(place, device, dtype):
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


def test_the_backbones_layers_exist(toy):
    modules = dict(toy.unet.named_modules())
    assert isinstance(STABLE_DIFFUSION, Backbone) and all(name in modules for name in (*STABLE_DIFFUSION.attention, *STABLE_DIFFUSION.features))


_LARGE_PAGES = """
from tokenflow_nb.model import load_model
import torch
load_model("toy", device="cpu")
large, here = torch.ones(64 << 20, dtype=torch.uint8), False
for line in open("/proc/self/smaps"):
    name, *values = line.split()
    if not name.endswith(":"):
        first, last = (int(end, 16) for end in name.split("-"))
        here = first <= large.data_ptr() < last
    elif here and name == "VmFlags:":
        print("hg" in values)
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages; any Linux that has them runs it")
@pytest.mark.parametrize(("asked", "large"), [(None, "True"), ("0", "False")], ids=["by default", "not against the user's wish"])
def test_large_tensors_lie_in_large_pages(asked, large):
    others = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment = others | ({} if asked is None else {"THP_MEM_ALLOC_ENABLE": asked})
    found = subprocess.run([sys.executable, "-c", _LARGE_PAGES], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [large], found.stderr


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
