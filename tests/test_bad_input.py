"""Bad input, seen from `edit_video`: an error that names the argument, the value and the remedy, before any long work, and nothing half-written.

What only a file or the cache can have wrong in detail stands in `test_clip.py` and `test_store.py`; here every row is seen from the top.
"""

import errno
import warnings

import numpy as np
import pytest
import torch

import tokenflow_nb.store.drafts
from tokenflow_nb.backbones.base import Model
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.clip import Clip, read_clip, write_clip
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.edit import Edit, edit_video
from tokenflow_nb.inversion import invert
from tokenflow_nb.store import Store, StoreError
from tokenflow_nb.toy.world import Scene

PROMPT = "a gold star on grass"


@pytest.fixture(scope="module")
def clip():
    return Scene("star", "blue", "grass", radius=36).render(frames=4, size=64)


@pytest.fixture
def edit(model, tmp_path, monkeypatch):
    "edit_video into a folder, with few steps; `refused` says whether the UNet was asked anything before the error came."

    def run(source, prompt=PROMPT, **options):
        options = dict(model=model, num_inference_steps=2, size=(64, 64), store=Store(tmp_path / "cache"), progress=False) | options
        return edit_video(source, prompt, out=options.pop("out", tmp_path / "out"), **options)

    return run


def refused(edit, tmp_path, monkeypatch, words, *arguments, error=ValueError, **options):
    "The call fails with these words, without one evaluation of the UNet, and leaves nothing behind."
    with monkeypatch.context() as patch:
        patch.setattr(Model, "predict", lambda *_, **__: pytest.fail("long work was started"))
        with pytest.raises(error) as caught:
            edit(*arguments, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


# ---- the source


def test_no_such_file(edit, tmp_path, monkeypatch):
    refused(edit, tmp_path, monkeypatch, ["nowhere.mp4", "no such file"], tmp_path / "nowhere.mp4")


def test_not_a_video(edit, tmp_path, monkeypatch):
    (tmp_path / "notes.mp4").write_text("not a video at all")
    refused(edit, tmp_path, monkeypatch, ["notes.mp4"], tmp_path / "notes.mp4")


def test_a_folder(edit, tmp_path, monkeypatch):
    refused(edit, tmp_path, monkeypatch, [tmp_path.name, "folder"], tmp_path)


def test_a_truncated_file_is_used_as_far_as_it_goes(edit, tmp_path, clip):
    whole = write_clip(tmp_path / "whole.mp4", Scene.random(1).render(frames=40, size=64))
    data = whole.read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) * 6 // 10])
    with pytest.warns(UserWarning, match="half.mp4"):
        result = edit(tmp_path / "half.mp4", keyframe_interval=None)
    assert 1 <= len(result.edited) < 40 and (tmp_path / "out" / "edited.mp4").exists()


def test_one_frame(edit, tmp_path, clip):
    assert len(edit(clip[:1]).edited) == 1
    assert len(read_clip(tmp_path / "out" / "edited.mp4")) == 1


