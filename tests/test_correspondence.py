"Matches, redundancy, advice and consistency on recordings whose right answers are known."

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_recording import made_recording

from tokenflow_nb.correspondence import (
    Table, advise, along_matches, cells, consistency_figure, endpoint_errors, endpoint_table, follow_flow, ladder, last_good, match_frames,
    redundancy, shade, shared_colours, trace, trace_tokens, true_interval, xt_slice,
)
from tokenflow_nb.features import FeatureError
from tokenflow_nb.toy.world import Scene

FINE = "up 2 attn 1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_recording(tmp_path_factory.mktemp("made"))


@given(seed=st.integers(0, 1000), first=st.integers(2, 30), columns=st.integers(1, 6))
def test_matches_are_those_of_brute_force(seed, first, columns):
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(first, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    there, back = match_frames(one, other, columns)
    cosines = torch.nn.functional.cosine_similarity(one[:, None], other[None], dim=-1)
    assert torch.allclose(there.similarity.double(), cosines.amax(1), atol=1e-5)
    assert torch.allclose(cosines.gather(1, there.place[:, None])[:, 0], cosines.amax(1), atol=1e-5)
    place = back.place[there.place]
    for token in range(first):
        rows, across = divmod(int(place[token]), columns), divmod(token, columns)
        assert there.cycle[token] == pytest.approx(np.hypot(rows[0] - across[0], rows[1] - across[1]), abs=1e-5)


@given(seed=st.integers(0, 1000), frame=st.integers(0, 3), token=st.integers(0, 15))
def test_a_trace_is_one_row_of_the_matches(seed, frame, token):
    tokens = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(seed))
    place, similarity, cycle = trace_tokens(tokens, frame, token, 4)
    for other in range(4):
        there, _ = match_frames(tokens[frame], tokens[other], 4)
        assert place[other] == there.place[token] and cycle[other] == there.cycle[token]
        assert similarity[other] == pytest.approx(float(there.similarity[token]), abs=1e-5)


def test_a_point_is_found_where_it_moved(made):
    recording, _, _ = made
    found = trace(recording, FINE, 1, frame=2, point=(0.45, 0.3))  # token (2, 3), and one to the right in each frame
    assert found.tokens[:, 0].tolist() == [2] * 6 and found.tokens[:, 1].tolist() == [1, 2, 3, 4, 5, 6]
    assert (found.cycle == 0).all() and found.similarity.min() > 0.99


@pytest.mark.parametrize("point", [(1.01, 0.5), (0.5, -0.1), (float("nan"), 0.5)])
def test_a_point_outside_is_refused(made, point):
    with pytest.raises(ValueError, match="outside"):
        trace(made[0], FINE, 1, point=point)


def test_what_is_not_recorded_is_named(made):
    recording, _, truth = made
    for ask in (
        lambda: trace(recording, "up 3 attn 0", 1), lambda: redundancy(recording, FINE, 7), lambda: trace(recording, FINE, 1, frame=6),
        lambda: endpoint_errors(recording, truth, FINE, 7), lambda: advise(recording, 7),
    ):
        with pytest.raises(FeatureError, match="there are|There are"):
            ask()
    with pytest.raises(FeatureError, match="no two recorded frames"):
        endpoint_errors(recording, truth, FINE, 1, distance=6)


def test_redundancy_of_a_rolling_picture(made):
    found = redundancy(made[0], FINE, 1)
    assert found.maps.shape == (6, 8, 8) and found.distances == [1, 2, 3, 4]
    assert (np.diff(found.similarity) < 0).all() and (np.diff(found.returned) < 0).all()
    assert found.returned[0] >= 7 / 8  # one column of eight leaves the picture
    assert (found.maps[2][:, 3] > 0.99).all() and (found.maps[0][:, 7] < 0.95).all()  # the middle stays, the right edge is gone


