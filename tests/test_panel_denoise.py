"DenoisePanel without a browser: every button on every kind of edit, and a state that no interruption can spoil."

import signal
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.backbones.schedule import Level, Prediction
from tokenflow_nb.edit import Edit, EditConfig, EditError
from tokenflow_nb.inversion import invert
from tokenflow_nb.panels.base import Worker
from tokenflow_nb.panels.films import Cache
from tokenflow_nb.panels.denoise import Branch, DenoisePanel, DenoiseState, clean_from_step, decode_here
from tokenflow_nb.panels.denoise import acting_steps, fork_hint, schedule_picture, schedule_text
from tokenflow_nb.panels.interrupts import _heard
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

STEPS, SCENE = 4, Scene("star", "blue", "grass", velocity=(0.8, -0.3))
PATIENCE = 120  # seconds that a thread may take on a slow machine


@pytest.fixture
def make_edit(model, tmp_path):
    "Makes an edit of a few small frames, at its start."

    def make(frames=2, **changes):
        options = dict(source_prompt=SCENE.caption, num_inference_steps=STEPS, keyframe_interval=min(2, frames)) | changes
        clip = SCENE.render(frames, size=32)
        trajectory = invert(model, clip, SCENE.caption, STEPS, store=Store(tmp_path / "store"), progress=False)
        return Edit(model, trajectory, EditConfig("a gold star on grass", **options), clip)

    return make


@pytest.fixture
def make_panel(make_edit, tmp_path):
    "Makes panels, and closes them."
    panels = []

    def make(edit=None, threaded=False):
        panels.append(DenoisePanel(edit or make_edit(), Store(tmp_path / "features"), Worker(threaded=threaded)))
        assert panels[-1].state.worker.wait(PATIENCE)
        return panels[-1]

    yield make
    for panel in panels:
        panel.close()
        panel.state.worker.wait(PATIENCE)


class Hook:
    "Counts a module's calls, and does something in one of them."

    def __init__(self, module, at=None, act=None):
        self.calls, self.at, self.act = 0, at, act
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        self.calls += 1
        if self.calls == self.at:
            self.act()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


@contextmanager
def running(panel, unet, at):
    "A run that is held before the UNet's call number `at` for the length of the block; then it goes on, to its end."
    reached, go_on = threading.Event(), threading.Event()

    def hold():
        reached.set()
        go_on.wait(PATIENCE)

    with Hook(unet, at, hold) as hook:
        panel.controls.run.click()
        assert reached.wait(PATIENCE)
        try:
            yield hook
        finally:
            go_on.set()
            ended = panel.state.worker.wait(PATIENCE)
        assert ended


@contextmanager
def held(panel, unet, act):
    "Does something, is held in the first call of the UNet for the length of the block, and goes on to the end."
    reached, go_on = threading.Event(), threading.Event()
    with Hook(unet, 1, lambda: (reached.set(), go_on.wait(PATIENCE))):
        act()
        assert reached.wait(PATIENCE)
        try:
            yield
        finally:
            go_on.set()
            ended = panel.state.worker.wait(PATIENCE)
        assert ended


def jump(panel, step):
    "A click on the schedule."
    panel.schedule._handle_custom_msg(dict(step=step), [])


def interrupt():
    raise KeyboardInterrupt


@given(st.floats(0.01, 0.95), st.floats(0.01, 0.999), st.integers(0, 1000))
def test_clean_frames_follow_from_a_step(kept, later, seed):
    if abs(kept - later) < 0.01:
        return
    level, other = (Level(share**0.5, (1 - share) ** 0.5) for share in (kept, later))
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double().unbind(0)
    before = level.alpha * clean + level.sigma * noise
    after = Prediction((before - level.sigma * noise) / level.alpha, noise).at(other)
    assert torch.allclose(clean_from_step(before, after, level, other), clean, atol=1e-6)


def test_a_step_without_a_change_of_level_is_refused():
    with pytest.raises(ValueError, match="without a change of level"):
        clean_from_step(torch.zeros(1), torch.zeros(1), Level(0.6, 0.8), Level(0.6, 0.8))


@pytest.mark.parametrize("method", ["pnp", "sdedit"])
def test_clean_frames_are_the_models_own(make_edit, method):
    branch = Branch(make_edit(method=method, **dict(strength=0.5) if method == "sdedit" else {}))
    while not branch.edit.done:
        believed = branch.edit.clean()
        branch.reach(branch.edit.index + 1)
        assert torch.allclose(branch.clean(branch.edit.index), believed, atol=1e-4)
    assert branch.first == (2 if method == "sdedit" else 0) and branch.clean(branch.first) is None


