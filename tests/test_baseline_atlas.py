"A clip taken apart into two moving pictures: does it come out again, and does paint move as the things in it do?"

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.clip import Clip
from tokenflow_nb.compare.atlas import LayeredAtlas, fit_affine, fit_atlas, layer_motion, mask_from_motion, paint
from tokenflow_nb.compare.atlas import where_seen
from tokenflow_nb.compare.job import Job
from tokenflow_nb.edit import EditConfig
from tokenflow_nb.measure.flow import Flow, estimate_flow
from tokenflow_nb.measure.metrics import masked_psnr
from tokenflow_nb.toy.world import Scene

FRAMES, MIDDLE = 6, 3
SCENE = Scene("heart", "purple", "grass", radius=32, velocity=(2, -1), spin=0.04, growth=0.004, centre=(54, 68), pan=(1.5, 0.5))
TRUTH = SCENE.truth(FRAMES)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def on_object(point: tuple[float, float], frame: int) -> np.ndarray:
    "Where a point of the object in the middle frame is in another, from the scene's own numbers."
    centre = lambda index: np.add(SCENE.centre, np.multiply(index, SCENE.velocity)) - 0.5  # noqa: E731
    turn, scale = SCENE.spin * (frame - MIDDLE), (1 + SCENE.growth) ** (frame - MIDDLE)
    way = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return way @ (point - centre(MIDDLE)) + centre(frame)


@pytest.fixture(scope="module")
def atlas(store):
    source = SCENE.render(FRAMES)
    return fit_atlas(source, estimate_flow(source, store=store), TRUTH.object_mask)


def test_the_clip_comes_out_again(atlas):
    again, source = atlas.render(), SCENE.render(FRAMES)
    assert masked_psnr(again, source) > 30
    assert masked_psnr(again, source, TRUTH.object_mask) > 28


def test_alpha_is_the_mask(atlas):
    alpha = atlas.alpha()
    assert overlap(alpha > 0.5, TRUTH.object_mask) > 0.95
    assert ((alpha > 0.1) & (alpha < 0.9)).mean() < 0.08  # one or the other nearly everywhere


def test_each_layer_holds_its_own_part(atlas):
    "A red foreground paints the object, all of it, and nothing else."
    red = atlas.render(foreground=lambda uv: torch.tensor([1.0, 0.0, 0.0]).expand(len(uv), 3))
    core = np.stack([cv2.erode(np.uint8(mask), np.ones((7, 7))) > 0 for mask in TRUTH.object_mask])
    far = np.stack([cv2.dilate(np.uint8(mask), np.ones((7, 7))) == 0 for mask in TRUTH.object_mask])
    assert np.abs(red[core] - np.array([255.0, 0, 0])).mean() < 8
    assert masked_psnr(red, SCENE.render(FRAMES), far) > 28


@pytest.mark.parametrize("point", [(50, 66), (66, 60)])
def test_a_dot_painted_on_the_object_follows_it(atlas, point):
    assert TRUTH.object_mask[MIDDLE, point[1], point[0]]
    frame = SCENE.render(FRAMES)[MIDDLE].copy()
    cv2.circle(frame, point, 4, (0, 255, 255), -1)
    painted = atlas.render(**paint(atlas, frame, MIDDLE))
    for index in range(FRAMES):
        cyan = (painted[index][..., 0] < 90) & (painted[index][..., 1] > 160) & (painted[index][..., 2] > 160)
        down, across = np.nonzero(cyan)
        assert len(down) > 20
        assert np.abs((across.mean(), down.mean()) - on_object(point, index)).max() < 0.7


def test_a_dot_painted_on_the_ground_stays_on_it_and_off_the_object(atlas):
    frame = SCENE.render(FRAMES)[MIDDLE].copy()
    cv2.circle(frame, (20, 24), 4, (0, 255, 255), -1)
    painted = atlas.render(**paint(atlas, frame, MIDDLE))
    for index in range(FRAMES):
        cyan = (painted[index][..., 0] < 90) & (painted[index][..., 1] > 160) & (painted[index][..., 2] > 160)
        down, across = np.nonzero(cyan)
        assert len(down) > 20
        wanted = (20 - SCENE.pan[0] * (index - MIDDLE), 24 - SCENE.pan[1] * (index - MIDDLE))
        assert np.abs((across.mean(), down.mean()) - np.array(wanted)).max() < 0.7
        assert not (cyan & TRUTH.object_mask[index]).any()


def test_a_known_edit_of_the_middle_frame_becomes_the_known_edit_of_all(atlas):
    ideal = SCENE.replace(material="gold").render(FRAMES)
    painted = atlas.render(**paint(atlas, ideal[MIDDLE], MIDDLE))
    assert masked_psnr(painted, ideal) > 28 and masked_psnr(painted, ideal, TRUTH.object_mask) > 22


