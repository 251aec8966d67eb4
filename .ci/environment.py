"""Makes .venv-colab or .venv-lower: an environment that has other versions than .venv, and the package installed into it.

    python .ci/environment.py colab     # what Colab's image ships (.ci/colab.txt)
    python .ci/environment.py lower     # the lower bounds of pyproject.toml

Fails when pip's resolver had to change one of the versions to install the package: on Colab that would force a restart. torch alone is
that of .venv, by a link (make .venv without a GPU, or its libraries are copied too): another version would be gigabytes. What only tests need (pytest,
nbclient) lies in .venv, which a path file puts behind everything else.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("colab", "lower")
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")


def pins(kind: str) -> dict[str, str]:
    "The version of each package, `*` for any patch."
    if kind == "colab":
        lines = (ROOT / ".ci" / "colab.txt").read_text().splitlines()
        return dict(line.split("==") for line in lines if line and not line.startswith("#"))
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return dict(line.split(">=") for line in dependencies)


def site_packages(python: str | Path) -> Path:
    "Where the packages of an interpreter lie."
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip())


def link_torch(target: Path) -> None:
    "Makes the torch of this interpreter importable from `target`, known to pip as well, without a copy."
    for name in ("torch", "torchgen", "functorch", *(path.name for path in site_packages(sys.executable).glob("torch-*.dist-info"))):
        if (source := site_packages(sys.executable) / name).exists():
            (target / name).symlink_to(source)


def installed(python: Path) -> dict[str, str]:
    "Name and version of all that pip sees."
    listed = subprocess.run([python, *PIP, "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    return {re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"] for each in json.loads(listed)}


def main() -> int:
    if sys.argv[1:] not in [[kind] for kind in KINDS]:
        print(f"one of {' | '.join(KINDS)}, not {sys.argv[1:]}", file=sys.stderr)
        return 2
    kind = sys.argv[1]
    folder = ROOT / f".venv-{kind}"
    python = folder / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    wanted = [f"{name}=={version}" for name, version in pins(kind).items() if name != "torch"]
    wanted += [line for line in metadata.requires("torch") if "extra ==" not in line]
    link_torch(site_packages(python))
    subprocess.run([python, *PIP, "install", "--quiet", *wanted], check=True, env=environment)
    before = installed(python)
    subprocess.run([python, *PIP, "install", "--quiet", "--editable", ROOT], check=True, env=environment)
    after = installed(python)
    changed = [f"{name} {version} → {after.get(name, 'nothing')}" for name, version in before.items() if after.get(name) != version]
    if changed:
        print(f"installing the package changed {', '.join(changed)}: a bound in pyproject.toml is too high", file=sys.stderr)
        return 1
    added = sorted(f"{name} {version}" for name, version in after.items() if name not in before)
    print(f"{len(before)} packages unchanged; the package brought {', '.join(added)}")
    (site_packages(python) / "behind.pth").write_text(f"{site_packages(sys.executable)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
