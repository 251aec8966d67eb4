"README.md from nbs/index.ipynb, as nbdev_readme makes it, but without Quarto. With --check: only compares."

import re
import sys
from pathlib import Path

import nbformat
import yaml
from execnb.nbio import read_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.processors import FilterDefaults


def readme() -> str:
    "The front page as Markdown; its pictures and notebooks are named from the top of the repository."
    config = get_config()
    notebook = read_nb(config.nbs_path / config.readme_nb)
    FilterDefaults()(notebook)  # changes it in place
    text, _ = MarkdownExporter().from_notebook_node(nbformat.from_dict(notebook))
    text = re.sub(r"\A---\n(.*?)\n---\n+", _heading, text, flags=re.S)
    text = re.sub(r"(\]\(|src=\")(?=images/|[\w/]+\.ipynb)", r"\1nbs/", text)
    return text.strip() + "\n"


def _heading(front_matter: re.Match) -> str:
    "nbdev turns the title and the line under it into YAML; this turns them back."
    said = yaml.safe_load(front_matter[1])
    return f"# {said['title']}\n\n" + (f"> {said['description']}\n\n" if "description" in said else "")


def main() -> int:
    target = Path(get_config().config_path) / "README.md"
    if "--check" not in sys.argv[1:]:
        target.write_text(readme())
    elif not target.exists() or target.read_text() != readme():
        print("README.md: not what nbs/index.ipynb says. `make docs-readme`, then commit both.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
