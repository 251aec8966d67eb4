"The stepper on the toy model: walks that must be equal bit for bit, and a UNet that must come back as it was."

import hashlib
import json
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tokenflow_nb.attention import Context, Injection
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.backbones.unet import STABLE_DIFFUSION, self_attentions
from tokenflow_nb.clip import Clip, read_clip
from tokenflow_nb.config import EditConfig, Execution, split_options
from tokenflow_nb.edit import Edit, EditError, edit_video
from tokenflow_nb.editors import Editor
from tokenflow_nb.inversion import invert
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

STEPS = 4
SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=5, size=64)


@pytest.fixture
def start(model, store, clip):
    "Makes an edit of five frames in four steps, at its start."

    def make(frames=None, **changes):
        source = clip if frames is None else clip[:frames]
        options = dict(source_prompt=SCENE.caption, num_inference_steps=STEPS, keyframe_interval=min(2, len(source))) | changes
        execution, options = split_options(options, Execution)
        config = EditConfig("a gold star on grass", **options)
        trajectory = invert(model, source, config.source_prompt, STEPS, config.inversion_steps, store=store, progress=False)
        return Edit(model, trajectory, config, source, Execution(**execution))

    return make


def weights(unet):
    hasher = hashlib.sha256()
    for name, value in unet.state_dict().items():
        hasher.update(name.encode() + value.numpy().tobytes())
    return hasher.hexdigest()


def bystanders(unet):
    "Processors and hooks of all modules."
    processors = {name: id(layer.processor) for name, layer in self_attentions(unet).items()}
    return processors, sum(len(module._forward_hooks) for module in unet.modules())


def test_run_is_its_steps(start):
    run, steps = start().run(), start()
    for _ in range(STEPS):
        steps.step()
    assert steps.done and torch.equal(run.latents, steps.latents)


@pytest.mark.parametrize("rule", ["paper", "published"])
def test_frames_of_groups_may_wait_for_a_block_of_any_size(start, rule):
    "Each frame is a keyframe, two are edited together: blocks of several groups, of one, of less."
    each, two, all_of_them = (start(rule=rule, keyframe_interval=1, max_joint_keyframes=2, block_size=size).step() for size in (1, 2, 8))
    for other in (two, all_of_them):
        torch.testing.assert_close(other.latents, each.latents, atol=1e-3, rtol=1e-3)


def test_latents_that_an_editor_spoils_are_found_at_the_step(start):
    @dataclass(frozen=True)
    class Spoiler(Editor):
        def after_step(self, step):
            return step.latents * float("nan") if step.index == STEPS - 1 else step.latents

    edit = start()
    edit.editor = Spoiler()
    for _ in range(STEPS - 1):
        edit.step()
    before = edit.latents
    with pytest.raises(ModelError, match=f"step {STEPS} of {STEPS}"):
        edit.step()
    assert edit.index == STEPS - 1 and edit.latents is before


@pytest.mark.parametrize("options", [dict(method="pnp"), dict(method="sdedit", strength=1.0)], ids=str)
def test_save_load_run_is_run(start, model, store, tmp_path, options):
    edit = start(**options).step().step()
    loaded = Edit.load(edit.save(tmp_path / "new folder" / "edit.safetensors"), model, store)
    assert repr(loaded) == repr(edit) and np.array_equal(loaded.clip.frames, edit.clip.frames)
    assert torch.equal(loaded.run().latents, edit.run().latents)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["edit.safetensors"]


def test_load_without_the_trajectory_computes_it_again(start, model, tmp_path):
    edit = start().step()
    loaded = Edit.load(edit.save(tmp_path / "edit.safetensors"), model, Store(tmp_path / "empty"))
    assert torch.equal(loaded.run().latents, edit.run().latents)


def test_fork_without_changes_is_its_parent(start):
    edit = start().step()
    fork = edit.fork()
    assert torch.equal(fork.run().latents, edit.run().latents)


def test_fork_goes_its_own_way_and_leaves_its_parent_alone(start):
    edit, straight = start().step(), start().run()
    fork = edit.fork(prompt="a marble star on grass").run()
    assert not torch.allclose(fork.latents, straight.latents)
    assert torch.equal(edit.run().latents, straight.latents)


