"""Panels in a real JupyterLab, driven by Playwright in Debian's chromium.

    apt-get install chromium && make test-browser

runs these tests; they take minutes, so `make test` skips them. `TOKENFLOW_SCREENSHOTS=folder` keeps the screenshots in a folder.
A story shows a panel with `show`, drives it like a person, and ends with `shots`, which takes its picture in the light and
the dark theme, at three widths, and fails where something overlaps, sticks out or is cut off.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
)
START, WORK = 300_000, 240_000  # milliseconds: until the lab or a kernel is up, until a piece of work is done
WIDE, MIDDLE, NARROW, TALL = 1400, 800, 400, 2200  # pixels
KERNEL = "jupyterapp.shell.currentWidget?.sessionContext.session?.kernel"
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def pytest_collection_modifyitems(items):
    reason = "needs chromium: `apt-get install chromium`, then `make test-browser`"
    try:
        import playwright  # noqa: F401
    except ImportError:
        reason, found = "needs Playwright: `pip install -e .[dev]`, then `make test-browser`", False
    else:
        found = bool(CHROMIUM)
    if not os.environ.get("TOKENFLOW_TEST_BROWSER"):
        reason, found = "takes minutes in a browser: `make test-browser` or TOKENFLOW_TEST_BROWSER=1 runs it", False
    for item in items:
        if Path(__file__).parent in item.path.parents and not found:
            item.add_marker(pytest.mark.skip(reason=reason))


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def lab(tmp_path_factory, _no_user_cache):
    "Folder and address of a JupyterLab that knows no user's settings."
    root, port = tmp_path_factory.mktemp("lab"), free_port()
    own = {f"JUPYTER_{name}_DIR": str(root / f".{name.lower()}") for name in ("CONFIG", "DATA", "RUNTIME")}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own |= {f"JUPYTERLAB_{name}_DIR": str(root / f".lab-{name.lower()}") for name in ("SETTINGS", "WORKSPACES")}
    news = root / ".lab-settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')  # its question would lie over the page
    options = (
        f"--allow-root --no-browser --expose-app-in-browser --port={port} --ServerApp.port_retries=0 --ServerApp.ip=127.0.0.1 "
        f"--IdentityProvider.token= --ServerApp.root_dir={root} --LabApp.extension_manager=readonly"
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", *options.split()],
        env=os.environ | own | {"JUPYTER_PREFER_ENV_PATH": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START / 1000
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url + "/api")
            break
        assert server.poll() is None and time.monotonic() < until, "JupyterLab did not start"
        time.sleep(0.25)
    yield root, url
    server.terminate()
    server.wait(60)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WORK)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def folder(tmp_path):
    "Where screenshots go."
    folder = Path(os.environ.get("TOKENFLOW_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def show(lab, browser, request, folder):
    "Runs a cell in a new notebook and waits until what it shows matches a selector. Returns the page."
    root, url = lab
    context = browser.new_context(viewport=dict(width=WIDE, height=TALL), permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(WORK)

    def shown(source: str, selector: str):
        name = f"{request.node.name}.ipynb"
        kernel = dict(kernelspec=dict(name="python3", display_name="Python 3"))
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel), root / name)
        page.goto(f"{url}/lab/workspaces/{request.node.name}/tree/{name}?reset", timeout=START)
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=START)
        # before there is a session the page says idle too, and a cell that is run then is dropped
        page.wait_for_function(f"{KERNEL}?.connectionStatus === 'connected'", timeout=START)
        page.evaluate(f"{KERNEL}.info.then(() => true)")
        page.evaluate(f"{KERNEL}.requestCommInfo({{}}).then(() => true)")  # and what asks for widgets at the start has its answer
        page.evaluate("jupyterapp.shell.collapseLeft()")
        page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-editor").first.click()
        page.keyboard.press("Shift+Enter")
        failed = ".jp-OutputArea-output:has-text('Traceback (most recent call last)')"
        found = page.locator(f"{selector}, {failed}").first
        found.wait_for(timeout=START)
        assert not page.locator(failed).count(), found.inner_text()
        return page

    yield shown
    page.screenshot(path=folder / f"{request.node.name}-end.png")
    with contextlib.suppress(Exception):  # a page that never came has no kernel
        page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
    context.close()


# What a person would call broken: a control outside the panel or its scrolling box, text wider than its button, two controls on the same place.
FAULTS = """(panel) => {
  const faults = [];
  const name = (node) => `${node.tagName.toLowerCase()} ${(node.innerText || node.ariaLabel || node.className || "").toString().slice(0, 60)}`;
  const scrolls = (node) => ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
  const inScroller = (node) => {
    for (let above = node.parentElement; above && above !== panel; above = above.parentElement) if (scrolls(above)) return above;
  };
  const shown = (node) => node.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && node.getClientRects().length;
  const controls = [...panel.querySelectorAll("button, input, select, textarea, canvas, pre, label, figcaption, .tfnb-error, .tfnb-note, .noUi-base")]
    .filter((node) => shown(node) && !node.closest(".tfnb-spoken") && !["hidden", "file"].includes(node.type));
  const outer = panel.getBoundingClientRect();
  for (const node of controls) {
    const box = node.getBoundingClientRect();
    const scroller = inScroller(node);
    if (!scroller && (box.left < outer.left - 1 || box.right > outer.right + 1)) faults.push(`${name(node)} sticks out of the panel`);
    if (node.tagName === "BUTTON" && node.scrollWidth > node.clientWidth + 1) faults.push(`${name(node)} is cut off`);
    if (node.tagName === "LABEL" && node.scrollWidth > node.clientWidth + 1) faults.push(`${name(node)} is cut off`);
  }
  for (const [index, first] of controls.entries()) for (const second of controls.slice(index + 1)) {
    if (first.contains(second) || second.contains(first) || inScroller(first) !== inScroller(second)) continue;
    const [a, b] = [first.getBoundingClientRect(), second.getBoundingClientRect()];
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 2 && down > 2) faults.push(`${name(first)} lies over ${name(second)}`);
  }
  return faults;
}"""


@pytest.fixture
def shots(folder):
    "Takes a panel's picture in both themes at three widths, and fails on faults of the layout. Returns the files."

    def taken(page, selector: str, name: str) -> list[Path]:
        panel, files, faults = page.locator(selector).first, [], []
        for theme, title in THEMES.items():
            page.evaluate("name => jupyterapp.commands.execute('apputils:change-theme', { theme: name })", title)
            page.locator(f'body[data-jp-theme-name="{title}"]').wait_for(state="attached")
            for width in (WIDE, MIDDLE, NARROW):
                page.set_viewport_size(dict(width=width, height=TALL))
                if width == NARROW:  # the panel itself is so narrow, not the window around it
                    page.wait_for_timeout(300)
                    around = width - round(panel.bounding_box()["width"])
                    page.set_viewport_size(dict(width=width + around, height=TALL))
                page.wait_for_timeout(300)
                height = round(panel.bounding_box()["height"])
                page.set_viewport_size(page.viewport_size | dict(height=max(TALL, height + 300)))  # all of it is on the page
                page.wait_for_timeout(500)
                files.append(folder / f"{name}-{theme}-{width}.png")
                panel.screenshot(path=files[-1])
                faults += [f"{theme}, {width} pixels: {fault}" for fault in panel.evaluate(FAULTS)]
        page.set_viewport_size(dict(width=WIDE, height=TALL))
        assert not faults, "\n".join(faults)
        return files

    return taken


SERIOUS = ("serious", "critical")


@pytest.fixture(scope="session")
def axe_script(tmp_path_factory) -> str:
    "The source of axe-core, from npm."
    folder = tmp_path_factory.mktemp("axe")
    if not shutil.which("npm"):
        pytest.skip("needs npm, which fetches axe-core: `apt-get install npm`")
    got = subprocess.run(["npm", "install", "--silent", "--prefix", folder, "axe-core@4"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"axe-core could not be fetched from npm: {got.stderr[-200:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def axe(axe_script):
    "Fails where axe-core finds something serious in a part of the page, in the light and the dark theme."

    def check(page, selector: str):
        page.evaluate(axe_script)
        for theme, title in THEMES.items():
            page.evaluate("name => jupyterapp.commands.execute('apputils:change-theme', { theme: name })", title)
            page.locator(f'body[data-jp-theme-name="{title}"]').wait_for(state="attached")
            page.wait_for_timeout(500)
            found = page.evaluate("async (selector) => (await axe.run(selector)).violations", selector)
            bad = [f"{theme}: {each['id']}: {each['nodes'][0]['html'][:200]}" for each in found if each["impact"] in SERIOUS]
            assert not bad, "\n".join(bad)

    return check
