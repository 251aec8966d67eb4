"The editor `controlnet`: what it adds to the network, on which branches and steps; its controls, networks and refusals."

import copy

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

import tokenflow_nb.editors.controls as controls
from pipelines import differences, state_of, toy_pipe, with_controlnet, xl_pipe
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.clip import Clip, write_clip
from tokenflow_nb.editors import ControlNet
from tokenflow_nb.editors.base import Step
from tokenflow_nb.editors.controlnet import TOY_CONTROLNET, control_frames, find_controlnets, load_controlnet, parse_controls
from tokenflow_nb.edit import Edit, EditError, edit_video
from tokenflow_nb.inversion import invert
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

CLIP = Scene.random(5).render(frames=4, size=64)
HOW = dict(method="controlnet", num_inference_steps=4, keyframe_interval=2, progress=False, size=(64, 64))
PROMPT = "a gold star on grass"


def edited(store, model="toy", **changes):
    return edit_video(CLIP, PROMPT, model=model, store=store, **HOW | changes).edited.frames


# ---- what it computes

def test_one_call_is_what_diffusers_own_pipeline_gives_to_its_network():
    pipe, seen = with_controlnet(toy_pipe()), []
    edges = control_frames("canny", CLIP[:1])
    keep = pipe.unet.register_forward_pre_hook(lambda module, given, named: seen.append((given, named)), with_kwargs=True)
    pipe("a star", image=torch.from_numpy(edges.numpy()).permute(0, 3, 1, 2).float() / 255, num_inference_steps=1, guidance_scale=1.0,
         controlnet_conditioning_scale=0.7, output_type="latent")
    keep.remove()
    (latents, timestep), named = seen[0][0][:2], seen[0][1]
    model = load_model(pipe)
    ours = model.residuals(pipe.controlnet, latents, int(timestep), model.embed("a star"), controls.as_control(edges.numpy()), 0.7)
    theirs = [*named["down_block_additional_residuals"], named["mid_block_additional_residual"]]
    assert len(ours) == len(theirs) == 13 and all(torch.equal(*pair) for pair in zip(ours, theirs))


@pytest.mark.parametrize("branches", [("source", "negative", "positive"), ("negative", "positive"), ("positive",), ("source",)])
def test_only_the_edited_branches_are_steered(model, store, branches):
    editor = ControlNet(end=0.5)
    prepared, trajectory = editor.prepare(model, CLIP), invert(model, CLIP, steps=4, store=store, progress=False)
    batch, prompt = torch.randn(2 * len(branches), 4, 16, 16), model.embed(PROMPT).expand(2 * len(branches))
    step = Step(model, trajectory, PROMPT, 0, 4, 500, [1, 3], batch, branches, prompt, prepared)
    found = editor.network_inputs(step)
    if branches == ("source",):
        assert found == {}
        return
    middle = found["mid_block_additional_residual"]
    by_hand = model.residuals(prepared.networks[0], batch[-2:], 500, prompt.take([0, 1]), controls.as_control(prepared.frames[0][[1, 3]].numpy()), 1.0)
    assert torch.allclose(middle[-2:], by_hand[-1], rtol=1e-4, atol=1e-3)
    if branches[0] == "source":
        assert not middle[:2].any() and all(not part[:2].any() and part[2:].any() for part in found["down_block_additional_residuals"])
    late = Step(model, trajectory, PROMPT, 2, 4, 500, [1, 3], batch, branches, prompt, prepared)
    assert editor.network_inputs(late) == {}


def test_scale_zero_is_no_control_and_blocks_change_nothing_but_rounding(store, tmp_path):
    none, without = edited(store, control_scale=0.0), edited(store, control_start=0.99, control_stop=1.0)
    assert np.abs(none.astype(int) - without).max() <= 1
    full = edited(store)
    assert np.abs(none.astype(int) - full).mean() > 1
    by_ones = edited(Store(tmp_path), block_size=1, source_branch="live")
    assert np.abs(by_ones.astype(int) - full).max() <= 2


def test_several_controls_add_up(model, store):
    network = load_controlnet(str(TOY_CONTROLNET), model)
    twice = edited(store, control="canny:0.5,canny:0.5", controlnet=[network, network])
    assert np.abs(twice.astype(int) - edited(store)).max() <= 1
    pipe = with_controlnet(toy_pipe())
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, copy.deepcopy(pipe.controlnet)])
    assert len(find_controlnets(None, ["canny", "soft"], load_model(pipe))) == 2


