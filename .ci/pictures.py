"""Pictures of the four panels for README.md and the panels' page: nbs/images/panel-NAME-THEME-WIDTH.webp.

    make panel-pictures     # takes minutes: runs the panels' stories in JupyterLab and chromium

WIDTH is that of the browser's window in pixels; at 400 the panel itself is so wide.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "nbs" / "images"
STORIES = "a_newcomer_presses or looks_at_features or walks_an_edit or compares_and_votes"
PANELS = ("edit", "features", "denoise", "compare")


def shrunk(path: Path, target: Path) -> int:
    "Writes a screenshot as a WebP. Returns its bytes."
    picture = Image.open(path).convert("RGB")
    picture.save(target, "webp", quality=78, method=6)
    return target.stat().st_size


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | dict(TOKENFLOW_TEST_BROWSER="1", TOKENFLOW_SCREENSHOTS=folder)
        code = subprocess.run([sys.executable, "-m", "pytest", "tests/browser", "-q", "-k", STORIES], cwd=ROOT, env=env).returncode
        if code:
            return code
        made = [path for name in PANELS for path in sorted(Path(folder).glob(f"{name}-*-*.png")) if path.stem.count("-") == 2]
        missing = [name for name in PANELS if sum(path.stem.startswith(f"{name}-") for path in made) != 6]
        if missing:
            print(f"no pictures of {', '.join(missing)}: was a story skipped?", file=sys.stderr)
            return 1
        size = sum(shrunk(path, IMAGES / f"panel-{path.stem}.webp") for path in made)
    print(f"{len(made)} pictures, {size / 1e6:.2f} MB, in {IMAGES.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
