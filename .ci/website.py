"""What Quarto would need of the notebooks, checked without Quarto, and a plain preview of the site.

    python .ci/website.py check      # prints what is wrong with the pages; the exit code is 1 when anything is
    python .ci/website.py process    # does to them what nbdev does before Quarto, and looks for errors
    python .ci/website.py preview    # every page as plain HTML in _docs/, to look at
"""

import ast
import builtins
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mistune
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "tokenflow_nb"
QUARTO = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
SITE, REPO = QUARTO["website"]["site-url"], QUARTO["website"]["repo-url"]
COLAB = f"https://colab.research.google.com/github/{urlsplit(REPO).path.strip('/')}/blob/main/"
MARKDOWN = mistune.create_markdown(renderer=None, plugins=["table", "strikethrough"])


# The pages


def sidebar() -> list[tuple[int, str]]:
    "Depth and text of every line of the sidebar: the title of a section, or a notebook's name seen from nbs/."

    def lines(contents, depth) -> Iterator[tuple[int, str]]:
        for entry in contents:
            if isinstance(entry, str):
                yield depth, entry
            else:
                yield depth, entry["section"]
                yield from lines(entry["contents"], depth + 1)

    return list(lines(QUARTO["website"]["sidebar"]["contents"], 0))


def listed() -> list[str]:
    "The notebooks of the sidebar, in order."
    return [text for _, text in sidebar() if text.endswith(".ipynb")]


def notebooks() -> list[str]:
    "Every notebook that there is, seen from nbs/."
    found = (path.relative_to(NBS) for path in NBS.rglob("*.ipynb"))
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def html_name(name: str) -> str:
    "The page that nbdev makes of a notebook: `panels/01_base.ipynb` becomes `panels/base.html`."
    path = Path(name)
    return path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.name.lower())).with_suffix(".html").as_posix()


@cache
def cells(name: str) -> list[dict]:
    "The cells of a notebook, their source as one string."
    found = json.loads((NBS / name).read_text(encoding="utf-8"))["cells"] if (NBS / name).exists() else []
    return [cell | {"source": "".join(cell["source"])} for cell in found]


# What a page says


@dataclass
class Said:
    "What the Markdown of one page refers to."

    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)  # between backticks
    headings: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # of raw HTML

    def read(self, text: str) -> "Said":
        for token in MARKDOWN(text):
            self._token(token)
        return self

    def _token(self, token: dict):
        kind, attributes = token["type"], token.get("attrs", {})
        if kind in ("link", "image"):
            (self.links if kind == "link" else self.images).append(attributes["url"])
        elif kind == "codespan":
            self.code.append(token["raw"])
        elif kind == "heading":
            self.headings.append(plain(token))
        elif kind in ("block_html", "inline_html"):
            _Tags(self).feed(token["raw"])
        for child in token.get("children") or ():
            self._token(child)


class _Tags(HTMLParser):
    "Adds what raw HTML refers to."

    def __init__(self, said: Said):
        super().__init__()
        self.said = said

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        given = dict(attrs)
        for name, into in (("href", self.said.links), ("src", self.said.images), ("id", self.said.ids)):
            if given.get(name):
                into.append(given[name])


def plain(token: dict) -> str:
    "The words of a heading, without marks."
    return token.get("raw", "") + "".join(plain(child) for child in token.get("children") or ())


@cache
def said(name: str) -> Said:
    "What a notebook under nbs/, or a Markdown file at the top, refers to."
    if name.endswith(".md"):
        return Said().read((ROOT / name).read_text(encoding="utf-8"))
    whole = Said()
    for cell in cells(name):
        if cell["cell_type"] == "markdown":
            whole.read(cell["source"])
    return whole


def slug(heading: str) -> str:
    "The anchor that pandoc gives a heading."
    words = re.sub(r"[^\w\-. ]", "", heading.lower()).strip()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", words)) or "section"


def github_slug(heading: str) -> str:
    "The anchor that the forge gives a heading of a Markdown file."
    return re.sub(r"\s", "-", re.sub(r"[^\w\- ]", "", heading.lower()).strip())


@cache
def index() -> dict[str, dict[str, tuple[str, str]]]:
    "Module → symbol → page and file, as nbdev links backticks."
    scope: dict = {}
    exec((PACKAGE / "_modidx.py").read_text(encoding="utf-8"), scope)
    return scope["d"]["syms"]


@cache
def anchors(name: str) -> frozenset[str]:
    "What a link into a page may name after `#`."
    if name.endswith(".md"):
        return frozenset(map(github_slug, said(name).headings)) | set(said(name).ids)
    pages = (page for symbols in index().values() for page, _ in symbols.values())
    symbols = {page.partition("#")[2] for page in pages if page.partition("#")[0] == html_name(name)}
    return frozenset(map(slug, said(name).headings)) | set(said(name).ids) | symbols


