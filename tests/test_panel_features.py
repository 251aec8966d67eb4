"The feature panel without a browser: its state, its marks, its widgets, and everything that can go wrong."

import threading
import time

import ipywidgets
import numpy as np
import pytest
from made_recording import made_recording

from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.correspondence import Trace
from tokenflow_nb.edit import Edit, EditConfig
from tokenflow_nb.features import FeatureError, record
from tokenflow_nb.inversion import invert
from tokenflow_nb.panels.base import Busy, Worker
from tokenflow_nb.panels.features import FeaturePanel, FeatureState, row_titles, trace_marks, trace_words
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

FINE, COARSE = "up 2 · 8×8 · attn 1", "up 1 · 4×4 · attn 0"
SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)


def inline():
    return Worker(threaded=False)


@pytest.fixture
def state(tmp_path):
    recording, clip, _ = made_recording(tmp_path)
    state = FeatureState(recording, clip, worker=inline())
    state.record()
    return state


@pytest.fixture
def panel(tmp_path):
    recording, clip, _ = made_recording(tmp_path)
    panel = FeaturePanel(recording, clip, worker=inline())
    yield panel
    panel.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "Model, clip, trajectory and store of a real, tiny source."
    model, clip, store = load_model("toy", device="cpu"), SCENE.render(3, size=64), Store(tmp_path_factory.mktemp("store"))
    return model, clip, invert(model, clip, SCENE.caption, 2, store=store, progress=False), store


# ---- pictures


def test_marks_stand_where_the_matches_are_and_say_it_in_numbers():
    found = Trace(4, (1, 0), [2, 4], np.array([[0, 3], [1, 0]]), np.array([0.25, 1.0]), np.array([2.4, 0.0]))
    first, similarity, last = trace_marks(found, (2, 4))[:3]
    assert (first["frame"], first["x"], first["y"], first["text"]) == (0, 0.875, 0.25, "↺ 2")
    assert similarity["text"] == "0.25" and last["text"] == "" and [first["row"], similarity["row"], last["row"]] == [0, 1, 2]
    assert trace_marks(found, (2, 4))[3]["text"] == "start" and first["colour"] != "#ffffff"
    assert "frame 4" in trace_words(found) and "0 of 1 matches" in trace_words(found)


def test_titles_say_what_colours_mean(state):
    assert "comparing frames" in row_titles("source", state.recording.layers[0], 1)[2]
    assert COARSE in state.titles[1] and "variance" in state.titles[1] and "(black) to 1.00 (yellow)" in state.titles[2]


# ---- state


def test_a_state_shows_what_is_chosen(state):
    assert state.layer in (FINE, COARSE) and [len(film) for film in state.films] == [6, 6, 6]
    state.layer = "up 1 attn 0"
    coarse = state.films
    state.layer, state.timestep = FINE, 1
    assert state.films[0] == coarse[0] and state.films[1] != coarse[1] and state.films[2] != coarse[2]
    state.layer, state.timestep = COARSE, 501
    assert state.films == coarse


def test_the_last_pictures_stay_while_frames_are_compared(state):
    "Nothing turns grey when another layer is chosen: its title says that frames are being compared."
    before, seen = state.films[2], []
    state.observe(lambda change: seen.append((state.titles[2], change.new[2])), "films")
    state.layer = COARSE if state.layer == FINE else FINE
    assert "comparing frames" in seen[0][0] and seen[0][1] == before and "(yellow)" in seen[-1][0] and seen[-1][1] != before


def test_pictures_are_made_once(state, monkeypatch):
    state.layer = COARSE
    state.layer = FINE
    monkeypatch.setattr("tokenflow_nb.panels.features.pca", lambda *_, **__: pytest.fail("projected twice"))
    monkeypatch.setattr("tokenflow_nb.panels.features.redundancy", lambda *_, **__: pytest.fail("compared twice"))
    state.layer = COARSE


def test_a_small_cache_forgets_and_still_shows(tmp_path):
    recording, clip, _ = made_recording(tmp_path)
    state = FeatureState(recording, clip, worker=inline())
    state.cache.max_bytes = 1
    state.record()
    state.layer = COARSE
    assert not state.error and [len(film) for film in state.films] == [6, 6, 6] and state.cache.nbytes <= 1


