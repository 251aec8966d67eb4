"A family of models from outside the package: it edits, is measured, shown and stepped through like the one inside."

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import own_family
import pytest
import torch
from own_family import FlowAttention, FlowSchedule, Network, Patches

import tokenflow_nb
from tokenflow_nb.backbones.load import MODELS, load_model, register_model, shared_model
from tokenflow_nb.backbones.schedule import Level, ModelError, Prediction, lifted
from tokenflow_nb.clip import write_clip
from tokenflow_nb.config import EditConfig
from tokenflow_nb.edit import Edit, edit_video
from tokenflow_nb.features import list_layers, record
from tokenflow_nb.inversion import gate, invert
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)
FEW = dict(num_inference_steps=4, keyframe_interval=2, source_prompt=SCENE.caption)


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=5, size=64)


@pytest.fixture(scope="module")
def family():
    return load_model("patches")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def test_it_is_loaded_by_its_name(family):
    assert isinstance(family, Patches) and family.name == "patches" and "patches" in MODELS
    assert load_model("patches").digest == family.digest
    assert shared_model("patches") is shared_model("patches")
    with torch.no_grad():
        family.network.enter.bias[0] += 1
        assert load_model("patches").digest != family.digest
        family.network.enter.bias[0] -= 1


def test_a_family_whose_code_has_changed_is_another_model(family, monkeypatch):
    "As when the cell that defines it is run again: its class, its network, its schedule, its processor."
    first, changes = family.digest, {
        Patches: ("output", lambda self, *given, **extra: -self.network(*given)), Network: ("forward", lambda self, latents, *given: latents),
        FlowSchedule: ("prediction", lambda self, output, latents, timestep: None), FlowAttention: ("unite", lambda self, attn, mixed: mixed),
    }
    seen = set()
    for kind, (name, function) in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, function)
            seen.add(family.digest)
    assert len(seen | {first}) == 5 and family.digest == first
    kept = shared_model("patches")
    with monkeypatch.context() as patch:
        patch.setattr(MODELS, "_things", dict(MODELS._things))
        register_again = type(own_family.load)(own_family.load.__code__, vars(own_family), "load")  # the same code, another function
        register_again.__module__, register_again.__qualname__ = own_family.load.__module__, own_family.load.__qualname__
        register_model("patches", "again")(register_again)
        assert shared_model("patches") is not kept


def test_a_clip_is_inverted_and_comes_back(family, clip, store):
    "The «VAE» is exact, so the reconstruction shows the inversion alone."
    found = gate(family, clip, invert(family, clip, SCENE.caption, 25, store=store, progress=False))
    assert found.vae == 99 and found.reconstruction > 30
    plain = gate(family, clip, invert(family, clip, SCENE.caption, 25, correction="none", store=store, progress=False))
    assert found.reconstruction > plain.reconstruction + 3


def test_an_edit_of_each_frame_alone_is_eulers_method(family, clip, store):
    "Written out once more, without the package's steps, guidance or schedule."
    trajectory = invert(family, clip, SCENE.caption, 4, store=store, progress=False)
    config = EditConfig("a gold star", rule="per_frame", method="pnp", pnp_attn_t=0.0, guidance_scale=3.0, guidance_stop=1.0, **FEW)
    edit = Edit(family, trajectory, config, clip)
    x, words, nothing = trajectory.at(999), family.embed("a gold star"), family.embed("")
    for timestep, below in zip([999, 749, 500, 250], [749, 500, 250, 0]):
        with torch.no_grad():
            given, without = (family.network(x, timestep, each.states, each.mask, each.pooled) for each in (words, nothing))
        x = x + (below - timestep) / 999 * (without + 3.0 * (given - without))
    assert edit.timesteps == [999, 749, 500, 250]
    torch.testing.assert_close(edit.run().latents, x, atol=1e-5, rtol=1e-5)


def test_keyframes_alone_are_edited_as_if_all_tokens_were_in_one_frame(family, clip, store):
    "Joint attention through the family's own processor, against its plain one on all tokens of all frames."
    from tokenflow_nb.attention import Context

    latents, words = family.encode(clip.frames), family.embed("a star")
    with family.installed(Context(("positive",), joint=True)):
        joint = family.predict(latents, 500, words)
    network, tokens = family.network, family.network.enter(latents.flatten(2).transpose(1, 2))
    inner = words.pooled + (words.states * words.mask[..., None]).sum(1) / words.mask.sum(1, keepdim=True) + 0.5
    with torch.no_grad():
        for block in network.blocks:
            mixed = block.attn(block.norm(tokens).flatten(0, 1)[None]).view_as(tokens)  # all frames as one
            tokens = tokens + mixed
            tokens = tokens + block.text(inner)[:, None] + block.mlp(tokens)
        output = network.leave(tokens).transpose(1, 2).view_as(latents)
    torch.testing.assert_close(joint.noise - joint.clean, output, atol=1e-5, rtol=1e-5)


