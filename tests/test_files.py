"Files that appear whole, targets that are checked before the work, and names that are text and nothing else."

import csv
import json
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.bench.machine import Bench
from tokenflow_nb.bench.run import Run
from tokenflow_nb.bench.table import Line
from tokenflow_nb.cli import command as cli
from tokenflow_nb.clip import Clip, read_clip
from tokenflow_nb.compare.suite import SuiteError, run_suite, write_report
from tokenflow_nb.edit import Edit, EditConfig, EditError, EditResult, edit_video
from tokenflow_nb.inversion import invert
from tokenflow_nb.measure.evaluate import evaluate
from tokenflow_nb.measure.metrics import Case, Measure
from tokenflow_nb.measure.page import _svg, _trade_off, report_page
from tokenflow_nb.measure.report import Report, Row
from tokenflow_nb.support.files import FILMS, film_and_record, replaced, writable_target, write_json, write_text
from tokenflow_nb.toy.evaluate import save_sheet
from tokenflow_nb.toy.world import Scene

NASTY = ("$\\frac$", "$x$", "\\alpha", "_hidden", "a^b_c", "two\nlines", "✨🐺", "نجم ذهبي", "<script>alert(1)</script>", "a|b", "`code`", "\x07bell", "% {0}", "' \" &amp;")


@pytest.fixture(scope="module")
def clip():
    return Scene("star", "blue", "grass", radius=36).render(frames=4, size=64)


@pytest.fixture(scope="module")
def report():
    "Methods and cases of every name that once broke something."
    figures = lambda place: {  # noqa: E731
        "warp_error": Measure("warp_error", 0.01 + place / 100, [0.01] * 3, choices={}), "clip_gain": Measure("clip_gain", 0.1, [0.1] * 3, choices={}),
        "sharpness_kept": Measure("sharpness_kept", 1.0, [1.0] * 3, choices={}),
    }
    return Report([Row(method, case, figures(place)) for place, method in enumerate(NASTY) for case in NASTY[::-1]], dict(methods={name: name for name in NASTY}))


@pytest.fixture(scope="module")
def result(model, store, clip):
    return edit_video(clip, "a gold star", model=model, num_inference_steps=2, size=(64, 64), store=store, progress=False)


# ---- whole or not at all


def failing(monkeypatch):
    "Every file is written, and then the disk is full."

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenflow_nb.support.files.os.replace", full)


def measured() -> Bench:
    line = Line("default", 24, 96.0, dict(invert=0.1, edit=0.2), 1e8, 0.2, dict(warp=1.0))
    run = Run(24, 100, dict(invert=1.0, edit=2.0), 1e8)
    return Bench(dict(machine="$\\frac$ & co", clock="wall", rate=1e12, subjects=["a star"], growth_steps=4), (line,), (run, run))