def test_a_point_is_followed(state):
    state.layer, state.timestep = FINE, 1
    state.pick(2, 0.45, 0.3)
    places = [(mark["frame"], mark["x"], mark["y"]) for mark in state.marks if mark["row"] == 0]
    assert places == [(frame, (1 + frame + 0.5) / 8, 2.5 / 8) for frame in range(6)] and state.frame == 2
    state.pick(3, 0.45, 0.3)
    assert state.marks[0]["x"] == 0.5 / 8
    state.layer = COARSE  # the point stays, its matches are those of the layer
    assert {mark["y"] for mark in state.marks if mark["frame"] == 3} == {1.5 / 4}


@pytest.mark.parametrize("trait, value, words", [("layer", "up 7", "There are: up 1"), ("timestep", 3, "there are 1, 501"), ("frame", 6, "there are 0, 1"), ("frame", -1, "there are")])
def test_what_is_not_recorded_is_refused_and_nothing_changes(state, trait, value, words):
    before = getattr(state, trait), state.films
    with pytest.raises(FeatureError, match=words):
        setattr(state, trait, value)
    assert (getattr(state, trait), state.films) == before


def test_nothing_can_be_chosen_before_recording(tmp_path):
    recording, clip, _ = made_recording(tmp_path)
    with pytest.raises(FeatureError, match="nothing is recorded yet"):
        FeatureState(recording, clip, worker=inline()).layer = FINE


def test_the_advice_is_in_words(state):
    with pytest.raises(FeatureError, match="advise\\(\\) first"):
        state.use_advice()
    state.advise()
    assert f"keyframe_interval={state.interval}" in state.advice and state.words == "" and state.advised == 0
    handed = []
    state.observe(lambda change: handed.append(change.new), "advised")
    state.use_advice()
    state.use_advice()  # once more: a linked panel may have changed its own meanwhile
    assert [value for value in handed if value] == [state.interval] * 2


def test_one_frame(tmp_path):
    recording, clip, _ = made_recording(tmp_path, frames=1)
    state = FeatureState(recording, clip, worker=inline())
    state.record()
    state.pick(0, 0.5, 0.5)
    state.advise()
    assert not state.error and "only one frame" in state.titles[2] and "one frame" in state.advice and len(state.marks) == 3
    assert state.interval == 1 and "no other frame" in state.words


def test_a_recording_of_another_clip_or_without_one_is_refused(tmp_path):
    recording, clip, _ = made_recording(tmp_path)
    other = made_recording(tmp_path, speed=2)[1]
    for given, words in ((other, "another clip"), (None, "give the clip")):
        state = FeatureState(recording, given, worker=inline())
        state.record()
        assert words in state.error and state.recording is None and not state.films


def test_a_second_start_is_refused_while_the_first_works(tmp_path):
    recording, clip, _ = made_recording(tmp_path)
    state, gate, begun = FeatureState(recording, clip), threading.Event(), threading.Event()
    state._open = lambda *_: (begun.set(), gate.wait(30))
    state._compare = lambda stop: None
    state.record()
    assert begun.wait(30)
    with pytest.raises(Busy, match="already recording features"):
        state.record()
    gate.set()
    assert state.worker.wait(30) and not state.error


