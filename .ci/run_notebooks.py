"""Executes notebooks with nbclient, as a reader would, and saves what they show.

    python .ci/run_notebooks.py                           # those whose saved outputs are stale
    python .ci/run_notebooks.py tutorials/04 toy/ 03_inv  # those whose path in nbs/ begins so, stale or not
    python .ci/run_notebooks.py --check tutorials/01      # saves nothing: do they run?

A notebook's metadata hold what it ran with, as digests. When one of them is another now, its outputs are stale.

* For every notebook: its code without comments, and the weights of the toy model if it names that model. The code of a library
  notebook contains the module that it exports, so a change of a module makes its own notebook stale.
* For a tutorial also the modules that it imports, directly or by way of others, because nothing else would show that its lesson is an
  old one. For a library notebook they do not count: `clip` and `schedule` are below nearly all of them, and every line changed there
  would make eighty notebooks stale that look the same when they are run again. That they still run, and that what they assert is
  still true, `nbdev_test` shows in every CI run. After a change of what many of them show, name their folder.
"""

import argparse
import ast
import hashlib
import io
import os
import re
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NBS, WEIGHTS = ROOT / "nbs", ROOT / "tokenflow_nb" / "toy" / "weights"
KEY = "tokenflow_nb"  # in the notebook's metadata; settings.ini lets nbdev_clean keep it
PATIENCE = 900  # seconds for one cell
SKIP = "skip-execution"
NOT_RUN = re.compile(r"^#\|\s*(eval:\s*false|slow|gpu)", re.M)  # as `nbdev_test` does
EXPORTED = re.compile(r"^#\|\s*export", re.M)
HIDDEN = re.compile(r"^#\|\s*(hide$|include:\s*false|output:\s*false)", re.M)
NAMES_TOY = re.compile(r"\b(toy|TOY_\w+)\b")
PLACE = re.compile(rf"/tmp/\S+|\btmp[a-z0-9_]{{8}}\b|/(home|root|Users)/\S+|{re.escape(str(ROOT))}\S*")
LARGEST = 70_000  # bytes of one picture in a library notebook; a tutorial shows films
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"


# What a notebook ran with


def ran_with(notebook: nbformat.NotebookNode, path: Path) -> dict[str, str]:
    "Digests of what decides a notebook's outputs."
    code = [plain(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    found = {"cells": _digest(*map(without_comments, code))}
    if is_tutorial(path):
        found["modules"] = _digest(*(without_comments(module.read_text(encoding="utf-8")) for module in imported(code)))
    if any(NAMES_TOY.search(cell) for cell in code):
        found["weights"] = weights()
    return found


def is_tutorial(path: Path) -> bool:
    return path.parent.name == "tutorials"


@cache
def plain(source: str) -> str:
    "A cell with `%pip` and `!ls` as Python."
    return TransformerManager().transform_cell(source)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@cache
def weights() -> str:
    "Digest of the toy model: its tensors and settings, not what is written about them."
    hasher = hashlib.sha256()
    for path in sorted(WEIGHTS.rglob("*")):
        if path.is_file() and path.parent != WEIGHTS or path.name == "model_index.json":
            hasher.update(path.relative_to(WEIGHTS).as_posix().encode() + path.read_bytes())
    return hasher.hexdigest()[:16]


def imported(cells: list[str]) -> list[Path]:
    "The modules of the package that code cells import, and those that these import, in the order of their names."
    waiting = {module for cell in cells for module in imports(plain(cell), "")}
    waiting |= {"tokenflow_nb.cli.command"} if any(re.search(r"\.system\(.\s*tokenflow_nb", plain(cell)) for cell in cells) else set()
    found: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if path and name not in found:
            found[name] = path
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            waiting |= imports(path.read_text(encoding="utf-8"), package)
    return [path for _, path in sorted(found.items())]


@cache
def imports(source: str, package: str) -> frozenset[str]:
    "Names of what a source imports of ours, wherever it does; `package` is where its relative imports start."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if name.startswith("tokenflow_nb."))


def _file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.exists()), None)


def without_comments(source: str) -> str:
    "Python without comments and blank lines: they change no output. Directives of nbdev (`#| hide`) are no comments."
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("#|"):
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def stale(path: Path) -> str:
    "Why a notebook's saved outputs are not what it would show now; empty when they are."
    notebook = nbformat.read(path, 4)
    if not any(cell.cell_type == "code" for cell in notebook.cells):
        return ""
    before, now = notebook.metadata.get(KEY, {}).get("ran_with"), ran_with(notebook, path)
    if not before:
        return "was never run by `make notebooks`"
    names = {"cells": "its own code", "modules": "the modules that it imports", "weights": "the toy model"}
    changed = [names[key] for key in names if before.get(key) != now.get(key)]
    return f"is older than {' and '.join(changed)}: `make notebooks`" if changed else ""


