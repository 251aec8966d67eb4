"What no notebook can say of itself: the rules that hold the repository together."

import ast
import csv
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted((ROOT / "tokenflow_nb").rglob("*.py"))
COLAB = dict(line.removesuffix(".*").split("==") for line in (ROOT / ".ci" / "colab.txt").read_text().splitlines() if "==" in line)
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "cv2": "opencv-python-headless", "yaml": "pyyaml"}
COMES_WITH = {
    "IPython": "ipywidgets",
    "traitlets": "ipywidgets",
    "huggingface_hub": "diffusers",
    "jinja2": "torch",
    "tokenizers": "transformers",
    "triton": "torch",  # on Linux with a GPU; without it a slower search serves
}


def bounds() -> dict[str, str]:
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"])


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_runtime_dependencies_have_lower_bounds_only_and_none_above_colab():
    held = bounds()  # an entry that is not `name>=version` fails here
    too_new = {name: bound for name, bound in held.items() if version(bound) > version(COLAB.get(name, "999"))}
    assert not too_new


def test_every_import_is_a_declared_dependency():
    declared = set(bounds()) | {"torchvision", "ray"}  # the extras
    stray = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"tokenflow_nb"}:
                if COMES_WITH.get(top, DISTRIBUTION.get(top, top)) not in declared:
                    stray.add(f"{path.name}: {top}")
    assert not stray


def test_the_command_line_answers_without_importing_torch():
    program = "import sys, tokenflow_nb.cli.command as cli; cli.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_quarto_settings_are_one_file():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def rooms() -> dict[str, int]:
    "Module → floor, as CONTRIBUTING.md says."
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    return {name: int(floor) for floor, name in rows}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "tokenflow_nb").with_suffix("").parts)


def imports(path: Path) -> set[str]:
    "The modules of ours that a module imports, anywhere in it but for annotations alone."
    tree = ast.parse(path.read_text())
    typing = {node for outer in ast.walk(tree) if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.dump(outer.test) for node in ast.walk(outer)}
    found, here = set(), path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing:
            above = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("tokenflow_nb.") for name in found if name.startswith("tokenflow_nb.")}


def test_the_map_of_rooms_has_every_module_and_no_other():
    assert set(rooms()) == {dotted(path) for path in MODULES if path.name not in ("__init__.py", "_modidx.py")}


def test_a_module_imports_only_from_floors_below():
    floors, upward = rooms(), []
    for package in ("panels", "baselines"):  # what a package imports itself, whoever imports the package has
        floors[package] = max(floor for name, floor in floors.items() if name.startswith(f"{package}."))
    for path in MODULES:
        name, house = dotted(path), dotted(path).partition(".")[0]
        for other in imports(path) & set(floors) if name in floors else ():
            same_house = "." in name and other.startswith(f"{house}.")
            if floors[other] >= floors[name] and not same_house:
                upward.append(f"{name} (floor {floors[name]}) imports {other} (floor {floors[other]})")
    assert not upward


def test_what_an_import_is_was_understood():
    assert {"keyframes", "propagation"} <= imports(ROOT / "tokenflow_nb" / "attention.py")
    assert {"clip", "compare.job"} <= imports(ROOT / "tokenflow_nb" / "compare" / "patches.py")
    assert "edit" in imports(ROOT / "tokenflow_nb" / "cli" / "edit.py")  # inside of a function


def test_changelog_speaks_of_this_version():
    import tokenflow_nb

    assert tokenflow_nb.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_table_is_the_one_that_was_measured():
    "Its figures and intervals are those of the suite's table, line by line."
    from tokenflow_nb.compare import METHODS
    from tokenflow_nb.measure.report import METRICS, Measure, Report, Row

    readme = (ROOT / "README.md").read_text()
    assert "`tokenflow_nb evaluate --suite toy`" in readme
    with (ROOT / "benchmarks" / "toy_suite" / "report.csv").open(encoding="utf-8") as file:
        rows = [Row(line["method"], line["case"], {name: Measure(name, float(line[name])) for name in METRICS if line.get(name)}) for line in csv.DictReader(file)]
    report = Report(rows, {})
    assert set(report.methods) == set(METHODS) and len(report.cases) == 24
    columns = [(report.summary("material_accuracy"), 0, 100), (report.summary("background_psnr"), 1, 1), (report.summary("warp_error"), 2, 1e3), (report.recovered(), 2, 1)]
    for method in report.methods:
        cells = ["{0:.{3}f} [{1:.{3}f}, {2:.{3}f}]".format(*(scale * each for each in found[method][:3]), digits) if method in found else "" for found, digits, scale in columns]
        if method == "vae":
            cells[0], cells[3] = "–", "1"
        if method == "plug_and_play":
            cells[3] = "0"
        assert f"| {METHODS[method].title} | {' | '.join(cells)} |" in readme.replace("**", ""), method


def test_the_toy_models_card_is_of_the_weights_that_are_there():
    from tokenflow_nb.toy.evaluate import weights_digest

    figures, readme = json.loads((ROOT / "tokenflow_nb" / "toy" / "weights" / "README.json").read_text()), (ROOT / "README.md").read_text()
    assert figures["about"]["digest"] == weights_digest()
    assert figures["about"]["command"] in readme and f"come to {figures['edits']['means']['paper']['recovered']:.2f} here" in readme


def test_each_promise_of_security_is_held_by_a_test_that_is_there():
    "Rows of the table name tests by file and function."
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| **")]
    named = [re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", row) for row in rows]
    assert len(rows) >= 9 and all(named)
    for path, name in sum(named, []):
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)