def test_an_interrupt_leaves_a_state_that_goes_on(state, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tokenflow_nb.panels.features.redundancy", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        state.cache.clear()
        with pytest.raises(KeyboardInterrupt):
            state.layer = FINE
    assert not state.worker.busy and state.layer == FINE
    state.layer = COARSE
    state.layer = FINE
    assert "(yellow)" in state.titles[2] and not state.error


# ---- the real thing


def test_a_trajectory_is_recorded_and_its_clip_decoded(toy):
    model, clip, trajectory, store = toy
    state = FeatureState(trajectory, layers=["up 2 attn 2", "mid attn 0"], store=store, worker=inline())
    state.record()
    assert not state.error and state.clip.frames.shape == clip.frames.shape and state.progress.fraction == 1
    assert state.model.digest == model.digest


def test_cancelling_a_recording_keeps_the_state_and_record_goes_on(toy, tmp_path):
    model, clip, trajectory, _ = toy
    worker = inline()
    state = FeatureState(trajectory, clip, model, ["mid attn 0"], store=Store(tmp_path), worker=worker)
    state.progress.observe(lambda change: worker.cancel(), "text")
    state.record()
    assert state.recording is None and "stopped" in state.progress.text and not state.error and not worker.busy
    state.progress.unobserve_all()
    state.record()
    assert state.recording is not None


def test_an_edit_is_shown_where_it_is_and_one_that_is_done_says_so(toy):
    model, clip, trajectory, store = toy
    config = EditConfig("a gold star on grass", SCENE.caption, num_inference_steps=2, keyframe_interval=3)
    edit = Edit(model, trajectory, config, clip)
    panel = FeaturePanel(edit, layers=["up 2 attn 2"], store=store, worker=inline())
    shown = lambda: [list(film) for film in panel.state.films]  # noqa: E731
    first = shown()
    assert "edit's tokens" in panel.strip.titles[1] and panel.state.timestep == edit.timesteps[0]
    assert panel.step.options == ["1 of 2"] and panel.timestep.layout.display == "none" and panel.step.layout.display is None
    edit.step()
    panel.again.click()
    second = shown()
    assert panel.state.timestep == edit.timesteps[1] and second[1] != first[1] and panel.state.step == 2
    edit.step()
    panel.again.click()
    assert not panel.errors.text and shown() == second  # the last step is the one that was next before
    panel.step.index = 0
    assert panel.state.step == 1 and shown() == first and edit.done
    with pytest.raises(FeatureError, match="step=3 is not kept: there are 1, 2"):
        panel.state.step = 3
    edit.history = []
    panel.again.click()
    assert "go back() one step" in panel.errors.text and panel.state.recording is not None
    panel.close()


def test_the_step_that_was_chosen_last_is_recorded(toy, tmp_path):
    "Choices while the worker records or compares: what it does is given up, and the last choice is shown."
    model, clip, trajectory, _ = toy
    config = EditConfig("a gold star on grass", SCENE.caption, num_inference_steps=2, keyframe_interval=3)
    state = FeatureState(Edit(model, trajectory, config, clip).run(), layers=["up 2 attn 2", "mid attn 0"], store=Store(tmp_path))
    reached, gate = threading.Event(), threading.Event()
    state.progress.observe(lambda change: "recording" in change.new and (reached.set(), gate.wait(60)), "text")
    state.record()
    assert reached.wait(60)
    state.step = 1
    state.progress.unobserve_all()
    gate.set()
    until = time.monotonic() + 120
    while (state.worker.busy or state._shown_step != 1) and time.monotonic() < until:
        time.sleep(0.01)
    assert state.recording.timesteps == [state.source.timesteps[0]] and not state.error
    for layer in ("mid attn 0", "up 2 attn 2"):
        state.layer = layer
    while (state.worker.busy or "(yellow)" not in state.titles[2]) and time.monotonic() < until:
        time.sleep(0.01)
    assert "up 2" in state.titles[1] and "(yellow)" in state.titles[2]
    state.close()


def test_frames_are_those_of_the_clip_also_where_some_are_recorded(toy):
    model, clip, trajectory, store = toy
    recording = record(model, trajectory, ["mid attn 0"], [trajectory.timesteps[0]], [0, 2], store, progress=False)
    panel = FeaturePanel(recording, clip, model, worker=inline())
    assert panel.strip.numbers == [0, 2] and panel.state.nearest_frame(1) == 0
    panel.strip.picked = dict(row=0, frame=1, x=0.5, y=0.5)
    assert panel.state.frame == 2 == panel.state.point["frame"] and "of frame 2" in panel.state.words and panel.player.frame == 1
    panel.player.frame = 0
    assert panel.state.frame == 0 and panel.strip.current == 0
    with pytest.raises(FeatureError, match="there are 0, 2"):
        panel.state.frame = 1
    panel.close()


def test_an_edit_that_fails_says_why(toy, tmp_path, monkeypatch):
    model, clip, trajectory, _ = toy
    edit = Edit(model, trajectory, EditConfig("a <b>gold</b> star", num_inference_steps=2, keyframe_interval=3), clip)
    monkeypatch.setattr(type(edit), "predict", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("the <b>device</b> is gone")))
    panel = FeaturePanel(edit, store=Store(tmp_path), worker=inline())
    assert panel.errors.text == "the <b>device</b> is gone" and "<b>device" not in panel.errors.value and not panel.state.worker.busy
    panel.close()


