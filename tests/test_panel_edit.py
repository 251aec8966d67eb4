"The edit panel without a browser: its inputs, buttons, pictures and downloads."

import json
import re
import threading
import time
from pathlib import Path

import ipywidgets
import pytest
from edit_states import FRAMES, PATIENCE, STEPS, cancelling, clip, expected, options, same  # noqa: F401

from tokenflow_nb.clip import read_clip
from tokenflow_nb.config import Reading
from tokenflow_nb.edit import Edit
from tokenflow_nb.panels import EditPanel
from tokenflow_nb.panels.base import Worker
from tokenflow_nb.panels.clips import open_source
from tokenflow_nb.panels.state import setting_defaults
from tokenflow_nb.store import Store


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
    assert panel.state.rendered is None and panel.state.source is None and panel.state.jobs == () and panel.state._loaded is None
    panel.state.render()
    assert "closed" in panel.state.error


def test_unknown_settings_are_refused(clip):
    with pytest.raises(ValueError, match="threshold: no such setting.*pnp_f_t"):
        EditPanel(clip, threshold=0.3)


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


def written(form, **values):
    "What a person writes into a form."
    form.values = form.values | values


def test_inputs_and_state_follow_each_other(panel):
    written(panel.steps.prompt, prompt="a red star", negative_prompt="blue")
    written(panel.steps.look, pnp_f_t=0.25, num_inference_steps=7, seed=11, guidance_scale=9.0)
    state = panel.state
    assert (state.prompt, state.negative_prompt, state.pnp_f_t, state.seed, state.guidance_scale) == ("a red star", "blue", 0.25, 11, 9.0)
    state.seed = 5
    assert panel.steps.look.values["seed"] == 5
    panel.steps.look.on_action("dice")
    assert state.seed != 5 and panel.steps.look.values["seed"] == state.seed


def test_every_setting_has_an_input(panel):
    shown = {spec["name"] for form in (panel.steps.clip, panel.steps.prompt, panel.steps.look) for spec in form.fields}
    assert {*setting_defaults()} <= shown
    assert all(spec["help"] for form in (panel.steps.look, panel.steps.clip) for spec in form.fields)
    seen = {spec["name"]: spec.get("when") for spec in panel.steps.look.fields}
    assert seen["strength"] == ["method", ["sdedit"]] and seen["pnp_f_t"][1] == ["pnp"]


def test_the_first_page_names_buttons_that_are_there(panel):
    cells = json.loads((Path(__file__).parents[1] / "nbs" / "start_here.ipynb").read_text(encoding="utf-8"))["cells"]
    named = re.findall(r"\*\*([^*]+)\*\*", "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"))
    assert named and set(named) <= {each.description for each in widgets(panel) if isinstance(each, ipywidgets.Button)}


def test_the_outlook_is_shown(panel):
    assert panel.state.outlook in panel.steps.outlook.value and panel.state.evaluations in panel.steps.outlook.value
    panel.state.num_inference_steps = 17
    assert panel.state.evaluations in panel.steps.outlook.value


def test_buttons_preview_render_and_show(panel, expected):
    stage, steps = panel.stage, panel.steps
    assert stage.strip.layout.display == stage.actions.layout.display == "none" and len(stage.player.films) == 1
    steps.preview.click()
    assert stage.strip.layout.display is None and [len(film) for film in stage.strip.rows] == [4, 4]
    steps.look.on_action("submit")  # Ctrl+Enter
    assert len(stage.player.films) == 2 and len(stage.player.films[1]) == FRAMES and stage.player.view == "wipe"
    assert stage.code.text == panel.state.code != "" and stage.actions.layout.display is None
    assert same(panel.state.rendered, expected) and [item["title"] for item in stage.gallery.items] == ["a gold star on grass"]
    assert stage.gallery.current == panel.state.film.key


def test_a_job_has_a_line_with_its_buttons(panel, cancelling):
    cancelling(panel.state, 2)
    panel.steps.render.click()
    [line] = panel.steps.jobs.children
    words, stop, again, drop = line.children
    assert "stopped at" in words.value and stop.layout.display == "none" and again.layout.display is None
    again.click()
    assert panel.steps.jobs.children == () and panel.state.rendered is not None


