"The pages: what Quarto would stumble over, and what a reader would."

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))

import run_notebooks  # noqa: E402
import split_imports  # noqa: E402
import website  # noqa: E402

PAGES = [*website.notebooks(), "README.md", "CONTRIBUTING.md"]
TUTORIALS = [name for name in website.listed() if name.startswith("tutorials/")]
LIBRARY = [name for name in website.notebooks() if name not in TUTORIALS]
SILENT = {"index.ipynb": "has no code: README.md is made from it"}  # may show nothing


# Every page


def test_the_sidebar_lists_every_notebook_once_and_nothing_else():
    assert sorted(website.listed()) == website.notebooks()


def test_the_sidebar_has_its_sections():
    assert [text for depth, text in website.sidebar() if depth == 0] == ["Start", "Tutorials", "The method", "Rooms", "Results"]


def test_no_two_notebooks_become_the_same_page():
    assert len(set(map(website.html_name, website.notebooks()))) == len(website.notebooks())


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_lead_somewhere(name):
    assert not website.broken_links(name)


@pytest.mark.parametrize("name", PAGES)
def test_names_between_backticks_exist(name):
    assert not website.unknown_names(name)


@pytest.mark.parametrize("name", website.notebooks())
def test_no_output_is_an_error(name):
    assert not website.error_outputs(website.NBS / name)


@pytest.mark.parametrize("name", website.notebooks())
def test_imports_have_cells_of_their_own(name):
    code = [cell["source"] for cell in website.cells(name) if cell["cell_type"] == "code"]
    exports = any(map(split_imports.EXPORTS.search, code))
    assert not exports or not [source for source in code if split_imports.split(source)], "`make export` gives them cells"


@pytest.mark.parametrize("name", website.notebooks())
def test_a_page_loses_nothing_of_its_notebook(name):
    "nbdev makes a page's head of the title cell and drops what else is in it, and lines of code that begin with %."
    title, *others = website.cells(name)
    assert re.fullmatch(r"# .+\n\n> [^\n]+(\n[^\n]+)*", title["source"].strip())
    assert not [cell["source"] for cell in others if cell["cell_type"] == "code" and re.search(r"^\s*%", cell["source"], re.MULTILINE)]


