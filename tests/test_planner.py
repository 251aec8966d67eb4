"The planner: counts that must be exact, forecasts that must follow the settings. Times are measured by benchmarks/planner.py, not here."

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from tokenflow_nb import memory, probe
from tokenflow_nb.bench import rows_counted
from tokenflow_nb.clip import ClipError
from tokenflow_nb.edit import EditConfig, edit_video
from tokenflow_nb.inversion import inversion_grid
from tokenflow_nb.memory import PeakMemory
from tokenflow_nb.planner import finite, forecast, plan
from tokenflow_nb.probe import Cost, Probe, known_probe, learn
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene
from tokenflow_nb.tracing import assumed_probe, traced
from tokenflow_nb.work import count_work, is_guided, joint_passes

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3))
SIZE = (64, 64)
JOBS = {
    "one frame": (1, dict()),
    "guidance to the end": (5, dict(keyframe_interval=2, guidance_stop=1.0)),
    "guidance never": (5, dict(keyframe_interval=2, guidance_stop=0.0)),
    "default": (9, dict(keyframe_interval=4)),
    "no guidance": (5, dict(guidance_scale=1.0, keyframe_interval=2)),
    "groups": (11, dict(keyframe_interval=1, max_joint_keyframes=4, block_size=3)),
    "all keyframes": (11, dict(keyframe_interval=1, max_joint_keyframes=None)),
    "live": (7, dict(keyframe_interval=2, source_branch="live")),
    "sdedit": (7, dict(keyframe_interval=2, method="sdedit", strength=0.5)),
    "repeated, finer inversion": (3, dict(keyframe_interval=3, inversion_steps=7, correction="repeated")),
    "jointly": (4, dict(rule="joint", keyframe_interval=4)),
    "per frame": (4, dict(rule="per_frame")),
    "published": (9, dict(rule="published", keyframe_interval=4, inversion_steps=10, remeasure=True, correction="none", max_joint_keyframes=None)),
}


@pytest.fixture
def found():
    "A probe with round figures, of 8 keyframes and 8 frames at a time in 3 branches."
    megabyte = 1e6
    costs = dict(invert=(0.01, 3), keyframes=(0.3, 100), frames=(0.02, 6), after=(0.012, 3), record=(0.008, 3), encode=(0.01, 10), decode=(0.02, 12))
    parts = {part: Cost(seconds, megabyte * count) for part, (seconds, count) in costs.items()}
    return Probe(rows=8, joint=8, branches=3, **parts, pair=1e-4, kept=400_000, output=400_000, recorded=25_000)


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(probe, "_PROBES", {})


@pytest.mark.parametrize("name", JOBS)
def test_the_rows_that_are_counted_are_those_that_run(model, tmp_path, name):
    frames, changes = JOBS[name]
    config = EditConfig("a gold star on grass", num_inference_steps=3, **changes)
    visited = len(inversion_grid(model, 3, config.inversion_steps)[0])
    work = count_work(frames, config, is_guided(config, model), visited)
    settings = {field: value for field, value in vars(config).items() if field != "prompt"}
    with rows_counted(model.unet) as rows:
        edit_video(SCENE.render(frames, size=64), config.prompt, model=model, size=SIZE, store=Store(tmp_path), progress=False, **settings)
    assert sum(rows) == work.total


def test_stages_are_counted_apart():
    config = EditConfig("a star", num_inference_steps=10, keyframe_interval=4, method="sdedit", strength=0.5)
    work = count_work(12, config)
    assert (work.invert, work.record, work.keyframes, work.frames) == (120, 5 * (3 + 12), (2 * 5 + 2) * 3, (5 + 2) * 12)


def test_the_cost_of_a_frame_does_not_grow_with_the_clip():
    config = EditConfig("a star")
    assert count_work(6400, config).total / 6400 <= 1.01 * count_work(640, config).total / 640
    assert max(joint_passes(6400, config)) == config.max_joint_keyframes


def test_forecast_adds_up_and_takes_the_highest(model, found):
    config = EditConfig("a star", num_inference_steps=50)
    made = forecast(24, (128, 128), config, model, found)
    assert made.evaluations == count_work(24, config).total == sum(stage.evaluations for stage in made.stages)
    parts = {stage.part: stage.seconds for stage in made.stages}
    keyframes = parts["record source"] - 50 * 24 * 0.008 + parts["keyframe passes"]
    assert math.isclose(made.seconds, 24 * (0.01 + 50 * 0.01) + keyframes + 24 * (50 * 0.008 + 20 * 0.02 + 30 * 0.012) + 24 * 0.02)
    assert keyframes > 0
    assert made.memory == max(stage.memory for stage in made.stages)
    assert set(made.by_stage) == {"invert", "record", "edit", "decode"} and math.isclose(sum(made.by_stage.values()), made.seconds)
    json.dumps(made.record(), allow_nan=False)
    for text in (str(made), made._repr_html_()):
        assert "keyframe passes" in text and f"{made.evaluations:,}" in text and "not again for another prompt" in text


