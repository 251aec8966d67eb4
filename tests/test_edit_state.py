"The state of the edit panel: every way in, a queue, cancelled anywhere, kept films, and equal to edit_video."

import threading

import numpy as np
import pytest
from edit_states import FRAMES, PATIENCE, ROWS, SCENE, STEPS, cancelling, clip, expected, make, options, same  # noqa: F401

from tokenflow_nb.clip import write_clip
from tokenflow_nb.config import Execution
from tokenflow_nb.edit import Edit, starting
from tokenflow_nb.forecast import measure
from tokenflow_nb.panels.clips import TOY_SCENE, Source, edit_code, open_source, toy_source
from tokenflow_nb.panels.state import EditState
from tokenflow_nb.store import Store
from tokenflow_nb.support.progress import drive


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
    assert "Stopped" in state.progress.text and [job.status for job in state.jobs] == ["stopped"]
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
    monkeypatch.setattr("tokenflow_nb.panels.state.learn", lambda *what: None)  # looks at the model, too
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
    state = make(None, model="toy", start=0.25, max_frames=3)
    state.open(str(path))
    state.method, state.strength, state.negative_prompt = "sdedit", 0.5, 'a "blue" star'
    state.render()
    assert state.error == "" and len(state.rendered.edited) == 3
    made = {}
    exec(state.code, made)
    assert same(made["result"], state.rendered)
    assert "start=0.25" in state.code and "pnp_f_t" not in state.code


def test_the_toy_clip_brings_its_settings_and_its_code(make):
    state = make(None, model="sd1.5", num_inference_steps=50)
    state.open("toy")
    assert (state.model, state.prompt) == ("toy", "a gold star on grass") and state.guidance_scale is None
    made = {}
    exec(f"{state.source.before}\nclip = {state.source.code}", made)
    assert (made["clip"].frames == TOY_SCENE.render().frames).all()


