"ComparePanel without a browser: what it refuses, what it shows, and that a voter cannot learn which clip is which."

import numpy as np
import pytest
import scipy.stats
import traitlets
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.clip import Clip, ClipError
from tokenflow_nb.config import EditConfig
from tokenflow_nb.panels.compare import (
    ComparePanel, CompareState, Preference, Vote, VoteError, difference, named_clips, vote_order, vote_table, wilson_interval,
)
from tokenflow_nb.panels.films import VIEWS, encode_webp
from tokenflow_nb.result import EditResult

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
    "All that a browser was told of a panel, but for the pixels, the canvas code, and how many questions there were before."
    traits = [item for widget in inside(panel) for item in widget.get_state().items() if item[0] not in ("_shown", "question", "_esm", "_css")]
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


def test_a_clip_of_one_frame_can_be_compared():
    panel = ComparePanel([make_clip(0, frames=1), make_clip(255, frames=1)])
    assert [len(film) for film in panel.player.films] == [1, 1] and panel.player.views == list(VIEWS) and panel.errors.text == ""
    panel.close()


def test_films_follow_their_choosers_and_are_not_sent_again(panel):
    ids = [film.id for film in panel.state.films]
    for first, second in ((0, 2), (2, 2), (1, 0)):
        panel.first.value, panel.second.value = first, second
        assert panel.player.names == [NAMES[first], NAMES[second]]
        assert [each["id"] for each in panel.player._shown] == [ids[first], ids[second]]


def result(prompt, value, source=None):
    source = make_clip(0) if source is None else source
    return EditResult(make_clip(value), source, EditConfig(prompt), model={}, timings={})


@pytest.mark.parametrize("given, names, expected", [
    ([result("a star", 1), result("a sun", 2)], None, ["source", "a star", "a sun"]),
    (result("a star", 1), None, ["source", "a star"]),
    ([result("a star", 1), result("a star", 2)], None, ["source", "a star", "a star (2)"]),
    ([make_clip(0), result("a star", 1)], None, ["clip 1", "a star"]),
    ([result("a star", 1), result("a sun", 2, make_clip(9))], None, ["a star", "a sun"]),
    ({"before": make_clip(0), "<b>": result("a star", 1)}, None, ["before", "<b>"]),
    ([result("a star", 1), result("a sun", 2)], ["one", "two"], ["source", "one", "two"]),
])
def test_results_name_themselves_beside_their_common_source(given, names, expected):
    clips, found = named_clips(given, names)
    assert found == expected and len(clips) == len(found)
    panel = ComparePanel(given, names)
    assert panel.player.names == expected[:2]
    panel.close()


def test_the_difference_is_what_it_says():
    first, second = np.zeros((2, 4, 5, 3), np.uint8), np.zeros((2, 4, 5, 3), np.uint8)
    second[1, 2, 3] = (255, 0, 0)
    expected = np.zeros((2, 4, 5))
    expected[1, 2, 3] = 1 / 3
    assert np.allclose(difference(first, second), expected)


def test_bad_values_are_refused_in_words(panel):
    for name, value in dict(first=3, second=-1).items():
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


def test_no_film_is_known_from_before_the_vote_or_from_another_question(panel):
    seen = {film.id for film in panel.state.films}
    panel.state.start_vote(rounds=4, seed=1)
    while panel.state.voting:
        ids = {each["id"] for each in panel.player._shown}
        assert len(ids) == 2 and not ids & seen
        assert all(set(each) - {"id", "poster"} == {"frames", "width", "height", "exact", "lossless"} for each in panel.player._shown)
        seen |= ids
        panel.booth.a.click()


def test_a_vote_counts_what_was_seen(panel):
    "A voter who always prefers the brighter picture, found by its pixels, always prefers the brighter clip."
    vote(panel, 4, lambda panel: panel.booth.a if panel.player.films[0][0] == bright(panel) else panel.booth.b)
    results = {(each.clip, each.other): (each.wins, each.trials) for each in panel.state.vote.preferences()}
    assert results == {(NAMES[0], NAMES[1]): (0, 4), (NAMES[0], NAMES[2]): (0, 4), (NAMES[1], NAMES[2]): (0, 4)}
    assert "&lt;i&gt;theirs&lt;/i&gt; preferred" in panel.result.value and "<i>" not in panel.result.value


def bright(panel):
    return encode_webp(panel.state.clips[max(panel.state.shown)][0], None)


@given(st.lists(st.sampled_from(["A", "B", "cannot tell"]), min_size=6, max_size=6), st.integers(0, 99))
def test_who_cannot_tell_is_counted_and_left_out(answers, seed):
    one = Vote(["x", "y"], rounds=6, seed=seed)
    for answer in answers:
        one.answer(answer)
    [found], torn = one.preferences(), answers.count("cannot tell")
    assert (found.trials, found.undecided) == (6 - torn, torn) and 0 <= found.wins <= found.trials
    assert (one.chose_a.wins, one.chose_a.trials, one.chose_a.undecided) == (answers.count("A"), 6 - torn, torn)
    assert found.interval == wilson_interval(found.wins, found.trials)
    assert ("cannot tell" in str(found)) == bool(torn)
    assert Preference("x", "y", 0, 0, 6).verdict == "undecided"


def test_keys_answer_and_a_key_that_was_held_answers_once(panel):
    panel.booth.rounds.value = 1
    panel.booth.start.click()
    asked = panel.player.question
    for key, question in (("a", asked), ("a", asked), ("c", asked + 1), ("b", asked + 2)):
        panel.player._heard(panel.player, dict(pressed=key, question=question), [])
    assert panel.state.vote.done and panel.errors.text == "" and panel.player.letters == []
    assert sum(each.undecided for each in panel.state.vote.preferences()) == 1 and ", 1 cannot tell" in panel.result.value


def test_a_vote_hides_the_views_and_gives_them_back(panel):
    panel.player.view = "wipe"
    panel.booth.start.click()
    assert (panel.player.view, panel.player.views, panel.player.playing) == ("side by side", ["side by side"], True)
    panel.booth.a.click()
    panel.booth.give_up.click()
    assert (panel.player.view, panel.player.views, panel.player.playing) == ("wipe", list(VIEWS), False)


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
    before = panel.state.shown
    panel.first.value = 1
    assert panel.player.names == ["A", "B"] and panel.state.shown == before


def test_close_frees_clips_films_and_widgets():
    panel = ComparePanel([make_clip(0), make_clip(1)])
    widgets = inside(panel)
    panel.close()
    panel.close()
    assert panel.state.clips == () and panel.state.films == []
    assert all(widget.comm is None for widget in widgets)
