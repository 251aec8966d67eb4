"The wheel, as a person gets it who has no repository: built, looked into, installed, and run from elsewhere."

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 20e6  # bytes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel of the tracked and new files of the tree; what was built in the tree before cannot slip in."
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "tokenflow_nb", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    "Runs the installed `tokenflow_nb` outside of the repository; the packages that it needs are those of this environment."
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv").glob("lib/*/site-packages"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TOKENFLOW_HOME": str(folder / "cache")}
    target = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *target], check=True, env=environment)
    (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def call(*argv: str) -> str:
        command = [python, *argv] if argv[0] == "-c" else [python.with_name("tokenflow_nb"), *argv]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call.folder = folder
    return call


def test_the_wheel_has_the_toy_model_the_scripts_and_is_small(wheel):
    assert wheel.stat().st_size < LARGEST
    held = set(zipfile.ZipFile(wheel).namelist())
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "clip_model/model"):
        assert f"tokenflow_nb/toy/weights/{part}.safetensors" in held
    data = [path for folder in ("static", "templates", "toy/weights") for path in (ROOT / "tokenflow_nb" / folder).rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in data} <= held
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tokenflow_nb").rglob("*.py")} <= held
    assert "tokenflow_nb/pairs.yaml" in held


def test_what_was_installed_is_what_runs(run):
    found = run("-c", "import sys, tokenflow_nb; assert 'torch' not in sys.modules; print(tokenflow_nb.__file__)")
    assert Path(found.strip()).is_relative_to(run.folder)


def test_help_and_models_outside_of_the_repository(run):
    assert "usage: tokenflow_nb" in run("--help")
    assert "ships with the package" in run("models")


def test_demo_outside_of_the_repository(run):
    run("demo", "--out", "result", "--steps", "2", "--quiet")
    assert {path.name for path in (run.folder / "result").iterdir()} == {"edited.mp4", "before_after.mp4", "sheet.png", "run.json"}
