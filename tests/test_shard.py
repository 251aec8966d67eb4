"Shards in processes of their own: the result of a single one, and a clear end whatever happens to one of them."

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.edit import starting
from tokenflow_nb.keyframes import intervals, keyframe_table
from tokenflow_nb.propagation import RULES, make_plan
from tokenflow_nb.scale.shard import Ranks, ShardError, cut_shards, edit_sharded, launch
from tokenflow_nb.support.progress import drive
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)


def config(**changes):
    options = dict(prompt="a gold star on grass", source_prompt=SCENE.caption, num_inference_steps=3, keyframe_interval=3)
    return EditConfig(**options | changes)


# ---- the same numbers

# Mostly in float64. In float32 one process differs from itself by about as much as is allowed here, when its block size is another: how much
# depends on the model's weights.
CASES = {  # by processes: frames, precision of the model, settings
    2: {
        "pnp": (10, "float64", config()),  # shards of 6 and 4 frames, the last interval of a single one
        "sdedit": (7, "float32", config(method="sdedit", strength=1.0, rule="linear", guidance_scale=1.0, num_inference_steps=2)),  # 3 and 4
        "published": (9, "float64", config(keyframe_interval=2, rule="published", remeasure=True)),  # 4 and 5
        # groups of 3 keyframes, shards of 4 and 5: the cut lies within a group
        "groups": (9, "float64", config(keyframe_interval=1, rule="published", max_joint_keyframes=4)),
    },
    3: {
        "uneven": (11, "float64", config(keyframe_interval=2, negative_prompt="a dull photo")),  # 4, 4 and 3
        "more": (10, "float64", config(num_inference_steps=2, max_joint_keyframes=None)),  # 3, 3 and 4
        # groups of 2 keyframes, shards of 4, 4 and 3 frames: the cuts lie between groups
        "groups": (11, "float64", config(num_inference_steps=2, keyframe_interval=2, max_joint_keyframes=3)),
    },
}


@pytest.mark.parametrize("processes", CASES)
def test_shards_together_are_the_single_edit(store, tmp_path, processes):
    clip, cases = SCENE.render(frames=11, size=64), CASES[processes]
    np.save(tmp_path / "clip.npy", clip.frames)
    told = {name: dict(frames=frames, dtype=dtype, config=case.settings()) for name, (frames, dtype, case) in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(told))
    launch("shard_worker:edit", processes, tmp_path)
    for name, (frames, dtype, case) in cases.items():
        model, part = load_model("toy", device="cpu", dtype=getattr(torch, dtype)), clip[:frames]
        single = drive(starting(model, part, case, Execution(store=store, source_branch="live"))).run().latents
        shards = torch.cat([load_file(tmp_path / f"{name}-{rank}.safetensors")["latents"] for rank in range(processes)])
        off, largest = float((shards - single).abs().max()), float(single.abs().max())
        print(f"{name}, {processes} processes, {dtype}: {off:.1e} of {largest:.2f}")
        assert off <= 1e-5 and off <= 1e-5 * largest


# ---- the cut


@given(frames=st.integers(1, 200), interval=st.integers(1, 20), count=st.integers(1, 12))
def test_shards_cover_the_clip_and_differ_by_an_interval_at_most(frames, interval, count):
    pieces = intervals(frames, min(interval, frames))
    cut = cut_shards(frames, min(interval, frames), min(count, len(pieces)))
    assert [frame for shard in cut for frame in shard.frames] == list(range(frames))
    assert [place for shard in cut for place in shard.keyframes] == list(range(len(pieces)))
    assert max(len(shard.keyframes) for shard in cut) - min(len(shard.keyframes) for shard in cut) <= 1
    for shard in cut:
        assert [frame for place in shard.keyframes for frame in pieces[place]] == list(shard.frames)


@given(frames=st.integers(1, 60), interval=st.integers(1, 9), count=st.integers(1, 8), rule=st.sampled_from([*RULES]), seed=st.integers(0, 99))
def test_every_frame_finds_its_keyframes_within_reach(frames, interval, count, rule, seed):
    interval = min(interval, frames)
    cut = cut_shards(frames, interval, min(count, len(intervals(frames, interval))))
    plan = make_plan(rule, frames, keyframe_table(frames, interval, 1, seed)[0], interval)
    for rank, shard in enumerate(cut):
        part = plan[shard.frames.start : shard.frames.stop]
        assert set(part.first.tolist()) | set(part.second.tolist()) <= set(Ranks(cut, rank).within_reach)


# ---- one of them fails


def alive(pid: int) -> bool:
    "Whether a process runs; one that has ended and waits to be collected does not."
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def left(folder: Path, seconds: float = 30) -> list[int]:
    "Processes of a test that are still there after a while."
    pids, end = [int(path.read_text()) for path in folder.glob("pid-*")], time.monotonic() + seconds
    assert len(pids) == 2
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return [pid for pid in pids if alive(pid)]