# What is wrong with its links


def broken_links(name: str) -> list[str]:
    "Links and pictures of a page that lead nowhere, or whose address is none; outside addresses are judged by their form."
    page = said(name)
    return [f"{name}: {url!r} {why}" for url in (*page.links, *page.images) if (why := _fault(name, url))]


def _fault(name: str, url: str) -> str:
    "Why an address on a page is wrong; empty when it is not."
    for base, where in ((COLAB, ROOT), (f"{REPO}/blob/main/", ROOT), (f"{REPO}/tree/main/", ROOT), (f"{REPO}/raw/main/", ROOT)):
        if url.startswith(base):
            return _missing(where / unquote(urlsplit(url[len(base) :]).path))
    if url == SITE or url.startswith(f"{SITE}/"):
        page, _, anchor = url[len(SITE) :].strip("/").partition("#")
        notebook = {html_name(each): each for each in notebooks()}.get(page or "index.html")
        return f"is no page of ours: there is no notebook for {page!r}" if notebook is None else _no_anchor(notebook, anchor)
    if "://" in url or url.startswith("mailto:"):
        return malformed(url)
    path, _, anchor = url.partition("#")
    target = ((NBS / name).parent if name.endswith(".ipynb") else ROOT / Path(name).parent) / unquote(path) if path else None
    if target is None:
        return _no_anchor(name, anchor)
    if why := _missing(target):
        return why
    return _no_anchor(target.resolve().relative_to(NBS).as_posix(), anchor) if target.suffix == ".ipynb" else ""


def _missing(path: Path) -> str:
    return "" if path.exists() else f"is not there: no {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}"


def _no_anchor(name: str, anchor: str) -> str:
    return f"has no such anchor in {name}" if anchor and anchor not in anchors(name) else ""


def malformed(url: str) -> str:
    "Why an outside address cannot be one; empty when its form is right."
    parts = urlsplit(url)
    if parts.scheme != "https":
        return "does not begin with https://"
    if not re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc):
        return f"has no host: {parts.netloc!r}"
    if re.search(r"""[\s<>"'{}|\\^`]""", url) or re.search(r"[.,;]$", url):
        return "has a character that belongs to the sentence"
    if parts.netloc == "arxiv.org" and not re.fullmatch(r"/(abs|pdf)/\d{4}\.\d{4,5}(v\d+)?", parts.path):
        return "is no paper's address"
    return ""


# What is wrong with its names

FOREIGN = frozenset(  # words between backticks that are neither ours nor of a cell of the page
    "frame_9 frame_10".split()
)

FILES = frozenset(".csv .html .ini .ipynb .json .md .mp4 .npz .png .py .safetensors .toml .yaml .yml".split())


@cache
def own_words() -> frozenset[str]:
    "Every identifier in the package's code, and every word of its strings other than docstrings."
    words = set(dir(builtins))
    for path in PACKAGE.rglob("*.py"):
        if path.name != "_modidx.py":
            words |= {*path.relative_to(PACKAGE).with_suffix("").parts}
            words |= set(_words(ast.parse(path.read_text(encoding="utf-8"))))
    return frozenset(words)


def _words(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        for name in ("id", "attr", "arg", "name", "module", "asname"):
            if isinstance(value := getattr(node, name, None), str):
                yield from value.split(".")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield from re.findall(r"\w+", node.value)


@cache
def members() -> dict[str, set[str]]:
    "Class → what can follow its dot: methods and fields, its own and those of its bases that are ours."
    own, bases = {}, {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                own[node.name] = own.get(node.name, set()) | set(_members(node))
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]

    def all_of(name: str) -> set[str]:
        return own.get(name, set()).union(*(all_of(base) for base in bases.get(name, ())))

    return {name: all_of(name) for name in own}


def _members(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef):
            yield inner.name
        elif isinstance(inner, ast.AnnAssign | ast.Assign):
            for target in inner.targets if isinstance(inner, ast.Assign) else [inner.target]:
                if isinstance(target, ast.Name | ast.Attribute):
                    yield target.id if isinstance(target, ast.Name) else target.attr


@cache
def commands() -> dict[str, set[str]]:
    "First word of a command that we document → what may follow it."
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    code = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.glob("cli/*.py"))
    called = re.findall(r'add_command\(commands, "(\w+)"', code)
    return {"make": set(targets), "tokenflow_nb": {*called, "COMMAND"}}


def unknown_names(name: str) -> list[str]:
    "Between backticks: our names that do not exist, commands and paths of ours that are none."
    page, here = said(name), set()
    if name.endswith(".ipynb"):
        here = set(re.findall(r"\w+", "\n".join(cell["source"] for cell in cells(name) if cell["cell_type"] == "code")))
    return [f"{name}: `{code}` {why}" for code in page.code if (why := _unknown(code.strip(), here))]