def test_what_the_painted_frame_does_not_show_keeps_the_source(atlas):
    "The ground moves left by 1.5 pixels a frame: the left edge of the first frame has left the middle one."
    painted, source = atlas.render(**paint(atlas, np.full((128, 128, 3), 255, np.uint8), MIDDLE)), SCENE.render(FRAMES)
    seen, unseen = (slice(4, 24), slice(8, 128)), (slice(4, 124), slice(0, 3))
    assert painted[0][seen].min() > 225
    assert np.abs(painted[0][unseen].astype(float) - source[0][unseen]).mean() < 12


def test_coordinates_invert(atlas):
    nodes = torch.rand(200, 2) * 70 + 30
    for layer in (atlas.foreground, atlas.background):
        for frame in (0, MIDDLE, FRAMES - 1):
            assert (layer.uv(where_seen(layer, nodes, frame)) - nodes).abs().max() < 0.02


def test_motion_is_found_from_estimated_flow(store):
    flow = estimate_flow(SCENE.render(FRAMES), store=store)
    ground = layer_motion(flow, ~TRUTH.object_mask, MIDDLE)
    wanted = np.outer(np.arange(FRAMES) - MIDDLE, SCENE.pan)
    assert np.abs(ground @ (64, 64, 1) - (64, 64) - wanted).max() < 0.3
    points = np.array([(50.0, 66.0), (66.0, 60.0)])
    moved = layer_motion(flow, TRUTH.object_mask, MIDDLE)
    for frame in range(FRAMES):
        for point in points:
            back = moved[frame][:, :2] @ on_object(point, frame) + moved[frame][:, 2]
            assert np.abs(back - point).max() < 0.5


def test_without_a_mask_what_moves_by_itself_is_the_foreground(store):
    flow = estimate_flow(SCENE.render(FRAMES), store=store)
    assert overlap(mask_from_motion(flow), TRUTH.object_mask) > 0.6
    assert overlap(mask_from_motion(Flow.exact(TRUTH)), TRUTH.object_mask) > 0.9


def test_a_clip_in_which_nothing_moves_is_all_background():
    still, shape = SCENE.render(1).frames.repeat(3, 0), (2, 128, 128)
    flow = Flow(np.zeros((*shape, 2), np.float32), np.zeros((*shape, 2), np.float32), np.ones(shape, bool), np.ones(shape, bool))
    atlas = fit_atlas(Clip(still), flow, visits=8)
    assert (atlas.alpha() < 0.5).all() and masked_psnr(atlas.render(), still) > 24


@given(st.lists(st.floats(-0.1, 0.1), min_size=4, max_size=4), st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 99))
def test_an_affine_motion_is_found_though_a_fifth_of_the_points_lie(change, right, down, seed):
    motion = np.column_stack([np.eye(2) + np.reshape(change, (2, 2)), (right, down)])
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 100, (300, 2))
    end = start @ motion[:, :2].T + motion[:, 2]
    end[:60] += rng.uniform(4, 12, (60, 2))
    assert np.abs(np.column_stack([start, np.ones(300)])[60:] @ (fit_affine(start, end) - motion).T).max() < 0.15


def test_a_fit_repeats_itself_and_leaves_the_callers_randomness_alone(store):
    source = SCENE.render(2)
    flow = estimate_flow(source, store=store)
    state = torch.get_rng_state()
    one, again = (fit_atlas(source, flow, TRUTH.object_mask[:2], visits=0.5).render() for _ in range(2))
    assert (one == again).all() and (torch.get_rng_state() == state).all()


def test_a_job(model, store):
    job = Job(model, SCENE.render(3), EditConfig("a gold heart on grass", num_inference_steps=3), mask=TRUTH.object_mask[:3], store=store)
    result = LayeredAtlas(visits=8)(job)
    edited = job.edit_images([1])[0]
    assert result.frames.shape == job.clip.frames.shape and result.fps == job.clip.fps
    assert masked_psnr(result.frames[1:2], edited[None]) > 22  # the painted frame looks as it was painted
    single = Job(model, job.clip[:1], job.config, store=store)
    assert len(LayeredAtlas()(single)) == 1
    with pytest.raises(ValueError, match="3 frames"):
        LayeredAtlas(keyframe=3)(job)


@pytest.mark.parametrize("bad", [dict(keyframe=-1), dict(keyframe=0.5), dict(visits=0), dict(visits=float("inf"))])
def test_settings_that_cannot_be_meant(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LayeredAtlas(**bad)
