"Many edits: fakes for what an executor may do, then real workers that are killed on the way."

import gc
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from films import same_film
from tokenflow_nb.backbones.load import MODELS
from tokenflow_nb.clip import read_clip, write_clip
from tokenflow_nb.config import EditConfig
from tokenflow_nb.edit import edit_video
from tokenflow_nb.scale import jobs
from tokenflow_nb.scale.jobs import EditJob, JobError, JobsFailed, LocalExecutor, Outcome, Outcomes, RayExecutor
from tokenflow_nb.scale.jobs import WorkerLost, edit_many
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(2, 0))
FEW = dict(model="toy", source_prompt=SCENE.caption, num_inference_steps=3, keyframe_interval=2, size=(64, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A clip of four frames, and a file that is none."
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "star.mp4", SCENE.render(frames=4, size=64))
    (folder / "broken.mp4").write_bytes(b"this is no video")
    return folder


@pytest.fixture
def make(folder, tmp_path):
    "Makes a job whose prompt names its result."
    return lambda name, source="star.mp4", **options: EditJob(folder / source, f"a {name} star on grass", out=tmp_path / name, **FEW | options)


@pytest.fixture
def edited(monkeypatch):
    "No model and no edit: a result is written at once, unless the prompt says what shall go wrong. The prompts that were run."
    run = []

    def edit(source, *, config, out, **_):
        run.append(prompt := config.prompt)
        if "broken" in prompt:
            raise ValueError("the film\nis torn")
        out.mkdir(parents=True, exist_ok=True)
        (out / "edited.mp4").write_text(prompt)
        (out / "run.json").write_text('{"config": {}}')

    monkeypatch.setattr(jobs, "edit_video", edit)
    monkeypatch.setattr(jobs, "_model_for", lambda job: None)
    return run


class Here(Executor):
    "Runs a task when it is submitted. `lose` says for which prompts, at which attempt, the worker dies."

    def __init__(self, lose=lambda prompt, attempt: False):
        self.lose, self.prompts = lose, []

    def submit(self, function, job, *rest):
        self.prompts.append(job.prompt)
        future = Future()
        if self.lose(job.prompt, self.prompts.count(job.prompt)):
            future.set_exception(WorkerLost("the worker went away"))
        else:
            future.set_result(function(job, *rest))
        return future


def statuses(outcomes):
    return [outcome.status for outcome in outcomes]


# What becomes of jobs


@pytest.mark.parametrize("executor", [Here, lambda: ThreadPoolExecutor(3)])
def test_a_failed_job_costs_one_row(edited, make, executor):
    outcomes = edit_many([make(name) for name in ("gold", "broken", "wooden", "marble")], executor(), progress=False)
    assert statuses(outcomes) == ["done", "failed", "done", "done"]
    assert [outcome.job.out.name for outcome in outcomes] == ["gold", "broken", "wooden", "marble"]
    assert outcomes[1].error == "the film is torn" and "ValueError: the film" in outcomes[1].traceback and not outcomes[1].losses
    assert [outcome.path.read_text() for outcome in outcomes if outcome.ok] == [f"a {name} star on grass" for name in ("gold", "wooden", "marble")]


def test_what_is_finished_is_not_run_again(edited, make):
    work = [make("gold"), make("wooden")]
    edit_many(work, Here(), progress=False)
    again = edit_many([*work, make("marble")], Here(), progress=False)
    assert statuses(again) == ["kept", "kept", "done"] and len(edited) == 3
    assert statuses(edit_many(work, None, progress=False)) == ["kept", "kept"]  # nothing to do: no process is started


@pytest.mark.parametrize("harm", ["no record", "not signed", "another job's", "no json", "cut", "gone", "other content"])
def test_what_is_not_this_jobs_whole_result_is_made_again(edited, make, harm):
    job = make("gold")
    edit_many([job], Here(), progress=False)
    record = json.loads(job.record_path.read_text())
    match harm:
        case "no record":
            job.record_path.unlink()
        case "not signed":
            job.record_path.write_text(json.dumps({"config": {}}))
        case "another job's":
            job.record_path.write_text(json.dumps(record | dict(job=record["job"] | dict(digest="0"))))
        case "no json":
            job.record_path.write_text('{"job": {"dig')
        case "cut":
            job.clip_path.write_text(job.clip_path.read_text()[:-1])
        case "gone":
            job.clip_path.unlink()
        case "other content":
            job.clip_path.write_text("something else")
    assert statuses(edit_many([job], Here(), progress=False)) == ["done"] and len(edited) == 2
    assert job.clip_path.read_text() == job.prompt and statuses(edit_many([job], Here(), progress=False)) == ["kept"]


def test_another_source_under_the_same_name_is_another_job(edited, tmp_path):
    source = write_clip(tmp_path / "clip.mp4", SCENE.render(frames=2, size=32))
    job = EditJob(source, "a gold star", out=tmp_path / "out", **FEW)
    edit_many([job], Here(), progress=False)
    write_clip(source, SCENE.replace(material="red").render(frames=2, size=32))
    assert statuses(edit_many([job], Here(), progress=False)) == ["done"]


def test_the_same_job_twice_is_run_once(edited, make):
    outcomes = edit_many([make("gold"), make("wooden"), make("gold")], Here(), progress=False)
    assert statuses(outcomes) == ["done"] * 3 and len(edited) == 2 and outcomes[0] is outcomes[2]


def test_a_killed_workers_job_is_tried_again(edited, make):
    executor = Here(lose=lambda prompt, attempt: "gold" in prompt and attempt < 3)
    outcomes = edit_many([make("gold"), make("wooden")], executor, retries=2, progress=False)
    assert statuses(outcomes) == ["done", "done"] and [len(outcome.losses) for outcome in outcomes] == [2, 0]


@pytest.mark.parametrize("retries", [0, 2])
def test_a_job_that_kills_every_worker_ends(edited, make, retries):
    executor = Here(lose=lambda prompt, attempt: "gold" in prompt)
    outcomes = edit_many([make("gold"), make("wooden")], executor, retries=retries, progress=False)
    assert statuses(outcomes) == ["lost", "done"] and outcomes[0].losses == ("the worker went away",) * retries
    assert outcomes[0].error == "the worker went away" and not outcomes[0].path.exists()


def test_an_executor_that_breaks_loses_no_finished_job(edited, make):
    class Breaks(Here):
        def submit(self, function, *arguments):
            if len(self.prompts) == 2:
                raise BrokenExecutor("the pool is broken")
            return super().submit(function, *arguments)

    work = [make(name) for name in ("gold", "wooden", "marble", "yellow")]
    outcomes = edit_many(work, Breaks(), progress=False)
    assert statuses(outcomes) == ["done", "done", "lost", "lost"] and "the pool is broken" in outcomes[3].error
    assert statuses(edit_many(work, Here(), progress=False)) == ["kept", "kept", "done", "done"]


def test_an_interrupt_cancels_what_waits(edited, make):
    waiting = []

    class Slow(Executor):
        def submit(self, *arguments):
            if len(waiting) == 2:
                raise KeyboardInterrupt
            waiting.append(Future())
            return waiting[-1]

    with pytest.raises(KeyboardInterrupt):
        edit_many([make(name) for name in ("gold", "wooden", "marble")], Slow(), progress=False)
    assert all(future.cancelled() for future in waiting)


def test_an_edit_has_as_many_threads_as_the_process_that_asked(edited, make, monkeypatch):
    found, edit = [], jobs.edit_video
    monkeypatch.setattr(jobs, "edit_video", lambda *arguments, **options: found.append(torch.get_num_threads()) or edit(*arguments, **options))

    class Elsewhere(Here):
        def submit(self, *task):
            torch.set_num_threads(before + 3)  # as in a process that has its own number
            return super().submit(*task)

    before = torch.get_num_threads()
    edit_many([make("gold")], Here(), progress=False)
    edit_many([make("wooden"), make("broken")], Elsewhere(), progress=False)
    assert found == [before] * 3


def test_jobs_of_one_model_follow_each_other(edited, make, tmp_path):
    executor = Here()
    work = [make("gold"), make("wooden", model="sd1.5"), make("marble"), make("yellow", model="sd1.5")]
    outcomes = edit_many(work, executor, progress=False)
    assert [prompt.split()[1] for prompt in executor.prompts] == ["gold", "marble", "wooden", "yellow"]
    assert [outcome.job for outcome in outcomes] == work


def test_a_worker_keeps_its_model_until_the_files_change(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(jobs, "_kept", threading.local())
    weights = shutil.copytree(MODELS["toy"].ids[0], tmp_path / "model")
    job = EditJob(folder / "star.mp4", "a star", out=tmp_path / "out", model=weights)
    before, model = job.digest, jobs._model_for(job)
    assert jobs._model_for(job) is model
    with ThreadPoolExecutor(1) as other:
        assert other.submit(jobs._model_for, job).result() is model  # threads share it
    index = weights / "model_index.json"
    index.write_text(index.read_text() + " ")
    assert jobs._model_for(job) is not model and job.digest != before


def test_the_model_before_is_gone_before_another_is_loaded(make, monkeypatch):
    alive = []

    def load(name, device):
        gc.collect()
        alive.append([each() for each in loaded if each() is not None])
        loaded.append(weakref.ref(model := type("Model", (), {})()))
        return model

    loaded = []
    monkeypatch.setattr(jobs, "_kept", threading.local())
    monkeypatch.setattr(jobs, "shared_model", load)
    for name in ("toy", "sd1.5"):
        jobs._model_for(make("gold", model=name))
    assert alive == [[], []]


# Settings, as edit_video takes them


def test_a_job_takes_a_whole_config_and_settings_over_it(make, folder, tmp_path, edited, monkeypatch):
    config = EditConfig.published("another prompt", source_prompt=SCENE.caption, num_inference_steps=4)
    job = EditJob(folder / "star.mp4", "a gold star", config, out=tmp_path / "out", model="toy", seed=7, size=(64, 64))
    assert job.config == EditConfig.published("a gold star", source_prompt=SCENE.caption, num_inference_steps=4, seed=7)
    assert job.reading.size == (64, 64) and job.prompt == "a gold star"
    asked, edit = {}, jobs.edit_video
    monkeypatch.setattr(jobs, "edit_video", lambda source, **given: asked.update(given) or edit(source, **given))
    assert statuses(edit_many([job], Here(), progress=False)) == ["done"]
    assert asked["config"] == job.config and asked["size"] == (64, 64) and asked["config"].inversion_steps == 500
    same = {name: value for name, value in job.config.settings().items() if name != "prompt"}
    assert EditJob(job.source, job.prompt, out=job.out, model="toy", size=(64, 64), **same).digest == job.digest


def test_every_option_of_edit_video_is_one_of_a_job():
    taken, given = (set(inspect.signature(each).parameters) for each in (edit_video, EditJob))
    of_a_loaded_model = {"ip_adapter_image", "lora", "vae", "tokenizer"}  # a job has the name of one
    assert taken - {"callback_on_step_end", "clip", *of_a_loaded_model, *jobs._OF_THE_RUN} <= given


# What a digest stands for


@pytest.mark.parametrize(
    "options, same",
    [
        (dict(seed=0), True),
        (dict(block_size=1), True),
        (dict(source_branch="live"), True),
        (dict(resume=False), True),
        (dict(method="sdedit"), False),
        (dict(pnp_attn_t=0.5), False),
        (dict(restore_size=False), True),
        (dict(size=[64, 64]), True),
        (dict(seed=1), False),
        (dict(restore_size=True), False),
        (dict(max_frames=2), False),
        (dict(start=0.1), False),
        (dict(size=(64, 128)), False),
        (dict(negative_prompt="blurred"), False),
        (dict(model="sd1.5"), False),
        (dict(device="cpu"), False),
    ],
)
def test_what_decides_the_picture_decides_the_digest(make, options, same):
    assert (make("gold").digest == make("gold", **options).digest) == same


def test_a_digest_knows_no_place(make, folder, tmp_path):
    other = EditJob(folder / ".." / folder.name / "star.mp4", make("gold").prompt, out=tmp_path / "elsewhere", **FEW)
    assert other.digest == make("gold").digest
    assert EditJob(other.source, other.prompt, out=tmp_path / "gold.gif", **FEW).digest != other.digest


def test_frames_are_a_source(edited, tmp_path):
    frames = SCENE.render(frames=2, size=32).frames
    one, same, other = (EditJob(each, "a star", out=tmp_path / "out") for each in (frames, frames.copy(), frames[::-1]))
    assert one.digest == same.digest != other.digest
    assert statuses(edit_many([one], Here(), progress=False)) == ["done"]


# Bad input


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(num_inference_step=3), ["option='num_inference_step' is unknown", "did you mean 'num_inference_steps'?"]),
        (dict(store=None), ["store=None", "edit_many"]),
        (dict(num_inference_steps=1), ["num_inference_steps=1", "at least 2"]),
        (dict(prompt="  "), ["prompt='  '"]),
        (dict(out="film.avi"), ["film.avi", ".mp4"]),
        (dict(out=None), ["out=None"]),
        (dict(method="pmp"), ["pmp", "did you mean 'pnp'?"]),
        (dict(max_frame=3), ["'max_frame'", "did you mean 'max_frames'?"]),
        (dict(config="pnp"), ["config='pnp'", "give an EditConfig"]),
    ],
)
def test_a_job_that_cannot_be_is_not_made(folder, tmp_path, change, words):
    with pytest.raises(ValueError) as caught:
        EditJob(**dict(source=folder / "star.mp4", prompt="a star", out=tmp_path / "out") | change)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_loaded_model_is_refused(model, folder, tmp_path):
    with pytest.raises(JobError, match="is loaded: give its name"):
        EditJob(folder / "star.mp4", "a star", out=tmp_path / "out", model=model)