def test_code_names_only_what_differs():
    config = EditState(prompt="a 'gold' star").config()
    assert edit_code(Source(toy_source(frames=1).clip), config, "'sd1.5'") == (
        "from tokenflow_nb.edit import edit_video\n# clip: the frames that this panel was given\n\n"
        'result = edit_video(\n    clip,\n    "a \'gold\' star",\n    model=\'sd1.5\',\n)\nresult'
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
        assert words in state.error and state.error_at == name and not state.worker.busy
    if name != "model":
        assert words in state.problems[name]  # beside the setting, before any start
    for job in state.jobs:
        state.cancel(job)
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
    assert "take an example" in state.error
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
    each = 10 + 10 * (1.5 + 2 * 0.5 + 1) + 4 * 1.5
    assert state.evaluations == f"{FRAMES * each:.0f} evaluations of the network, {each:.0f} a frame"
    assert state.outlook == "The time is known after the first render · 852.0 kB of disk"
    state.guidance_scale = 1.0
    assert f"{FRAMES * each:.0f}" not in state.evaluations
    for name, value in dict(keyframe_interval=0, method="pn", guidance_scale=-1.0).items():
        before = getattr(state, name)
        setattr(state, name, value)
        assert state.outlook == "" and name in state.problems
        setattr(state, name, before)
    state.prompt = ""
    assert state.outlook and state.error == "" and state.problems == {}


def test_the_first_render_teaches_the_outlook_its_time(make, monkeypatch):
    monkeypatch.setattr(measure, "_KNOWN", {})
    state = make()
    assert "About" not in state.outlook
    state.render()
    assert "About" in state.outlook
    state.num_inference_steps = 100
    assert "About" in state.outlook


def test_nothing_is_loaded_for_an_outlook(clip, monkeypatch):
    monkeypatch.setattr("tokenflow_nb.panels.state.shared_model", lambda name: pytest.fail("a model was loaded"))
    state = EditState(clip, prompt="a star", model="sd1.5", num_inference_steps=2)
    assert state.evaluations.endswith("9 a frame") and EditState(model="sd1.5").outlook == ""


@pytest.fixture
def held(monkeypatch):
    "Steps wait for `go`; `running` is set when one waits."
    running, go, once = threading.Event(), threading.Event(), Edit.step

    def hold(edit):
        running.set()
        assert go.wait(PATIENCE)
        return once(edit)

    monkeypatch.setattr(Edit, "step", hold)
    return running, go


def test_two_clicks_and_a_queue(clip, options, tmp_path, held):
    running, go = held
    state = EditState(clip, store=Store(tmp_path), **options)
    state.render()
    assert running.wait(PATIENCE)
    state.render()
    assert "already under way" in state.error and len(state.jobs) == 1
    state.prompt = "a red star on grass"
    state.render()
    state.prompt = "a green star on grass"
    state.render()
    assert [job.status for job in state.jobs] == ["running", "waiting", "waiting"] and state.error == ""
    state.cancel(state.jobs[1])  # before it starts
    assert [job.config.prompt for job in state.jobs] == ["a gold star on grass", "a green star on grass"]
    go.set()
    assert state.worker.wait(PATIENCE)
    assert state.jobs == () and [film.prompt for film in state.films] == ["a green star on grass", "a gold star on grass"]
    assert state.rendered.config.prompt == "a green star on grass" and state.error == ""


def test_a_cancel_stops_one_job_and_the_next_one_follows(clip, options, tmp_path, held):
    running, go = held
    state = EditState(clip, store=Store(tmp_path), **options)
    state.render()
    assert running.wait(PATIENCE)
    state.prompt = "a red star on grass"
    state.render()
    state.cancel()
    go.set()
    assert state.worker.wait(PATIENCE)
    [left] = state.jobs
    assert left.status == "stopped" and left.config.prompt == "a gold star on grass"
    assert state.rendered.config.prompt == "a red star on grass"
    state.resume(left)
    assert state.worker.wait(PATIENCE) and state.jobs == () and len(state.films) == 2


def test_another_clip_can_be_opened_while_an_edit_runs(clip, options, tmp_path, held):
    running, go = held
    state = EditState(clip, store=Store(tmp_path), **options)
    state.render()
    assert running.wait(PATIENCE)
    state.open("toy")
    assert state.reader.wait(PATIENCE) and len(state.source.clip) == 24 and state.error == ""
    go.set()
    assert state.worker.wait(PATIENCE) and len(state.rendered.edited) == FRAMES


def test_the_last_wish_is_read(clip, options, tmp_path, monkeypatch):
    go, read = threading.Event(), []

    def slow(source, reading):
        read.append(reading.start)
        assert go.wait(PATIENCE)
        return open_source(source, reading)

    state = EditState(clip, store=Store(tmp_path), **options)
    monkeypatch.setattr("tokenflow_nb.panels.state.open_source", slow)
    for start in (0.1, 0.2, 0.25):
        state.start = start
    go.set()
    assert state.reader.wait(PATIENCE)
    assert read == [0.1, 0.25] and len(state.source.clip) == FRAMES - 2 and state.error == ""


def test_expected_frames_are_seen_on_the_way(make, monkeypatch):
    monkeypatch.setattr("tokenflow_nb.panels.run.BETWEEN_LOOKS", 0.0)
    state, seen = make(), []
    state.observe(lambda change: seen.append(change.new), "look")
    state.render()
    assert [(look.step, look.steps) for look in seen if look] == [(1, STEPS), (2, STEPS)] and seen[-1] is None
    assert seen[0].pictures.shape == (FRAMES, *state.rendered.edited.size, 3)
    far, near = (np.abs(look.pictures.astype(int) - state.rendered.edited.frames).mean() for look in seen[:2])
    assert near < far  # they come closer to the film


def test_kept_films_are_found_again(make, expected, clip):
    state = make()
    state.render()
    [film] = state.films
    again = make(prompt="", num_inference_steps=2)
    assert [each.key for each in again.films] == [film.key]
    again.choose(again.films[0])
    assert again.error == "" and again.rendered.config == state.rendered.config
    assert (again.prompt, again.num_inference_steps, again.code) == (state.prompt, STEPS, state.code)
    close = again.rendered.edited.frames.astype(int) - state.rendered.edited.frames
    assert np.abs(close).mean() < 4  # an mp4 rounds
    again.forget(again.films[0])
    assert again.films == () and make().films == ()


def test_the_same_edit_is_not_rendered_twice(make, monkeypatch):
    state = make()
    state.render()
    monkeypatch.setattr(Edit, "step", lambda edit: pytest.fail("a step was taken"))
    monkeypatch.setattr(state.given, "decode", lambda latents: pytest.fail("it was decoded again"))
    state.rendered = None
    state.render()
    assert state.rendered is not None and "kept from an earlier render" in state.progress.text


def test_damaged_films_are_no_films_and_break_nothing(make, tmp_path):
    state = make()
    state.render()
    (state.films[0].entry.path / "edited.mp4").write_bytes(b"no film")
    with pytest.warns(UserWarning, match="damaged"):
        state.rendered = None
        state.render()  # rendered again
    assert state.rendered is not None
    meta = dict(kind="film", prompt=3, frames="many", settings=[], recipe=None)
    with Store(tmp_path / "store").writing("film-" + "0" * 32, meta) as writer:
        writer.put_json("run", {})
    assert len(make().films) == 1


def test_a_film_that_cannot_be_kept_is_shown(make, expected, monkeypatch):
    def full(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("tokenflow_nb.panels.state.keep_film", full)
    state = make()
    state.render()
    assert same(state.rendered, expected) and "could not be kept: the disk is full" in state.note and state.films == ()


def test_saving(make, tmp_path):
    state = make()
    assert state.save(tmp_path / "out") is None and "nothing is rendered yet" in state.error and state.error_at == "out"
    state.render()
    assert state.save(tmp_path / "out") == tmp_path / "out" and state.error == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"edited.mp4", "run.json"}


def test_another_prompt_than_that_of_the_film_is_said(make):
    state = make()
    state.render()
    assert state.stale == ""
    state.prompt = "a red star on grass"
    assert state.stale == "of an earlier prompt: a gold star on grass"


def test_presets_go_back_to_the_defaults(make):
    state = make()
    state.preset("careful")
    assert (state.num_inference_steps, state.inversion_steps) == (50, 100)
    state.preset("draft")
    assert (state.num_inference_steps, state.inversion_steps) == (10, None)


def test_without_a_gpu_the_toy_is_chosen_and_that_is_said(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    state = EditState(clip, store=Store(tmp_path))
    assert state.model == "toy" and "no GPU" in state.hint
    assert EditState("toy", store=Store(tmp_path)).hint == ""  # its clip is of the toy world
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert EditState(clip, store=Store(tmp_path)).model == "sd1.5"


def test_a_part_of_a_clip_and_of_a_file(make, tmp_path):
    path = tmp_path / "star.mp4"
    write_clip(path, SCENE.render(frames=10, size=64))
    state = make(str(path), max_frames=4)
    assert len(state.source.clip) == 4 and str(state.source).startswith("4 of 10 frames")
    state.start = 0.5
    assert state.source.reading == dict(start=0.5, max_frames=4) and state.error == ""
    state.start = 99
    assert "start earlier" in state.error and state.error_at == "start"
    state.start = "soon"
    assert "start='soon'" in state.error
    state.start = 0.5
    assert state.error == "" and len(state.source.clip) == 4  # the part that was read last is right again
    state.start, state.stop = 0.0, 0.5
    assert len(state.source.clip) == 4 and state.error == ""
    frames = make(SCENE.render(frames=10, size=64))
    assert len(frames.source.clip) == 10  # all of what was given
    frames.stop = 0.5
    assert len(frames.source.clip) == 4 and frames.source.code == "clip[0:4]"


def test_another_size_and_shape(make, clip, model, cache):
    state = make(side=32, shape="wide, 16:9")
    state.render()
    assert state.error == "" and state.rendered.edited.size == (32, 64) and "size=(32, 64)" in state.code
    made = dict(clip=clip, model=model)
    exec(state.code, made)
    assert same(made["result"], state.rendered)
    state.side = 0
    state.render()
    assert "side=0" in state.error and state.error_at == "side"