def test_nbdev_processes_every_notebook():
    done = subprocess.run([sys.executable, "-W", "ignore", ROOT / ".ci" / "website.py", "process"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# Outputs


@pytest.mark.parametrize("name", website.notebooks())
def test_outputs_are_not_stale(name):
    assert not run_notebooks.stale(website.NBS / name)


@pytest.mark.parametrize("name", website.notebooks())
def test_outputs_are_fit_for_readers(name):
    assert not run_notebooks.unfit(website.NBS / name)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_notebook_shows_something_and_is_small(name):
    assert bool(run_notebooks.shown(website.NBS / name)) != (name in SILENT), "show what the code does, or give a reason in SILENT"
    assert (website.NBS / name).stat().st_size < 350_000


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_small_exports_nothing_and_opens_in_colab(name):
    path = website.NBS / name
    assert path.stat().st_size < 1.5e6
    assert not any(split_imports.EXPORTS.search(cell["source"]) for cell in website.cells(name) if cell["cell_type"] == "code")
    assert f"{website.COLAB}nbs/{name}" in website.said(name).links


@pytest.mark.parametrize("name", website.notebooks())
def test_a_notebook_names_its_kernel(name):
    "Or JupyterLab asks for one before anything else."
    assert nbformat.read(website.NBS / name, 4).metadata.get("kernelspec") == run_notebooks.KERNELSPEC


@pytest.mark.parametrize("name", TUTORIALS)
def test_what_is_for_colab_does_nothing_elsewhere(name):
    "*Run All* in plain Jupyter runs these cells too."
    scope: dict = {}
    for cell in website.cells(name):
        if cell["cell_type"] == "code" and re.search(r"^#\|\s*eval:\s*false", cell["source"], re.M):
            exec(run_notebooks.plain(cell["source"]), scope)
    assert "files" not in scope and "drive" not in scope


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_begins_with_a_result_and_folds_its_answers(name):
    "The first cell that runs is short and shows something; what the helpers do is in `toy.lesson`."
    cells = [cell for cell in website.cells(name) if cell["cell_type"] == "code"]
    first = cells[1]  # after the one for Colab
    assert first["outputs"] and len(first["source"].splitlines()) <= 25
    source = "\n".join(cell["source"] for cell in cells)
    assert "toy.lesson import" in source and "def show(" not in source and "fit_clip(" not in source
    assert "<details>" in "".join(cell["source"] for cell in website.cells(name)[-1:])


def test_the_first_notebook_is_one_cell_and_make_lab_opens_it():
    (code,) = [cell["source"] for cell in website.cells("start_here.ipynb") if cell["cell_type"] == "code"]
    assert 'EditPanel("toy")' in code and website.listed()[1] == "start_here.ipynb"
    assert "lab nbs/start_here.ipynb" in (ROOT / "Makefile").read_text(encoding="utf-8")


# The checks themselves: each must see what is wrong


@pytest.fixture
def page(monkeypatch):
    "Makes a page of some Markdown, and returns its name."

    def make(text: str) -> str:
        monkeypatch.setattr(website, "said", lambda name: website.Said().read(text))
        monkeypatch.setattr(website, "cells", lambda name: [])
        website.anchors.cache_clear()
        return "panels/01_base.ipynb"

    yield make
    website.anchors.cache_clear()


@pytest.mark.parametrize(
    "text, why",
    [
        ("[edit](../13_edit.ipynb)", ""),
        ("[edit](../09_edt.ipynb)", "no nbs/panels/../09_edt.ipynb"),
        ("![panel](../images/panel-edit-light-1400.webp)", ""),
        ("![panel](images/panel-edit-light-1400.webp)", "no nbs/panels/images/panel-edit-light-1400.webp"),
        ("## A *small* heading\n\n[up](#a-small-heading)", ""),
        ("## A heading\n\n[up](#another-heading)", "has no such anchor"),
        (f"[e]({website.SITE}/edit.html#edit_video)", ""),
        (f"[e]({website.SITE}/edit.html#edit_vide)", "has no such anchor"),
        (f"[e]({website.SITE}/edt.html)", "is no page of ours"),
        (f"[e]({website.COLAB}nbs/14_panels.ipynb)", ""),
        (f"[e]({website.COLAB}nbs/12_panel.ipynb)", "is not there"),
        (f"[e]({website.REPO}/blob/main/Makefile)", ""),
        ('<img src="../images/nothing.png">', "is not there"),
        ("[paper](https://arxiv.org/abs/2307.10373)", ""),
        ("[paper](https://arxiv.org/abs/23071.0373)", "is no paper's address"),
        ("[paper](http://arxiv.org/abs/2307.10373)", "does not begin with https://"),
        ("[paper](https://arxiv)", "has no host"),
        ("<https://arxiv.org/abs/2307.10373>", ""),
    ],
)
def test_the_link_checker_sees(page, text, why):
    found = website.broken_links(page(text))
    assert bool(found) == bool(why) and why in "".join(found)


@pytest.mark.parametrize(
    "code, why",
    [
        ("edit_video", ""),
        ("edit_vide", "is not in the code"),
        ("edit_video()", ""),
        ("Edit.fork", ""),
        ("Edit.frok", "is no member"),
        ("PlugAndPlay.network_inputs", ""),  # inherited
        ("features.record", ""),
        ("features.recrod", "is not in the module"),
        ("tokenflow_nb.edit.edit_video", ""),
        ("toy.world", ""),
        ("make demo", ""),
        ("make dmeo", "is no command"),
        ("tokenflow_nb edit wolf.mp4", ""),
        ("tokenflow_nb edt wolf.mp4", "is no command"),
        ("tests/test_edit.py", ""),
        ("tests/test_edt.py", "is no path"),
        ("python -m tokenflow_nb.toy.evaluate", ""),
        ("python -m tokenflow_nb.toy.evaluat", "is no module"),
        ("KeyError", ""),
        ("run.json", ""),
        ("(f, s, c)", ""),
    ],
)
def test_the_checker_of_names_sees(page, code, why):
    found = website.unknown_names(page(f"See `{code}`."))
    assert bool(found) == bool(why) and why in "".join(found)


def test_an_error_output_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(website, "ROOT", tmp_path)
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0", outputs=[error])]), tmp_path / "x.ipynb")
    assert "1 / 0" in website.error_outputs(tmp_path / "x.ipynb")[0]


def test_imports_are_split_off():
    assert split_imports.split("import os\n\nfrom a import (\n    b,\n)\n\n\nx = os.name\n") == ("import os\n\nfrom a import (\n    b,\n)", "x = os.name")
    assert split_imports.split("#| slow\nimport os\n\nx = os.name") == ("#| slow\nimport os", "#| slow\nx = os.name")
    for whole in ("import os", "x = 1", "#| export\nimport os\nx = 1", "#| eval: false\nimport os\nx = 1"):
        assert split_imports.split(whole) is None


# Staleness


def executed(folder: Path, *sources: str) -> Path:
    "A notebook with these code cells as `make notebooks` saves it; each has an output."
    folder.mkdir(exist_ok=True)
    path, output = folder / "01_x.ipynb", nbformat.v4.new_output("stream", text="2\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, outputs=[output]) for source in sources])
    notebook.metadata[run_notebooks.KEY] = {"ran_with": run_notebooks.ran_with(notebook, path)}
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def tutorial(tmp_path):
    "A tutorial that imports `propagation`, by way of `attention`."
    return executed(tmp_path / "tutorials", "from tokenflow_nb.attention import Context\nmodel = 'toy'\nprint(1 + 1)")


@pytest.fixture
def page_of_module(tmp_path):
    "A library notebook that imports `propagation`."
    return executed(tmp_path / "nbs", "#| export\nfrom tokenflow_nb.propagation import Plan", "print(1 + 1)")


def changed(path: Path, edit) -> str:
    notebook = nbformat.read(path, 4)
    edit(notebook)
    nbformat.write(notebook, path)
    return run_notebooks.stale(path)


def test_an_executed_notebook_is_not_stale(tutorial, page_of_module):
    assert run_notebooks.stale(tutorial) == run_notebooks.stale(page_of_module) == ""


def test_a_notebook_that_was_never_run_is_stale(tutorial, page_of_module, tmp_path):
    for path in (tutorial, page_of_module):
        assert "never run" in changed(path, lambda notebook: notebook.metadata.pop(run_notebooks.KEY))
    text = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("no code")])
    nbformat.write(text, tmp_path / "text.ipynb")
    assert run_notebooks.stale(tmp_path / "text.ipynb") == ""


def test_a_notebook_with_other_code_is_stale(tutorial, page_of_module):
    for path in (tutorial, page_of_module):
        assert "its own code" in changed(path, lambda notebook: notebook.cells[-1].update(source="print(2)"))


def test_a_comment_or_prose_makes_no_notebook_stale_but_a_directive_does(page_of_module):
    assert not changed(page_of_module, lambda notebook: notebook.cells[-1].update(source="# two\nprint(1 + 1)  # is two"))
    assert not changed(page_of_module, lambda notebook: notebook.cells.insert(0, nbformat.v4.new_markdown_cell("two")))
    assert "its own code" in changed(page_of_module, lambda notebook: notebook.cells[-1].update(source="#| eval: false\nprint(1 + 1)"))


def test_a_module_makes_only_those_tutorials_stale_that_reach_it(tutorial, page_of_module, monkeypatch, tmp_path):
    package = tmp_path / "tokenflow_nb"
    for path in website.PACKAGE.rglob("*.py"):
        copy = package / path.relative_to(website.PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    monkeypatch.setattr(run_notebooks, "ROOT", tmp_path)
    assert run_notebooks.stale(tutorial) == ""
    with (package / "edit.py").open("a") as file:  # is not imported
        file.write("x = 1\n")
    with (package / "propagation.py").open("a") as file:  # by way of `attention`; but a comment changes nothing
        file.write("\n# a comment\n")
    assert run_notebooks.stale(tutorial) == ""
    with (package / "propagation.py").open("a") as file:
        file.write("x = 1\n")
    assert "the modules that it imports" in run_notebooks.stale(tutorial)
    assert run_notebooks.stale(page_of_module) == ""


def test_cells_with_shell_and_magic_are_read():
    cells = ["if True:\n    %pip install -q x\nfrom tokenflow_nb.inversion import invert", "x = (7\n % 2)", "!ls"]
    found = {path.name for path in run_notebooks.imported(cells)}
    assert {"clip.py", "inversion.py", "read.py"} <= found and "edit.py" not in found  # and what they import themselves
    assert {"command.py", "demo.py"} <= {path.name for path in run_notebooks.imported(["!tokenflow_nb demo"])}


def test_the_toy_model_makes_those_stale_that_name_it(tutorial, page_of_module, monkeypatch):
    monkeypatch.setattr(run_notebooks, "weights", lambda: "others")
    assert "the toy model" in run_notebooks.stale(tutorial) and run_notebooks.stale(page_of_module) == ""


def test_notebooks_are_run_and_saved_and_failures_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_notebooks, "NBS", tmp_path)
    (tmp_path / "toy").mkdir()
    good = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in ("#| eval: false\n1 / 0", "print(1 + 1)\nprint(3)")])
    nbformat.write(good, tmp_path / "toy" / "01_good.ipynb")

    def main(*given: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run_notebooks.py", *given])
        return run_notebooks.main()

    assert main("--check", "toy/") == 0 and "never run" in run_notebooks.stale(tmp_path / "toy" / "01_good.ipynb")
    capsys.readouterr()
    assert main() == 0 and run_notebooks.stale(tmp_path / "toy" / "01_good.ipynb") == ""
    saved = json.loads((tmp_path / "toy" / "01_good.ipynb").read_text())
    assert saved["cells"][0]["outputs"] == [] and saved["cells"][1]["outputs"][0]["text"] == ["2\n", "3\n"]
    assert re.search(r"toy/01_good.ipynb: \d+ s", capsys.readouterr().out)
    assert main() == 0 and capsys.readouterr().out == ""  # nothing is stale
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), tmp_path / "02_bad.ipynb")
    assert main("03") == 0 and main("02") == 1 and "ZeroDivisionError" in capsys.readouterr().err


