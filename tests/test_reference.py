"""Every step of inversion, plug-and-play and SDEdit against what the published program computed.

`TOKENFLOW_REFERENCE_DIR` names a folder with `unet.safetensors`, `config.json`, `golden.safetensors` and `golden.json`; the default is the copy in `tests/reference`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tokenflow_nb.backbones.base import Prompt
from tokenflow_nb.backbones.schedule import NoiseSchedule
from tokenflow_nb.backbones.unet import StableDiffusion
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.denoiser import Conditioning
from tokenflow_nb.edit import Edit
from tokenflow_nb.editors import PlugAndPlay, SDEdit
from tokenflow_nb.inversion import invert_latents
from tokenflow_nb.trajectory import Excerpt

FOLDER = Path(os.environ.get("TOKENFLOW_REFERENCE_DIR", Path(__file__).parent / "reference"))
TOLERANCE = 1e-4  # relative, float32


@dataclass
class Recorded:
    "The recorded inversion, read as a trajectory."

    golden: dict[str, torch.Tensor]
    timesteps: list[int]  # noisiest first

    @property
    def noisiest(self):
        return max(self.timesteps)

    def __len__(self):
        return len(self.golden["latents"])

    def at(self, timestep, frames=None):
        latents = self.golden["latents" if timestep is None else f"inversion/{timestep}"]
        return latents if frames is None else latents[frames]

    def excerpt(self, positions):
        return Excerpt(self, positions)


@pytest.fixture(scope="module")
def settings():
    return json.loads((FOLDER / "golden.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden.safetensors")


@pytest.fixture(scope="module")
def model(settings):
    unet = UNet2DConditionModel.from_config(json.loads((FOLDER / "config.json").read_text()))
    unet.load_state_dict(load_file(FOLDER / "unet.safetensors"))
    return StableDiffusion(unet.eval(), None, None, None, NoiseSchedule(settings["scheduler"]), name="reference")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_timesteps(model, settings):
    assert model.schedule.timesteps(settings["steps"]) == settings["timesteps"]


def test_inversion(model, settings, golden):
    visited = settings["timesteps"][::-1]
    ours = invert_latents(model, golden["latents"], Prompt(golden["source_embeds"]), visited, visited)
    errors = {timestep: relative(ours[timestep], golden[f"inversion/{timestep}"]) for timestep in visited}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("method", ["pnp", "sdedit"])
def test_edit(model, settings, golden, method):
    interval = settings["batch_size"]
    config = EditConfig.published(
        "recorded",
        editor=PlugAndPlay(settings["pnp_f_t"], settings["pnp_attn_t"]) if method == "pnp" else SDEdit(strength=1.0),
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        keyframe_interval=interval,
    )
    starts = torch.arange(golden["keyframe_offsets"].shape[1]) * interval
    conditioning = Conditioning(*(Prompt(golden[f"{name}_embeds"]) for name in ("source", "negative", "prompt")))
    trajectory = Recorded(golden, settings["timesteps"])
    execution, keyframes = Execution(block_size=interval, source_branch="live"), starts + golden["keyframe_offsets"]
    edit = Edit(model, trajectory, config, None, execution, conditioning, keyframes)
    errors = {}
    for timestep in settings["timesteps"]:
        errors[timestep] = relative(edit.step().latents, golden[f"{method}/{timestep}"])
    assert edit.done
    assert max(errors.values()) <= TOLERANCE, errors
    print(method, f"largest relative error {max(errors.values()):.1e}")
