"The edit panel without a browser: every way in, cancelled anywhere, wrong in every way, and equal to edit_video."

import threading

import numpy as np
import pytest

from tokenflow_nb import source
from tokenflow_nb.clip import read_clip, write_clip
from tokenflow_nb.config import Execution
from tokenflow_nb.edit import Edit, edit_video, starting
from tokenflow_nb.forecast import measure
from tokenflow_nb.panels import EditPanel
from tokenflow_nb.panels.base import Worker
from tokenflow_nb.panels.edit import TOY_SCENE, EditState, Source, edit_code, keep_upload, open_source, toy_source
from tokenflow_nb.panels.edit import uploaded
from tokenflow_nb.store import Store
from tokenflow_nb.support.progress import drive
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3))
STEPS, FRAMES = 3, 4
ROWS = (3 * 2 + 2 * FRAMES) + (2 * 2 + FRAMES) * (STEPS - 1)  # of an edit with a record: keyframes and frames, and guidance at the first step
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=FRAMES, size=64)


@pytest.fixture(scope="module")
def options(model):
    return dict(
        model=model, prompt="a gold star on grass", source_prompt=SCENE.caption, num_inference_steps=STEPS, keyframe_interval=2, seed=3
    )


@pytest.fixture
def make(clip, options, tmp_path):
    "A state whose work is done in place, on a store of its own."

    def made(shown=clip, **changes):
        return EditState(shown, store=Store(tmp_path / "store"), worker=Worker(threaded=False), **options | changes)

    return made


@pytest.fixture(scope="module")
def expected(clip, options, tmp_path_factory):
    "What edit_video makes of the same settings."
    settings = {name: value for name, value in options.items() if name != "prompt"}
    return edit_video(clip, options["prompt"], **settings, store=Store(tmp_path_factory.mktemp("store")), progress=False)


@pytest.fixture
def cancelling(monkeypatch):
    "Cancels a state's work after its n-th step of any kind; counts the steps that were begun."

    def after(state, count):
        begun, once, record_once, predict = [0], Edit.step, source._record_step, state.given.predict

        def tick():
            begun[0] += 1
            if begun[0] == count:
                state.cancel()

        def whole(take):
            "Counts a step as one, whatever the model is asked in it."

            def step(*arguments):
                tick()
                monkeypatch.setattr(state.given, "predict", predict)
                try:
                    return take(*arguments)
                finally:
                    monkeypatch.setattr(state.given, "predict", counted)

            return step

        def counted(*arguments, **named):
            tick()
            return predict(*arguments, **named)

        monkeypatch.setattr(Edit, "step", whole(once))
        monkeypatch.setattr(source, "_record_step", whole(record_once))
        monkeypatch.setattr("tokenflow_nb.panels.edit.learn", lambda *what: None)  # looks at the model, too
        monkeypatch.setattr(state.given, "predict", counted)
        return begun

    return after


def same(result, other):
    return (result.edited.frames == other.edited.frames).all()


def test_render_is_edit_video(make, expected):
    state = make()
    state.render()
    assert state.error == "" and same(state.rendered, expected)
    assert state.rendered.config == expected.config and state.rendered.model == expected.model
    assert set(state.rendered.timings) == {"invert", "record", "edit", "decode"}


@pytest.mark.parametrize("count", range(1, 3 * STEPS + 1))
def test_cancel_within_a_step_loses_nothing(make, expected, cancelling, count):
    state = make()
    begun = cancelling(state, count)
    state.render()
    assert begun[0] == count  # not one step more
    assert state.rendered is None and state.error == "" and not state.worker.busy
    assert "Stopped" in state.progress.text and "goes on" in state.progress.text
    state.render()
    assert begun[0] == 3 * STEPS  # not one step twice
    assert same(state.rendered, expected)


def test_a_change_of_the_prompt_keeps_the_parts_of_a_cancelled_inversion(make, cancelling):
    state = make()
    begun = cancelling(state, 2)
    state.render()
    state.prompt = "a red star on grass"
    state.render()
    # whole parts of the inversion are kept; of the part under way the two steps are taken again
    assert begun[0] == 3 * STEPS + 2 and state.rendered.config.prompt == "a red star on grass"


def test_a_change_of_the_prompt_keeps_a_cancelled_record(make, cancelling, monkeypatch):
    state = make()
    asked, predict = [], state.given.predict
    cancelling(state, STEPS + 2)
    state.render()
    assert "recording the source, step 2" in state.progress.text
    monkeypatch.undo()
    monkeypatch.setattr("tokenflow_nb.panels.edit.learn", lambda *what: None)  # looks at the model, too
    monkeypatch.setattr(state.given, "predict", lambda *what, **named: asked.append(len(what[0])) or predict(*what, **named))
    state.prompt = "a red star on grass"
    state.render()
    assert asked[:2] == [2, FRAMES] and sum(asked[2:]) == ROWS  # keyframes and frames of the last step, then the edit
    assert state.rendered.config.prompt == "a red star on grass"


