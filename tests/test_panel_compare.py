"ComparePanel without a browser: what it refuses, what it shows, and that a voter cannot learn which clip is which."

import numpy as np
import pytest
import scipy.stats
import traitlets
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.clip import Clip, ClipError
from tokenflow_nb.panels.compare import (
    VIEWS, ComparePanel, CompareState, Vote, VoteError, compare_films, difference, time_slice, vote_order, vote_table, wilson_interval,
)

NAMES = ["source", "ours & more", "<i>theirs</i>"]


def make_clip(value, frames=3, size=(12, 16), fps=8):
    return Clip(np.full((frames, *size, 3), value, np.uint8), fps)


@pytest.fixture
def panel():
    panel = ComparePanel([make_clip(value) for value in (0, 100, 200)], NAMES)
    yield panel
    panel.close()


def inside(box):
    return [box, *(widget for child in getattr(box, "children", ()) for widget in inside(child))]


def told(panel):
    "All that a browser was told of a panel, but for the pixels and the canvas code."
    traits = [item for widget in inside(panel) for item in widget.get_state().items() if item[0] not in ("films", "_esm", "_css")]
    return str([(name, value) for name, value in traits if "IPY_MODEL" not in str(value)])


@pytest.mark.parametrize(("other", "remedy"), [
    (make_clip(1, frames=2), r"clip\[:2\]"),
    (make_clip(1, size=(16, 12)), r"fit_clip\(clip, size=\(12, 16\)\)"),
    (make_clip(1, fps=24), r"fps=8"),
    (make_clip(1).frames, "as_clip"),
])
def test_what_does_not_fit_is_refused_with_the_way_out(other, remedy):
    with pytest.raises(ClipError, match=remedy):
        ComparePanel([make_clip(0), other])


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", ""], ["a", 3]])
def test_names_must_tell_clips_apart(names):
    with pytest.raises(ClipError, match="2 different texts"):
        CompareState([make_clip(0), make_clip(1)], names)


def test_one_clip_is_no_comparison():
    with pytest.raises(ClipError, match="at least two"):
        ComparePanel([make_clip(0)])


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_of_one_frame(view):
    panel = ComparePanel([make_clip(0, frames=1), make_clip(255, frames=1)])
    panel.view.value = view
    assert panel.player.films and all(len(film) == 1 for film in panel.player.films) and panel.errors.text == ""
    assert panel.player.wipe == (view == "wipe")
    panel.close()


def test_views_follow_their_choosers(panel):
    panel.view.value = "difference"
    assert panel.player.names[0].startswith("source − ours & more: black is equal, the brightest 39%")
    panel.second.value = 2
    assert "theirs" in panel.player.names[0] and "78%" in panel.player.names[0]
    panel.second.value = 0
    assert "the mean 0.0%" in panel.player.names[0]  # a clip beside itself


def test_difference_and_cut_are_what_they_say():
    first, second = np.zeros((2, 4, 5, 3), np.uint8), np.zeros((2, 4, 5, 3), np.uint8)
    second[1, 2, 3] = (255, 0, 0)
    expected = np.zeros((2, 4, 5))
    expected[1, 2, 3] = 1 / 3
    assert np.allclose(difference(first, second), expected)
    assert np.array_equal(time_slice(second, 2), second[:, 2])
    assert np.array_equal(time_slice(second, 2, height=4), second[[0, 0, 1, 1], 2])


def test_bad_values_are_refused_in_words(panel):
    for name, value in dict(first=3, second=-1, row=12, view="sideways").items():
        with pytest.raises(traitlets.TraitError, match=name):
            setattr(panel.state, name, value)


@given(st.integers(2, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_every_pair_is_asked_equally_often_on_both_sides(clips, rounds, seed):
    order = vote_order(clips, rounds, seed)
    assert len(order) == rounds * clips * (clips - 1) // 2
    for a in range(clips):
        for b in range(a):
            assert order.count((a, b)) + order.count((b, a)) == rounds
            assert abs(order.count((a, b)) - order.count((b, a))) <= 1


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilsons_interval_is_scipys(wins, losses, level):
    trials = max(1, wins + losses)
    expected = scipy.stats.binomtest(wins, trials).proportion_ci(level, method="wilson")
    assert np.allclose(wilson_interval(wins, trials, level), (expected.low, expected.high), atol=1e-9)


def vote(panel, seed, answer):
    "A whole vote; what the browser was told before each answer."
    panel.state.start_vote(rounds=4, seed=seed)
    transcript = []
    while panel.state.voting:
        transcript.append(told(panel))
        answer(panel).click()
    return transcript


def test_nothing_but_pixels_depends_on_the_order(panel):
    "Whatever the seed drew, the browser is told the same: so nothing in it can give the names away."
    one, two = (vote(panel, seed, lambda panel: panel.booth.a) for seed in (1, 2))
    assert vote_order(3, 4, 1) != vote_order(3, 4, 2)
    assert one == two and len(one) == 12
    assert not any(name in text for text in one for name in ("ours", "theirs", "source"))


def test_a_vote_counts_what_was_seen(panel):
    "A voter who always prefers the brighter picture, found by its pixels, always prefers the brighter clip."
    vote(panel, 4, lambda panel: panel.booth.a if panel.player.films[0][0] == bright(panel) else panel.booth.b)
    results = {(each.clip, each.other): (each.wins, each.trials) for each in panel.state.vote.preferences()}
    assert results == {(NAMES[0], NAMES[1]): (0, 4), (NAMES[0], NAMES[2]): (0, 4), (NAMES[1], NAMES[2]): (0, 4)}
    assert "&lt;i&gt;theirs&lt;/i&gt; preferred" in panel.result.value and "<i>" not in panel.result.value


def bright(panel):
    from tokenflow_nb.panels.films import encode_png

    return encode_png(panel.state.clips[max(panel.state.shown)][0])


def test_a_vote_is_unreadable_before_its_end(panel):
    panel.booth.start.click()
    vote = panel.state.vote
    for look in (vote.preferences, lambda: vote.seed, lambda: vote.chose_a, lambda: vote_table(vote)):
        with pytest.raises(VoteError, match="open"):
            look()
    assert panel.result.value == "" and not any(name in repr(vote) for name in NAMES)


def test_a_vote_that_is_given_up_leaves_nothing(panel):
    panel.booth.start.click()
    panel.booth.a.click()
    panel.booth.give_up.click()
    assert panel.state.vote is None and panel.result.value == "" and panel.player.names == NAMES[:2]
    panel.booth.a.click()  # a click that came late
    assert "no vote is under way" in panel.errors.text
    panel.booth.start.click()
    assert panel.errors.text == "" and "Question 1" in panel.booth.question.value


def test_seeds_are_drawn_afresh_and_told_at_the_end():
    seeds = set()
    for _ in range(3):
        one = Vote(["a", "b"], rounds=1)
        one.answer("A")
        seeds.add(one.seed)
    assert len(seeds) == 3


def test_choosers_cannot_disturb_a_vote(panel):
    panel.booth.start.click()
    shown = compare_films(panel.state)
    panel.view.value = "difference"
    panel.first.value = 1
    assert [name for name, _ in compare_films(panel.state)] == ["A", "B"] and all(
        np.array_equal(one, two) for (_, one), (_, two) in zip(shown, compare_films(panel.state))
    )


def test_close_frees_clips_pictures_and_widgets():
    panel = ComparePanel([make_clip(0), make_clip(1)])
    widgets = inside(panel)
    panel.close()
    panel.close()
    assert panel.state.clips == () and len(panel.state.cache) == 0
    assert all(widget.comm is None for widget in widgets)