def test_a_pass_without_guidance_is_measured_too(model, found):
    flat = replace(found, after=found.frames)  # one branch takes as long as two
    made = forecast(24, (128, 128), EditConfig("a star"), model, flat)
    assert math.isclose({stage.part: stage.seconds for stage in made.stages}["frame passes"], 24 * 25 * found.frames.seconds)


def test_what_the_disk_cannot_hold_is_told(model, found, monkeypatch):
    config = EditConfig("a star")
    need = forecast(200, (128, 128), config, model, found).disk
    monkeypatch.setattr("tokenflow_nb.planner.free_disk", lambda root: int(0.8 * need))
    (said,) = forecast(200, (128, 128), config, model, found, memory=1e12).warnings
    assert "on the disk" in said and "source_branch='live'" in said
    live = forecast(200, (128, 128), EditConfig("a star", source_branch="live"), model, found, memory=1e12)
    assert live.warnings == () and "source_branch='recorded'" in live.advice[0]


def test_the_disk_is_the_one_that_the_store_lies_on(model, found, monkeypatch, tmp_path):
    small = Store(tmp_path / "small")
    monkeypatch.setattr("tokenflow_nb.planner.free_disk", lambda root: 1 if root == small.root else int(1e15))
    asked = 200, (128, 128), EditConfig("a star"), model, found, 1e12
    assert forecast(*asked).warnings == () and "on the disk" in forecast(*asked, small).warnings[0]
    monkeypatch.setattr("tokenflow_nb.planner.asked_probe", lambda *job: found)
    clip = Scene("star", "blue", "grass").render(8, 64)
    assert "on the disk" in plan(clip, EditConfig("a star"), model, 1e12, store=small).warnings[0]


def test_without_a_probe_what_is_not_known_is_not_said(model):
    made = forecast(24, (128, 128), EditConfig("a star"), model, None)
    assert math.isnan(made.seconds) and math.isnan(made.memory) and made.disk > 0 and "about" not in made.line and "nan" not in str(made).lower()
    assert json.dumps(made.record(), allow_nan=False) and made.record()["memory"] is None


@pytest.mark.parametrize("change", [dict(num_inference_steps=100), dict(inversion_steps=200), dict(rule="joint")])
def test_more_work_takes_longer(model, found, change):
    assert forecast(200, (128, 128), EditConfig("a star", **change), model, found).seconds > forecast(200, (128, 128), EditConfig("a star"), model, found).seconds


def test_memory_does_not_grow_with_a_long_clip(model, found):
    short, long = (forecast(frames, (128, 128), EditConfig("a star"), model, found) for frames in (640, 6400))
    for before, after in zip(short.stages, long.stages, strict=True):
        assert after.memory == before.memory > 0, before.part
    assert long.disk == pytest.approx(10 * short.disk, rel=0.01)  # but for the tokens of a group of keyframes


def test_memory_of_a_short_clip_counts_its_latents(model, found):
    few, more = ({stage.part: stage.memory for stage in forecast(frames, (128, 128), EditConfig("a star"), model, found).stages} for frames in (24, 48))
    assert more["frame passes"] - few["frame passes"] == 2 * 24 * 4 * 4 * 32 * 32


def test_a_block_that_fits_is_found(model, found):
    config = EditConfig("a star", block_size=8)
    need = forecast(64, (128, 128), config, model, found).memory
    assert forecast(64, (128, 128), config, model, found, memory=1.2 * need).block_size == 8
    tight = forecast(64, (128, 128), EditConfig("a star", block_size=32), model, found, memory=1.2 * need)
    assert tight.block_size == 8 and "block_size=8 fits" in tight.warnings[0]
    never = forecast(64, (128, 128), config, model, found, memory=1e6)
    assert never.block_size is None and "max_joint_keyframes=4" in never.warnings[0]


def test_a_slow_device_is_asked_less():
    for joint, rows in ((48, 8), (8, 64), (2, 1), (1, 1), (0, 8)):
        assert probe._probe_size(joint, rows, allowed=0.1) == (min(joint, 2), 1, False)
        assert probe._probe_size(joint, rows, allowed=1e6) == (joint, rows, True)


@pytest.mark.parametrize("start, row", [(0.04, 0.01), (0.06, 0.0)])
def test_an_evaluation_that_takes_long_to_start_is_probed_in_blocks_as_the_edit_has_them(model, start, row):
    config, now = EditConfig("a gold star on grass"), [0.0]

    def tick(_, args):
        now[0] += start + row * len(args[0])

    hook = model.unet.register_forward_pre_hook(tick)
    try:
        made = probe.probe(model, SIZE, config, 24, clock=lambda: now[0])
    finally:
        hook.remove()
    block, keyframes = start + 8 * row, start + 3 * row
    assert (made.rows, made.joint) == (8, 3)
    assert [8 * cost.seconds for cost in (made.invert, made.record, made.after, made.frames)] == pytest.approx([block, block, block, 2 * block])
    assert made.keyframes.seconds == pytest.approx(3 * keyframes)