def _unknown(code: str, here: set[str]) -> str:
    "Why a piece of code in a sentence is wrong; empty when it is not, or when it is nothing of ours."
    first, _, rest = code.partition(" ")
    if first in commands() and rest and (word := rest.split()[0])[0] != "-" and "|" not in rest and word not in commands()[first]:
        return f"is no command: {first} has {', '.join(sorted(commands()[first]))}"
    if module := re.match(r"python -m (tokenflow_nb[\w.]*)", code):
        return "" if _module(module[1]) else "is no module"
    if path := re.fullmatch(r"(?:python )?((?:nbs|tests|benchmarks|tokenflow_nb|\.ci|\.github)/[\w./-]*)(?: .*)?", code):
        return "" if (ROOT / path[1]).exists() else "is no path in the repository"
    if Path(code).suffix in FILES or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(\))?", code):
        return ""
    head, *tail = code.removesuffix("()").removeprefix("tokenflow_nb.").split(".")
    if head in members() and tail:
        return "" if tail[0] in members()[head] else f"is no member: {head} has no {tail[0]}"
    if tail and _module(f"tokenflow_nb.{head}") and (PACKAGE / head).with_suffix(".py").exists():
        known = {symbol.rpartition(".")[2] for symbol in index().get(f"tokenflow_nb.{head}", {})}
        return "" if tail[0] in known | own_words() & _top_level(head) else f"is not in the module: {head} has no {tail[0]}"
    if strange := [word for word in (head, *tail) if word not in own_words() | here | FOREIGN]:
        return f"is not in the code: no {strange[0]}"
    return ""


def _module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@cache
def _top_level(module: str) -> frozenset[str]:
    "Names that a module defines, constants included."
    names = set()
    for node in ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")).body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            names.add(getattr(target, "id", ""))
        names.add(getattr(node, "name", ""))
    return frozenset(names)


# What is wrong with its outputs


def error_outputs(path: Path) -> list[str]:
    "Cells of a notebook whose saved output is an error."
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            text = "".join(output.get("text", ""))
            if output["output_type"] == "error" or "Traceback (most recent call last)" in text:
                found.append(f"{path.relative_to(ROOT)}: the cell {''.join(cell['source'])[:60]!r} shows an error")
    return found


# The processed notebooks, and a plain rendering


def process() -> Path:
    "Does to all notebooks, changed or not, what nbdev does before Quarto reads them. Returns the folder. Must run under `__main__`: nbdev spawns workers."
    return Path(proc_nbs(n_workers=2, force=True))


STYLE = """
:root { color-scheme: light; font: 16px/1.6 system-ui, sans-serif; color: #222; }
body { margin: 0; display: grid; grid-template-columns: 17rem minmax(0, 48rem); gap: 2.5rem; }
nav { padding: 1.5rem 0 2rem 1.5rem; font-size: .9rem; line-height: 1.45; }
nav p { margin: 1.1rem 0 .2rem; font-weight: 600; } nav a { display: block; color: #555; text-decoration: none; padding: .1rem 0; }
nav a.here { color: #0a58ca; font-weight: 600; } nav a:hover { text-decoration: underline; }
main { padding: 1rem 1.5rem 4rem; min-width: 0; overflow-wrap: break-word; }
h1, h2, h3, h4 { line-height: 1.25; margin: 2rem 0 .6rem; } .anchor-link { display: none; }
a { color: #0a58ca; } img, video, svg, canvas { max-width: 100%; height: auto; }
code { font: .86em/1.5 ui-monospace, monospace; background: #f3f4f6; padding: .1em .25em; border-radius: 3px; }
pre { font: .84rem/1.5 ui-monospace, monospace; background: #f6f8fa; padding: .7rem .9rem; border-radius: 6px; overflow-x: auto; }
pre code { background: none; padding: 0; font-size: 1em; } .jp-OutputArea-output pre, .output pre { background: none; border-left: 3px solid #e3e6ea; border-radius: 0; }
.jp-RenderedMarkdown table, .scroll, main table { display: block; width: max-content; max-width: 100%; overflow-x: auto; border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; } blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid #ccc; color: #555; }
.jp-InputPrompt, .jp-OutputPrompt, .prompt, .jp-Collapser { display: none; } hr { border: 0; border-top: 1px solid #e3e6ea; margin: 2.5rem 0 1rem; }
summary { display: none; }
@media (max-width: 800px) { body { display: block; } nav { padding: .8rem 1rem; background: #f6f8fa; } summary { display: list-item; cursor: pointer; font-weight: 600; } main { padding: .5rem 1rem 3rem; } }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><nav><details{open}><summary>{site}</summary>{sidebar}</details></nav><main>{body}</main>
<script>matchMedia("(max-width: 800px)").matches && document.querySelector("details").removeAttribute("open")</script></body></html>
"""