def test_it_edits_and_what_is_asked_decides(family, clip, store):
    options = dict(model=family, store=store, progress=False, **FEW)
    before = {name: layer.processor for name, layer in family.attentions().items()}
    film = edit_video(clip, "a gold star", **options)
    assert film.frames.shape == clip.frames.shape and film.config.guidance_scale == 2.0
    assert np.array_equal(edit_video(clip, "a gold star", **options, resume=False, block_size=2).frames, film.frames)
    assert not np.array_equal(edit_video(clip, "a red star", **options).frames, film.frames)
    assert not np.array_equal(edit_video(clip, "a gold star", pnp_attn_t=0.0, **options).frames, film.frames)
    assert np.array_equal(edit_video(clip, "a gold star", pnp_f_t=0.0, **options).frames, film.frames)  # it has no such layers
    live = edit_video(clip, "a gold star", source_branch="live", resume=False, **options)
    assert np.abs(live.frames.astype(int) - film.frames).max() <= 1
    assert {name: layer.processor for name, layer in family.attentions().items()} == before


def test_its_layers_are_recorded_by_their_own_names(family, clip, store):
    trajectory = invert(family, clip, SCENE.caption, 4, store=store, progress=False)
    assert [layer.name for layer in list_layers(family)] == ["block 0 · 16×16", "block 0 · 16×16 out", "block 1 · 16×16", "block 1 · 16×16 out"]
    recording = record(family, trajectory, ["block 1"], [500], store=store, progress=False)
    assert recording.tokens("block 1").shape == (5, 256, 32)


def test_the_suite_measures_it(family, tmp_path):
    from tokenflow_nb.compare.suite import run_suite
    from tokenflow_nb.measure.metrics import Case

    cases = [Case.toy(Scene("star", "blue", "grass", velocity=(2, 0)), "gold", 3, 64)]
    report = run_suite(cases, ["tokenflow", "per_frame"], tmp_path, model=family, metrics=["warp_error", "ssim"], num_inference_steps=2, progress=False)
    assert [row.method for row in report.rows] == ["tokenflow", "per_frame"] and all(row.measures["ssim"] > 0 for row in report.rows)


def test_the_panel_edits_with_it(clip, tmp_path):
    from tokenflow_nb.panels.base import Worker
    from tokenflow_nb.panels.edit import EditPanel

    panel = EditPanel(clip, model="patches", prompt="a gold star", worker=Worker(threaded=False), store=Store(tmp_path), **FEW)
    panel.state.render()
    assert panel.state.error == "" and panel.state.rendered.frames.shape == clip.frames.shape
    assert panel.state.rendered.config.guidance_scale == 2.0
    panel.close()


def test_an_installed_package_brings_it_to_the_command_line(tmp_path, clip):
    info = tmp_path / "own_family-1.0.dist-info"
    info.mkdir()
    (tmp_path / "own_family.py").write_text(Path(own_family.__file__).read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokenflow_nb.models]\npatches = own_family:load\n")
    write_clip(tmp_path / "clip.mp4", clip)
    root = Path(tokenflow_nb.__file__).parent.parent
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), str(root)]), TOKENFLOW_HOME=str(tmp_path / "cache"))

    def run(*arguments):
        code = f"import sys; from tokenflow_nb.cli import main; sys.exit(main({list(arguments)!r}))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)

    listed = run("models")
    assert listed.returncode == 0 and "a transformer over patches" in listed.stdout, listed.stderr
    made = run("edit", "clip.mp4", "a gold star", "--model", "patches", "--steps", "2", "--quiet", "--out", "made")
    assert made.returncode == 0, made.stderr
    assert '"name": "patches"' in (tmp_path / "made" / "run.json").read_text()


def test_a_flow_needs_no_division_at_its_ends():
    schedule, generator = FlowSchedule(), torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    told = Prediction(clean, noise)
    for timestep in (999, 500, 1, None):
        level = schedule.level(timestep)
        found = schedule.prediction(schedule.target(told, timestep), told.at(level), timestep)
        torch.testing.assert_close(found.clean, clean)
        torch.testing.assert_close(found.noise, noise)
    assert schedule.level(999) == Level(0, 1) and schedule.level(None) == Level(1, 0)
    torch.testing.assert_close(lifted(told.at(schedule.level(250)), told, schedule.level(250), schedule.level(999)), noise)


def test_what_is_no_model_is_refused(monkeypatch):
    monkeypatch.setattr(MODELS, "_things", dict(MODELS._things))
    register_model("nothing", "gives nothing")(lambda device, dtype: None)
    with pytest.raises(ModelError, match="model='nothing' gave a NoneType: its function must return a Model"):
        load_model("nothing")
    with pytest.raises(ValueError, match="name='toy': .* is the model of this name: take another"):
        register_model("toy", "another")(lambda device, dtype: None)
    with pytest.raises(ValueError, match="name='two words': give the model a name"):
        register_model("two words", "another")(lambda device, dtype: None)
    with pytest.raises(ValueError, match="load=5: give a function"):
        register_model("five", "five")(5)
