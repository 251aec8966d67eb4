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

import run_tutorials  # noqa: E402
import split_imports  # noqa: E402
import website  # noqa: E402

PAGES = [*website.notebooks(), "README.md", "CONTRIBUTING.md"]
TUTORIALS = [name for name in website.listed() if name.startswith("tutorials/")]


# Every page


def test_the_sidebar_lists_every_notebook_once_and_nothing_else():
    assert sorted(website.listed()) == website.notebooks()


def test_the_sidebar_has_its_sections():
    assert [text for depth, text in website.sidebar() if depth == 0] == ["Start", "Tutorials", "How it works", "Reference", "Benchmarks"]


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


# Tutorials


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorials_outputs_are_not_stale(name):
    assert not run_tutorials.stale(website.NBS / name)


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_small_exports_nothing_and_opens_in_colab(name):
    path = website.NBS / name
    assert path.stat().st_size < 1.5e6
    assert not any(split_imports.EXPORTS.search(cell["source"]) for cell in website.cells(name) if cell["cell_type"] == "code")
    assert f"{website.COLAB}nbs/{name}" in website.said(name).links


# The checks themselves: each must see what is wrong


@pytest.fixture
def page(monkeypatch):
    "Makes a page of some Markdown, and returns its name."

    def make(text: str) -> str:
        monkeypatch.setattr(website, "said", lambda name: website.Said().read(text))
        monkeypatch.setattr(website, "cells", lambda name: [])
        website.anchors.cache_clear()
        return "panels/00_base.ipynb"

    yield make
    website.anchors.cache_clear()


@pytest.mark.parametrize(
    "text, why",
    [
        ("[edit](../09_edit.ipynb)", ""),
        ("[edit](../09_edt.ipynb)", "no nbs/panels/../09_edt.ipynb"),
        ("![panel](../images/panel-edit.png)", ""),
        ("![panel](images/panel-edit.png)", "no nbs/panels/images/panel-edit.png"),
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


@pytest.fixture
def tutorial(tmp_path):
    "A tutorial that imports `propagation`, as `make tutorials` saves it."
    path, output = tmp_path / "01_x.ipynb", nbformat.v4.new_output("stream", text="2\n")
    cell = nbformat.v4.new_code_cell("from tokenflow_nb.attention import Context\nprint(1 + 1)", outputs=[output])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata[run_tutorials.KEY] = {"ran_with": run_tutorials.ran_with(notebook)}
    nbformat.write(notebook, path)
    return path


def changed(path: Path, edit) -> str:
    notebook = nbformat.read(path, 4)
    edit(notebook)
    nbformat.write(notebook, path)
    return run_tutorials.stale(path)


def test_a_fresh_tutorial_is_not_stale(tutorial):
    assert run_tutorials.stale(tutorial) == ""


def test_an_unexecuted_tutorial_is_stale(tutorial):
    assert "no outputs" in changed(tutorial, lambda notebook: notebook.cells[0].update(outputs=[]))
    assert "never run" in changed(tutorial, lambda notebook: notebook.metadata.pop(run_tutorials.KEY))


def test_a_tutorial_with_other_code_is_stale(tutorial):
    assert "its own code" in changed(tutorial, lambda notebook: notebook.cells[0].update(source="print(2)"))


def test_a_tutorial_is_stale_when_a_module_changes_that_it_reaches(tutorial, monkeypatch, tmp_path):
    package = tmp_path / "tokenflow_nb"
    for path in (*website.PACKAGE.glob("*.py"), *website.PACKAGE.glob("video/*.py")):
        copy = package / path.relative_to(website.PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    monkeypatch.setattr(run_tutorials, "ROOT", tmp_path)
    assert run_tutorials.stale(tutorial) == ""
    with (package / "edit.py").open("a") as file:  # is not imported
        file.write("x = 1\n")
    with (package / "propagation.py").open("a") as file:  # by way of `attention`; but a comment changes nothing
        file.write("\n# a comment\n")
    assert run_tutorials.stale(tutorial) == ""
    with (package / "propagation.py").open("a") as file:
        file.write("x = 1\n")
    assert "the modules that it imports" in run_tutorials.stale(tutorial)


def test_cells_with_shell_and_magic_are_read():
    cells = ["if True:\n    %pip install -q x\nfrom tokenflow_nb.store import store", "x = (7\n % 2)", "!ls"]
    found = {path.name for path in run_tutorials.imported(cells)}
    assert {"clip.py", "store.py", "read.py"} <= found and "edit.py" not in found  # and what they import themselves
    assert {"command.py", "demo.py"} <= {path.name for path in run_tutorials.imported(["!tokenflow_nb demo"])}


def test_a_tutorial_is_stale_when_the_toy_model_changes(tutorial, monkeypatch):
    monkeypatch.setattr(run_tutorials, "weights", lambda: "others")
    assert "the toy model" in run_tutorials.stale(tutorial)


def test_a_tutorial_runs_saves_and_reports_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_tutorials, "TUTORIALS", tmp_path)
    good = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in ("#| eval: false\n1 / 0", "print(1 + 1)")])
    nbformat.write(good, tmp_path / "01_good.ipynb")
    monkeypatch.setattr(sys, "argv", ["run_tutorials.py"])
    assert run_tutorials.main() == 0 and run_tutorials.stale(tmp_path / "01_good.ipynb") == ""
    saved = json.loads((tmp_path / "01_good.ipynb").read_text())
    assert saved["cells"][0]["outputs"] == [] and saved["cells"][1]["outputs"][0]["text"] == ["2\n"]
    assert re.search(r"01_good.ipynb: \d+ s", capsys.readouterr().out)
    assert run_tutorials.main() == 0 and capsys.readouterr().out == ""  # nothing is stale
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), tmp_path / "02_bad.ipynb")
    assert run_tutorials.main() == 1 and "ZeroDivisionError" in capsys.readouterr().err