@pytest.mark.parametrize("height, width", [(63, 65), (9, 200), (128, 31)])
def test_odd_sizes_are_fitted_and_said(edit, model, height, width, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    result = edit(frames, keyframe_interval=2)
    assert result.edited.size == (64, 64) and f"{height}×{width}" in str(result.source.fit)


def test_without_a_size_the_aspect_is_kept(model):
    from tokenflow_nb.edit import default_size

    assert default_size(model, Clip(np.zeros((1, 720, 1280, 3), np.uint8))) == (128, 224)
    assert default_size(model, Clip(np.zeros((1, 90, 50, 3), np.uint8))) == (224, 128)


@pytest.mark.parametrize(
    "frames, words",
    [
        (np.zeros((2, 1, 1, 3), np.uint8), ["1×1"]),
        (np.zeros((2, 32, 32, 4), np.uint8), ["transparency", "background=", "4"]),
        (np.full((2, 32, 32, 3), 1.5, np.float32), ["1.5", "[0, 1]"]),
        (np.full((2, 32, 32, 3), np.nan, np.float32), ["NaN"]),
        (np.zeros((2, 32, 32, 3), np.int64), ["int64"]),
        (np.zeros((32, 32, 3), np.uint8), ["(32, 32, 3)"]),
        (np.zeros((0, 32, 32, 3), np.uint8), ["0"]),
    ],
    ids=["one pixel", "alpha", "float range", "nan", "dtype", "rank", "no frames"],
)
def test_arrays_that_are_no_clip(edit, tmp_path, monkeypatch, frames, words):
    refused(edit, tmp_path, monkeypatch, words, frames)


# ---- the settings


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(prompt=""), ["prompt=''"]),
        (dict(prompt="  \n"), ["prompt="]),
        (dict(prompt=None), ["prompt=None"]),
        (dict(method="pnpp"), ["method='pnpp'", "did you mean 'pnp'", "sdedit"]),
        (dict(rule="papr"), ["rule='papr'", "did you mean 'paper'"]),
        (dict(model="toi"), ["model='toi'", "did you mean 'toy'"]),
        (dict(model="/no/such/folder"), ["model='/no/such/folder'", "folder"]),
        (dict(guidence_scale=3), ["guidence_scale", "did you mean 'guidance_scale'"]),
        (dict(num_inference_steps=0), ["num_inference_steps=0", "at least 2"]),
        (dict(num_inference_steps=1), ["num_inference_steps=1", "at least 2"]),
        (dict(num_inference_steps=1001), ["num_inference_steps=1001", "1000"]),
        (dict(num_inference_steps=2.5), ["num_inference_steps=2.5"]),
        (dict(inversion_steps=5000), ["inversion_steps=5000", "1000"]),
        (dict(keyframe_interval=0), ["keyframe_interval=0"]),
        (dict(keyframe_interval=5), ["keyframe_interval=5", "4"]),
        (dict(keyframe_interval="8"), ["keyframe_interval='8'"]),
        (dict(guidance_scale="7"), ["guidance_scale='7'"]),
        (dict(seed=1.5), ["seed=1.5"]),
        (dict(block_size=0), ["block_size=0"]),
        (dict(pnp_f_t=80), ["pnp_f_t=80", "from 0 to 1"]),
        (dict(strength=0, method="sdedit"), ["strength=0"]),
        (dict(guidance_scale=float("nan")), ["guidance_scale=nan"]),
        (dict(size=(64,)), ["size="]),
        (dict(size=(0, 64)), ["size="]),
        (dict(out="edited.avi"), ["out='edited.avi'", ".mp4"]),
    ],
    ids=str,
)
def test_settings(edit, tmp_path, monkeypatch, clip, options, words):
    refused(edit, tmp_path, monkeypatch, words, clip, **options)


def test_out_is_an_existing_file_without_suffix(edit, tmp_path, monkeypatch, clip):
    (tmp_path / "taken").write_text("mine")
    refused(edit, tmp_path, monkeypatch, ["taken", "file"], clip, out=tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_out_below_a_file(edit, tmp_path, monkeypatch, clip):
    (tmp_path / "taken").write_text("mine")
    refused(edit, tmp_path, monkeypatch, ["out=", "cannot be written"], clip, out=tmp_path / "taken" / "gold.mp4")


def test_a_prompt_that_is_too_long_names_the_words_that_are_cut(model):
    with pytest.warns(UserWarning, match="left out: '.*zebra'"):
        model.embed("a gold star on grass and on sand and on water and on planks and a zebra")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.embed("a gold star on grass")


# ---- what goes wrong on the way


def test_latents_that_are_no_numbers_stop_the_edit_and_say_where(model, clip, tmp_path, monkeypatch):
    trajectory = invert(model, clip, "", steps=4, store=Store(tmp_path), progress=False)
    edit = Edit(model, trajectory, EditConfig(PROMPT, num_inference_steps=4, keyframe_interval=2), clip).step()
    before, output = edit.latents, type(model).output
    monkeypatch.setattr(type(model), "output", lambda *a, **k: output(*a, **k) * float("nan"))
    with pytest.raises(ModelError, match=r"step 2 of 4 .*timestep \d+.*float32"):
        edit.step()
    assert edit.index == 1 and edit.latents is before
    with pytest.raises(ModelError, match="inversion"):
        invert(model, clip, "other", steps=4, store=Store(tmp_path), progress=False)
    assert len(Store(tmp_path).entries()) == 1


def test_no_network_for_a_hub_id_says_what_was_tried_and_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load_model("nobody/no-such-model", device="cpu")
    for words in ("nobody/no-such-model", "copy in", "folder", "toy"):
        assert words in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="model_index.json"):
        load_model(tmp_path, device="cpu")