def test_downloads(panel):
    sent = []
    panel.stage.download.send = lambda content, buffers=None: sent.append((content, buffers))
    panel.stage.download._give("edited.mp4")
    assert "nothing is rendered" in sent[0][0]["error"]
    panel.steps.render.click()
    for name, start in {"edited.mp4": b"ftyp", "before-after.mp4": b"ftyp", "run.json": b"config"}.items():
        sent.clear()
        panel.stage.download._give(name)
        assert sent[-1][0]["last"] and sent[-1][0]["as"].endswith(name)
        assert start in b"".join(piece for _, [piece] in sent)[:200]
    sent.clear()
    panel.stage.download._give("../secret")
    assert sent == []


def test_an_edit_under_way_opens_in_a_denoising_panel(panel, cancelling):
    cancelling(panel.state, STEPS * 2 + 2)
    panel.steps.render.click()
    assert panel.stage.inside.layout.display is None
    inside = panel.stage.denoise()
    assert panel.stage.below.children[-1] is inside and inside.state.position >= 1 and inside.state.error == ""


def test_films_are_compared(panel):
    panel.steps.render.click()
    panel.state.prompt = "a red star on grass"
    panel.steps.render.click()
    panel.stage.gallery._handle_custom_msg({"compare": [film.key for film in panel.state.films]}, [])
    assert len(panel.stage.below.children[-1].state.clips) >= 2
    panel.stage.gallery._handle_custom_msg({"show": panel.state.films[1].key}, [])
    assert panel.state.prompt == "a gold star on grass"
    panel.stage.gallery._handle_custom_msg({"remove": panel.state.films[1].key}, [])
    assert len(panel.state.films) == 1


def test_errors_stand_at_their_input(panel):
    written(panel.steps.look, num_inference_steps=1)
    assert "at least 2" in panel.steps.look.errors["num_inference_steps"] and panel.errors.value == ""
    written(panel.steps.look, num_inference_steps=3)
    assert panel.steps.look.errors == {}
    written(panel.steps.prompt, prompt=" ")
    assert panel.steps.prompt.errors == {}  # nobody likes to be told before the first word
    panel.steps.render.click()
    assert "say what the edited clip shows" in panel.steps.prompt.errors["prompt"]


def test_text_of_a_person_is_escaped(panel):
    written(panel.steps.prompt, model="<img src=x onerror=alert(1)>", prompt="<b>gold</b>")
    panel.steps.render.click()
    html = [widget.value for widget in widgets(panel) if isinstance(getattr(widget, "value", None), str)]
    assert not any("<img" in text or "<b>" in text for text in html)


def test_a_bad_source_is_told_in_the_panel(tmp_path):
    panel = EditPanel("nowhere.mp4", store=Store(tmp_path), worker=Worker(threaded=False))
    assert "no such file" in panel.steps.clip.errors["path"]
    panel.close()


def test_a_source_may_be_chosen_in_the_panel(clip_file, tmp_path):
    panel = EditPanel(store=Store(tmp_path), worker=Worker(threaded=False), model="toy")
    written(panel.steps.clip, path=str(clip_file), max_frames=5)
    panel.steps.clip.on_action("open")
    assert panel.state.error == "" and (panel.state.source.clip.frames == read_clip(clip_file, max_frames=5).frames).all()
    assert open_source(str(clip_file), Reading(max_frames=5)).reading == {"max_frames": 5}
    panel.close()


@pytest.mark.parametrize("named, back, closed", [(False, False, True), (True, False, False), (False, True, False)])
def test_a_panel_that_has_left_the_page_is_closed(tmp_path, monkeypatch, named, back, closed):
    monkeypatch.setattr("tokenflow_nb.panels.edit.AWAY", 0.05)
    monkeypatch.setattr("tokenflow_nb.panels.edit.has_name", lambda panel: named)
    panel = EditPanel(store=Store(tmp_path), worker=Worker(threaded=False))
    panel.steps.prompt.views = 1
    panel.steps.prompt.views = 0
    panel.steps.prompt.views = int(back)  # its cell was moved
    until = time.monotonic() + (PATIENCE if closed else 0.5)
    while panel.comm is not None and time.monotonic() < until:
        time.sleep(0.02)
    assert (panel.comm is None) == closed
    panel.close()
