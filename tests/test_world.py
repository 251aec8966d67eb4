"""The toy world under random scenes: flow, visibility, masks and edits hold for all of them, not for the ones shown."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_nb.toy.world import BACKGROUNDS, MATERIALS, SHAPES, Scene, caption, captions, held_out

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    "`picture` (h, w, c) sampled (bilinear) at each pixel plus `flow` (h, w, 2)."
    height, width = picture.shape[:2]
    x = np.clip(np.arange(width) + flow[..., 0], 0, width - 1)
    y = np.clip(np.arange(height)[:, None] + flow[..., 1], 0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = (x - left)[..., None], (y - top)[..., None]
    above = picture[top, left] * (1 - across) + picture[top, right] * across
    below = picture[bottom, left] * (1 - across) + picture[bottom, right] * across
    return above * (1 - down) + below * down


# flow


@few
@given(seed=seeds, frame=st.integers(0, 22))
def test_the_next_frame_sampled_along_the_flow_is_this_frame(seed, frame):
    scene = Scene.random(seed).replace(material="purple", background="plain")
    truth = scene.truth()
    here, there = scene.image(frame=frame), scene.image(frame=frame + 1)
    ahead, back = truth.forward_visible[frame], truth.backward_visible[frame]
    assert np.abs(warp(there, truth.forward_flow[frame]) - here)[ahead].max() < 0.03
    assert np.abs(warp(here, truth.backward_flow[frame]) - there)[back].max() < 0.03
    assert np.abs(warp(there, truth.forward_flow[frame]) - here)[ahead].mean() < 0.002


@few
@given(seed=seeds, size=st.sampled_from([32, 64, 100]))
def test_there_and_back_is_the_identity(seed, size):
    truth = Scene.random(seed).truth(frames=4, size=size)
    for t in range(3):
        for first, second, seen in (
            (truth.forward_flow[t], truth.backward_flow[t], truth.forward_visible[t]),
            (truth.backward_flow[t], truth.forward_flow[t], truth.backward_visible[t]),
        ):
            assert seen.mean() > 0.5
            assert np.abs(first + warp(second, first))[seen].max() < 1e-4


@few
@given(
    seed=seeds,
    pan=st.tuples(st.integers(-4, 4), st.integers(-4, 4)),
    velocity=st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
)
def test_motion_by_whole_pixels_gives_whole_flow_and_equal_bytes(seed, pan, velocity):
    still = Scene.random(seed, moving=False)
    # a centre on a binary fraction moves without rounding, so that bytes can be compared
    scene = still.replace(pan=pan, velocity=velocity, centre=np.round(np.array(still.centre) * 8) / 8)
    frames, truth = scene.render(frames=3).frames, scene.truth(frames=3)
    for t in range(2):
        flow, mask = truth.forward_flow[t], truth.object_mask[t]
        assert (flow[mask] == velocity).all() and (flow[~mask] == np.negative(pan)).all()
        assert (truth.backward_flow[t][truth.object_mask[t + 1]] == np.negative(velocity)).all()
        assert np.array_equal(warp(frames[t + 1], flow)[truth.forward_visible[t]], frames[t][truth.forward_visible[t]])
        back = truth.backward_visible[t]
        assert np.array_equal(warp(frames[t], truth.backward_flow[t])[back], frames[t + 1][back])


def test_flow_is_measured_in_pixels_of_the_rendered_size():
    scene = Scene("circle", velocity=(1, 0.5), pan=(-1.5, 1))
    small, large = scene.truth(2, 64), scene.truth(2, 256)
    for flow, scale in ((small.forward_flow[0], 0.5), (large.forward_flow[0], 2.0)):
        middle = len(flow) // 2
        assert np.allclose(flow[middle, middle], np.multiply(scale, (1, 0.5)))
        assert np.allclose(flow[0, 0], np.multiply(scale, (1.5, -1)))


def test_one_frame_has_a_mask_and_no_flow():
    truth = Scene().truth(frames=1, size=32)
    assert truth.forward_flow.shape == truth.backward_flow.shape == (0, 32, 32, 2)
    assert truth.forward_visible.shape == (0, 32, 32) and truth.object_mask.shape == (1, 32, 32)


# masks and visibility


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_mask_has_the_area_of_the_object(size):
    mask = Scene("circle", radius=40.0).truth(frames=1, size=size).object_mask
    assert math.isclose(mask.sum() * (128 / size) ** 2, math.pi * 40**2, rel_tol=0.01)


def test_in_a_still_scene_all_is_visible_but_the_blended_rim():
    scene = Scene("heart", "gold", "grass", angle=0.3)
    truth = scene.truth(frames=2)
    filled = scene.replace(shape="circle", radius=300.0)  # covers the whole picture
    assert filled.truth(frames=2).forward_visible.all()
    hidden = ~truth.forward_visible[0]
    assert np.array_equal(truth.forward_visible, truth.backward_visible)
    outline = truth.object_mask[0] ^ np.roll(truth.object_mask[0], 1, 1)
    assert hidden.any() and hidden.sum() < 3 * outline.sum() + 3 * 128


@few
@given(seed=seeds)
def test_what_the_object_covers_or_the_picture_loses_is_not_visible(seed):
    scene = Scene.random(seed).replace(pan=(3.0, -2.0))
    truth = scene.truth(frames=2)
    x, y = np.meshgrid(np.arange(128), np.arange(128))
    end_x, end_y = x + truth.forward_flow[0, ..., 0], y + truth.forward_flow[0, ..., 1]
    inside = (end_x >= 0) & (end_x <= 127) & (end_y >= 0) & (end_y <= 127)
    assert not truth.forward_visible[0][~inside].any()
    landing = truth.object_mask[1, end_y.round().clip(0, 127).astype(int), end_x.round().clip(0, 127).astype(int)]
    seen = truth.forward_visible[0]
    assert np.array_equal(landing[seen], truth.object_mask[0][seen])
    assert (inside & ~truth.object_mask[0] & landing).any()  # the case did occur


# edits


@few
@given(seed=seeds, material=st.sampled_from(MATERIALS), background=st.sampled_from(list(BACKGROUNDS)))
def test_the_ideal_edit_changes_nothing_but_what_was_asked(seed, material, background):
    scene = Scene.random(seed)
    recoloured, moved = scene.replace(material=material), scene.replace(background=background)
    truth = scene.truth(frames=3, size=64)
    for edited in (recoloured, moved):
        for field in dataclasses.fields(truth):
            assert np.array_equal(getattr(edited.truth(frames=3, size=64), field.name), getattr(truth, field.name))
    source = scene.render(frames=2, size=64).frames
    sure, mask = truth.forward_visible[:1], truth.object_mask[:1]  # the rim blends both
    assert np.array_equal(recoloured.render(frames=1, size=64).frames[sure & ~mask], source[:1][sure & ~mask])
    assert np.array_equal(moved.render(frames=1, size=64).frames[sure & mask], source[:1][sure & mask])
    assert recoloured.caption == caption(scene.shape, material, scene.background)


def test_frames_do_not_depend_on_how_many_are_rendered():
    scene = Scene.random(5)
    clip = scene.render(frames=5, size=48, fps=12)
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (5, 48, 48, 3) and clip.fps == 12
    picture = scene.image(size=48, frame=4)
    assert picture.dtype == np.float32 and 0 <= picture.min() and picture.max() <= 1
    assert np.abs(clip.frames[4] / 255 - picture).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(scene.render(frames=2, size=48).frames, clip.frames[:2])


@pytest.mark.parametrize("size", [64, 256])
def test_another_size_shows_the_same_scene(size):
    scene = Scene.random(11).replace(material="red", background="plain")
    block = 16  # both are compared as 16x16 pictures
    shrink = lambda picture: picture.reshape(block, len(picture) // block, block, -1, 3).mean((1, 3))  # noqa: E731
    for frame in (0, 20):
        assert np.abs(shrink(scene.image(size, frame)) - shrink(scene.image(128, frame))).max() < 0.02


def test_an_object_outside_the_picture_leaves_the_background():
    away = Scene("star", centre=(-200, 64), pan=(1, 0))
    assert not away.truth(frames=2).object_mask.any() and away.truth(frames=2).forward_visible[0, :, 1:].all()
    assert np.array_equal(away.image(32), away.replace(shape="heart", material="blue").image(32))


# random scenes


@few
@given(seed=seeds)
def test_a_moving_object_stays_in_the_picture_and_moves_gently(seed):
    scene = Scene.random(seed)
    mask = scene.truth(frames=24, size=64).object_mask
    assert mask.any((1, 2)).all() and not mask[:, [0, -1]].any() and not mask[:, :, [0, -1]].any()
    assert math.hypot(*scene.velocity) <= 1 and math.hypot(*scene.pan) <= 1.5
    assert abs(scene.spin) <= 0.03 and abs(scene.growth) <= 0.006


@few
@given(seed=seeds, kept=st.booleans(), moving=st.booleans())
def test_a_seed_is_a_scene(seed, kept, moving):
    scene = Scene.random(seed, held_out=kept, moving=moving)
    assert scene == Scene.random(np.random.default_rng(seed), held_out=kept, moving=moving)
    assert held_out(scene.shape, scene.material, scene.background) == kept
    still = (0.0, 0.0) == scene.velocity == scene.pan and scene.spin == scene.growth == 0
    assert still != moving


def test_stills_spread_over_the_whole_range():
    rng = np.random.default_rng(0)
    stills = [Scene.random(rng, moving=False) for _ in range(600)]
    for values, low, high in (
        ([s.centre[0] for s in stills], 52, 76),
        ([s.centre[1] for s in stills], 52, 76),
        ([s.radius for s in stills], 30, 42),
        ([s.angle for s in stills], -0.35, 0.35),
        ([s.background_offset[1] for s in stills], 0, 512),
    ):
        assert low <= min(values) < low + 0.05 * (high - low) and high - 0.05 * (high - low) < max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < 0.05 * (high - low)
    assert {s.shape for s in stills} == set(SHAPES) and {s.material for s in stills} == set(MATERIALS)
    assert {s.background for s in stills} == set(BACKGROUNDS)


@few
@given(seed=seeds, kept=st.booleans())
def test_a_still_is_never_cut_by_the_edge(seed, kept):
    mask = Scene.random(seed, held_out=kept, moving=False).truth(frames=1).object_mask[0]
    assert mask.any() and not mask[[0, -1]].any() and not mask[:, [0, -1]].any()


HELD_OUT = """
    circle red grass, circle striped grass, circle gold grass, circle purple sand, circle wooden sand, square blue night, square dotted night,
    star blue water, star dotted water, heart red sky, heart striped sky, heart gold sky, heart purple plain, heart wooden plain