def test_another_model_is_refused_in_words(toy, tmp_path):
    model, clip, trajectory, _ = toy
    other = load_model("toy", device="cpu")
    next(other.unet.parameters()).data.mul_(1.1)
    panel = FeaturePanel(trajectory, clip, other, store=Store(tmp_path), worker=inline())
    assert "another model" in panel.errors.text
    panel.close()


# ---- widgets


def test_widgets_show_the_state_and_set_it(panel):
    state = panel.state
    assert list(panel.layer.options) == [layer.name for layer in state.recording.layers] and not panel.layer.disabled
    assert panel.layer.value == state.layer and panel.timestep.value == str(state.timestep)
    assert panel.layer.groups == ["up 1 · 4×4", "up 2 · 8×8", "up 2 · 8×8"] and panel.step.layout.display == "none"
    assert panel.strip.rows == state.films and panel.strip.titles == state.titles and panel.player.films == state.films
    panel.layer.value, panel.timestep.value = COARSE, "1"
    assert (state.layer, state.timestep) == (COARSE, 1) and panel.strip.rows == state.films and panel.strip.cells == 4
    state.layer = FINE
    assert panel.layer.value == FINE and panel.strip.cells == 8
    panel.player.frame = 3
    assert state.frame == 3 == panel.strip.current


def test_a_click_and_a_drag_mark_every_frame(panel):
    panel.layer.value, panel.timestep.value = FINE, "1"
    for x in (0.45, 0.6):
        panel.strip.picked = dict(row=1, frame=2, x=x, y=0.3)
        marks = [mark for mark in panel.strip.marks if mark["row"] == 0]
        assert [mark["frame"] for mark in marks] == list(range(6)) and marks[2]["x"] == (int(x * 8) + 0.5) / 8
    assert "Token (2, 4)" in panel.words.value and panel.strip.current == panel.player.frame == 2


def test_the_advice_appears_in_the_panel(panel):
    assert panel.use.disabled
    panel.advice.click()
    assert f"keyframe_interval={panel.state.interval}" in panel.advised.value and "keyframe_interval" not in panel.words.value
    assert not panel.use.disabled
    panel.use.click()
    assert panel.state.advised == panel.state.interval and "Handed over" in panel.advised.value


def test_a_busy_panel_refuses_in_words(panel):
    panel.state.worker.busy, panel.state.worker.task = True, "recording features"
    assert panel.again.disabled and not panel.cancel.disabled
    panel.state.worker.busy = True
    panel.advice.click()
    assert "already recording features" in panel.errors.text
    panel.state.worker.busy = False
    assert not panel.again.disabled


def test_a_recording_that_was_removed_from_the_store_says_so(panel):
    Store(panel.state.recording.entry.path.parent).clear()
    panel.strip.picked = dict(row=0, frame=0, x=0.5, y=0.5)
    assert "No such file" in panel.errors.text
    panel.strip.picked = {}


def test_closing_frees_everything_twice(tmp_path):
    recording, clip, _ = made_recording(tmp_path)
    panel = FeaturePanel(recording, clip)
    assert panel.state.worker.wait(60)
    children = [widget for widget in panel.children]
    for _ in range(2):
        panel.close()
    state = panel.state
    assert state.recording is state.clip is state.source is state.model is None and len(state.cache) == 0 and state.films == []
    assert all(widget.comm is None for widget in children if isinstance(widget, ipywidgets.Widget))
    with pytest.raises(Busy, match="closed"):
        state.record()
