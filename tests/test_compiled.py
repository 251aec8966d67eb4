"compile=True: the same film, one graph for each kind of pass, none from the second edit on, and the network afterwards as it was."

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from tokenflow_nb.attention import Kernels
from tokenflow_nb.backbones import compiled as module
from tokenflow_nb.backbones.compiled import CompiledPasses, compiling
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.edit import Edit, edit_key, edit_video
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.inversion import invert
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

CLIP = Scene("star", "blue", "grass").render(frames=5, size=64)  # with blocks of 2: the last one is filled up
FEW = dict(num_inference_steps=4, size=(64, 64), keyframe_interval=2, block_size=2, progress=False)


@pytest.fixture
def small(monkeypatch):
    "A model of the toy's form, small enough to be compiled in seconds, by a backend that runs the graphs as they are."
    monkeypatch.setattr(CompiledPasses, "backend", "eager")
    torch._dynamo.reset()
    toy = load_model("toy", device="cpu")
    torch.manual_seed(0)
    config = dict(toy.unet.config) | dict(
        block_out_channels=(16, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, attention_head_dim=4, layers_per_block=1,
    )
    unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
    return replace(toy, unet=unet, injectable=None)


def edited(model, folder, **changes):
    "The latents after each step, and the film."
    latents = []

    def note(edit, step, timestep, tensors):
        latents.append(tensors["latents"].clone())

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = edit_video(CLIP, "a gold star", model=model, store=Store(folder), callback_on_step_end=note, **FEW | changes)
    return torch.stack(latents), result.edited.frames


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def close(one, other) -> bool:
    "Latents to 1e-4, and pixels to the rounding of that."
    return bool((one[0] - other[0]).abs().max() < 1e-4) and np.abs(one[1].astype(int) - other[1]).max() <= 1


@pytest.mark.parametrize("changes", [{}, dict(source_branch="live"), dict(method="sdedit", max_joint_keyframes=2, rule="linear"), dict(rule="joint")], ids=str)
def test_the_same_film_by_one_graph_of_each_kind_and_no_further_one(small, tmp_path, changes):
    plain, before = edited(small, tmp_path / "plain", **changes), graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        first = edited(small, tmp_path / "first", compile=True, **changes)
        made = graphs() - before
        again = edited(small, tmp_path / "again", compile=True, **changes)
    assert close(plain, first) and close(plain, again)
    kinds = module._PASSES[small.network].passes
    assert made == len(kinds) == graphs() - before and 2 <= made <= 16
    assert small.passes is None and small.context is None


def test_three_branches_in_one_batch(small, tmp_path, monkeypatch):
    "As on a GPU: fewer kinds."
    from tokenflow_nb.denoiser import Denoiser

    ready = Denoiser.__post_init__
    monkeypatch.setattr(Denoiser, "__post_init__", lambda self: (ready(self), setattr(self, "sequential", False)))
    plain = edited(small, tmp_path / "plain")
    assert close(plain, edited(small, tmp_path / "compiled", compile=True)) and len(module._PASSES[small.network].passes) <= 9


def test_more_steps_need_no_more_graphs(small, tmp_path):
    edited(small, tmp_path / "few", compile=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = graphs()
        edited(small, tmp_path / "many", compile=True, num_inference_steps=8)
        assert graphs() == before


def test_it_names_nothing_in_the_store(small, tmp_path):
    trajectory = invert(small, CLIP, steps=4, store=Store(tmp_path), progress=False)
    config = EditConfig("a gold star", num_inference_steps=4, keyframe_interval=2)
    keys = {edit_key(Edit(small, trajectory, config, CLIP, Execution(compile=wanted))) for wanted in (False, True)}
    assert len(keys) == 1
    with compiling(small):
        assert edit_key(Edit(small, trajectory, config, CLIP, Execution())) in keys
        assert Edit(small, trajectory, config).denoiser.kernels == Kernels()


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so_once(small, tmp_path):
    inner = small.unet.mid_block.forward

    def odd(*given, **named):
        return inner(*given, **named) if float(given[0].abs().max()) > 0 else None

    plain = edited(small, tmp_path / "plain")
    small.unet.mid_block.forward = odd  # it asks for a number
    with pytest.warns(UserWarning, match="compile=True: this network cannot be compiled, going on without: ") as caught:
        result = edit_video(CLIP, "a gold star", model=small, store=Store(tmp_path), compile=True, **FEW)
    said = [str(each.message) for each in caught if "compile=True" in str(each.message)]
    assert len(said) == 1 and "\n" not in said[0] and close(plain, (plain[0], result.edited.frames))


def test_an_offloaded_network_is_refused_with_the_remedy_and_that_helps(small, tmp_path):
    small.unet._hf_hook = object()
    with pytest.raises(ModelError, match="compile=True: .* is offloaded.*leave compile out") as caught:
        edit_video(CLIP, "a gold star", model=small, store=Store(tmp_path), compile=True, **FEW)
    assert "\n" not in str(caught.value) and small.passes is None
    edit_video(CLIP, "a gold star", model=small, store=Store(tmp_path), **FEW)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_toy_gives_the_same_film(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(CompiledPasses, "backend", backend)
    torch._dynamo.reset()
    model = load_model("toy", device="cpu")
    plain = edited(model, tmp_path / "plain")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert close(plain, edited(model, tmp_path / "compiled", compile=True))
