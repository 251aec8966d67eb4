"""The forecast: counts that must be exact, needs that must follow the settings, remedies that must work. Times are
compared by benchmarks/forecast.py, not here."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from tokenflow_nb.bench.run import rows_counted
from tokenflow_nb.clip import ClipError
from tokenflow_nb.config import Execution, split_options
from tokenflow_nb.edit import EditConfig, edit_video
from tokenflow_nb.forecast import measure as measuring
from tokenflow_nb.forecast.measure import Cost, Costs, costs_of, known_costs, learn, measure
from tokenflow_nb.forecast.plan import finite, forecast, plan
from tokenflow_nb.forecast.work import count_work, is_guided, joint_passes
from tokenflow_nb.inversion import inversion_grid
from tokenflow_nb.store import Store
from tokenflow_nb.support import memory
from tokenflow_nb.support.memory import PeakMemory, free_memory
from tokenflow_nb.toy.world import Scene

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
    "Round costs."
    seconds = dict(row=Cost(0.01, 3e6), encode=Cost(0.01, 10e6), decode=Cost(0.02, 12e6))
    return Costs(**seconds, pair=1e-3, tokens=400_000, recorded=25_000)


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(measuring, "_KNOWN", {})


# What is counted


@pytest.mark.parametrize("name", JOBS)
def test_the_rows_that_are_counted_are_those_that_run(model, tmp_path, name):
    frames, changes = JOBS[name]
    how, settings = split_options(changes, Execution)
    config = EditConfig("a gold star on grass", num_inference_steps=3, **settings)
    visited = len(inversion_grid(model, 3, config.inversion_steps)[0])
    work = count_work(frames, config, is_guided(config, model), Execution(**how), visited)
    clip, store = SCENE.render(frames, size=64), Store(tmp_path)
    with rows_counted(model.unet) as rows:
        edit_video(clip, config=config, model=model, size=SIZE, store=store, progress=False, **how)
    assert sum(rows) == work.total


def test_stages_are_counted_apart():
    config = EditConfig("a star", num_inference_steps=10, keyframe_interval=4, method="sdedit", strength=0.5)
    work = count_work(12, config)
    assert (work.invert, work.record, work.keyframes, work.frames) == (120, 5 * (3 + 12), (2 * 5 + 2) * 3, (5 + 2) * 12)


def test_the_cost_of_a_frame_does_not_grow_with_the_clip():
    config = EditConfig("a star")
    assert count_work(6400, config).total / 6400 <= 1.01 * count_work(640, config).total / 640
    assert max(joint_passes(6400, config)) == config.max_joint_keyframes


# What follows from it


def by_part(made) -> dict:
    return {stage.part: stage for stage in made.stages}


def test_forecast_adds_up_and_takes_the_highest(model, found):
    config = EditConfig("a star", num_inference_steps=50)
    made, work = forecast(24, (128, 128), config, model, found), count_work(24, config)
    assert made.evaluations == work.total == sum(stage.evaluations for stage in made.stages)
    pairs = 3 * 2 * (50 + 20) * 1e-3  # each of three keyframes to two others, with the prompt and where guidance acts
    assert math.isclose(made.seconds, 0.01 * work.total + 24 * (0.01 + 0.02) + pairs)
    assert made.memory == max(stage.memory for stage in made.stages)
    assert set(made.by_stage) == {"invert", "record", "edit", "decode"}
    assert math.isclose(sum(made.by_stage.values()), made.seconds)
    json.dumps(made.record(), allow_nan=False)
    text = made._repr_markdown_()
    assert text == str(made) and "keyframe passes" in text and f"{made.evaluations:,}" in text
    assert "once for all prompts" in text


def test_memory_is_what_the_formulas_say(model, found):
    "On the CPU: 24 frames of 128×128, latents of 4×16×16 numbers for the toy model's scale."
    latents, held = 4 * 4 * (128 // model.latent_scale) ** 2, 32 << 20
    stages = by_part(forecast(24, (128, 128), EditConfig("a star", num_inference_steps=50), model, found))
    left = 3 * 4 * 400_000  # of three keyframes
    assert stages["inversion"].memory == held + 8 * 3e6 + 2 * 8 * 51 * latents
    assert stages["record source"].memory == held + left + 8 * (3e6 + 25_000)
    assert stages["keyframe passes"].memory == held + 2 * 24 * latents + left + 3 * 3e6
    assert stages["frame passes"].memory == held + 2 * 24 * latents + left + 8 * 3e6
    assert stages["decoding"].memory == held + 24 * latents + 12e6 + 24 * 128 * 128 * 3


def test_on_a_gpu_branches_are_together_and_latents_elsewhere(found):
    from tokenflow_nb.backbones.untrained import random_model

    distant, config = random_model(device="meta"), EditConfig("a star")
    stages = by_part(forecast(24, (512, 512), config, distant, found, memory=1e12))
    assert stages["frame passes"].memory == 3 * 4 * 400_000 + 8 * 3 * 3e6
    alone = by_part(forecast(24, (512, 512), replace(config, guidance_scale=1.0), distant, found, memory=1e12))
    assert alone["frame passes"].memory == 3 * 4 * 400_000 + 8 * 2 * 3e6
    assert forecast(6400, (512, 512), config, distant, found, memory=1e12).memory == pytest.approx(
        forecast(640, (512, 512), config, distant, found, memory=1e12).memory
    )


def test_without_costs_what_is_not_known_is_not_said(model):
    made = forecast(24, (128, 128), EditConfig("a star"), model, None)
    assert math.isnan(made.seconds) and math.isnan(made.memory) and made.disk > 0
    assert "about" not in made.line and "above" not in made.line and "nan" not in str(made).lower()
    assert json.dumps(made.record(), allow_nan=False) and made.record()["memory"] is None


@pytest.mark.parametrize("change", [dict(num_inference_steps=100), dict(inversion_steps=200), dict(rule="joint")])
def test_more_work_takes_longer(model, found, change):
    more, less = (forecast(200, (128, 128), EditConfig("a star", **each), model, found) for each in (change, {}))
    assert more.seconds > less.seconds


def test_memory_grows_with_a_clip_by_its_latents_and_pictures_alone(model, found):
    short, long = (forecast(frames, (128, 128), EditConfig("a star"), model, found) for frames in (6400, 12800))
    latents = 4 * 4 * (128 // model.latent_scale) ** 2 * 6400
    more = dict(inversion=0, decoding=latents) | {"record source": 0, "keyframe passes": 2 * latents, "frame passes": 2 * latents}
    for part, stage in by_part(long).items():
        assert stage.memory - by_part(short)[part].memory == pytest.approx(more[part]), part
    assert long.disk == pytest.approx(2 * short.disk)


# What does not fit, and that the remedies help


def test_a_block_that_fits_is_found(model, found):
    job = 64, (128, 128), EditConfig("a star"), model, found
    need = forecast(*job, Execution(block_size=8)).memory
    assert forecast(*job, Execution(block_size=8), memory=1.2 * need).block_size == 8
    tight = forecast(*job, Execution(block_size=32), memory=1.2 * need)
    assert tight.block_size == 8 and "block_size=8 fits" in tight.warnings[0]
    obeyed = forecast(*job, Execution(block_size=tight.block_size), memory=1.2 * need)
    assert obeyed.warnings == ()


def test_fewer_keyframes_together_are_the_next_remedy_and_a_smaller_size_the_last(model, found):
    config = EditConfig("a star", keyframe_interval=2, max_joint_keyframes=40)
    memory = 0.5 * forecast(80, (128, 128), config, model, found).memory
    tight = forecast(80, (128, 128), config, model, found, memory=memory)
    assert tight.block_size is None and "max_joint_keyframes=2 with block_size=8 fits" in tight.warnings[0]
    assert forecast(80, (128, 128), replace(config, max_joint_keyframes=2), model, found, memory=memory).warnings == ()
    never = forecast(80, (128, 128), config, model, found, memory=4.3e7)
    assert never.block_size is None and "edit a smaller size" in never.warnings[0]
    quarter = Costs(*(cost._replace(bytes=cost.bytes / 4) for cost in (found.row, found.encode, found.decode)), tokens=100_000)
    smaller = replace(config, max_joint_keyframes=2)
    assert forecast(80, (64, 64), smaller, model, quarter, Execution(block_size=1), memory=4.3e7).warnings == ()


def test_what_the_disk_cannot_hold_is_said(model, found, monkeypatch):
    job = 200, (128, 128), EditConfig("a star"), model, found
    need = forecast(*job).disk
    monkeypatch.setattr("tokenflow_nb.forecast.plan.free_disk", lambda root: int(0.8 * need))
    (said,) = forecast(*job, memory=1e12).warnings
    assert "on the disk" in said and "source_branch='live'" in said
    live = Execution(source_branch="live")
    assert forecast(*job, live, memory=1e12).warnings == ()
    monkeypatch.setattr("tokenflow_nb.forecast.plan.free_disk", lambda root: 1)
    for each in (Execution(), live):  # without the record there is no room either
        (said,) = forecast(*job, each, memory=1e12).warnings
        assert "live" not in said and "TOKENFLOW_HOME" in said


def test_the_disk_is_the_one_of_the_store(model, found, monkeypatch, tmp_path):
    small = Store(tmp_path / "small")
    monkeypatch.setattr("tokenflow_nb.forecast.plan.free_disk", lambda root: 1 if root == small.root else int(1e15))
    asked, kept = (200, (128, 128), EditConfig("a star"), model, found), Execution(store=small)
    assert forecast(*asked, memory=1e12).warnings == () and "on the disk" in forecast(*asked, kept, 1e12).warnings[0]
    monkeypatch.setattr("tokenflow_nb.forecast.plan.costs_of", lambda *job: found)
    clip = Scene("star", "blue", "grass").render(8, 64)
    assert "on the disk" in plan(clip, EditConfig("a star"), model, kept, 1e12).warnings[0]


# What is measured


@pytest.mark.parametrize("start, row, block", [(0.04, 0.01, 8), (0.06, 0.0, 8), (0.0, 0.3, 3), (0.0, 3.0, 1)])
def test_an_evaluation_is_measured_in_a_block_unless_that_takes_long(model, start, row, block):
    now, seen = [0.0], []

    def tick(_, args):
        seen.append(len(args[0]))
        now[0] += start + row * len(args[0])

    hook = model.unet.register_forward_pre_hook(tick)
    try:
        made = measure(model, SIZE, clock=lambda: now[0])
    finally:
        hook.remove()
    assert max(seen) == block and sum(seen) <= 2 + 4 * block + 1
    assert made.row.seconds == pytest.approx(row + start / block) and made.pair == pytest.approx(0.0)
    assert made.encode.seconds == made.decode.seconds == 0.0


def test_what_keyframes_leave_and_what_a_record_takes_is_counted_in_bytes(model, tmp_path, nothing_known):
    "The record's size is that of a real one."
    clip, config = SCENE.render(8, size=64), EditConfig("a star", num_inference_steps=2)
    store = Store(tmp_path)
    stage = by_part(plan(clip, config, model))["record source"]
    edit_video(clip, "a star", model=model, size=SIZE, num_inference_steps=2, store=store, progress=False)
    (entry,) = [entry for entry in store.entries() if entry.meta["kind"] == "source"]
    assert entry.nbytes == pytest.approx(stage.disk, rel=0.1)


def test_a_slow_device_or_one_with_little_memory_measures_one_frame(model, monkeypatch):
    monkeypatch.setattr(measuring, "free_memory", lambda device: 1.0)
    with rows_counted(model.unet) as rows:
        made = measure(model, SIZE)
    assert max(rows) == 1 and made.pair == 0.0 and made.tokens > 0


def test_plan_measures_once_and_leaves_random_numbers_alone(model, nothing_known):
    clip, config = SCENE.render(4, size=64), EditConfig("a star", keyframe_interval=2)
    assert math.isnan(plan(clip, config, model, measure=False).seconds) and known_costs(model, SIZE) is None
    state = torch.random.get_rng_state()
    with rows_counted(model.unet) as rows:
        first = plan(clip, config, model)
        asked = len(rows)
        second = plan(clip, EditConfig("another", keyframe_interval=2, num_inference_steps=20), model)
    assert 0 < asked == len(rows) and sum(rows) < 0.15 * count_work(24, EditConfig("a star")).total
    assert 0 < second.seconds < first.seconds
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not math.isnan(plan(clip, EditConfig("a star", keyframe_interval=1), model, measure=False).seconds)


def test_an_edit_teaches_the_time(model, nothing_known):
    config = EditConfig("a star", keyframe_interval=4, num_inference_steps=10)
    work = count_work(8, config)
    learn(model, SIZE, config, 8, dict(invert=0.5, edit=0.5 * (work.keyframes + work.frames), decode=4.0))
    made = forecast(8, SIZE, config, model, known_costs(model, SIZE))
    assert math.isclose(made.seconds, 0.5 * work.total + 4.0)
    assert math.isnan(made.memory) and finite(made.memory) is None and by_part(made)["record source"].disk > 0
    json.dumps(made.record(), allow_nan=False)
    assert not math.isnan(costs_of(model, SIZE).row.bytes)  # who wants the memory measures it after all


def test_an_edit_corrects_the_time_that_was_measured_and_keeps_the_memory(model, nothing_known):
    config, measured = EditConfig("a star", num_inference_steps=10), costs_of(model, SIZE)
    work = count_work(8, config)
    learn(model, SIZE, config, 8, dict(edit=0.5 * (work.keyframes + work.frames), decode=4.0))
    learned = known_costs(model, SIZE)
    assert learned.row == Cost(0.5, measured.row.bytes) and learned.decode == Cost(0.5, measured.decode.bytes)
    assert learned.encode == measured.encode and learned.tokens == measured.tokens and costs_of(model, SIZE) is learned


@pytest.mark.parametrize(
    "size, changes, words", [((60, 64), {}, "multiples of"), (SIZE, dict(keyframe_interval=9), "keyframe_interval=9")]
)
def test_what_cannot_be_edited_cannot_be_planned(model, size, changes, words):
    clip = SCENE.render(4, size=64)
    with pytest.raises(ValueError, match=words):
        plan(type(clip)(clip.frames[:, : size[0]].copy()), EditConfig("a star", **changes), model)
    assert issubclass(ClipError, ValueError)


# Memory


def test_peak_memory_sees_what_comes_and_goes():
    monitor = PeakMemory()
    numbers = torch.ones(10_000_000)
    while monitor.highest < monitor.before + 30e6:  # it looks every few milliseconds; a hang is a failure
        time.sleep(0.001)
    del numbers
    assert 30e6 < monitor.bytes < 80e6


def test_the_thread_of_a_monitor_ends_with_it():
    import threading

    before = set(threading.enumerate())
    monitor = PeakMemory()
    (thread,) = set(threading.enumerate()) - before
    del monitor
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("limit, free", [("8000000", 8e6 - 5e6 + 1e6), ("max", None), (None, None)])
def test_a_container_has_no_more_than_its_limit(monkeypatch, tmp_path, limit, free):
    "Files that nobody uses any more count as free."
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("5000000\n")
        (tmp_path / "memory.stat").write_text("anon 4000000\ninactive_file 1000000\n")
    assert free_memory("cpu") == free if free else free_memory("cpu") > 1e7


# A real run


def test_a_run_keeps_forecast_and_measurement(model, tmp_path, nothing_known, capfd):
    settings, held = dict(model=model, size=SIZE, num_inference_steps=2, keyframe_interval=2), []
    settings["store"] = Store(tmp_path / "store")
    # memory that is taken anew: such a small edit may find all that it needs in what earlier tests have freed
    settings["callback_on_step_end"] = lambda *_: held.append(torch.ones(10_000_000))
    edit_video(SCENE.render(3, size=64), "a gold star on grass", out=tmp_path / "out", progress=True, **settings)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["forecast"]["evaluations"] == count_work(3, EditConfig("a star", num_inference_steps=2, keyframe_interval=2)).total
    assert set(record["forecast"]["seconds"]) <= set(record["timings"]) and record["memory"] > 30e6
    assert "evaluations a frame" in "".join(capfd.readouterr())