@pytest.mark.parametrize("make", [toy_pipe, xl_pipe])
def test_a_pipelines_own_controlnet_is_taken_and_left_as_it_was(make, store):
    pipe = with_controlnet(make())
    with torch.no_grad():
        pipe.controlnet.controlnet_mid_block.weight.normal_()
    before = state_of(pipe)
    assert not np.array_equal(edited(store, pipe), edited(store, pipe, control_scale=0.0))
    assert differences(before, state_of(pipe)) == []


def test_network_frames_and_strength_decide_the_name_in_the_store(model, store):
    trajectory = invert(model, CLIP, steps=4, store=store, progress=False)
    from tokenflow_nb.config import EditConfig
    from tokenflow_nb.edit import edit_key

    def key(**options):
        return edit_key(Edit(model, trajectory, EditConfig(PROMPT, num_inference_steps=4, method="controlnet", **options), CLIP))

    other = copy.deepcopy(load_controlnet(str(TOY_CONTROLNET), model))
    with torch.no_grad():
        other.conv_in.bias.add_(0.1)
    own = Clip(control_frames("soft", CLIP).numpy())
    keys = [key(), key(control="canny:0.8"), key(controlnet=other), key(control=own, controlnet=other), key(control="soft", controlnet=other)]
    assert len(set(keys[:4])) == 4 and key() == keys[0] and keys[4] != keys[2]


def test_an_edit_goes_on_after_an_interruption(store, tmp_path):
    seen = []

    def stop(edit, step, timestep, tensors):
        seen.append(step)
        if step == 1:
            raise KeyboardInterrupt

    whole = edited(store)
    with pytest.raises(KeyboardInterrupt):
        edited(Store(tmp_path), callback_on_step_end=stop)
    assert np.array_equal(edited(Store(tmp_path)), whole)


# ---- controls

def test_control_frames_of_a_star_are_its_outline():
    scene = Scene("star", "red", "plain")
    clip, inside = scene.render(frames=1), scene.truth(frames=1).object_mask[0]
    for name in ("canny", "soft"):
        (frame,) = control_frames(name, clip).numpy()
        rim = inside ^ np.pad(inside, 2)[4:, 2:-2] | inside ^ np.pad(inside, 2)[2:-2, 4:]
        assert frame[rim].mean() > 5 * frame[~inside].mean() and np.array_equal(frame[..., 0], frame[..., 2])
    (tile,) = control_frames("tile", clip).numpy()
    assert np.abs(tile.astype(int) - clip.frames[0]).mean() < 12 and np.abs(np.diff(tile.astype(int), axis=0)).max() < np.abs(np.diff(clip.frames[0].astype(int), axis=0)).max()


def test_depth_by_an_estimator_of_transformers(tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, patch_size=14, image_size=28, out_indices=[1, 2, 3, 4],
                            reshape_hidden_states=False, apply_layernorm=True)
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, head_hidden_size=4, patch_size=14)
    network = DepthAnythingForDepthEstimation(config)
    torch.nn.init.normal_(network.head.conv3.weight)
    torch.nn.init.constant_(network.head.conv3.bias, 5.0)  # its last layer cuts what is below 0
    network.save_pretrained(tmp_path)
    DPTImageProcessor(size=dict(height=28, width=28), do_resize=True).save_pretrained(tmp_path)
    found = controls.depth(CLIP.frames, tmp_path, "cpu")
    assert found.shape == CLIP.frames.shape and (found.min(), found.max()) == (0, 255)
    with pytest.raises(ModelError, match="control='depth'.*could not be loaded.*control frames of your own"):
        controls.depth(CLIP.frames, tmp_path / "nothing", "cpu")
    own = Clip(found)  # the remedy
    assert control_frames(own, CLIP).shape == found.shape


def test_frames_of_ones_own_from_a_file_and_at_another_size(tmp_path):
    write_clip(tmp_path / "edges.mp4", Clip(np.repeat(np.repeat(control_frames("canny", CLIP).numpy(), 2, 1), 2, 2)))
    frames = control_frames(str(tmp_path / "edges.mp4"), CLIP)
    assert frames.shape == CLIP.frames.shape and frames.float().std() > 5


