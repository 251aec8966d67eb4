"Recording tokens: bad input, what an edit's recording is, and a PCA that is the same every time."

import numpy as np
import pytest
import torch

from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.backbones.unet import self_attentions
from tokenflow_nb.config import EditConfig, Execution, split_options
from tokenflow_nb.edit import Edit
from tokenflow_nb.features import FeatureError, align, colours, find_layer, list_layers, pca, pca_clip, record
from tokenflow_nb.inversion import Trajectory, invert
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)
STEPS = 3
LAYERS = ["up 1 conv 1", "up 2 attn 2", "up 2 attn 2 out", "mid attn 0"]


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=5, size=64)


@pytest.fixture(scope="module")
def trajectory(model, store, clip):
    return invert(model, clip, SCENE.caption, STEPS, block_size=2, store=store, progress=False)


@pytest.fixture
def start(model, clip, trajectory):
    "Makes an edit of the clip, at its start."
    def make(**options):
        execution, options = split_options(dict(num_inference_steps=STEPS, keyframe_interval=2) | options, Execution)
        return Edit(model, trajectory, EditConfig("a gold star on grass", SCENE.caption, **options), clip, Execution(**execution))

    return make


@pytest.fixture
def recording(model, trajectory, store):
    return record(model, trajectory, LAYERS, store=store, progress=False)


def test_every_layer_is_recorded_block_by_block(model, trajectory, store):
    whole = record(model, trajectory, store=store, progress=False)
    assert len(whole.layers) == 2 * len(self_attentions(model.unet)) + 1 and whole.timesteps == trajectory.timesteps
    assert len(whole.entry.names) == STEPS * 2  # five frames in parts of four
    for layer in whole.layers:
        assert whole.tokens(layer, whole.timesteps[0]).shape[:2] == (5, layer.grid[0] * layer.grid[1])


def test_tokens_do_not_depend_on_what_else_is_recorded(model, trajectory, store, recording):
    alone = record(model, trajectory, ["up 2 attn 2"], recording.timesteps[1], [1, 3], store=store, progress=False)
    assert alone.frames == [1, 3]
    tokens = recording.tokens("up 2 attn 2", recording.timesteps[1])[[1, 3]]
    torch.testing.assert_close(alone.tokens("up 2 attn 2"), tokens, atol=4e-3, rtol=4e-3)


def test_a_clip_that_is_not_square(model, store):
    wide = Scene("circle", "red", "sky").render(2, size=64).frames[:, :32]
    path = invert(model, type(SCENE.render(1))(wide), "", 2, store=store, progress=False)
    recording = record(model, path, ["down 0 attn 0"], store=store, progress=False)
    assert recording.layers[0].name == "down 0 · 8×16 · attn 0"
    assert pca(recording, "down 0 attn 0").scores.shape == (2, 8, 16, 3)


def test_one_frame(model, store, clip):
    path = invert(model, clip[:1], SCENE.caption, 2, store=store, progress=False)
    recording = record(model, path, LAYERS, store=store, progress=False)
    assert len(recording) == 1 and pca_clip(recording, "up 2 attn 2", size=(64, 64)).frames.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(layers=["up 9 attn 2"]), "There are: down 0"),
        (dict(layers=["up 2 attn"]), "did you mean"),
        (dict(timesteps=[4]), "there are"),
        (dict(timesteps=[]), "empty"),
        (dict(frames=[0, 5]), "5, which is not there: there are 0 to 4"),
    ],
)
def test_what_is_not_there_is_refused_before_any_work(model, trajectory, store, monkeypatch, options, words):
    monkeypatch.setattr(type(model), "predict", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(FeatureError, match=words):
        record(model, trajectory, store=store, progress=False, **options)


def test_what_is_not_recorded_is_named(recording):
    for ask in (lambda: recording.tokens("up 3 attn 2"), lambda: pca(recording, "up 3 attn 2")):
        with pytest.raises(FeatureError, match="up 2 · 8×8 · attn 2 out"):
            ask()
    with pytest.raises(FeatureError, match=f"timestep=7 is not recorded: there are {recording.timesteps[0]}, "):
        recording.tokens("up 2 attn 2", 7)
    with pytest.raises(FeatureError, match="frame=5"):
        recording.position(5)


def test_another_model_or_clip_is_refused_by_digest(model, trajectory, store, clip, recording):
    assert recording.check(model, clip) is recording
    other = load_model("toy", device="cpu")
    with torch.no_grad():
        next(other.unet.parameters()).add_(0.01)
    with pytest.raises(FeatureError, match="another model"):
        record(other, trajectory, LAYERS, store=store, progress=False)
    with pytest.raises(FeatureError, match="another model"):
        recording.check(other)
    with pytest.raises(FeatureError, match="another clip"):
        recording.check(clip=clip[1:])


def test_a_trajectory_from_before_digests_were_kept_is_taken(model, trajectory, store):
    meta = {name: value for name, value in trajectory.entry.meta.items() if not name.endswith("_digest")}
    old = Trajectory(type(trajectory.entry)(trajectory.entry.path, trajectory.entry.manifest | dict(meta=meta)))
    assert record(model, old, ["mid attn 0"], store=store, progress=False).check(model)


def test_an_edit_is_recorded_where_it_is_and_does_not_move(model, store, start):
    edit = start().step()
    latents, index = edit.latents.clone(), edit.index
    recording = record(model, edit, LAYERS, store=store, progress=False)
    assert recording.timesteps == [edit.timesteps[index]] and recording.kind == "edit" and recording.prompt == "a gold star on grass"
    assert edit.index == index and torch.equal(edit.latents, latents) and len(edit.history) == 1
    assert record(model, edit, LAYERS, store=store, progress=False).entry.key == recording.entry.key
    assert record(model, edit.step(), LAYERS, store=store, progress=False).entry.key != recording.entry.key
    with pytest.raises(FeatureError, match="there are"):
        record(model, edit, LAYERS, timesteps=[recording.timesteps[0]], store=store, progress=False)


@pytest.mark.parametrize("rule", ["paper", "per_frame", "joint"])
def test_an_edits_recording_is_what_its_positive_branch_computes(model, store, start, rule):
    edit, seen = start(rule=rule, pnp_f_t=0.0, pnp_attn_t=0.0), {}
    edit.denoiser.sequential = False
    layer = dict(model.unet.named_modules())["up_blocks.2.attentions.2.transformer_blocks.0.attn1"]
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.setdefault("calls", []).append(output.chunk(3)[2]))
    edit.predict()
    hook.remove()
    expected = torch.cat([rows for rows in seen["calls"]][1 if rule == "paper" else 0 :])  # the keyframe pass comes first
    tokens = record(model, edit, LAYERS, store=store, progress=False).tokens("up 2 attn 2 out")
    torch.testing.assert_close(tokens, expected, atol=4e-3, rtol=4e-3)


