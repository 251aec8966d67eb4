"Panels that show the same frame and hand the advice over: duck typing, threads, ends."

import threading

import ipywidgets
import pytest
import traitlets
from made_recording import made_recording

from tokenflow_nb.panels import FeaturePanel, link
from tokenflow_nb.panels.base import Note, Panel, Worker
from tokenflow_nb.panels.inputs import Choice, strip_height

PATIENCE = 60  # seconds until a thread that should have ended counts as stuck


class State(traitlets.HasTraits):
    "What an edit panel's state has for a link: the shown frame, and a setting."

    frame, keyframe_interval, error = traitlets.Int(), traitlets.Int(8), traitlets.Unicode()

    def __init__(self, last=5):
        super().__init__()
        self.last = last

    @traitlets.validate("frame", "keyframe_interval")
    def _check(self, proposal):
        if proposal["value"] > self.last + 1:
            raise traitlets.TraitError(f"{proposal['value']} is more than {self.last}")
        return proposal["value"]

    def close(self):
        pass


def panel_of(state):
    return Panel(state, [Note("words")], "example")


@pytest.fixture
def features(tmp_path):
    recording, clip, _ = made_recording(tmp_path)
    panel = FeaturePanel(recording, clip, worker=Worker(threaded=False))
    yield panel
    panel.close()


def test_a_frame_is_shown_by_all_and_the_advice_taken_over(features):
    edit, other = panel_of(State()), panel_of(State())
    features.state.frame = 2
    link(features, edit, other)
    assert edit.state.frame == other.state.frame == 2  # they begin at the first panel's frame
    features.strip.picked = dict(row=0, frame=4, x=0.5, y=0.5)
    assert edit.state.frame == 4
    edit.state.frame = 1
    assert features.state.frame == features.strip.current == features.player.frame == other.state.frame == 1
    features.advice.click()
    assert edit.state.keyframe_interval == 8  # advised is not yet used
    features.use.click()
    assert edit.state.keyframe_interval == other.state.keyframe_interval == features.state.interval
    edit.state.keyframe_interval = 6
    features.use.click()  # once more
    assert edit.state.keyframe_interval == features.state.interval and other.state.keyframe_interval == features.state.interval


def test_a_frame_that_a_panel_does_not_have_is_the_nearest_or_left_alone(features):
    "The recording has the frames 0 to 5, the other clip 40. Nobody is sent back to a frame that is there for all."
    long = panel_of(State(last=39))
    link(features, long)
    long.state.frame = 30
    assert long.state.frame == 30 and features.state.frame == 5 and not features.errors.text
    short = panel_of(State(last=0))
    linked = link(long, short)
    long.state.frame = 20
    assert short.state.frame == 0 and long.state.frame == 20 and long.state.error == short.state.error == ""
    linked.unlink()


def test_an_interval_that_is_refused_is_said_where_it_was_advised(features):
    refuses = panel_of(State(last=0))
    link(features, refuses)
    features.state.interval = 5
    features.state.use_advice()
    assert refuses.state.keyframe_interval == 8 and "5 is more than 0" in features.errors.text


def test_unlinking_and_closing_end_it(features):
    edit, other = panel_of(State()), panel_of(State())
    linked = link(features, edit, other)
    edit.close()
    features.state.frame = 3
    assert edit.state.frame == 0 and other.state.frame == 3 and linked.panels == [features, other]
    linked.unlink()
    linked.unlink()
    features.state.frame = 4
    assert other.state.frame == 3 and linked.panels == [] and "ended" in repr(linked)
    link(features, other)
    assert other.state.frame == 4
    other.close()
    features.state.frame = 5  # the one that is left goes on alone


def test_two_threads_at_once_end_at_one_frame():
    one, two = panel_of(State(last=999)), panel_of(State(last=999))
    link(one, two)
    barrier = threading.Barrier(2)

    def play(state, frames):
        barrier.wait(PATIENCE)
        for frame in frames:
            state.frame = frame

    threads = [threading.Thread(target=play, args=(one.state, range(500))), threading.Thread(target=play, args=(two.state, range(999, 500, -1)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads) and one.state.frame == two.state.frame


@pytest.mark.parametrize("wrong, words", [((3,), "of type int"), ((None,), "of type NoneType"), ((ipywidgets.Button(),), "of type Button"), ((), "1 panels are given")])
def test_what_is_no_panel_is_refused_in_one_line(wrong, words):
    panel = panel_of(State())
    with pytest.raises(TypeError, match=words) as refused:
        link(panel, *wrong)
    assert "\n" not in str(refused.value) and "give" in str(refused.value)
    with pytest.raises(TypeError, match="the same panel as"):
        link(panel, panel)


# ---- inputs


def test_a_choice_is_one_of_its_options():
    choice, seen = Choice(label="Layer"), []
    choice.offer(["a", "b", "c"], "b", ["one", "one", "two"])
    choice.observe(lambda change: seen.append(choice.value), "index")
    choice.set_state({"index": 2})  # as the browser sends it
    assert seen == ["c"]
    with pytest.raises(ValueError, match="Layer='d' is not there: there are a; b; c"):
        choice.value = "d"
    assert choice.value == "c" and strip_height(0, (10, 10)) == 160