def test_flicker_is_taken_out_of_control_frames():
    clip = Scene("star", "red", "plain").render(frames=6, size=64)
    flicker = clip.frames.astype(int) // 2 + (np.arange(6) % 2 * 40)[:, None, None, None]
    change = [np.abs(np.diff(control_frames(Clip(flicker.astype(np.uint8)), clip, steady).numpy().astype(int), axis=0)).mean() for steady in (False, True)]
    assert change[1] < change[0] / 2


@pytest.mark.parametrize("value, found", [
    ("canny", [("canny", 1.0)]), ("canny:0.8, depth:0.5", [("canny", 0.8), ("depth", 0.5)]), (["soft"], [("soft", 1.0)]), ("tile:0", [("tile", 0.0)]),
])
def test_controls_are_parsed(value, found):
    assert parse_controls(value) == found


# ---- what does not fit is refused before the clip is inverted

@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    "Folders of ControlNets that do not fit."
    folder, config = tmp_path_factory.mktemp("networks"), dict(ControlNetModel.load_config(TOY_CONTROLNET))
    for name, changes in dict(wide=dict(block_out_channels=[64, 64, 64, 64]), words=dict(cross_attention_dim=64), far=dict(conditioning_embedding_out_channels=[8, 8, 8, 8])).items():
        ControlNetModel.from_config(config | changes).save_pretrained(folder / name)
    toy_pipe().vae.save_pretrained(folder / "vae")
    ControlNetModel.from_config(config).save_pretrained(folder / "pickled", safe_serialization=False)
    return folder


REFUSED = {
    "no control": (dict(control="kanny"), "control='kanny': give canny, soft"),
    "no strength": (dict(control="canny:a"), "strength as a number from 0 to 2"),
    "too strong": (dict(control="canny:3"), "strength as a number from 0 to 2"),
    "a number": (dict(control=3), "control=3: give canny"),
    "nothing": (dict(control=""), "control="),
    "another length": (dict(control=CLIP[:3]), "has 3 frames, the clip 4"),
    "another shape": (dict(control=Clip(np.zeros((4, 64, 128, 3), np.uint8))), "64×128.*another shape"),
    "no film": (dict(control=__file__), "cannot be read as frames"),
    "order": (dict(control_start=0.7, control_stop=0.6), "control_start=0.7: the control stops at 0.6"),
    "unknown for it": (dict(control="depth", controlnet=None), "no ControlNet is known"),
    "one for two": (dict(control="canny,soft", controlnet=str(TOY_CONTROLNET)), "has 1 networks, control 2"),
    "width": (dict(controlnet="wide"), r"for another model.*64, 64, 64, 64"),
    "words": (dict(controlnet="words"), "for another model.* 64, those of toy"),
    "scale of frames": (dict(controlnet="far"), "8 times smaller"),
    "no network": (dict(controlnet="vae"), "could not be loaded"),
    "single file": (dict(controlnet=str(TOY_CONTROLNET / "diffusion_pytorch_model.safetensors")), "single file.*from_single_file"),
    "pickle": (dict(controlnet="pickled"), "only pickles.*never read"),
    "no name": (dict(controlnet="nothing here"), "no folder and no hub id"),
    "another object": (dict(controlnet=torch.nn.Linear(1, 1)), "is a Linear, no ControlNetModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_any_work(case, networks, cache):
    options, says = REFUSED[case]
    options = {name: str(networks / value) if isinstance(value, str) and (networks / value).is_dir() and value else value for name, value in options.items()}
    with pytest.raises(ValueError, match=says) as caught:
        edited(Store(cache), **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 330
    assert not list(cache.glob("trajectory*"))


def test_an_edit_without_its_clip_and_one_that_a_file_cannot_hold(model, store, tmp_path):
    from tokenflow_nb.config import EditConfig

    trajectory = invert(model, CLIP, steps=4, store=store, progress=False)
    config = EditConfig(PROMPT, num_inference_steps=4, method="controlnet")
    with pytest.raises(ValueError, match="give clip= to Edit"):
        Edit(model, trajectory, config)
    own = EditConfig(PROMPT, num_inference_steps=4, method="controlnet", controlnet=load_controlnet(str(TOY_CONTROLNET), model))
    with pytest.raises(EditError, match="controlnet is an object in memory.*give its path"):
        Edit(model, trajectory, own, CLIP).save(tmp_path / "edit.safetensors")
    Edit(model, trajectory, EditConfig(PROMPT, num_inference_steps=4, method="controlnet", controlnet=str(TOY_CONTROLNET)), CLIP).save(tmp_path / "edit.safetensors")