def preview(processed: Path, target: Path, names: list[str]) -> int:
    "Writes pages as HTML below `target`, their pictures beside them. Returns how many."
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter, style = HTMLExporter(template_name="basic"), STYLE + HtmlFormatter().get_style_defs(".highlight")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(processed, target, ignore=shutil.ignore_patterns("*.ipynb", "*.yml"))
    there = [name for name in names if (processed / name).exists()]  # a sidebar may be ahead of its pages; `check` says so
    for name in there:
        page = target / html_name(name)
        page.parent.mkdir(parents=True, exist_ok=True)
        notebook = _for_preview(json.loads((processed / name).read_text(encoding="utf-8")))
        body, _ = exporter.from_notebook_node(notebook)
        body = re.sub(r'<div class="?\s*highlight[^>]*><pre>(<span></span>)?\s*</pre></div>', "", body)  # of a cell that is not shown
        up = "../" * name.count("/")
        body = re.sub(rf'href="({re.escape(SITE)}/)?([\w./-]+)\.(?:ipynb|html)(#[^"]*)?"', lambda found: _link(found, up), body)
        filled = dict(title=title(name), style=style, site=QUARTO["website"]["title"], sidebar=_sidebar_html(name, up), body=body)
        page.write_text(PAGE.format(open=" open", **filled), encoding="utf-8")
    return len(there)


def _for_preview(notebook: dict):
    "The notebook as nbconvert wants it; the front matter of nbdev becomes a heading again."
    import nbformat

    first = "".join(notebook["cells"][0]["source"]) if notebook["cells"] else ""
    if matter := re.match(r"\A---\n(.*?)\n---", first, re.S):
        front = yaml.safe_load(matter[1])
        heading = f"# {front.get('title', '')}\n\n" + (f"> {front['description']}\n" if "description" in front else "")
        notebook["cells"][0] |= {"cell_type": "markdown", "source": heading + first[matter.end() :]}
        for key in ("outputs", "execution_count"):
            notebook["cells"][0].pop(key, None)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        quiet = cell["cell_type"] == "code" and re.search(r"^#\|\s*echo:\s*false", source, re.M)
        cell["source"] = "" if quiet else re.sub(r"^#\|.*\n?", "", source, flags=re.M) if cell["cell_type"] == "code" else _plain(source)
        for output in cell.get("outputs", ()):
            if "text/markdown" in output.get("data", {}):
                output["data"]["text/markdown"] = _plain("".join(output["data"]["text/markdown"]))
    return nbformat.reads(json.dumps(notebook), 4)


def _plain(text: str) -> str:
    "Markdown without what only Quarto understands: fences and attributes."
    return re.sub(r"^:::.*$|(?<=[)\w ])\{[.#a-z][\w .=\"#:;_-]*\}", "", text, flags=re.M)


def _link(found: re.Match, up: str) -> str:
    "A link to a notebook or to our site, to the page of the preview."
    page = html_name(f"{found[2]}.html")
    return f'href="{up if found[1] else ""}{page}{found[3] or ""}"'


def title(name: str) -> str:
    "A page's title: its first heading."
    return next(iter(said(name).headings), Path(name).stem)


def _sidebar_html(current: str, up: str) -> str:
    rows = []
    for depth, text in sidebar():
        if text.endswith(".ipynb"):
            here = ' class="here"' if text == current else ""
            rows.append(f'<a{here} style="margin-left:{depth * 0.8}rem" href="{up}{html_name(text)}">{title(text)}</a>')
        else:
            rows.append(f'<p style="margin-left:{depth * 0.8}rem">{text}</p>')
    return "\n".join(rows)


# All of it


def faults() -> list[str]:
    "Everything that is wrong with the pages as they lie in nbs/."
    missing = [f"_quarto.yml: the sidebar lists {name}, which is not there" for name in listed() if name not in notebooks()]
    absent = [f"_quarto.yml: the sidebar has no {name}" for name in notebooks() if name not in listed()]
    pages = [*notebooks(), "README.md", "CONTRIBUTING.md"]
    wrong = [fault for name in pages for fault in (*broken_links(name), *unknown_names(name))]
    return missing + absent + wrong + [fault for name in notebooks() for fault in error_outputs(NBS / name)]


def main() -> int:
    if sys.argv[1:] == ["preview"]:
        target = ROOT / get_config().doc_path.name
        print(f"{preview(process(), target, listed())} pages: {target / 'index.html'}")
        return 0
    if sys.argv[1:] == ["process"]:
        processed = process()
        wrong = [fault for name in notebooks() for fault in error_outputs(processed / name)]
    else:
        wrong = faults()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
