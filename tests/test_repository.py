"What no notebook can say of itself: the rules that hold the repository together."

import ast
import csv
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted((ROOT / "tokenflow_nb").rglob("*.py"))
COLAB = {  # the image of August 2026
    "torch": "2.11",
    "diffusers": "0.39",
    "transformers": "5.15",
    "numpy": "2.1",
    "matplotlib": "3.10",
    "scikit-learn": "1.6",
    "ipywidgets": "7.7.1",
    "anywidget": "0.9.21",
    "imageio-ffmpeg": "0.6",
}
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "imageio_ffmpeg": "imageio-ffmpeg", "cv2": "opencv-python-headless", "yaml": "pyyaml"}
COMES_WITH = {
    "IPython": "ipywidgets",
    "traitlets": "ipywidgets",
    "huggingface_hub": "diffusers",
    "tokenizers": "transformers",
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
    program = "import sys, tokenflow_nb.cli as cli; cli.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_sidebar_lists_every_notebook_once():
    def leaves(contents):
        for entry in contents:
            if isinstance(entry, str):
                yield entry
            else:
                yield from leaves(entry["contents"])

    sidebar = sorted(leaves(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]))
    tracked = subprocess.run(["git", "ls-files", "nbs"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert sidebar == sorted(name.removeprefix("nbs/") for name in tracked.split() if name.endswith(".ipynb"))


def test_quarto_settings_are_one_file():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_changelog_speaks_of_this_version():
    import tokenflow_nb

    assert tokenflow_nb.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_table_is_the_one_that_was_measured():
    from tokenflow_nb.report import METRICS, Measure, Report, Row

    with (ROOT / "benchmarks" / "toy_suite" / "report.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = [Row(line["method"], line["case"], {name: Measure(name, float(line[name])) for name in METRICS if line.get(name)}) for line in lines]
    table = Report(rows, {}).markdown(["warp_error", "clip_gain", "material_accuracy", "background_psnr", "sharpness_kept"])
    assert table in (ROOT / "README.md").read_text()