def refused(jobs, *words, executor=None, **options):
    with pytest.raises(JobError) as caught:
        edit_many(jobs, executor or Here(), progress=False, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_cannot_be_run_is_told_before_any_work(edited, make, tmp_path):
    good = make("gold")
    refused([], "jobs is empty")
    refused(good, "is one job", "[job]")
    refused([good, "star.mp4"], "jobs[1]='star.mp4'", "EditJob")
    refused([good, make("wooden", source="nowhere.mp4")], "jobs[1]", "nowhere.mp4", "no such file")
    refused([good, EditJob(good.source, "a wooden star", out=good.out, **FEW)], "jobs[0] and jobs[1]", "both write", "gold")
    refused([good, EditJob(good.source, "a wooden star", out=good.out / "edited.mp4", **FEW)], "both write")
    both = (EditJob(good.source, good.prompt, out=tmp_path / f"star.{kind}", **FEW) for kind in ("mp4", "gif"))
    refused(both, "both write", "star.json")
    refused([good], "executor=<built-in function print>", "no submit()", executor=print)
    refused([good], "is a class", executor=LocalExecutor)
    refused([good], "retries=-1", retries=-1)
    assert not edited and not good.out.exists()


def test_an_executor_without_futures_is_told(edited, make):
    class Plain:
        def submit(self, *_):
            return "soon"

    refused([make("gold")], "returns 'soon'", "no future", executor=Plain())


def test_ray_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"tokenflow_nb\[ray\]"):
        RayExecutor()


