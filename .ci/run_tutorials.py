"""Runs the tutorials with nbclient, as a reader would.

    python .ci/run_tutorials.py              # those whose saved outputs are stale, and saves them
    python .ci/run_tutorials.py 04 05        # those whose name begins so
    python .ci/run_tutorials.py --check 01   # saves nothing: do they run?

A tutorial's metadata hold what it ran with: a digest each of its own code, of the modules that it imports, directly or by way of others, and
of the toy model's weights. When one of them is another now, its outputs are stale.
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
PACKAGE, WEIGHTS, TUTORIALS = ROOT / "tokenflow_nb", ROOT / "tokenflow_nb" / "toy" / "weights", ROOT / "nbs" / "tutorials"
KEY = "tokenflow_nb"  # in the notebook's metadata; settings.ini lets nbdev_clean keep it
PATIENCE = 900  # seconds for one cell
SKIP = "skip-execution"
WIDGET = "application/vnd.jupyter.widget-view+json"


# What a tutorial ran with


def ran_with(notebook: nbformat.NotebookNode) -> dict[str, str]:
    "Digests of all that decides a tutorial's outputs."
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    modules = imported(code)
    return {
        "cells": _digest(*code),
        "modules": _digest(*(without_comments(path.read_text(encoding="utf-8")) for path in modules)),
        "weights": weights(),
    }


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
    plain = TransformerManager().transform_cell  # `%pip` and `!ls` as Python
    waiting = {module for cell in cells for module in imports(plain(cell), "")}
    waiting |= {"tokenflow_nb.cli.command"} if any(re.search(r"^\s*!\s*tokenflow_nb", cell, re.M) for cell in cells) else set()
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
    "A module's text without comments and blank lines: a comment changes no output."
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def stale(path: Path) -> str:
    "Why a tutorial's saved outputs are not what it would show now; empty when they are."
    notebook = nbformat.read(path, 4)
    before, now = notebook.metadata.get(KEY, {}).get("ran_with"), ran_with(notebook)
    if not before:
        return "was never run by `make tutorials`"
    if not any(cell.get("outputs") for cell in notebook.cells):
        return "has no outputs"
    names = {"cells": "its own code", "modules": "the modules that it imports", "weights": "the toy model"}
    changed = [names[key] for key in names if before.get(key) != now[key]]
    return f"is older than {' and '.join(changed)}: `make tutorials`" if changed else ""


# Running one


def run(path: Path, save: bool) -> float:
    "Executes a tutorial from top to bottom in an empty folder and a cache of its own. Returns the seconds. Raises what a cell raises."
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    skipped = [cell for cell in notebook.cells if cell.cell_type == "code" and re.search(r"^#\|\s*eval:\s*false", cell.source, re.M)]
    for cell in skipped:
        cell.metadata["tags"] = [SKIP]
    with tempfile.TemporaryDirectory() as folder:
        own = {"TOKENFLOW_HOME": f"{folder}/cache", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        (work := Path(folder) / "work").mkdir()
        client = NotebookClient(
            notebook, timeout=PATIENCE, kernel_name="python3", skip_cells_with_tag=SKIP, record_timing=False, resources={"metadata": {"path": str(work)}}
        )
        began = time.perf_counter()
        client.execute(env=os.environ | own)
        seconds = time.perf_counter() - began
    for cell in skipped:
        del cell.metadata["tags"]
    if save:
        _save(notebook, path)
    return seconds


def _save(notebook: nbformat.NotebookNode, path: Path) -> None:
    "Writes a tutorial with its outputs and what it ran with, in nbdev's form."
    from execnb.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb

    notebook.metadata[KEY] = {"ran_with": ran_with(notebook)}
    notebook.metadata.pop("widgets", None)  # panels and bars live as long as their kernel: nothing but their names would be left
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    nbformat.write(notebook, path)
    cleaned = read_nb(path)
    clean_nb(cleaned, allowed_metadata_keys=[KEY])
    write_nb(cleaned, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names (default: all that are stale; with --check, all)")
    parser.add_argument("--check", action="store_true", help="run, but save nothing")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time")
    args = parser.parse_args()
    paths = [path for path in sorted(TUTORIALS.glob("*.ipynb")) if path.name.startswith(tuple(args.names) or ("",))]
    if not args.names and not args.check:
        paths = [path for path in paths if stale(path)]

    def one(path: Path) -> str:
        try:
            print(f"{path.name}: {run(path, save=not args.check):.0f} s", flush=True)
        except Exception as error:  # of a cell, or of a kernel that died: the others shall still run
            print(f"{path.name}: {error}", file=sys.stderr, flush=True)
            return path.name
        return ""

    with ThreadPoolExecutor(args.processes) as pool:
        failed = list(filter(None, pool.map(one, paths)))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
