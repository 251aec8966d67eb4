"Patch matching on warps that are known, and what an edited keyframe becomes in the other frames."

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_nb.clip import Clip
from tokenflow_nb.compare.job import Job
from tokenflow_nb.compare.patches import KeyframePatches, carried_positions, match_patches, vote
from tokenflow_nb.edit import EditConfig
from tokenflow_nb.measure.flow import Flow, estimate_flow
from tokenflow_nb.measure.metrics import masked_psnr
from tokenflow_nb.toy.world import Scene


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    "A picture without two equal places, (h, w, 3) float32 in [0, 1]."
    noise = cv2.GaussianBlur(np.random.default_rng(seed).random((height, width, 3)).astype(np.float32), (0, 0), 1.5)
    return (noise - noise.min()) / (noise.max() - noise.min())


def grid(height: int, width: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)


@settings(max_examples=6)
@given(st.integers(-12, 12), st.integers(-12, 12), st.integers(0, 9))
def test_the_field_of_a_shifted_picture_is_the_shift(right, down, seed):
    wide = texture(48 + 24, 56 + 24, seed)
    source, target = wide[12:-12, 12:-12], wide[12 - down : 60 - down, 12 - right : 68 - right]
    known = grid(48, 56) - (right, down)
    seen = ((known >= 3) & (known < (53, 45))).all(-1)[3:-3, 3:-3]
    field = match_patches(target, source, rounds=4, seed=seed)
    assert (field == known).all(-1)[3:-3, 3:-3][seen].mean() > 0.95


def test_the_field_of_a_turned_picture_is_the_turn():
    source, turn = texture(80, 80), cv2.getRotationMatrix2D((39.5, 39.5), 12, 1.0)
    target = cv2.warpAffine(source, turn, (80, 80), flags=cv2.INTER_CUBIC)
    back = cv2.invertAffineTransform(turn)
    known = grid(80, 80) @ back[:, :2].T + back[:, 2]
    field = match_patches(target, source, rounds=5)
    off = np.linalg.norm(field - known, axis=-1)[14:-14, 14:-14]
    assert np.median(off) < 0.6 and (off < 1.5).mean() > 0.9
    image = source[..., ::-1] ** 2
    wanted = cv2.warpAffine(image, turn, (80, 80), flags=cv2.INTER_CUBIC)
    error = (vote(image, field) - wanted)[14:-14, 14:-14]
    assert np.sqrt((error**2).mean()) < 0.3 * wanted[14:-14, 14:-14].std()


def test_matching_is_never_worse_than_its_start_and_repeats_itself():
    target, source = texture(40, 40, 1), texture(40, 40, 2)
    cost = lambda field: ((target - source[field[..., 1], field[..., 0]]) ** 2).sum()  # noqa: E731
    one, again = (match_patches(target, source, patch=1, start=grid(40, 40), seed=4) for _ in range(2))
    assert (one == again).all() and cost(one) < 0.5 * cost(grid(40, 40))
    assert (match_patches(target, target, start=grid(40, 40)) == grid(40, 40)).all()


def test_matches_stay_inside_a_source_of_another_size():
    field = match_patches(texture(20, 50), texture(31, 17, 1))
    assert field.shape == (20, 50, 2) and field.min() >= 0 and (field <= (16, 30)).all()


def test_voting_with_the_true_field_reproduces_the_picture():
    picture = texture(40, 48)
    for right, down in ((0, 0), (5, -3), (-7, 2)):
        field = np.clip(grid(40, 48) + (right, down), 0, (47, 39))
        exact = (slice(12, -12), slice(12, -12))
        assert np.allclose(vote(picture, field)[exact], np.roll(picture, (-down, -right), (0, 1))[exact])
        assert vote(picture, field).min() >= 0 and vote(picture, field).max() <= 1


def test_a_single_vote_is_a_copy():
    picture, field = texture(20, 20), np.random.default_rng(0).integers(0, 20, (9, 11, 2))
    assert (vote(picture, field, patch=1) == picture[field[..., 1], field[..., 0]]).all()


def test_positions_are_carried_both_ways():
    "A camera that pans by whole pixels: the place in the keyframe is the pixel's own plus all the pans between."
    scene = Scene(background="grass", radius=1, centre=(-40, -40), pan=(3, -2))
    places = carried_positions(Flow.exact(scene.truth(5)), keyframe=2)
    for frame in range(5):
        shift = (places[frame] - grid(128, 128))[10:-10, 10:-10]
        assert np.allclose(shift, (3 * (frame - 2), -2 * (frame - 2)), atol=1e-4)


@pytest.fixture(scope="module")
def repeated():
    "A ground of equal stripes: colour cannot tell them apart, position can."
    wide = np.tile(np.repeat(np.array([40, 200], np.uint8), 4), 20)[None, :, None].repeat(48, 0).repeat(3, 2)
    return Clip(np.stack([wide[:, 4 * t : 4 * t + 64] for t in range(3)]))


def test_where_colours_repeat_the_flow_decides(repeated):
    shape = (2, 48, 64)
    flow = Flow(np.full((*shape, 2), (-4.0, 0.0)), np.full((*shape, 2), (4.0, 0.0)), np.ones(shape, bool), np.ones(shape, bool))
    paint = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (48, 64, 3))
    spread = KeyframePatches().spread(paint, repeated, flow, keyframe=1)
    assert np.abs(spread[2, 6:-6, 6:-12].astype(int) - paint[6:-6, 10:-8]).max() <= 1
    assert np.abs(spread[0, 6:-6, 12:-6].astype(int) - paint[6:-6, 8:-10]).max() <= 1


def test_paint_on_the_keyframe_follows_the_object(store):
    "The edit is known in every frame; only the keyframe is shown to the method."
    scene = Scene("heart", "purple", "grass", radius=30, velocity=(2, 1), spin=0.04, pan=(-1, 0), centre=(52, 56))
    ideal, source = scene.replace(material="gold").render(6), scene.render(6)
    spread = KeyframePatches().spread(ideal[3], source, estimate_flow(source, store=store), keyframe=3)
    mask = scene.truth(6).object_mask
    assert (spread[3] == ideal[3]).all()
    still = np.repeat(ideal.frames[3:4], 6, 0)
    for where in (mask, ~mask):
        assert masked_psnr(spread, ideal, where) > 24
    assert masked_psnr(spread, ideal, mask) > masked_psnr(still, ideal, mask) + 6


def test_a_job(model, store):
    scene = Scene("heart", "purple", "grass", radius=30, velocity=(2, 1), centre=(60, 60))
    job = Job(model, scene.render(3), EditConfig("a gold heart on grass", num_inference_steps=3), store=store)
    result = KeyframePatches(keyframe=0)(job)
    assert result.frames.shape == job.clip.frames.shape and result.fps == job.clip.fps
    assert (result[0] == job.edit_images([0])[0]).all()
    assert (KeyframePatches(keyframe=0)(job).frames == result.frames).all()
    single = Job(model, job.clip[:1], job.config, store=store)
    assert len(KeyframePatches()(single)) == 1
    with pytest.raises(ValueError, match="3 frames"):
        KeyframePatches(keyframe=3)(job)


@pytest.mark.parametrize("bad", [dict(patch=4), dict(patch=0), dict(keyframe=-1), dict(keyframe=1.5), dict(position_scale=-1.0)])
def test_settings_that_cannot_be_meant(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        KeyframePatches(**bad)