@pytest.fixture
def stumble(tmp_path, monkeypatch):
    "Launches two processes of which the second one fails in some way. Asserts that no process and no file is left elsewhere."
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))

    def run(what, listen=lambda said: None, timeout=600):
        (tmp_path / "what").write_text(what)
        launch("shard_worker:stumble", 2, tmp_path, listen, timeout)

    yield run
    assert not left(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    "what, message, note",
    [
        ("raise", "shard 1 of 2: ValueError: the dog ate the keyframes$", "in stumble"),  # its own traceback
        ("memory", "shard 1 of 2: OutOfMemoryError: CUDA out of memory. More shards, a smaller size or a larger", "in stumble"),
        ("exits early", "shard 1 of 2 ended with exit code 1: no camel fits", "no camel"),
        ("killed", "shard 1 of 2 was ended by SIGKILL, as the system does when memory runs out$", ""),
        ("crashed", "shard 1 of 2 was ended by SIGSEGV$", "in fail"),  # where, as faulthandler says
        ("hang", "shard 0 of 2: OthersLost: no answer from the other shards: .*[Tt]imed out", "in gather"),
        ("terminated", "shard 1 of 2 was ended by SIGTERM$", ""),
        ("stopped", "shard 1 of 2 was stopped, .* for instance, and did not go on", None),
        ("stopped early", "shard 1 of 2 was stopped", None),  # the other one waits without end
    ],
)
def test_a_shard_that_fails_is_named_and_none_is_left(stumble, what, message, note):
    with pytest.raises(ShardError) as caught:
        stumble(what, timeout=2 if "stopped" in what else 600)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)
    if note is not None:
        assert note in caught.value.__notes__[0]


def test_a_shard_that_is_stopped_for_a_moment_goes_on(stumble):
    "Stopped by hand and continued, which the launcher must see before `timeout`."
    def go_on(said):
        pids.extend(int(path.read_text()) for path in Path(os.environ["TMPDIR"]).parent.glob("pid-1"))
        psutil.Process(pids[0]).suspend()
        threading.Timer(3, psutil.Process(pids[0]).resume).start()

    pids = []
    stumble("nothing", go_on, timeout=30)
    assert pids


def test_none_is_left_when_the_launcher_is_killed(tmp_path):
    (tmp_path / "what").write_text("stay")
    program = f"import sys; sys.path[:] = {sys.path!r}; from pathlib import Path; from tokenflow_nb.scale.shard import launch;"
    program += "launch('shard_worker:stumble', 2, Path(sys.argv[1]), lambda said: print(said, flush=True))"
    launcher = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert "met" in launcher.stdout.readline()  # all are there
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    launcher.stdout.close()
    assert not left(tmp_path)


def test_an_interrupt_ends_all(stumble):
    def interrupt(said):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stumble("stay", interrupt)


# ---- bad input, before any process is started


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, dict(shards=4), "shards=4: 9 frames with keyframe_interval=3 have 3 keyframes"),
        ({}, dict(shards=0), "shards=0"),
        (dict(rule="joint"), {}, "rule='joint' edits all frames edited jointly|rule='linear' and keyframe_interval=1"),
        (dict(rule="per_frame"), {}, "run edit_video on pieces"),
        (dict(keyframe_interval=10), {}, "keyframe_interval=10"),
        ({}, dict(device="mps"), "device='mps'"),
        ({}, dict(timeout=0), "timeout=0"),
        ({}, dict(timeout=float("inf")), "timeout=inf"),
        ({}, dict(timeout="60"), "timeout='60'"),
        ({}, dict(shards=True), "shards=True"),
        ({}, dict(shards=2.0), "shards=2.0"),
        ({}, dict(store="cache"), "store='cache'"),
        ({}, dict(progress=1), "progress=1"),
        ({}, dict(size=(0, 64)), "size=\\(0, 64\\)"),
        ({}, dict(config="a gold star"), "config='a gold star': give an EditConfig, EditConfig.published\\('a gold star'\\)"),
        ({}, dict(prompt=" "), "prompt=' ' is empty"),
        ({}, dict(seeed=1), "option='seeed' is unknown: did you mean 'seed'\\?"),
        ({}, dict(seed="one"), "seed='one'"),
        ({}, dict(out="film.avi"), "give a file ending in .mp4 or .gif"),
        pytest.param({}, dict(device="cuda"), "shards=2: this machine has 0 GPUs", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")),
    ],
)
def test_bad_input_is_told_before_any_work(monkeypatch, store, changes, options, message):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    options = dict(prompt="a gold star", config=config(**changes), shards=2, model="toy", device="cpu", store=store) | options
    with pytest.raises(ValueError, match=message):
        edit_sharded(SCENE.render(frames=9, size=64), **options)


def test_numpys_numbers_are_numbers():
    assert cut_shards(np.int64(9), np.int64(3), np.int64(2)) == cut_shards(9, 3, 2)


def test_a_loaded_model_is_refused(model, store):
    with pytest.raises(ValueError, match="give its name or folder"):
        edit_sharded(SCENE.render(frames=9, size=64), "a gold star", config(), shards=2, model=model, store=store)


# ---- a clip in, a clip out


def test_a_sharded_edit_is_saved_with_the_settings_that_made_it(store, tmp_path, capfd):
    "A whole config, a setting over it, another prompt; the result is that of one process to a level of 255, and the record says how."
    clip, given = SCENE.render(frames=7, size=64), config()
    options = dict(model="toy", seed=5, size=clip.size, device="cpu", store=store, out=tmp_path / "star.gif", progress=False)
    result = edit_sharded(clip, "a wooden star on grass", given, shards=2, **options)
    wanted = config(seed=5, prompt="a wooden star on grass", guidance_scale=result.config.guidance_scale)
    assert result.config == wanted and json.loads((tmp_path / "star.json").read_text())["config"] == wanted.settings()
    assert (tmp_path / "star.gif").is_file() and list(result.timings) == ["load", "invert", "edit", "decode"]
    model = load_model("toy", device="cpu")
    single = drive(starting(model, clip, wanted, Execution(store=store, source_branch="live"))).run().decode()
    assert np.abs(result.edited.frames.astype(int) - single.frames).max() <= 1
    assert not list(store.root.glob("*scratch*")) and capfd.readouterr() == ("", "")  # the launcher says nothing by itself