WRITERS = {  # what writes, and the files that it writes
    "text": (lambda at, have: write_text(at / "x.txt", "new"), ["x.txt"]),
    "json": (lambda at, have: write_json(at / "x.json", {}), ["x.json"]),
    "report.csv": (lambda at, have: have["report"].to_csv(at / "x.csv"), ["x.csv"]),
    "report.json": (lambda at, have: have["report"].to_json(at / "x.json"), ["x.json"]),
    "suite": (lambda at, have: write_report(have["report"], at), ["report.html", "report.csv", "cards.json"]),
    "bench": (lambda at, have: measured().save(at), ["bench.md", "bench.csv", "bench.json", "growth.png"]),
    "sheet": (lambda at, have: save_sheet(at / "sheet.png", [have["clip"]] * 4, ["a", "b", "c", "d"]), ["sheet.png"]),
    "edit": (lambda at, have: have["edit"].save(at / "x.safetensors"), ["x.safetensors"]),
    "record": (lambda at, have: have["result"].save(at), ["run.json", "edited.mp4"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_was_there_stays_when_writing_fails(name, monkeypatch, tmp_path, model, store, clip, report, result):
    write, files = WRITERS[name]
    trajectory = invert(model, clip, "", steps=2, store=store, progress=False)
    have = dict(report=report, clip=clip, result=result, edit=Edit(model, trajectory, EditConfig("a gold star", num_inference_steps=2), clip))
    for file in files:
        (tmp_path / file).write_text("old")
    with monkeypatch.context() as patch:
        failing(patch)
        with pytest.raises((OSError, ValueError), match="No space left"):
            write(tmp_path, have)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(files, b"old")  # no other file, too
    write(tmp_path, have)
    assert sorted(os.listdir(tmp_path)) == sorted(files) and not any(path.read_bytes() == b"old" for path in tmp_path.iterdir())


def test_nothing_is_written_in_place():
    "Whoever writes a file writes it through `replaced`: the parts are named so."
    for path in sorted(Path(cli.__file__).parent.parent.rglob("*.py")):
        if path.name in ("files.py", "memory.py") or path.parent.name in ("store", "toy", "panels", "video"):  # has a way of its own
            continue
        found = re.findall(r"(\w+)\.(?:write_text|write_bytes|open)\(\"?[wa]?|savefig\((\w+)", path.read_text())
        writers = {one or other for one, other in found} - {"part", "buffer", "self"}
        assert writers <= {"log", "path", "safe", "Image", "safetensors"}, (path, writers)  # `path.open("rb")` reads


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "x.json").symlink_to(tmp_path / "far" / "x.json")
    write_json(tmp_path / "x.json", 1)
    assert (tmp_path / "x.json").is_symlink() and (tmp_path / "far" / "x.json").read_text() == "1\n"


@given(st.text(max_size=40))
def test_any_text_can_be_written(text):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write_text(Path(folder) / "x.txt", text)
        assert path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n") == text.encode("utf-8", "backslashreplace").decode().replace("\r\n", "\n").replace("\r", "\n")


# ---- targets


@pytest.mark.parametrize("name", ["results.d", "wolf.v2", "wolf.v2-edited", "x.mp4", "X.GIF", "a b/c.d/e", "..."])
def test_only_mp4_and_gif_name_files(name, tmp_path, result):
    out = result.save(tmp_path / name)
    film, record = film_and_record(out)
    assert film.is_file() and record.is_file() and out.is_dir() == (not name.lower().endswith(FILMS))


def spoiled(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "record.json").mkdir()
    (tmp_path / "full" / "edited.mp4").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.mp4")
    names = ("taken", "taken/x.mp4", "taken/deep/er", "folder.mp4", "record.mp4", "full", "loop", "loop/x.mp4", "pipe.mp4", "x" * 256, "x" * 250 + ".mp4", "x.avi", "x.PNG", "a\0b", "\ud800")
    return {name: tmp_path / name for name in names}


def test_what_cannot_be_written_is_refused_by_everything_that_writes(tmp_path, clip, model, store, result, monkeypatch):
    monkeypatch.setattr("tokenflow_nb.edit.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for name, out in spoiled(tmp_path).items():
        before = sorted(os.listdir(tmp_path))
        for write in (lambda: edit_video(clip, "a gold star", out=out, progress=False), lambda: result.save(out)):
            with pytest.raises(ValueError, match="^out=") as caught:
                write()
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 700, name
        assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_is_wanted_or_a_file(tmp_path, clip, report):
    (tmp_path / "file").touch()
    for write in (lambda: run_suite([1], ["vae"], tmp_path / "file"), lambda: write_report(report, tmp_path / "file"), lambda: measured().save(tmp_path / "file")):
        with pytest.raises(ValueError, match="is a file: give a folder"):
            write()
    for write in (report.to_csv, report.to_json):
        with pytest.raises(ValueError, match="is a folder: give the name of a file in it"):
            write(tmp_path)
        assert write(tmp_path / "new" / "x").is_file()  # what the error says to do


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written into"):
        writable_target("out", tmp_path / "x.mp4")
    tmp_path.chmod(0o700)


def test_a_read_only_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(ValueError, match="cannot be written into; choose another folder"):
        writable_target("out", tmp_path / "x.mp4")


def test_the_source_is_not_overwritten(tmp_path, clip_file, model, store, monkeypatch):
    source = tmp_path / "wolf.mp4"
    source.write_bytes(clip_file.read_bytes())
    (tmp_path / "link.mp4").symlink_to(source)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "edited.mp4").hardlink_to(source)
    options = dict(model=model, num_inference_steps=2, size=(64, 64), store=store, progress=False, max_frames=2)
    monkeypatch.chdir(tmp_path)
    for out in (source, "wolf.mp4", "./results/../wolf.mp4", "link.mp4", "results"):
        with pytest.raises(ValueError, match="would overwrite the source .*: give another name"):
            edit_video(source, "a gold square", out=out, **options)
        with pytest.raises(ValueError, match="would overwrite the source"):
            edit_video(read_clip(source, max_frames=2), "a gold square", out=out, **{name: value for name, value in options.items() if name != "max_frames"})
    assert source.read_bytes() == clip_file.read_bytes()
    assert edit_video(source, "a gold square", out="other.mp4", **options) and (tmp_path / "other.mp4").is_file()


# ---- the picture without its sound


def test_the_picture_is_written_when_the_source_is_gone(tmp_path, clip_file, result):
    gone = EditResult(Clip(result.edited.frames, source=str(tmp_path / "gone.mp4")), Clip(result.source.frames, source=str(tmp_path / "gone.mp4")), result.config, result.model, {})
    for out in ("a", "b.mp4", "c.gif"):
        with pytest.warns(UserWarning, match="gone.mp4 is gone: .* is written without its sound") as caught:
            saved = gone.save(tmp_path / out)
        assert len(caught) == 1 and len(read_clip(film_and_record(saved)[0])) == 4 and film_and_record(saved)[1].is_file()


def test_the_picture_is_written_when_the_sound_cannot_be(tmp_path, result, clip_file, monkeypatch):
    from tokenflow_nb import result as saving
    from tokenflow_nb.clip import ClipError, write_clip

    def odd(path, clip, audio_from=None):
        if audio_from:
            raise ClipError("sixteen channels")
        return write_clip(path, clip)

    monkeypatch.setattr(saving, "write_clip", odd)
    loud = EditResult(result.edited, Clip(result.source.frames, source=str(clip_file)), result.config, result.model, {})
    with pytest.warns(UserWarning, match="is written without the sound of .*sixteen channels") as caught:
        loud.save(tmp_path / "x.mp4")
    assert len(caught) == 1 and len(read_clip(tmp_path / "x.mp4")) == 4


def test_frames_from_a_folder_have_no_sound_and_no_warning(tmp_path, result):
    pictures = EditResult(result.edited, Clip(result.source.frames, source=str(tmp_path)), result.config, result.model, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.save(tmp_path / "x.mp4")


def test_a_suite_keeps_the_frames_where_the_film_cannot_be_written(tmp_path, monkeypatch):
    from tokenflow_nb.clip import ClipError
    from tokenflow_nb.compare.data import toy_benchmark

    def no_film(*_, **__):
        raise ClipError("no encoder")

    monkeypatch.setattr("tokenflow_nb.compare.plan.write_clip", no_film)
    with pytest.warns(UserWarning, match="no film to look at: no encoder"):
        report = run_suite(toy_benchmark(1, 1, frames=2, size=64), ["vae"], tmp_path, num_inference_steps=2, metrics=["ssim"], progress=False)
    assert report.rows[0].measures and not report.errors
    (tmp_path / "suite.json").write_text("{")
    with pytest.raises(SuiteError, match="suite.json is damaged: remove it"):
        run_suite(toy_benchmark(1, 1, frames=2, size=64), ["vae"], tmp_path, num_inference_steps=2, metrics=["ssim"], progress=False)
    (tmp_path / "suite.json").unlink()  # what the error says to do
    assert run_suite(toy_benchmark(1, 1, frames=2, size=64), ["vae"], tmp_path, num_inference_steps=2, metrics=["ssim"], progress=False).rows[0].measures


# ---- no number, no film


def test_latents_that_are_no_numbers_do_not_become_a_film(model, clip, store):
    trajectory = invert(model, clip, "", steps=2, store=store, progress=False)
    edit = Edit(model, trajectory, EditConfig("a gold star", num_inference_steps=2), clip)

    def spoil(edit):
        if edit.done:
            edit.latents = edit.latents.clone()
            edit.latents[2, 0, 3, 3] = float("nan")

    with pytest.raises(ModelError, match="latents are not finite after step 2 of 2"):
        edit.run(callback=spoil).decode()
    with pytest.raises(ModelError, match="latents are not finite"):
        edit.decode(edit.latents[:1] * float("inf"))


def test_a_saved_edit_that_is_damaged_is_refused_in_one_line(model, clip, store, tmp_path):
    import safetensors.torch
    import torch
    from safetensors import safe_open

    trajectory = invert(model, clip, "", steps=2, store=store, progress=False)
    path = Edit(model, trajectory, EditConfig("a gold star", num_inference_steps=2), clip).step().save(tmp_path / "edit")
    with safe_open(path, "pt") as file:
        state, tensors = json.loads(file.metadata()["state"]), {name: file.get_tensor(name) for name in file.keys()}

    def written(changes=None, **parts):
        safetensors.torch.save_file(tensors | parts, path, metadata=dict(state=json.dumps(changes if isinstance(changes, (list, str)) else state | (changes or {}))))

    spoilers = [
        lambda: path.write_bytes(b"no tensors"), lambda: path.write_bytes(path.read_bytes()[:-9]), lambda: written({"index": 99}), lambda: written({"index": "1"}),
        lambda: written({"index": True}), lambda: written([1]), lambda: written("x"), lambda: written({"config": {"promt": "x"}}), lambda: written({"config": dict(state["config"], seed="x")}),
        lambda: written({"fps": -1}), lambda: written(latents=torch.zeros(1)), lambda: written(latents=tensors["latents"] * float("nan")), lambda: written(frames=torch.zeros(3)),
        lambda: written({"model": None}),
    ]
    for spoil in spoilers:
        written()
        spoil()
        with pytest.raises(EditError, match=r"^path=") as caught:
            Edit.load(path, model, store)
        assert "\n" not in str(caught.value)
    written()
    assert Edit.load(path, model, store).index == 1


# ---- text is text


class Shown(HTMLParser):
    "What a page says, and how many scripts it runs."

    def __init__(self):
        super().__init__()
        self.words, self.scripts = [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"

    def handle_data(self, data):
        self.words.append(data)


def test_names_are_text_in_tables_pages_and_files(report, tmp_path):
    films = {case: {NASTY[0]: Clip(np.zeros((2, 16, 16, 3), np.uint8))} for case in NASTY[:3]}
    page = Shown()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a font need not have every sign
        page.feed(report_page(report, films, title="<script>$\\frac$"))
    assert page.scripts == 1  # the player's own
    assert all(name in page.words for name in NASTY) and "<script>$\\frac$" in page.words
    table = Shown()
    table.feed(report._repr_html_())
    assert not table.scripts and all(name in table.words for name in NASTY)
    with report.to_csv(tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        assert {row["method"] for row in csv.DictReader(file)} == set(NASTY)
    assert Report.from_json(report.to_json(tmp_path / "x.json")).methods == list(NASTY)


def test_names_do_not_break_a_markdown_table(report):
    lines = report.markdown().splitlines()
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(lines) == 2 + len(NASTY) and len(columns) == 1
    assert r"| a\|b |" in report.markdown() and r"\<script>" in report.markdown() and "| two lines |" in report.markdown()


def test_names_are_drawn_as_they_are(report):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        for figure in (report.figure(), report.frames_figure("warp_error", NASTY[0]), _trade_off(report, "warp_error", "clip_gain")):
            ElementTree.fromstring(_decoded(_svg(figure)))  # an SVG that every program reads
            texts = [text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_parse_math"))]
            assert all(name.replace("\x07", "\ufffd") in texts for name in NASTY[:-2]), texts  # beginning with an underscore, too
            assert figure._repr_png_().startswith(b"\x89PNG")


def _decoded(image: str) -> bytes:
    import base64

    return base64.b64decode(re.search(r"base64,([^\"]+)", image)[1])


def test_a_bench_draws_the_machine_as_it_is_called(tmp_path):
    assert {path.name for path in measured().save(tmp_path)} == {"bench.md", "bench.csv", "bench.json", "growth.png"}
    assert "$\\frac$ & co" in (tmp_path / "bench.md").read_text()


def test_a_case_named_so_is_evaluated(clip):
    cases = [Case(name, clip, f"a star {name}") for name in NASTY]
    found = evaluate({"$\\frac$": [clip] * len(cases)}, cases, metrics=["ssim"])
    assert found.cases == list(NASTY) and not found.errors
    with pytest.raises(ValueError, match="metrics is empty"):
        evaluate({"a": [clip]}, cases[:1], metrics=[])
    with pytest.raises(ValueError, match="metrics='beauty' is unknown"):
        found.markdown(["beauty"])


# ---- the command line


@pytest.mark.parametrize(
    "argv",
    [
        ("edit", "{film}", "gold", "--out", "x.avi"), ("edit", "{film}", "gold", "--out", ""), ("edit", "{film}", "gold", "--out", "{film}"), ("edit", "{film}", "gold", "--strength", "2"),
        ("edit", "{film}", "", "--model", "toy"), ("edit", "{film}", "gold", "--guidance-scale", "nan"), ("edit", "{film}", "gold", "--steps", "1"), ("edit", "{film}", "gold", "--fps", "0"),
        ("edit", "{film}", "gold", "--max-frames", "0"), ("edit", "{film}", "gold", "--inversion-steps", "3"), ("edit", "{film}", "gold", "--size", "99999"),
        ("edit", "{film}", "gold", "--keyframe-interval", "0"), ("edit", "{film}", "gold", "--seed", "1e3"), ("edit", "nowhere.mp4", "gold"), ("edit",), ("bench", "--steps", "1"),
        ("bench", "--scenes", "0"), ("bench", "--presets", "fast"), ("bench", "--out", "{film}"), ("demo", "--steps", "1"), ("demo", "--out", "{film}"), ("invert", "nowhere.mp4"),
        ("evaluate", "--suite", "toy", "--frames", "0"), ("evaluate", "--suite", "toy", "--steps", "0"), ("evaluate", "--suite", "toy", "--keyframe-interval", "0"),
        ("evaluate", "--suite", "toy", "--processes", "0"), ("evaluate", "--suite", "toy", "--metrics", ","), ("evaluate", "--suite", "toy", "--out", "{film}"), ("cache", "prune", "--max-size", "x"),
    ],
    ids=" ".join,
)
def test_bad_input_has_code_2_and_one_line(argv, clip_file, tmp_path, monkeypatch, capsys):
    from tokenflow_nb.backbones.base import Model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "predict", lambda *_, **__: pytest.fail("the UNet was asked"))
    try:
        code = cli.main([part.format(film=clip_file) for part in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1 and "error: " in err and "Traceback" not in err, err
    assert not list(tmp_path.iterdir())


def test_a_films_name_with_a_dot_has_a_default_target(clip_file, tmp_path, monkeypatch, cache, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wolf.v2.mp4").write_bytes(clip_file.read_bytes())
    options = ["--model", "toy", "--steps", "2", "--size", "64", "--max-frames", "2", "--quiet"]
    assert cli.main(["edit", "wolf.v2.mp4", "a gold square", *options]) == 0
    assert {path.name for path in (tmp_path / "wolf.v2-edited").iterdir()} == {"edited.mp4", "run.json"}
    assert cli.main(["edit", "wolf.v2.mp4", "a gold square", "--out", "gold.gif", *options]) == 0
    assert (tmp_path / "gold.gif").is_file() and f"wrote {Path('gold.gif')}" in capsys.readouterr().out


def test_ctrl_c_says_what_is_kept(monkeypatch, clip_file, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenflow_nb.edit.edit_video", stopped)
    assert cli.main(["edit", str(clip_file), "gold", "--model", "toy"]) == 130
    assert capsys.readouterr().err.strip() == "tokenflow_nb: stopped. The steps that are done are kept: the same command goes on from there."