def test_pickled_weights_are_not_read(tmp_path):
    import shutil

    from tokenflow_nb.backbones.load import TOY_FOLDER

    folder = tmp_path / "model"
    shutil.copytree(TOY_FOLDER, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("kind", ["trajectory", "edit"])
def test_a_damaged_cache_entry_is_found_and_computed_again(edit, model, clip, tmp_path, kind):
    first = edit(clip)
    [entry] = [entry for entry in Store(tmp_path / "cache").entries() if entry.meta["kind"] == kind]
    path = next(entry.path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="computed again|recomputed"):
        again = edit(clip)
    assert np.array_equal(first.edited.frames, again.edited.frames)


def test_a_full_disk_costs_nothing_that_was_there(edit, model, clip, tmp_path, monkeypatch):
    edit(clip)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenflow_nb.store.drafts, "save_file", full)
    with pytest.raises(StoreError, match="TOKENFLOW_HOME|prune"):
        edit(clip, source_prompt="a blue star")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if path.suffix != ".lock"} == {p: d for p, d in before.items() if p.suffix != ".lock"}


def test_out_of_memory_halves_the_block_and_goes_on(model, clip, tmp_path, monkeypatch):
    "The UNet of a device that takes six rows at most: keyframes go branch by branch, frames in smaller blocks."
    config = EditConfig(PROMPT, num_inference_steps=2, keyframe_interval=1)
    trajectory = invert(model, clip, "", steps=2, store=Store(tmp_path), progress=False)
    free = Edit(model, trajectory, config, clip, Execution(block_size=4)).run()
    predict = Model.predict

    def small(self, latents, *arguments, **options):
        if len(latents) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, latents, *arguments, **options)

    monkeypatch.setattr(Model, "predict", small)
    tight = Edit(model, trajectory, config, clip, Execution(block_size=4))
    tight.denoiser.sequential = False  # as on a GPU
    with pytest.warns(UserWarning, match="out of memory") as caught:
        tight.run()
    assert torch.allclose(tight.latents, free.latents, atol=1e-2)
    assert len(caught) <= 2  # once per halving, not at every step
    alone = Edit(model, trajectory, EditConfig(PROMPT, num_inference_steps=2, rule="per_frame"), clip, Execution(block_size=4))
    alone.denoiser.sequential = False
    with pytest.warns(UserWarning, match="block_size=2"):
        alone.run()


def test_out_of_memory_in_the_inversion(model, clip, tmp_path, monkeypatch):
    predict = Model.predict

    def small(self, latents, *arguments, **options):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, latents, *arguments, **options)

    free = invert(model, clip, "", steps=2, store=Store(tmp_path / "free"), progress=False)
    monkeypatch.setattr(Model, "predict", small)
    with pytest.warns(UserWarning, match="out of memory"):
        tight = invert(model, clip, "", steps=2, store=Store(tmp_path / "tight"), progress=False)
    assert torch.allclose(tight.at(tight.noisiest), free.at(free.noisiest), atol=1e-3)