def test_another_prompt_is_spared_inversion_and_record(make, monkeypatch):
    state = make()
    state.render()
    asked, predict = [], state.given.predict
    monkeypatch.setattr(state.given, "predict", lambda *what, **named: asked.append(len(what[0])) or predict(*what, **named))
    state.prompt = "a red star on grass"
    state.render()
    assert sum(asked) == ROWS and state.rendered.config.prompt == "a red star on grass"


def test_another_source_prompt_starts_anew_and_leaves_no_rubbish(make, cancelling, tmp_path):
    state = make()
    cancelling(state, 2)
    state.render()
    state.source_prompt = ""
    state.render()
    assert state.rendered is not None
    state.close()
    assert [path.name for path in (tmp_path / "store").iterdir() if path.name.startswith(".writing")] == []


def test_an_interrupt_in_the_middle_leaves_a_state_that_goes_on(make, expected, monkeypatch):
    state, once = make(), Edit.step

    def interrupted(edit):
        if edit.index == 1:
            raise KeyboardInterrupt
        return once(edit)

    monkeypatch.setattr(Edit, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.render()
    assert not state.worker.busy and state.rendered is None
    monkeypatch.setattr(Edit, "step", once)
    state.render()
    assert same(state.rendered, expected)


def test_preview_has_the_settings_of_render(make):
    state = make()
    state.preview(frames=3)
    state.render()
    few, whole = state.previewed.config, state.rendered.config
    different = {name for name in vars(few) if getattr(few, name) != getattr(whole, name)}
    assert different <= {"rule", "keyframe_interval"}
    assert state.shown == [0, 2, 3]
    assert (state.previewed.source.frames == state.rendered.source.frames[state.shown]).all()


def test_preview_is_what_a_stepper_previews(make, model, clip, tmp_path):
    state = make()
    state.preview(frames=2)
    state.render()
    stepper = drive(starting(model, state.rendered.source, state.config(), Execution(store=state.store)))
    difference = np.abs(stepper.preview(2).frames.astype(int) - state.previewed.edited.frames)
    assert difference.max() <= 1  # they are inverted in blocks of other sizes, which rounds otherwise


def test_the_code_gives_the_same_clip(make, expected, clip, model, cache):
    state = make()
    state.render()
    made = dict(clip=clip, model=model)
    exec(state.code, made)
    assert same(made["result"], state.rendered) and made["result"].config == state.rendered.config


def test_the_code_of_a_file_reads_that_part_of_the_file(make, tmp_path, model, cache):
    path = tmp_path / "it's a star.mp4"
    write_clip(path, SCENE.render(frames=8, size=64))
    state = make(None, model="toy")
    state.open(str(path), 0.25, 3)
    state.method, state.strength, state.negative_prompt = "sdedit", 0.5, 'a "blue" star'
    state.render()
    assert state.error == "" and len(state.rendered.edited) == 3
    made = {}
    exec(state.code, made)
    assert same(made["result"], state.rendered)
    assert "start=0.25" in state.code and "pnp_f_t" not in state.code


def test_the_toy_clip_brings_its_settings_and_its_code(make):
    state = make(None, model="sd1.5", num_inference_steps=50)
    state.open_toy()
    assert (state.model, state.prompt) == ("toy", "a gold star on grass") and state.guidance_scale is None
    made = {}
    exec(f"{state.source.before}\nclip = {state.source.code}", made)
    assert (made["clip"].frames == TOY_SCENE.render().frames).all()


def test_code_names_only_what_differs():
    config = EditState(prompt="a 'gold' star").config()
    assert edit_code(Source(toy_source(frames=1).clip), config, "'sd1.5'") == (
        "from tokenflow_nb.edit import edit_video\n# clip: the frames that this panel was given\n\n"
        'result = edit_video(\n    clip,\n    "a \'gold\' star",\n    model=\'sd1.5\',\n    keyframe_interval=8,\n)\nresult'
    )


BAD = {
    "prompt": ("  ", "say what the edited clip shows"),
    "method": ("pn", "did you mean 'pnp'"),
    "num_inference_steps": (1, "at least 2"),
    "guidance_scale": (-1.0, "from 0 to 100"),
    "pnp_f_t": (1.5, "from 0 to 1"),
    "keyframe_interval": (0, "at least 1"),
    "model": ("toi", "did you mean 'toy'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_said_in_words_and_put_right(make, name):
    value, words = BAD[name]
    state = make(num_inference_steps=2)
    good = getattr(state, name)
    setattr(state, name, value)
    for start in (state.preview, state.render):
        start()
        assert words in state.error and not state.worker.busy
    assert state.previewed is None and state.rendered is None
    setattr(state, name, good)
    state.preview(frames=1)
    assert state.error == "" and state.previewed is not None


def test_more_steps_than_the_schedule_has(make):
    state = make(num_inference_steps=2000)
    state.preview()
    assert "from 2 to 1000" in state.error


def test_no_clip_and_no_such_file_and_no_video(make, tmp_path):
    state = make(None)
    state.render()
    assert "no clip yet" in state.error
    state.open(str(tmp_path / "nowhere.mp4"))
    assert "no such file" in state.error
    state.open("")
    assert "toy clip" in state.error
    (tmp_path / "letter.mp4").write_text("Dear Sir")
    state.open(str(tmp_path / "letter.mp4"))
    assert "not a video" in state.error and state.source is None


def test_a_clip_of_one_frame(make, clip):
    state = make(clip[:1], keyframe_interval=8)
    state.preview()
    state.render()
    assert state.error == "" and state.shown == [0] and len(state.rendered.edited) == 1


def test_words_that_the_model_does_not_read_are_told(make):
    state = make(prompt="a gold star on grass " * 40)
    state.preview(frames=1)
    assert "left out" in state.note
    state.prompt = "a gold star on grass"
    state.preview(frames=1)
    assert state.note == ""


def test_the_outlook_follows_the_settings(make, monkeypatch):
    monkeypatch.setattr(measure, "_KNOWN", {})
    state = make(num_inference_steps=10, keyframe_interval=2)
    assert state.outlook == f"{10 + 10 * (1.5 + 2 * 0.5 + 1) + 4 * 1.5:.0f} evaluations a frame, {FRAMES * 51} in all · 852.0 kB of disk"
    state.num_inference_steps = 2
    assert state.outlook.startswith("10 evaluations a frame, 42 in all")
    state.guidance_scale = 1.0
    assert state.outlook.startswith("9 evaluations")
    for name, value in dict(keyframe_interval=0, method="pn", guidance_scale=-1.0).items():
        before = getattr(state, name)
        setattr(state, name, value)
        assert state.outlook == ""
        setattr(state, name, before)
    state.prompt = ""
    assert state.outlook.startswith("9 evaluations")
    assert state.error == ""


def test_the_first_render_teaches_the_outlook_its_minutes(make, monkeypatch):
    monkeypatch.setattr(measure, "_KNOWN", {})
    state = make()
    assert "about" not in state.outlook
    state.render()
    assert "about" in state.outlook and "on cpu" in state.outlook
    state.num_inference_steps = 100
    assert "about" in state.outlook


def test_nothing_is_loaded_for_an_outlook(clip, monkeypatch):
    monkeypatch.setattr("tokenflow_nb.panels.edit.shared_model", lambda name: pytest.fail("a model was loaded"))
    state = EditState(clip, prompt="a star", model="sd1.5", num_inference_steps=2)
    assert state.outlook.startswith("9 evaluations a frame") and EditState(model="sd1.5").outlook == ""


def test_two_clicks_on_run(clip, options, tmp_path, monkeypatch):
    state, running, go = EditState(clip, store=Store(tmp_path), **options), threading.Event(), threading.Event()
    once = Edit.step

    def held(edit):
        running.set()
        assert go.wait(PATIENCE)
        return once(edit)

    monkeypatch.setattr(Edit, "step", held)
    state.render()
    assert running.wait(PATIENCE)
    state.render()
    assert "already rendering" in state.error
    state.preview()
    assert "already rendering" in state.error
    state.open_toy()
    assert "already rendering" in state.error and len(state.source.clip) == FRAMES
    go.set()
    assert state.worker.wait(PATIENCE)
    assert state.rendered is not None and state.error == ""


def test_closing_in_the_middle_ends_the_thread_and_frees(clip, options, tmp_path, monkeypatch):
    panel, running, go, once = EditPanel(clip, store=Store(tmp_path), **options), threading.Event(), threading.Event(), Edit.step

    def held(edit):
        running.set()
        assert go.wait(PATIENCE)
        return once(edit)

    monkeypatch.setattr(Edit, "step", held)
    panel.state.render()
    assert running.wait(PATIENCE)
    panel.close()
    go.set()
    assert panel.state.worker.wait(PATIENCE)
    assert panel.state.rendered is None and panel.state.source is None and panel.state._runs == {} and panel.state._loaded is None
    panel.state.render()
    assert "closed" in panel.state.error


def test_unknown_settings_are_refused(clip):
    with pytest.raises(ValueError, match="threshold: no such setting.*pnp_f_t"):
        EditPanel(clip, threshold=0.3)


def test_uploads_of_both_versions():
    seven = {"clip.mp4": {"metadata": {"size": 2}, "content": b"ab"}}
    eight = ({"name": "clip.mp4", "type": "video/mp4", "size": 2, "content": memoryview(b"ab")},)
    assert uploaded(seven) == uploaded(eight) == [("clip.mp4", b"ab")]
    assert uploaded({}) == uploaded(()) == []


@pytest.mark.parametrize("name", ["../../evil.mp4", "..", "C:\\clips\\evil.mp4", "/etc/evil.mp4", ""])
def test_an_upload_stays_in_the_cache(name, cache):
    path = keep_upload(name, b"content")
    assert path.resolve().is_relative_to(cache.resolve()) and path.read_bytes() == b"content" and path.is_file()


def widgets(panel):
    found = list(panel.children)
    for widget in found:
        found.extend(getattr(widget, "children", ()))
    return found


def labelled(panel, description):
    return next(widget for widget in widgets(panel) if getattr(widget, "description", "") == description)


@pytest.fixture
def panel(clip, options, tmp_path):
    made = EditPanel(clip, store=Store(tmp_path / "store"), worker=Worker(threaded=False), **options)
    yield made
    made.close()


def test_widgets_and_state_follow_each_other(panel, model):
    labels = {"Prompt": "prompt", "Negative prompt": "negative_prompt", "Features": "pnp_f_t", "Steps": "num_inference_steps", "Seed": "seed"}
    values = {"prompt": "a red star", "negative_prompt": "blue", "pnp_f_t": 0.25, "num_inference_steps": 7, "seed": 11}
    for label, name in labels.items():
        labelled(panel, label).value = values[name]
        assert getattr(panel.state, name) == values[name]
    panel.state.seed = 5
    assert labelled(panel, "Seed").value == 5
    assert labelled(panel, "Guidance").value == model.guidance_scale and panel.state.guidance_scale is None
    labelled(panel, "Guidance").value = 9.0
    assert panel.state.guidance_scale == 9.0
    labelled(panel, "Model").value = "sd1.5"
    panel.state.guidance_scale = None
    assert labelled(panel, "Guidance").value == 7.5


def test_the_outlook_is_shown(panel):
    assert panel.state.outlook and panel.state.outlook.split(" · ")[0] in panel.outlook.value
    panel.state.num_inference_steps = 17
    assert panel.state.outlook.split(" · ")[0] in panel.outlook.value
    panel.state.outlook = ""  # what it is while settings are not usable; the panel's own fields allow usable ones only
    assert panel.outlook.value == ""


def test_thresholds_are_those_of_the_method(panel):
    labelled(panel, "Features")
    labelled(panel, "Method").value = "sdedit"
    labelled(panel, "Strength")
    with pytest.raises(StopIteration):
        labelled(panel, "Features")


def test_buttons_preview_render_and_show(panel, expected):
    assert panel.strip.layout.display == panel.player.layout.display == "none" and panel.code.text == ""
    labelled(panel, "Preview keyframes").click()
    assert panel.strip.layout.display is None and [len(film) for film in panel.strip.rows] == [4, 4]
    labelled(panel, "Render clip").click()
    assert len(panel.player.films[1]) == FRAMES and panel.player.wipe and panel.code.text == panel.state.code != ""
    assert same(panel.state.rendered, expected)


def test_text_of_a_person_is_escaped(panel):
    labelled(panel, "Model").value = "<img src=x onerror=alert(1)>"
    labelled(panel, "Render clip").click()
    assert "<img" not in panel.errors.value and "<img" in panel.errors.text


def test_a_bad_source_is_told_in_the_panel():
    panel = EditPanel("nowhere.mp4", worker=Worker(threaded=False))
    assert "no such file" in panel.errors.text
    panel.close()


def test_a_source_may_be_chosen_in_the_panel(clip_file, tmp_path):
    panel = EditPanel(store=Store(tmp_path), worker=Worker(threaded=False), model="toy")
    labelled(panel, "Video file").value = str(clip_file)
    labelled(panel, "Frames, at most").value = 5
    labelled(panel, "Open").click()
    assert panel.errors.text == "" and (panel.state.source.clip.frames == read_clip(clip_file, max_frames=5).frames).all()
    assert open_source(str(clip_file), max_frames=5).reading == {"max_frames": 5}
    panel.close()
