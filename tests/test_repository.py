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
