"""What README.md tells a person to do, done as it stands.

Two things differ from the page. Stable Diffusion wants a GPU and a download: its code runs with `model="toy"` and two steps. And no test clones the
repository from the net: it *is* a clone, and `make demo` is the command that tests/test_packaging.py runs from the wheel.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tokenflow_nb.cli import command as cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
SHELL = [line for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]
INLINE = re.findall(r"`(tokenflow_nb [a-z-][^`|]*)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))


def test_the_readme_is_what_its_notebook_says():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_that_edits_a_file(clip_file, tmp_path, monkeypatch):
    (block,) = [block for block in PYTHON if "edit_video" in block]
    assert block.count('model="sd1.5"') == 1
    shutil.copy(clip_file, tmp_path / "wolf.mp4")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(block.replace('model="sd1.5"', 'model="toy", num_inference_steps=2'), scope)
    assert {path.name for path in (tmp_path / "wolf-gold").iterdir()} == {"edited.mp4", "run.json"}
    assert "<video" in scope["result"]._repr_html_()


def test_code_that_shows_a_panel():
    (block,) = [block for block in PYTHON if "EditPanel()" in block]
    scope: dict = {}
    exec(block.replace("EditPanel()", "panel = EditPanel()"), scope)
    assert scope["panel"].state.error == ""
    scope["panel"].close()


def test_no_code_is_left_untested():
    assert len(PYTHON) == 2 and len(SHELL) == 3


def test_the_commands():
    clone, demo, lab = SHELL
    url, folder = re.fullmatch(r"git clone (\S+) && cd (\S+)", clone).groups()
    assert url.endswith(f"/{folder}")
    said = subprocess.run(["make", "--dry-run", *shlex.split(demo)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and "tokenflow_nb demo --out demo" in said.stdout
    assert lab == "make lab"


def test_its_first_picture_moves_and_is_made_by_one_command():
    first = re.search(r"!\[[^]]+\]\((nbs/images/[\w.-]+)\)", README)[1]
    with Image.open(ROOT / first) as picture:
        assert picture.n_frames > 20 and picture.width <= 900 and (ROOT / first).stat().st_size < 2e6
    assert Path(first).name in (ROOT / ".ci" / "film.py").read_text(encoding="utf-8")
    said = subprocess.run(["make", "--dry-run", "readme-film"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and ".ci/film.py" in said.stdout


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([\w-]+)`", README))))
def test_its_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("command", sorted(set(INLINE)))
def test_its_commands_are_understood(command, capsys):
    words = shlex.split(command)[1:]
    try:
        cli.parser().parse_args(words)
    except SystemExit as stop:  # `--help`; `invert` named without its clip
        assert stop.code == 0 or len(words) == 1 and f"the following arguments are required: CLIP (tokenflow_nb {words[0]}" in capsys.readouterr().err