def test_redundancy_tells_and_can_be_ended(made):
    calls = []
    redundancy(made[0], FINE, 1, callback=lambda: calls.append(1))
    assert len(calls) == 5 + 4 + 3 + 2
    with pytest.raises(KeyboardInterrupt):
        redundancy(made[0], FINE, 1, callback=lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_one_frame_has_nothing_to_compare_with(tmp_path):
    recording, _, truth = made_recording(tmp_path, frames=1)
    found, advice = redundancy(recording, FINE, 1), advise(recording, 1)
    assert np.isnan(found.maps).all() and found.distances == [] and (shade(found.maps) == 128).all()
    assert advice.interval == 1 and "one frame" in str(advice) and true_interval(recording, truth, 1) == 1
    assert trace(recording, FINE, 1).tokens.shape == (1, 2)


@pytest.mark.parametrize("frames", [*range(1, 12), 64, 200])
def test_the_ladder_rises_and_stays_below_the_length(frames):
    steps = ladder(frames)
    assert steps == sorted(set(steps)) and all(1 <= step < frames for step in steps) and (frames == 1) == (steps == [])
    assert all(later <= 2 * earlier for earlier, later in zip(steps, steps[1:]))


def test_matches_of_a_rolling_picture_have_no_error(made):
    recording, _, truth = made
    errors, still = endpoint_errors(recording, truth, FINE, 1, distance=2)
    assert errors.max() < 1e-5 and still == pytest.approx(np.full(len(still), 2.0))
    table = endpoint_table([(recording, truth)], distance=1)
    assert table.columns == ["t = 1", "t = 501", "standing still"] and len(table.rows) == 3
    row, _, value = table.best(2)
    assert value < 1e-5 and row.startswith("up 2")


def test_flow_is_followed_there_and_back():
    scene = Scene("square", "red", "sky", centre=(60, 60), velocity=(1.5, -0.5), spin=0.03, growth=0.01, pan=(0.7, 0.2))
    truth = scene.truth(7)
    there, seen = follow_flow(truth, 1, 6, (32, 32))
    inside = cells(truth.object_mask[1], (32, 32)) == 1
    centre, angle, scale = np.array([60 + 1.5, 60 - 0.5]), 5 * 0.03, 1.01**5
    x, y = np.meshgrid((np.arange(32) + 0.5) * 4, (np.arange(32) + 0.5) * 4)
    right, down = x - centre[0], y - centre[1]
    expected_x = centre[0] + 7.5 + scale * (np.cos(angle) * right - np.sin(angle) * down)
    expected_y = centre[1] - 2.5 + scale * (np.sin(angle) * right + np.cos(angle) * down)
    chosen = inside & seen
    assert chosen.sum() > 50
    assert np.abs((there[..., 1] + 0.5) * 4 - expected_x)[chosen].max() < 0.3 and np.abs((there[..., 0] + 0.5) * 4 - expected_y)[chosen].max() < 0.3
    assert np.allclose(there[seen & ~inside & (cells(truth.object_mask[1], (32, 32)) == 0)] - np.indices((32, 32)).transpose(1, 2, 0)[
        seen & ~inside & (cells(truth.object_mask[1], (32, 32)) == 0)], [-5 * 0.2 / 4, -5 * 0.7 / 4], atol=0.02)


def test_slower_clips_get_longer_intervals(tmp_path):
    advised, true = [], []
    for speed in (0, 1, 2):
        recording, _, truth = made_recording(tmp_path, frames=8, speed=speed)
        advised.append(advise(recording, 1).interval)
        true.append(true_interval(recording, truth, 1))
    assert advised == sorted(advised, reverse=True) and advised[0] > advised[-1]
    assert advised[0] == 6  # all there is to compare: the ladder of 8 frames


def test_best_layers_are_those_that_come_back(tmp_path):
    advice = advise(made_recording(tmp_path, noise=0.1)[0], 1)
    assert advice.layers[0].startswith("up 2") and len(advice.layers) == 2 and "keyframe_interval=" in str(advice)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.05, 0.95))
def test_the_last_good_distance_is_within_the_ladder_and_falls_with_the_demand(shares, good):
    distances = ladder(64)[: len(shares)]
    interval = last_good(distances, np.array(shares), good)
    assert 1 <= interval <= distances[-1] and last_good(distances, np.array(shares), min(1.0, good + 0.05)) <= interval


def test_an_edit_is_judged_along_the_sources_matches(tmp_path):
    source = made_recording(tmp_path)[0]
    steady, flicker = (made_recording(tmp_path, of="edit", noise=noise)[0] for noise in (0.0, 1.0))
    distances, own = along_matches(source, source, FINE, 1)
    curves = {name: along_matches(source, other, FINE, 1)[1] for name, other in dict(steady=steady, flicker=flicker).items()}
    assert distances == [1, 2, 3, 4] and np.allclose(curves["steady"], own, atol=1e-3) and (curves["flicker"] < own).all()


@pytest.mark.parametrize("change, words", [(dict(frames=5), "different clips"), (dict(speed=2), "different clips"), (dict(model_digest="n"), "different models")])
def test_recordings_that_do_not_belong_together_are_refused(tmp_path, change, words):
    source, other = made_recording(tmp_path)[0], made_recording(tmp_path, **change)[0]
    for ask in (lambda: along_matches(source, other, FINE, 1), lambda: shared_colours(source, [other], FINE, 1)):
        with pytest.raises(FeatureError, match=words):
            ask()


def test_the_key_figure(made):
    recording, clip, _ = made
    source, same = shared_colours(recording, [recording], FINE, 1)
    assert np.array_equal(source, same) and source.shape == (6, 8, 8, 3)
    assert np.array_equal(xt_slice(clip.frames, 0.5), clip.frames[:, 16])
    figure = consistency_figure(dict(clip=clip.frames, features=source), columns=3)
    assert len(figure.axes) == 8 and figure.axes[3].images[0].get_array().shape == (6, 32, 3)


def test_a_table_shows_and_escapes():
    table = Table("<i>", ["a<b"], ["c&d", "e"], np.array([[np.nan, 2.0]]))
    assert table.best() == ("a<b", "e", 2.0)
    assert "a&lt;b" in table._repr_html_() and "<i>" not in table._repr_html_()