"""


def test_the_rule_of_the_held_out_combinations_is_fixed():
    kept = {(s, m, b) for s in SHAPES for m in MATERIALS for b in BACKGROUNDS if held_out(s, m, b)}
    assert kept == {tuple(names.split()) for names in HELD_OUT.split(",")} and len(kept) == 14 and len(captions()) == 308


def test_combinations_held_out_of_the_larger_world_are_held_out_still():
    "The weights that ship were begun in it: six shapes and eight backgrounds, counted by their places in these lists."
    shapes, backgrounds = "circle square triangle star heart cross".split(), "grass bricks sky night water sand planks plain".split()
    for s in SHAPES:
        for m in MATERIALS:
            for b in BACKGROUNDS:
                assert held_out(s, m, b) == ((7 * shapes.index(s) + 5 * MATERIALS.index(m) + 11 * backgrounds.index(b)) % 25 == 0)


# the look of the world: a trained model knows it, so a change of texture must not pass unseen

MEAN_COLOURS = {
    "red": (0.881, 0.119, 0.119),
    "green": (0.099, 0.634, 0.181),
    "blue": (0.130, 0.253, 0.871),
    "yellow": (0.991, 0.881, 0.119),
    "purple": (0.562, 0.150, 0.717),
    "striped": (0.551, 0.551, 0.552),
    "checkered": (0.912, 0.383, 0.379),
    "dotted": (0.280, 0.400, 0.741),
    "marble": (0.779, 0.815, 0.818),
    "wooden": (0.549, 0.330, 0.146),
    "gold": (0.973, 0.891, 0.491),
    "grass": (0.279, 0.515, 0.142),
    "sky": (0.676, 0.805, 0.958),
    "night": (0.082, 0.079, 0.224),
    "water": (0.139, 0.433, 0.557),
    "sand": (0.829, 0.710, 0.500),
    "planks": (0.619, 0.434, 0.260),
    "plain": (0.558, 0.558, 0.568),
}


@pytest.mark.parametrize("name", MEAN_COLOURS)
def test_materials_and_backgrounds_keep_their_colours(name):
    if name in MATERIALS:
        radius = 131.25 if name == "striped" else 300.0  # the broadest pattern: here, too, the picture holds whole stripes
        picture = Scene("circle", name, radius=radius).image(64)
    else:
        picture = Scene(background=name, centre=(-500, 0)).image(64)
    assert np.abs(picture.mean((0, 1)) - MEAN_COLOURS[name]).max() < 0.01


# bad input


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(shape="hart"), ["shape='hart'", "'heart'", "square"]),
        (dict(shape="triangle"), ["shape='triangle'", "heart"]),
        (dict(background="bricks"), ["background='bricks'", "planks"]),
        (dict(material="golden"), ["material='golden'", "'gold'", "checkered"]),
        (dict(background="nihgt"), ["background='nihgt'", "'night'", "planks"]),
        (dict(background=""), ["background=''", "grass"]),
        (dict(shape=None), ["shape=None", "circle"]),
        (dict(material=["gold"]), ["material=['gold']", "marble"]),
        (dict(radius=0), ["radius=0", "above 0"]),
        (dict(radius=float("nan")), ["radius=nan", "finite"]),
        (dict(radius="34"), ["radius='34'", "number"]),
        (dict(growth=-1), ["growth=-1", "above -1"]),
        (dict(spin=float("inf")), ["spin=inf", "finite"]),
        (dict(centre=64), ["centre=64", "(x, y)"]),
        (dict(velocity=(1, 2, 3)), ["velocity=(1, 2, 3)", "(x, y)"]),
        (dict(pan=(0, float("nan"))), ["pan=nan", "finite"]),
    ],
)
def test_a_bad_scene_is_refused_with_the_argument_the_value_and_the_remedy(arguments, parts):
    for build in (Scene, Scene().replace):
        with pytest.raises(ValueError) as caught:
            build(**arguments)
        assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("method", "arguments", "part"),
    [
        ("render", dict(frames=0), "frames=0"),
        ("render", dict(frames=2.5), "frames=2.5"),
        ("render", dict(size=-1), "size=-1"),
        ("render", dict(fps=0), "fps=0"),
        ("render", dict(fps=float("nan")), "fps=nan"),
        ("image", dict(size=0), "size=0"),
        ("image", dict(frame=float("inf")), "frame=inf"),
        ("truth", dict(frames=True), "frames=True"),
        ("truth", dict(size="64"), "size='64'"),
    ],
)
def test_a_bad_request_is_refused(method, arguments, part):
    with pytest.raises(ValueError, match=part):
        getattr(Scene(), method)(**arguments)


def test_a_field_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="colour"):
        Scene().replace(colour="red")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scene().radius = 3