def test_back_undoes_a_step(start):
    edit = start().step()
    before = edit.latents.clone()
    edit.step().back()
    assert edit.index == 1 and torch.equal(edit.latents, before)
    assert torch.equal(edit.run().latents, start().run().latents)
    with pytest.raises(EditError, match="no step before"):
        start().back()


def test_a_stopped_run_goes_on(start):
    edit, stop = start(), threading.Event()
    edit.run(callback=lambda edit: stop.set(), stop=stop)
    assert edit.index == 1
    assert torch.equal(edit.run().latents, start().run().latents)


def test_another_models_edit_is_refused(start, model, store, tmp_path):
    path = start().save(tmp_path / "edit.safetensors")
    other = load_model("toy", device="cpu")
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    with pytest.raises(EditError, match="digest"):
        Edit.load(path, other, store)


def test_settings_that_decide_earlier_steps_cannot_change(start):
    edit = start().step()
    for changes in (dict(num_inference_steps=8), dict(source_prompt="a star"), dict(method="sdedit"), dict(remeasure=True)):
        with pytest.raises(EditError, match=next(iter(changes))):
            edit.fork(**changes)


@pytest.mark.parametrize("rule", ["paper", "linear", "published", "joint", "per_frame"])
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_any_number_of_frames(start, rule, frames):
    edit = start(frames=frames, rule=rule).run()
    assert edit.done and edit.latents.shape[0] == frames and edit.decode().frames.shape == (frames, 64, 64, 3)


def test_block_size_changes_nothing_but_rounding(start):
    assert torch.allclose(start(block_size=1).run().latents, start(block_size=5).run().latents, atol=2e-2)


def test_a_frame_pass_never_mixes_branches(start):
    "The edit must not depend on the negative prompt when nothing weighs it."
    one, two = start(guidance_scale=1.0), start(guidance_scale=1.0, negative_prompt="a red square")
    assert torch.equal(one.step().latents, two.step().latents)
    assert start(guidance_scale=1.0).denoiser.branches == ("source", "positive")


def test_seed_decides_keyframes(start):
    one, same, other = start(seed=1), start(seed=1), start(seed=2)
    assert torch.equal(one.keyframes, same.keyframes) and not torch.equal(one.keyframes, other.keyframes)


def test_preview_edits_evenly_spaced_frames(start):
    edit = start()
    preview = edit.preview(3)
    assert preview.frames.shape == (3, 64, 64, 3) and edit.index == 0


def test_the_unet_comes_back_bit_identical(model, start):
    before, around = weights(model.unet), bystanders(model.unet)
    sample, words = torch.randn(2, 4, 16, 16), model.embed("a gold star")
    plain = model.predict(sample, 500, words).noise
    start().step()
    assert torch.equal(model.predict(sample, 500, words).noise, plain)
    assert weights(model.unet) == before and bystanders(model.unet) == around


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_unet_comes_back_after_an_exception(model, error):
    before, around = weights(model.unet), bystanders(model.unet)
    sample, words = torch.randn(2, 4, 16, 16), model.embed("a gold star")
    plain = model.predict(sample, 500, words).noise
    with pytest.raises(error):
        with model.installed(Context(("source", "positive"), joint=True, injection=STABLE_DIFFUSION)):
            model.predict(sample, 500, words)
            assert bystanders(model.unet) != around
            raise error("in the middle")
    assert torch.equal(model.predict(sample, 500, words).noise, plain)
    assert weights(model.unet) == before and bystanders(model.unet) == around


def test_unknown_feature_layers_are_refused_before_anything_is_installed(model):
    around = bystanders(model.unet)
    for wrong in (Injection(attention=("no_such_layer",)), Injection(features=("no_such_layer",)), Injection(features=("conv_in",))):
        with pytest.raises(ValueError, match=r"injection\.(attention|features)=\['(no_such_layer|conv_in)'\]: the network has no such layers"):
            with model.installed(Context(injection=wrong)):
                raise AssertionError("must not get here")
    assert bystanders(model.unet) == around