# What readers see


def test_the_whole_method_is_one_page():
    "Fewer than 150 lines of code, and only torch and diffusers compute: of ours it takes a clip, and at the end the edit to compare with."
    cells = json.loads((website.NBS / "00_in_one_page.ipynb").read_text(encoding="utf-8"))["cells"]
    end = next(index for index, cell in enumerate(cells) if "## The package computes the same numbers" in "".join(cell["source"]))
    code = ["".join(cell["source"]) for cell in cells[:end] if cell["cell_type"] == "code"]
    assert sum(len([line for line in cell.splitlines() if line.strip()]) for cell in code) < 150
    ours = set(re.findall(r"from tokenflow_nb\.([\w.]+) import", "\n".join(code)))
    assert ours == {"backbones.load", "clip", "toy.world"} and "from tokenflow_nb.backbones.load import TOY_FOLDER" in code[0]


@pytest.mark.parametrize(
    "output, why",
    [
        (dict(output_type="stream", name="stdout", text="32 dB\n"), ""),
        (dict(output_type="stream", name="stderr", text="UserWarning: ...\n"), "stderr"),
        (dict(output_type="stream", name="stdout", text="10%\r20%\n"), "a bar"),
        (dict(output_type="stream", name="stdout", text="saved to /tmp/x1/edited.mp4\n"), "/tmp/x1/edited.mp4"),
        (dict(output_type="execute_result", data={"text/plain": f"PosixPath('{ROOT}/nbs')"}, metadata={}, execution_count=1), f"{ROOT}/nbs"),
        (dict(output_type="display_data", data={"image/png": "A" * 96_000}, metadata={}), "a picture of 72 kB"),
        (dict(output_type="display_data", data={"image/png": "A" * 70_000}, metadata={}), ""),
        (dict(output_type="display_data", data={"text/html": f"<img src='data:image/webp;base64,{'A' * 96_000}'>"}, metadata={}), "a picture of 72 kB"),
    ],
)
def test_the_checker_of_outputs_sees(tmp_path, output, why):
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.from_dict(output)])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    found = run_notebooks.unfit(tmp_path / "x.ipynb")
    assert bool(found) == bool(why) and why in "".join(found)