# What a reader sees


def shown(path: Path) -> list[nbformat.NotebookNode]:
    "The outputs that are on a notebook's page."
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" and not HIDDEN.search(cell.source)]
    return [output for cell in cells for output in cell.outputs if output.output_type != "stream" or output.text.strip()]


def unfit(path: Path) -> list[str]:
    "What no reader should see among a notebook's outputs: warnings, bars, places of one machine, large pictures. Empty when all is well."
    found = []
    for output in shown(path):
        data = output.get("data", {})
        text = output.get("text", "") + data.get("text/plain", "")
        pictures = [data.get(kind, "") for kind in ("image/png", "image/jpeg", "image/gif")]
        pictures += re.findall(r"data:image/\w+;base64,([\w+/=]*)", data.get("text/html", ""))
        picture = max(map(len, pictures)) * 3 // 4
        found += [f"stderr: {text[:100]}"] if output.get("name") == "stderr" else []
        found += [f"a bar: {text[:100]!r}"] if "\r" in text else []
        found += [f"names a place of this machine: {place[0]}" for place in [PLACE.search(text)] if place]
        found += [f"a picture of {picture // 1000} kB" for _ in range(picture > LARGEST * (5 if is_tutorial(path) else 1))]
    return found


# Running one


def run(path: Path, save: bool) -> float:
    "Executes a notebook from top to bottom in an empty folder and a cache of its own. Returns the seconds. Raises what a cell raises."
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    skipped = [cell for cell in notebook.cells if cell.cell_type == "code" and NOT_RUN.search(cell.source)]
    for cell in skipped:
        cell.metadata["tags"] = [SKIP]
    with tempfile.TemporaryDirectory() as folder:
        own = {"TOKENFLOW_HOME": f"{folder}/cache", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        (work := Path(folder) / "work").mkdir()
        options = dict(timeout=PATIENCE, kernel_name="python3", skip_cells_with_tag=SKIP, record_timing=False, coalesce_streams=True)
        client = NotebookClient(notebook, resources={"metadata": {"path": str(work)}}, **options)
        began = time.perf_counter()
        client.execute(env=os.environ | own)
        seconds = time.perf_counter() - began
    for cell in skipped:
        del cell.metadata["tags"]
    if save:
        _save(notebook, path)
    return seconds


def _save(notebook: nbformat.NotebookNode, path: Path) -> None:
    "Writes a notebook with its outputs and what it ran with, in nbdev's form."
    from execnb.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb

    notebook.metadata[KEY] = {"ran_with": ran_with(notebook, path)}
    notebook.metadata["kernelspec"] = KERNELSPEC  # without it JupyterLab asks which kernel is meant
    notebook.metadata.pop("widgets", None)  # panels and bars live as long as their kernel
    for cell in notebook.cells:
        if cell.cell_type == "code":
            keeps = not EXPORTED.search(cell.source)  # such a cell only defines: what else it gives is an accident
            cell.outputs = [output for output in cell.outputs if keeps and _outlives(output)]
            for output in cell.outputs:
                _keep_one(output.get("data", {}))
    nbformat.write(notebook, path)
    cleaned = read_nb(path)
    clean_nb(cleaned, allowed_metadata_keys=[KEY])
    write_nb(cleaned, path)


def _outlives(output: nbformat.NotebookNode) -> bool:
    "Whether an output has more than a widget, which it then loses: a panel has a picture, a bar has nothing."
    data = output.get("data", {})
    return data.pop(WIDGET, None) is None or "image/png" in data


def _keep_one(data: dict) -> None:
    "Of a picture that is there as PNG and as JPEG, as Pillow gives it: the PNG, which is exact, unless it is large."
    if {"image/png", "image/jpeg"} <= data.keys():
        del data["image/png" if len(data["image/png"]) * 3 // 4 > LARGEST else "image/jpeg"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of paths in nbs/ (default: all that are stale; with --check, all)")
    parser.add_argument("--check", action="store_true", help="run, but save nothing")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time")
    args = parser.parse_args()
    paths = {path.relative_to(NBS).as_posix(): path for path in sorted([*NBS.glob("*.ipynb"), *NBS.glob("*/*.ipynb")])}
    named = [name for name in paths if name.startswith(tuple(args.names) or "")]
    if not args.names and not args.check:
        named = [name for name in named if stale(paths[name])]

    def one(name: str) -> str:
        try:
            print(f"{name}: {run(paths[name], save=not args.check):.0f} s", flush=True)
        except Exception as error:  # of a cell, or of a kernel that died: the others shall still run
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            return name
        return ""

    with ThreadPoolExecutor(args.processes) as pool:
        failed = list(filter(None, pool.map(one, named)))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