def test_an_edit_that_ran_apart_or_in_other_blocks_records_the_same(model, store, start, tmp_path):
    whole, apart = start(block_size=5), start(block_size=2)
    whole.denoiser.sequential, apart.denoiser.sequential = False, True
    first, second = (record(model, edit, LAYERS, store=Store(tmp_path / name), progress=False) for edit, name in ((whole, "a"), (apart, "b")))
    for name in LAYERS:
        torch.testing.assert_close(first.tokens(name), second.tokens(name), atol=2e-2, rtol=2e-2)


def test_an_edit_that_is_done_says_what_to_do(model, store, start):
    with pytest.raises(FeatureError, match=r"go back\(\)"):
        record(model, start().run(), LAYERS, store=store, progress=False)


def test_memory_that_runs_out_leaves_a_whole_recording(model, trajectory, recording, monkeypatch, tmp_path):
    predict = type(model).predict

    def scarce(self, latents, timestep, embeds, **options):
        result = predict(self, latents, timestep, embeds, **options)
        if len(latents) > 1:
            raise torch.OutOfMemoryError("too much")  # after the layers were seen, as an output that does not fit
        return result

    monkeypatch.setattr(type(model), "predict", scarce)
    with pytest.warns(UserWarning, match="out of memory"):
        again = record(model, trajectory, LAYERS[1:], store=Store(tmp_path), progress=False)
    torch.testing.assert_close(again.tokens("up 2 attn 2"), recording.tokens("up 2 attn 2"), atol=4e-3, rtol=4e-3)


def test_a_recording_that_is_interrupted_leaves_nothing_and_the_unet_as_it_was(model, trajectory, tmp_path):
    store, before = Store(tmp_path), {name: layer.processor for name, layer in self_attentions(model.unet).items()}

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, trajectory, LAYERS, store=store, progress=False, callback=interrupt)
    assert not store.entries() and not list(tmp_path.glob(".writing-*"))
    assert {name: layer.processor for name, layer in self_attentions(model.unet).items()} == before
    told = []
    record(model, trajectory, LAYERS, store=store, progress=False, callback=lambda *so_far: told.append(so_far))
    assert told[-1] == (15, 15) and told == sorted(told)


def test_layers_are_found_by_words_numbers_or_module(model):
    layers = list_layers(model)
    for layer in layers:
        assert find_layer(layer.name, layers) == find_layer(layer, layers) == find_layer(layer.key, layers) == layer
    assert find_layer("mid_block.attentions.0.transformer_blocks.0.attn1", layers).side == "input"


def test_colours_do_not_jump(recording):
    "From one timestep to the next components keep their place and sign, and a second fit is the first one."
    for layer in LAYERS[1:2]:
        one, other = (pca(recording, layer, timestep) for timestep in recording.timesteps[:2])
        correlation = np.corrcoef(one.scores.reshape(-1, 3).T, other.scores.reshape(-1, 3).T)[:3, 3:]
        assert (np.diag(correlation) > 0).all() and (np.abs(correlation).argmax(1) == range(3)).sum() >= 2
        assert np.array_equal(one.scores, pca(recording, layer, recording.timesteps[0]).scores)


def test_alignment_undoes_any_order_and_sign(recording):
    projection = pca(recording, "up 2 attn 2")
    for order in ([1, 2, 0], [2, 1, 0], [0, 2, 1]):
        for signs in np.array([[1, -1, 1], [-1, -1, -1]], float):
            assert np.array_equal(align(projection.turned(order, signs), projection).scores, projection.scores)


def test_incremental_pca_sees_what_pca_sees(recording):
    whole = pca(recording, "up 2 attn 2")
    parts = align(pca(recording, "up 2 attn 2", largest=1), whole)
    assert np.abs((whole.components * parts.components).sum(1)).min() > 0.9
    assert colours(parts.scores).shape == (5, 8, 8, 3)