@pytest.mark.parametrize("source, count", [("print(2)", 1), ("#| hide\nprint(2)", 0), ("#| output: false\nprint(2)", 0), ("#| hide_input\nprint(2)", 1)])
def test_only_what_is_on_the_page_counts_as_shown(tmp_path, source, count):
    assert len(run_notebooks.shown(executed(tmp_path, source))) == count


def test_of_two_forms_of_a_picture_one_is_kept():
    small, large = ({"image/png": "A" * size, "image/jpeg": "B" * 50_000, "text/plain": "..."} for size in (70_000, 96_000))
    run_notebooks._keep_one(small), run_notebooks._keep_one(large)
    assert (set(small), set(large)) == ({"image/png", "text/plain"}, {"image/jpeg", "text/plain"})


def test_of_a_panel_its_picture_is_kept_and_of_a_bar_nothing():
    panel, bar, text = ({"text/plain": "x", **more} for more in ({"image/png": "A", run_notebooks.WIDGET: {}}, {run_notebooks.WIDGET: {}}, {}))
    outputs = [nbformat.v4.new_output("display_data", data=data) for data in (panel, bar, text)]
    assert [run_notebooks._outlives(output) for output in outputs] == [True, False, True]
    assert set(outputs[0].data) == {"text/plain", "image/png"}


def test_a_saved_notebook_names_its_kernel(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")]), tmp_path / "x.ipynb")
    run_notebooks._save(nbformat.read(tmp_path / "x.ipynb", 4), tmp_path / "x.ipynb")
    assert nbformat.read(tmp_path / "x.ipynb", 4).metadata["kernelspec"] == run_notebooks.KERNELSPEC
