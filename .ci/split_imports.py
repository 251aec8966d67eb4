"""Gives the imports of a notebook's cells a cell of their own, where they share one with other code.

nbdev executes every cell that imports something before it hands a notebook to Quarto, but not the cells between: one that imports and
then uses what such a cell has made stops the site. `make export` runs this.
"""

import ast
import hashlib
import re
import sys
from pathlib import Path

from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config

EXPORTS = re.compile(r"^#\|\s*(default_exp|exports?|exporti)\b", re.M)
NEVER_RUN = re.compile(r"^#\|\s*eval:\s*false", re.M)


def split(source: str) -> tuple[str, str] | None:
    "The imports of a cell and the rest of it; None when it need not be split."
    if EXPORTS.search(source) or NEVER_RUN.search(source) or re.search(r"^\s*[%!]", source, re.M):
        return None
    body = ast.parse(source).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    if not imports or len(imports) == len(body):
        return None
    lines = source.splitlines()
    taken = {line for node in imports for line in range(node.lineno - 1, node.end_lineno)}
    first = [line for line in lines if line.startswith("#|")]
    for number in sorted(taken):
        if first and number and number - 1 not in taken and not lines[number - 1].strip() and not first[-1].startswith("#|"):
            first.append("")  # between groups of imports
        first.append(lines[number])
    rest = re.sub(r"\n{3,}", "\n\n\n", "\n".join(line for number, line in enumerate(lines) if number not in taken)).strip("\n")
    return "\n".join(first), re.sub(r"\A((?:#\|.*\n)*)\n+", r"\1", rest)


def mend(path: Path) -> int:
    "Splits the cells of one notebook that exports something, in place. Returns how many."
    notebook = read_nb(path)
    if not any(cell.cell_type == "code" and EXPORTS.search(cell.source) for cell in notebook.cells):
        return 0
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and (parts := split(cell.source)):
            imports = mk_cell(parts[0], execution_count=None)
            imports.id = hashlib.sha256(f"imports of {cell.id}".encode()).hexdigest()[:8]  # the same in everybody's copy
            cells.append(imports)
            cell.source = parts[1]
        cells.append(cell)
    count = len(cells) - len(notebook.cells)
    if count:
        notebook.cells = cells
        write_nb(notebook, path)
    return count


def main() -> int:
    folder = get_config().nbs_path
    for path in sorted(folder.rglob("*.ipynb")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and (count := mend(path)):
            print(f"{path.name}: {count} cell{'s' * (count > 1)} split")
    return 0


if __name__ == "__main__":
    sys.exit(main())