def test_looking_costs_no_call_of_the_unet(make_edit, make_panel, model):
    panel = make_panel()
    with Hook(model.unet) as unet:
        panel.controls.step.click()
        assert unet.calls == 2 * 3  # keyframes and frames, three branches one after the other
    with Hook(model.unet) as unet, Hook(model.vae.decoder) as decoder:
        panel.controls.back.click()
        panel.controls.step.click()
        assert unet.calls == decoder.calls == 0 and panel.player.names[1] == "A: expected"


def test_the_cache_is_bounded_and_a_forgotten_picture_is_made_again(make_edit):
    state = DenoiseState(make_edit(), Worker(threaded=False), Cache(max_bytes=8_000))
    for _ in range(STEPS):
        state.step()
        decode_here(state)
    assert 0 < state.cache.nbytes <= 8_000
    state.jump(1)
    assert state.seen(0, "clean", 0, 1) is None
    decode_here(state, [0])
    assert state.seen(0, "clean", 0, 1)


@pytest.mark.parametrize("rule", ["paper", "joint", "per_frame"])
@pytest.mark.parametrize("frames", [1, 3])
def test_every_button_for_any_number_of_frames(make_edit, make_panel, frames, rule):
    panel = make_panel(make_edit(frames, rule=rule))
    panel.features.value = True
    for button in (panel.controls.step, panel.controls.step, panel.controls.back, panel.controls.run):
        button.click()
        assert panel.errors.text == ""
    assert panel.state.position == STEPS and [len(film) for film in panel.player.films] == [frames, frames]
    drawn = panel.boxes[0].strip.outlined
    assert len(drawn) == {"paper": -(-frames // 2), "joint": frames, "per_frame": 0}[rule]
    assert panel.boxes[0].strip.titles == ["expected", "source features", "edited features"]
    panel.kind.value = "noisy"
    assert panel.boxes[0].strip.titles[0] == "noisy" and panel.player.names[1] == "A: noisy"


def test_the_keyframes_shown_are_those_of_the_step(make_edit, make_panel):
    edit = make_edit(4)
    panel = make_panel(edit)
    assert panel.boxes[0].strip.outlined == []
    for step in range(STEPS):
        panel.controls.step.click()
        assert panel.boxes[0].strip.outlined == edit.keyframes[step].tolist()


def test_a_panel_on_a_finished_edit(make_edit, make_panel):
    panel = make_panel(make_edit().run())
    assert panel.state.position == STEPS and panel.controls.run.disabled and panel.controls.step.disabled
    panel.controls.step.click()
    assert "the edit is done" in panel.errors.text
    panel.controls.back.click()
    assert panel.errors.text == "" and panel.state.position == STEPS - 1
    jump(panel, 0)
    assert panel.state.position == 0 and panel.controls.back.disabled and panel.controls.start.disabled
    panel.controls.back.click()
    assert "no step before step 0" in panel.errors.text
    panel.controls.end.click()
    assert panel.errors.text == "" and panel.state.position == STEPS
    panel.controls.start.click()
    assert panel.state.position == 0


def test_a_panel_on_an_edit_that_was_loaded(make_edit, make_panel, model, tmp_path):
    path = make_edit().step().step().save(tmp_path / "edit.safetensors")
    panel = make_panel(Edit.load(path, model, Store(tmp_path / "store")))
    assert panel.state.position == panel.schedule.first == 2 and panel.player.names[1] == "A: noisy"
    panel.controls.run.click()
    assert panel.errors.text == "" and torch.equal(panel.state.branches[0].edit.latents, make_edit().run().latents)


def test_a_panel_on_a_failed_edit(make_edit, make_panel):
    edit = make_edit().step()
    edit.latents = edit.latents * float("nan")
    panel = make_panel(edit)
    panel.controls.run.click()
    assert "latents are not finite after step 2 of 4" in panel.errors.text
    assert panel.state.position == edit.index == 1 and not panel.state.worker.busy


def test_a_panel_on_an_edit_whose_source_is_gone(make_edit, make_panel, tmp_path):
    panel = make_panel(make_edit())
    Store(tmp_path / "store").clear()
    panel.controls.run.click()
    assert "run invert() again" in panel.errors.text and panel.state.position == 0
    panel.fork.fields["prompt"].value = "a red star"
    panel.fork.fork.click()
    assert "run invert() again" in panel.fork.errors.text and len(panel.state.branches) == 1


def test_a_closed_panel_says_so_and_keeps_nothing(make_edit, make_panel):
    edit = make_edit()
    panel = make_panel(edit)
    panel.fork.fields["prompt"].value = "a red star"
    panel.fork.fork.click()
    fork = weakref.ref(panel.state.branches[1].edit)
    panel.close()
    panel.close()
    assert fork() is None and len(panel.state.cache) == 0
    panel.controls.run.click()
    assert "closed" in panel.state.error
    assert edit.run().done  # the user's edit goes on without it


def test_what_is_no_edit_is_refused():
    with pytest.raises(TypeError, match="give an Edit"):
        DenoisePanel("edit")


def test_an_interrupt_on_the_calling_thread_spoils_nothing(make_edit, make_panel, model):
    panel = make_panel()
    for at in (1, 2, 3, 4):  # in the keyframe pass and in the frame pass
        with Hook(model.unet, at, interrupt), pytest.raises(KeyboardInterrupt):
            panel.controls.run.click()
        assert panel.state.position == panel.state.branches[0].edit.index < STEPS
        assert panel.schedule.position == panel.schedule.wish == panel.state.position and not panel.controls.run.disabled
    panel.controls.run.click()
    assert torch.equal(panel.state.branches[0].edit.latents, make_edit().run().latents)


def test_an_interrupt_of_the_kernel_stops_a_run_after_its_step(make_edit, make_panel, model):
    "The handler that the panel's thread sets is called as the signal would call it; see test_panel_base for the signal."
    panel = make_panel(threaded=True)
    with running(panel, model.unet, 7):  # in the second step: the first asks three branches for keyframes and frames
        _heard(signal.SIGINT, None)
    assert panel.state.position == 2 == panel.state.wish and panel.errors.text == "" and not panel.controls.run.disabled
    panel.controls.run.click()
    assert panel.state.worker.wait(PATIENCE)
    assert torch.equal(panel.state.branches[0].edit.latents, make_edit().run().latents)


def test_two_clicks_on_run_and_clicks_in_a_run(make_edit, make_panel, model):
    "Run again changes nothing. Back and Step leave the run: they count from the step that is shown."
    panel = make_panel(threaded=True)
    with running(panel, model.unet, 1) as unet:
        panel.controls.run.click()
        assert panel.errors.text == "" and panel.controls.run.disabled and not panel.controls.pause.disabled
        assert panel.fork.fork.disabled
    assert unet.calls == 2 * 3 * (STEPS // 2) + 2 * 2 * (STEPS // 2)  # guidance acts at half of these few steps
    assert torch.equal(panel.state.branches[0].edit.latents, make_edit().run().latents)
    other = make_panel(threaded=True)
    with running(other, model.unet, 7):
        assert other.state.position == 1
        other.controls.step.click()
    assert other.state.position == 2 and other.errors.text == ""


def test_the_last_wish_counts(make_panel, model):
    "Clicks and keys that come while a step is being taken add up, and none is refused."
    panel = make_panel(threaded=True)
    with held(panel, model.unet, panel.controls.step.click):
        panel.controls.step.click()
        panel.schedule._handle_custom_msg(dict(by=1), [])
        assert panel.schedule.wish == 3 and panel.schedule.busy and panel.schedule.position == 0
    assert panel.state.position == 3 and panel.errors.text == "" and not panel.schedule.busy
    with held(panel, model.unet, panel.controls.end.click):
        jump(panel, 1)
    assert panel.state.position == 1 and panel.state.branches[0].edit.index == STEPS
    panel.schedule._handle_custom_msg(dict(by=-9), [])  # a key may ask for more than there is
    assert panel.state.worker.wait(PATIENCE) and panel.state.position == 0 and panel.errors.text == ""


def test_a_fork_after_a_step_waits_for_it(make_panel, model):
    "Work is done in the order of the clicks; the decoding of pictures gives way."
    panel = make_panel(threaded=True)
    panel.fork.fields["prompt"].value = "a red star"
    with held(panel, model.unet, panel.controls.step.click):
        panel.fork.fork.click()
    assert panel.state.branches[1].edit.index == 1 and panel.errors.text == panel.fork.errors.text == ""


def test_the_last_pictures_stay_until_new_ones_are_there(make_panel):
    "No film is grey or shorter at any moment, neither when a step is taken nor when a branch begins."
    panel, films, rows = make_panel(), [], []
    panel.player.observe(lambda change: films.append(change.new), "films")
    panel.boxes[0].strip.observe(lambda change: rows.append(change.new), "rows")
    panel.controls.step.click()
    panel.fork.fields["prompt"].value = "a red star"
    panel.fork.fork.click()
    panel.controls.run.click()
    panel.controls.back.click()
    shown = [film for each in films for film in each] + [film for each in rows for film in each] + panel.boxes[1].strip.rows
    assert len(films) > 4 and all(len(film) == 2 and panel._grey not in film for film in shown)


def test_a_fork_that_changes_nothing_any_more_is_said(make_edit, make_panel):
    panel = make_panel(make_edit(guidance_stop=0.5, pnp_attn_t=0.5))  # both act in two of four steps
    assert acting_steps(panel.state.branches[0].edit) == dict(guidance=2, attention=2, features=3)
    hint, fields = (lambda: panel.fork.hint.value), panel.fork.fields
    assert hint() == "" and not panel.fork.fork.disabled
    jump(panel, 2)
    assert "Guidance acts in steps 1 to 2" in hint() and "raise Guidance stop" in hint() and not panel.fork.fork.disabled
    fields["guidance_stop"].value = 1.0
    assert hint() == ""
    fields["pnp_attn_t"].value = 0.25
    assert "attention changes nothing" in hint()
    fields["pnp_attn_t"].value = 1.0
    assert hint() == ""
    panel.controls.end.click()
    assert "The edit is done" in hint() and panel.fork.fork.disabled
    with pytest.raises(EditError, match="go back to an earlier step to fork"):
        panel.state.fork(prompt="a red star")
    assert fork_hint(panel.state.branches[0].edit, 2, dict(guidance_stop=7)) == ""  # refused in words when it is made


def test_a_fork_changes_the_keyframe_interval(make_edit, make_panel):
    panel = make_panel(make_edit(4))
    panel.controls.step.click()
    panel.state.keyframe_interval = 9  # an advice may be longer than the clip
    assert panel.fork.fields["keyframe_interval"].value == panel.state.keyframe_interval == 4
    panel.fork.fork.click()
    panel.controls.run.click()
    assert panel.errors.text == panel.fork.errors.text == "" and len(panel.boxes[1].strip.outlined) == 1
    assert "keyframe interval 4" in panel.boxes[1].title.value and "keyframe interval 2" in panel.boxes[0].place.value


def test_pause_stops_after_the_step_and_run_goes_on(make_edit, make_panel, model):
    panel = make_panel(threaded=True)
    with running(panel, model.unet, 7):  # in the second step: the first asks three branches for keyframes and frames
        panel.controls.pause.click()
    assert panel.state.position == 2
    assert [len(film) for film in panel.player.films] == [2, 2]  # and all its frames are decoded
    panel.controls.run.click()
    assert panel.state.worker.wait(PATIENCE)
    assert torch.equal(panel.state.branches[0].edit.latents, make_edit().run().latents)


def test_closing_in_a_run_ends_its_thread(make_edit, make_panel, model):
    edit = make_edit()
    panel = make_panel(edit, threaded=True)
    with running(panel, model.unet, 1):
        panel.close()
    assert edit.index == 1 and edit.run().done


def test_forks_stand_beside_their_parent(make_edit, make_panel):
    panel = make_panel()
    panel.controls.step.click()
    panel.fork.fields["pnp_attn_t"].value = 0.0
    panel.fork.fields["prompt"].value = "a <b>red</b> star"
    panel.fork.fork.click()
    panel.controls.run.click()
    parent, fork = panel.state.branches
    assert torch.equal(parent.edit.latents, make_edit().run().latents) and not torch.equal(fork.edit.latents, parent.edit.latents)
    assert len(panel.strips.children) == 2 and panel.player.names == ["source", "A: expected", "B: expected"]
    assert "attention injected, A: steps 1 to 3" in panel.schedule.text and "attention injected, B: no step" in panel.schedule.picture
    assert "features injected: steps" in panel.schedule.text  # one bar for both
    assert "<b>" not in panel.boxes[1].title.value and "from step 1" in panel.boxes[1].title.value
    jump(panel, 1)
    assert panel.boxes[0].strip.rows[0] == panel.boxes[1].strip.rows[0]  # the step that they share


def test_a_fork_that_decides_what_is_done_is_refused_in_words(make_edit):
    state = DenoiseState(make_edit(), Worker(threaded=False))
    state.step()
    with pytest.raises(EditError, match="method decides steps already taken"):
        state.fork(method="sdedit")
    with pytest.raises(ValueError, match="did you mean 'prompt'"):
        state.fork(promt="a star")
    assert len(state.branches) == 1


def test_unknown_layers_are_said_with_those_there_are(make_panel):
    panel = make_panel()
    panel.controls.step.click()
    panel.layer.offer([*panel.layer.options, "up 9 · 1×1 · attn 0"], "up 9 · 1×1 · attn 0")
    panel.features.value = True
    assert "There are" in panel.errors.text and "attn" in panel.errors.text


def test_the_schedule_is_readable_without_colours():
    acting = dict(A=dict(guidance=1, attention=1, features=0), B=dict(guidance=2, attention=1, features=0))
    assert schedule_text([1.0, 0.5, 0.0], 1, acting) == (
        "step 1 of 2, noise level 0.50; guidance, A: step 1; guidance, B: steps 1 to 2; attention injected: step 1; features injected: no step"
    )
    picture = schedule_picture([1.0, 0.5, 0.0], 1, acting, taken=1)
    assert "guidance, B: steps 1 to 2" in picture and "features injected: no step" in picture and picture.count("tfnb-schedule-bar") == 4
    assert 'points="0.00,0.00 50.00,25.00"' in picture and 'points="50.00,25.00 100.00,50.00"' in picture  # taken, and not yet