@pytest.mark.parametrize("steps, stop, guided", [(10, 0.4, 4), (2, 0.4, 1), (5, 1.0, 5), (5, 0.0, 0)])
def test_guidance_acts_at_the_first_steps(steps, stop, guided):
    config = EditConfig("a star", num_inference_steps=steps, guidance_stop=stop)
    assert [config.guided(step) for step in range(steps)] == [True] * guided + [False] * (steps - guided)
    later = EditConfig("a star", method="sdedit", strength=0.5, num_inference_steps=2 * steps, guidance_stop=stop)
    assert [config.guided(step) for step in range(steps)] == [later.guided(step) for step in range(steps, 2 * steps)]  # of the steps that are run


def test_a_step_without_guidance_is_one_of_scale_one(start):
    free, weak = start(guidance_stop=0.0), start(guidance_scale=1.0)
    assert torch.equal(free.predict().noise, weak.predict().noise)
    assert not torch.allclose(free.predict().noise, start(guidance_stop=1.0).predict().noise)


def test_edit_video_writes_a_playable_file_and_its_record(model, store, clip, tmp_path):
    result = edit_video(
        Clip(clip.frames, fps=12.5), "a gold star on grass", model=model, num_inference_steps=2, size=(64, 64), out=tmp_path / "result",
        store=store, progress=False,
    )
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == ["edited.mp4", "run.json"]
    back = read_clip(tmp_path / "result" / "edited.mp4")
    assert len(back) == 5 and back.fps == 12.5 and back.size == (64, 64)
    record = json.loads((tmp_path / "result" / "run.json").read_text())
    assert EditConfig(**record["config"]) == result.config and record["model"]["digest"] == model.digest
    assert set(record["timings"]) == {"read", "load", "invert", "record", "edit", "decode"}


def test_a_file_gets_its_record_beside_it(model, store, clip, tmp_path):
    options = dict(model=model, num_inference_steps=2, size=(64, 64), store=store, progress=False)
    edit_video(clip, "a gold star", out=tmp_path / "new" / "gold.mp4", **options)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["gold.json", "gold.mp4"]
    assert json.loads((tmp_path / "new" / "gold.json").read_text())["clip"]["frames"] == 5


def test_a_record_is_enough_to_make_the_clip_again(model, store, clip):
    first = edit_video(clip, "a gold star on grass", model=model, num_inference_steps=2, size=(64, 64), store=store, progress=False)
    config = first.record()["config"]
    again = edit_video(clip, **config, model=model, size=(64, 64), store=store, progress=False)
    assert np.array_equal(first.edited.frames, again.edited.frames)


def test_the_sources_size_is_restored_when_asked(model, store):
    wide = SCENE.render(frames=2, size=96)
    odd = Clip(wide.frames[:, :75, :], fps=wide.fps)
    options = dict(model=model, num_inference_steps=2, size=(64, 64), store=store, progress=False)
    assert edit_video(odd, "a gold star", **options).edited.size == (64, 64)
    assert edit_video(odd, "a gold star", restore_size=True, **options).edited.size == (75, 96)


def test_an_epsilon_model_beside_the_v_model(model, store, clip):
    "The same weights read as a noise predictor paint something else, but everything runs and stays finite."
    from tokenflow_nb.backbones.schedule import NoiseSchedule

    assert model.schedule.prediction_type == "v_prediction"
    epsilon = replace(model, schedule=NoiseSchedule(model.schedule.config | dict(prediction_type="epsilon")))
    latents, words = torch.randn(1, 4, 16, 16), model.embed("a gold star")
    alpha, sigma = model.schedule.level(500)
    output = epsilon.predict(latents, 500, words).noise
    assert torch.allclose(model.predict(latents, 500, words).noise, alpha * output + sigma * latents, atol=1e-5)
    assert epsilon.digest != model.digest


def test_the_papers_frame_shape_has_an_odd_side_at_the_lowest_level_and_is_edited_as_it_is(model, store):
    clip = Scene("star", "blue", "grass", centre=(64, 30), radius=20).render(3, size=112)
    clip = Clip(clip.frames[:, :64])  # 64×112: sides of 2 and 3.5 cells at the lowest level, as 384×672 has 6 and 10.5 with Stable Diffusion
    assert model.multiple == 16
    options = dict(source_prompt=SCENE.caption, num_inference_steps=2, keyframe_interval=2, size=(64, 112))
    result = edit_video(clip, "a gold star on grass", model=model, store=store, progress=False, **options)
    assert result.source.size == result.edited.size == (64, 112) and not np.array_equal(result.edited.frames, clip.frames)