def test_ray_that_is_not_started_is_told():
    pytest.importorskip("ray")
    with pytest.raises(RuntimeError, match=r"call ray.init\(\)"):
        RayExecutor()


# The table


def test_the_table_escapes_and_raises(make):
    bad = Outcome(make("<b>gold</b>"), "failed", 0.25, "no <i>video</i> & no sound", "Traceback ...")
    table = Outcomes([Outcome(make("wooden"), "done", 1.5, losses=("the worker went away",)), bad])
    assert "&lt;b&gt;gold&lt;/b&gt;" in table._repr_html_() and "<b>" not in table._repr_html_() and "<i>" not in table._repr_html_()
    assert "done (tried 2 times)" in repr(table) and "no <i>video</i> & no sound" in repr(table) and len(repr(table).splitlines()) == 4
    assert list(table.failed) == [bad] and statuses(Outcomes(table[:1]).raise_failed()) == ["done"]
    with pytest.raises(JobsFailed, match="1 of 2 jobs have no result") as caught:
        table.raise_failed()
    assert caught.value.outcomes[0].traceback == "Traceback ..."


# Real workers


@pytest.fixture(scope="module")
def serial(folder, tmp_path_factory, model):
    "The same edits one after the other in this process: frames of the film by material, and the cache."
    out, found = tmp_path_factory.mktemp("serial"), {}
    cache = Store(out / "cache")

    def run(material):
        if material not in found:
            options = FEW | dict(model=model)
            edit_video(folder / "star.mp4", f"a {material} star on grass", out=out / material, store=cache, progress=False, **options)
            found[material] = read_clip(out / material / "edited.mp4").frames
        return found[material]

    run.cache = cache
    return run