def test_a_small_edit_is_not_held_up(model):
    clip, config = SCENE.render(24, size=64), EditConfig("a star", num_inference_steps=10)
    with rows_counted(model.unet) as rows:
        probe.probe(model, SIZE, config, 24)
    assert sum(rows) < 0.15 * count_work(24, config).total and len(clip) == 24


def test_plan_asks_a_device_once(model, nothing_known, monkeypatch):
    clip, config = SCENE.render(4, size=64), EditConfig("a star", keyframe_interval=2)
    assert math.isnan(plan(clip, config, model, measure=False).seconds) and known_probe(model, SIZE, config, 4) is None
    state = torch.random.get_rng_state()
    with rows_counted(model.unet) as rows:
        first = plan(clip, config, model)
        asked = len(rows)
        second = plan(clip, EditConfig("another", keyframe_interval=2, num_inference_steps=20), model)
    assert 0 < asked == len(rows) and 0 < second.seconds < first.seconds
    assert torch.equal(torch.random.get_rng_state(), state)  # whoever draws next draws what he would have drawn
    assert not math.isnan(plan(clip, EditConfig("a star", keyframe_interval=1), model, measure=False).seconds)


def test_an_edit_teaches_the_time(model, nothing_known):
    config = EditConfig("a star", keyframe_interval=4, num_inference_steps=10)
    work = count_work(8, config)
    learn(model, SIZE, config, 8, dict(invert=0.5 * work.invert, edit=0.5 * (work.keyframes + work.frames), decode=4.0))
    made = forecast(8, SIZE, config, model, known_probe(model, SIZE, config, 8))
    assert math.isclose(made.seconds, 0.5 * work.total + 4.0) and math.isnan(made.memory) and finite(made.memory) is None
    json.dumps(made.record(), allow_nan=False)


@pytest.mark.parametrize("size, changes, words", [((60, 64), {}, "multiples of"), (SIZE, dict(keyframe_interval=9), "keyframe_interval=9")])
def test_what_cannot_be_edited_cannot_be_planned(model, size, changes, words):
    clip = SCENE.render(4, size=64)
    with pytest.raises(ValueError, match=words):
        plan(type(clip)(clip.frames[:, : size[0]].copy()), EditConfig("a star", **changes), model)
    assert issubclass(ClipError, ValueError)


def test_peak_memory_sees_what_comes_and_goes():
    watch = PeakMemory()
    numbers = torch.ones(10_000_000)
    del numbers
    assert 39e6 < watch.bytes < 60e6 and watch.left < 10e6


def test_where_the_system_cannot_forget_a_thread_looks(monkeypatch):
    monkeypatch.setattr(memory, "_forget_peak", lambda: False)
    watch = PeakMemory()
    numbers = torch.ones(10_000_000)
    while watch.highest < watch.before + 30e6:  # the thread looks every few milliseconds; a hang is a failure
        time.sleep(0.001)
    del numbers
    assert watch.bytes >= 30e6


def test_where_the_system_says_nothing_nothing_is_said(monkeypatch):
    monkeypatch.setattr(memory, "_forget_peak", lambda: False)
    monkeypatch.setattr(memory, "_status", lambda name: math.nan)
    assert math.isnan(PeakMemory().bytes) and math.isnan(PeakMemory().left) and finite(PeakMemory().bytes) is None


def test_traced_parts_need_no_device(model):
    parts, tokens = traced(model, SIZE, joint=3, rows=2)
    assert len(tokens) == len([name for name, _ in model.unet.named_modules() if name.endswith(".attn1")])
    more, _ = traced(model, SIZE, joint=3, rows=4)
    assert math.isclose(more["row"].operations, 2 * parts["row"].operations) and more["row"].bytes > 1.5 * parts["row"].bytes
    pairs = sum(4 * count**2 * channels for count, channels in tokens)
    alone = 9 * parts["row"].operations / 2  # joint attention: each of 3 keyframes in 2 branches attends to 2 others
    assert math.isclose(parts["keyframes"].operations, alone + 2 * 3 * 2 * pairs, rel_tol=1e-6)


def test_an_assumed_device_is_planned_for(model):
    config = EditConfig("a star")
    slow, fast = (forecast(24, SIZE, config, model, assumed_probe(model, SIZE, config, 24, rate)) for rate in (1e9, 1e10))
    assert math.isclose(slow.seconds, 10 * fast.seconds, rel_tol=1e-6) and slow.memory == fast.memory


def test_a_run_keeps_forecast_and_measurement(model, tmp_path, nothing_known, capfd):
    settings = dict(model=model, size=SIZE, num_inference_steps=2, keyframe_interval=2, store=Store(tmp_path / "store"))
    edit_video(SCENE.render(3, size=64), "a gold star on grass", out=tmp_path / "out", progress=True, **settings)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["forecast"]["evaluations"] == count_work(3, EditConfig("a star", num_inference_steps=2, keyframe_interval=2)).total
    assert set(record["forecast"]["seconds"]) <= set(record["timings"]) and record["memory"] > 1e5
    assert "evaluations a frame" in "".join(capfd.readouterr())
