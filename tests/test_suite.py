"A suite that is killed, started again, given methods that fail, and the page that it writes."

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.clip import Clip
from tokenflow_nb.compare import METHODS, compare, suite
from tokenflow_nb.compare.suite import SuiteError, run_suite, write_report
from tokenflow_nb.measure.metrics import METRICS, Case, metric
from tokenflow_nb.measure.page import report_page
from tokenflow_nb.measure.report import Report
from tokenflow_nb.toy.world import Scene

FEW = dict(metrics=["warp_error", "ssim"], num_inference_steps=2, progress=False)


def make_cases(count: int = 2, frames: int = 3, size: int = 64) -> list[Case]:
    scene = Scene("star", "blue", "grass", velocity=(2, 0))
    return [Case.toy(scene, material, frames, size) for material in ("gold", "marble", "wooden")[:count]]


# Methods that cost nothing. Those of a module can go to another process.


def keep(job):
    return job.clip


def darken(job):
    factors = 1 - 0.3 * (np.arange(len(job.clip)) % 2)
    return job.clip_of((job.clip.frames * factors[:, None, None, None]).astype(np.uint8))


def die(job):
    os._exit(3)


class Counted:
    "A method that counts its calls."

    def __init__(self, method=keep):
        self.method, self.seen = method, []

    def __call__(self, job):
        self.seen.append(job.name)
        return self.method(job)


@pytest.fixture(scope="module")
def cases():
    return make_cases()


# Going on


def test_what_is_finished_is_not_done_again(cases, tmp_path):
    first, second = Counted(), Counted(darken)
    report = run_suite(cases, dict(keep=first), tmp_path, **FEW)
    again = run_suite(cases, dict(keep=first, darken=second), tmp_path, **FEW)
    names = [case.name for case in cases]
    assert first.seen == names and second.seen == names
    assert again.values("warp_error", "keep") == report.values("warp_error", "keep")
    assert [(row.method, row.case) for row in again.rows] == [(method, name) for method in ("keep", "darken") for name in names]


def test_other_metrics_are_measured_on_the_frames_that_are_kept(cases, tmp_path):
    method = Counted(darken)
    run_suite(cases, dict(darken=method), tmp_path, **FEW)
    report = run_suite(cases, dict(darken=method), tmp_path, **FEW | dict(metrics=["sharpness_kept"]))
    assert len(method.seen) == 2 and report.metrics == ["sharpness_kept"]


def test_figures_are_of_the_frames_and_not_of_the_film(cases, tmp_path):
    from tokenflow_nb.clip import read_clip
    from tokenflow_nb.measure.metrics import warp_error

    case = cases[0]
    report = run_suite([case], dict(darken=darken), tmp_path, **FEW)
    frames = (case.source.frames * np.array([1, 0.7, 1])[:, None, None, None]).astype(np.uint8)
    [film] = (tmp_path / "clips").glob("*/darken.mp4")
    found = float(report.values("warp_error", "darken")[case.name])
    assert found == float(warp_error(frames, case.flow)) != float(warp_error(read_clip(film), case.flow))