def same_latents(one: Store, other: Store) -> int:
    "Asserts that the tensors of two caches are equal bit by bit. Returns how many there are."
    count = 0
    for entry in one.entries():
        twin = other.get(entry.key)
        for name in entry.names if twin else ():
            if f"{name}.safetensors" in entry.manifest["files"]:
                mine, theirs = entry.load(name), twin.load(name)
                assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine), (entry.key, name)
                count += len(mine)
    return count


def kill_after(path: Path, pids, killed: list):
    "A thread that kills the first of these processes when a file appears."

    def watch():
        until = time.monotonic() + 600
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        if found := pids():
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_the_default_replaces_a_killed_process_and_computes_the_same(make, serial, tmp_path):
    materials, killed, cache = ("gold", "wooden"), [], Store(tmp_path / "cache")
    work = [make(material) for material in materials]
    thread = kill_after(work[0].clip_path, lambda: [child.pid for child in multiprocessing.active_children()], killed)
    outcomes = edit_many(work, store=cache, progress=False)
    thread.join()
    assert statuses(outcomes) == ["done", "done"] and killed, outcomes
    assert [loss for outcome in outcomes for loss in outcome.losses] == ["the worker process was ended by SIGKILL, as the system does when memory runs out"]
    assert all(same_film(outcome.path, serial(material)) for outcome, material in zip(outcomes, materials, strict=True))
    assert same_latents(serial.cache, cache)
    assert not multiprocessing.active_children()


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    "A Ray cluster of two CPUs on this machine, whose token is not written into the user's home."
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tokenflow_nb[ray]'")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("RAY_gcs_server_port_wait_time_s", "RAY_worker_register_timeout_seconds"):
        monkeypatch.setenv(name, "300")  # on a busy machine
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield ray
    ray.shutdown()
    os.environ.pop("RAY_AUTH_MODE", None)  # set by Ray, for a token that is gone


def test_ray_edits_eight_jobs_one_broken_one_worker_killed(cluster, make, serial, tmp_path):
    materials = ("gold", "wooden", "marble", "yellow", "red", "striped", "dotted")
    work = [make(material) for material in materials]
    work.insert(3, make("broken", source="broken.mp4"))
    killed, cache = [], Store(tmp_path / "cache")
    with RayExecutor(workers=2) as executor:
        thread = kill_after(work[0].clip_path, lambda: executor.pids, killed)
        outcomes = edit_many(work, executor, store=cache, progress=False)
        thread.join()
        assert len(executor.pids) == 2 and killed[0] not in executor.pids
    assert statuses(outcomes) == ["done"] * 3 + ["failed"] + ["done"] * 4, outcomes
    assert "broken.mp4" in outcomes[3].error and "ClipError" in outcomes[3].traceback and len(outcomes.failed) == 1
    (loss,) = (loss for outcome in outcomes for loss in outcome.losses)
    assert "worker was lost" in loss
    done = [outcome for outcome in outcomes if outcome.ok]
    assert all(same_film(outcome.path, serial(material)) for outcome, material in zip(done, materials, strict=True))
    assert same_latents(serial.cache, cache)