def test_a_killed_process_leaves_what_it_finished(cases, tmp_path):
    script = f"""
        import os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        from test_suite import FEW, Counted, darken, make_cases
        from tokenflow_nb.compare.suite import run_suite

        def dies(job):
            if "marble" in job.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return darken(job)

        run_suite(make_cases(), dict(keep=Counted(), darken=Counted(dies)), {str(tmp_path)!r}, **FEW)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept, darkened = Counted(), Counted(darken)
    report = run_suite(cases, dict(keep=kept, darken=darkened), tmp_path, **FEW)
    assert kept.seen == [] and darkened.seen == [cases[1].name]
    assert not report.errors and len(report.rows) == 4


def test_another_process_knows_a_built_in_method_again():
    "Else a suite with it could not go on after a restart."
    script = "import json; from tokenflow_nb import compare; from tokenflow_nb.compare import suite; print(json.dumps({n: suite._about(e.make()) for n, e in compare.METHODS.items()}))"
    found = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert found[0] == found[1]
    assert len(json.loads(found[0])) == len(METHODS) and "0x" not in found[0]


def test_an_interrupt_stops_and_keeps(cases, tmp_path):
    def interrupted(job):
        raise KeyboardInterrupt

    first, second = Counted(), Counted(darken)
    with pytest.raises(KeyboardInterrupt):
        run_suite(cases, dict(keep=first, darken=Counted(interrupted)), tmp_path, **FEW)
    assert first.seen == [cases[0].name]
    run_suite(cases, dict(keep=first, darken=second), tmp_path, **FEW)
    assert first.seen == [case.name for case in cases] and len(second.seen) == 2


def test_half_written_files_are_no_results(cases, tmp_path):
    method = Counted()
    run_suite(cases, dict(keep=method), tmp_path, **FEW)
    for path in (*tmp_path.glob("clips/*/keep.npz"), *tmp_path.glob("rows/*/keep.json")):
        path.write_bytes(path.read_bytes()[:50])
    left = next(tmp_path.glob("clips/*")) / ".123.keep.npz"
    left.write_bytes(b"half")
    run_suite(cases, dict(keep=method), tmp_path, **FEW)
    assert len(method.seen) == 4 and not left.exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(num_inference_steps=3), "num_inference_steps: 2 there, 3 asked for"),
        (dict(seed=5), "seed: 0 there, 5 asked for"),
        (dict(cases=make_cases(frames=4)), "3×64×64 there"),
    ],
)
def test_other_settings_do_not_belong_into_the_folder(cases, tmp_path, changes, says):
    method = Counted()
    run_suite(cases, dict(keep=method), tmp_path, **FEW)
    before = (tmp_path / "suite.json").read_text()
    with pytest.raises(SuiteError, match=re.escape(says)):
        run_suite(changes.pop("cases", cases), dict(keep=method), tmp_path, **FEW | changes)
    assert len(method.seen) == 2 and (tmp_path / "suite.json").read_text() == before


def test_a_smaller_block_may_go_on(cases, tmp_path):
    method = Counted()
    for size in (8, 2):
        run_suite(cases, dict(keep=method), tmp_path, **FEW, block_size=size)
    assert len(method.seen) == 2


def test_methods_are_given_the_block_size(cases, model, store, tmp_path):
    case, seen = cases[0], []
    methods = dict(keep=lambda job: seen.append(job.execution.block_size) or job.clip)
    run_suite([case], methods, tmp_path, **FEW, block_size=3)
    compare(case.source, case.prompt, methods, model=model, size=(64, 64), store=store, block_size=2, progress=False)
    assert seen == [3, 2]
    with pytest.raises(ValueError, match="block_size=0: give a whole number of frames"):
        run_suite([case], methods, tmp_path / "none", **FEW, block_size=0)


# Failing


def broken(job):
    raise RuntimeError("no memory\nleft")


FAILING = dict(
    broken=(broken, "RuntimeError: no memory left"),
    small=(lambda job: Clip(job.clip.frames[:, ::2, ::2]), "one size"),
    short=(lambda job: job.clip[:2], "cut both by clip[:2]"),
    nan=(lambda job: np.where(job.clip.frames > 9, np.nan, job.clip.frames / 255), "NaN"),
    nothing=(lambda job: None, "axes"),
)


def test_methods_that_fail_cost_only_their_own_rows(cases, tmp_path):
    methods = {name: method for name, (method, _) in FAILING.items()}
    report = run_suite(cases, dict(keep=keep) | methods | dict(darken=darken), tmp_path, **FEW)
    for row in report.rows:
        if row.method in FAILING:
            assert row.measures == {} and FAILING[row.method][1] in row.errors["clip"]
        else:
            assert set(row.measures) == {"warp_error", "ssim"} and row.errors == {}
    page = write_report(report, tmp_path)[0].read_text()
    assert "no memory left" in page and "no clip" in page


def test_a_failure_is_tried_again(cases, tmp_path):
    method, late = Counted(), Counted(broken)
    run_suite(cases, dict(keep=method, late=late), tmp_path, **FEW)
    late.method = darken  # what was wrong is mended
    report = run_suite(cases, dict(keep=method, late=late), tmp_path, **FEW)
    assert len(method.seen) == 2 and len(late.seen) == 4 and not report.errors


class Torn(list):
    "Cases of which one cannot be read."

    def __getitem__(self, place):
        if place == 0:
            raise ValueError("bear: 3 masks for 5 frames")
        return super().__getitem__(place)


def test_a_case_that_cannot_be_read_costs_no_other(cases, tmp_path):
    report = run_suite(Torn(cases), dict(keep=keep), tmp_path, **FEW)
    assert [bool(row.measures) for row in report.rows] == [False, True]
    assert "3 masks for 5 frames" in report.errors[0]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(methods=["tokenflo"]), "methods: 'tokenflo' is unknown; did you mean 'tokenflow'? there are vae, "),
        (dict(methods={"a/b": keep}), "cannot name its files"),
        (dict(metrics=["warp"]), "metrics='warp' is unknown: there are warp_error"),
        (dict(steps=3), "steps=3 is no setting of an edit: there are"),
        (dict(num_inference_steps=1), "num_inference_steps=1"),
        (dict(cases=[]), "at least one"),
        (dict(processes=0), "processes=0"),
        (dict(processes=2, methods={"own": lambda job: job.clip}), "processes=1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(cases, tmp_path, monkeypatch, arguments, says):
    def loaded(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(suite, "load_model", loaded)
    given = dict(cases=cases, methods=dict(keep=keep)) | FEW | arguments
    with pytest.raises(ValueError, match=re.escape(says)):
        run_suite(out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_judge_that_cannot_be_loaded_is_told_before_the_work(cases, tmp_path):
    method = Counted()
    with pytest.raises(SuiteError, match="judge='nowhere/clip' cannot be loaded"):
        run_suite(cases, dict(keep=method), tmp_path, **FEW | dict(metrics=["clip_gain"]), judge="nowhere/clip")
    assert method.seen == []


# Two processes


def redness(evidence):
    return evidence.edited.frames[..., 0].mean((1, 2)) / 255


def test_two_processes_give_the_figures_of_one(tmp_path, monkeypatch):
    "Also by a metric of this file, which the other processes do not know by themselves."
    monkeypatch.setattr(METRICS, "_things", dict(METRICS._things))
    metric("red %", better="higher", scale=100, digits=1)(redness)
    cases, methods = make_cases(3), dict(keep=keep, darken=darken)
    options = FEW | dict(metrics=["warp_error", "ssim", "clip_gain", "redness"])
    one = run_suite(cases, methods, tmp_path / "one", **options)
    two = run_suite(cases, methods, tmp_path / "two", **options, processes=2)
    assert [(row.method, row.case) for row in one.rows] == [(row.method, row.case) for row in two.rows]
    for first, second in zip(one.rows, two.rows):
        for name in ("warp_error", "ssim", "redness"):
            assert float(first.measures[name]) == float(second.measures[name])
        # sums over threads round differently
        assert float(first.measures["clip_gain"]) == pytest.approx(float(second.measures["clip_gain"]), abs=1e-5)
    red = two.values("redness", "keep")[cases[0].name]
    assert len(red.per_frame) == 3 and red == pytest.approx(cases[0].source.frames[..., 0].mean() / 255)
    page, table, _ = write_report(two, tmp_path / "two")
    assert "red % ↑" in page.read_text() and "redness" in table.read_text().splitlines()[0].split(",")


def test_a_process_that_dies_is_told_and_the_rest_goes_on_later(cases, tmp_path):
    with pytest.raises(SuiteError, match="a worker process ended before its work"):
        run_suite(cases, dict(keep=Counted(), darken=Counted(die)), tmp_path, **FEW, processes=2)
    kept, darkened = Counted(), Counted(darken)
    report = run_suite(cases, dict(keep=kept, darken=darkened), tmp_path, **FEW)
    assert len(kept.seen) < 2 and len(darkened.seen) == 2 and not report.errors


def test_what_other_processes_cannot_import_is_refused_with_a_remedy(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(METRICS, "_things", dict(METRICS._things))
    metric("zero", name="zero")(lambda evidence: 0)
    few, methods = FEW | dict(metrics=["zero"]), dict(keep=keep)
    with pytest.raises(SuiteError, match=r"metric 'zero' cannot be sent to another process .*use processes=1"):
        run_suite(cases, methods, tmp_path, **few, processes=2)
    assert run_suite(cases, methods, tmp_path, **few, processes=1).summary("zero")["keep"].value == 0
    model = load_model("toy", device="cpu")
    with pytest.raises(SuiteError, match="is loaded in this process: give its name or folder, or processes=1"):
        run_suite(cases, methods, tmp_path / "loaded", **FEW, model=model, processes=2)
    assert run_suite(cases[:1], methods, tmp_path / "loaded", **FEW, model=model, processes=1).rows[0].measures


# What it says


def test_it_says_how_much_and_how_long_before_it_starts(cases, tmp_path, capsys):
    run_suite(cases, dict(keep=keep), tmp_path, **FEW | dict(progress=True))
    first = capsys.readouterr().out
    assert re.search(r"^2 edits: 2 cases × 1 method\. This takes about \d+ (s|min).*a guess", first)
    run_suite(cases, dict(keep=keep, darken=darken), tmp_path, **FEW | dict(progress=True))
    assert "4 edits: 2 cases × 2 methods, 2 of them done before. This takes" in capsys.readouterr().out
    run_suite(cases, dict(keep=keep, darken=darken), tmp_path, **FEW | dict(progress=True))
    assert "Nothing is left to do." in capsys.readouterr().out


def test_times_are_of_the_method_without_the_inversion(cases, tmp_path):
    def inverts(job):
        assert len(job.trajectory) == len(job.clip)
        return job.clip

    run_suite(cases[:1], dict(inverts=inverts), tmp_path, **FEW)
    [path] = tmp_path.glob("rows/*/inverts.json")
    run = Report.from_json(path).card["run"]
    assert run["inverting"] > run["seconds"] >= 0


# The page


class Reader(HTMLParser):
    "Elements that are left open, what scripts hold, and everything that would be loaded."

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.scripts, self.loads, self.words = [], 0, [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.loads += [value for name, value in attributes if name in ("src", "href", "data", "srcset")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data + " "


def test_the_page_has_everything_and_runs_nothing_of_others(tmp_path):
    evil = "<script>alert('x')</script>\" onload=\"alert(1)"
    case = make_cases(1)[0]
    case = Case(evil, case.source, case.prompt, case.source_prompt, case.mask, case.ideal, case.flow, case.scene)
    report = run_suite([case], dict(vae=keep, per_frame=darken, other=keep, lost=broken), tmp_path, **FEW)
    html, table, cards = write_report(report, tmp_path, title=evil)
    page = html.read_text()
    read = Reader(page)
    assert read.open == [] and read.scripts == 1 and "alert" not in re.search(r"<script>(.*?)</script>", page, re.S)[1]
    assert all(each.startswith("data:") for each in read.loads) and "url(http" not in page
    assert {"vae", "per_frame", "other", "lost"} <= set(re.findall(r"\w+", read.words)) and evil in read.words
    assert page.count("data:image/webp") == 5  # source, three methods, ideal
    assert "RuntimeError: no memory left" in read.words
    assert len(table.read_text().splitlines()) == 5
    said = json.loads(cards.read_text())
    assert said["card"]["settings"]["num_inference_steps"] == 2 and said["card"]["versions"]["torch"]
    assert [run["failed"] for run in said["runs"]] == [False, False, False, True]


def test_films_beyond_the_room_are_left_out_and_named(cases):
    report = Report([], {})
    films = {f"case {place}": dict(source=cases[0].source) for place in range(4)}
    page = report_page(report, films, max_bytes=1)
    assert page.count("<section") == 1 and "3 more cases" in page


def test_a_report_without_a_single_figure_still_makes_a_page(cases, tmp_path):
    report = run_suite(cases[:1], dict(lost=broken), tmp_path, **FEW)
    assert "RuntimeError" in Reader(write_report(report, tmp_path)[0].read_text()).words
