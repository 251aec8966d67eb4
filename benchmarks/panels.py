"""How fast features are recorded, shown and clicked: `python benchmarks/panels.py`. Prints; asserts nothing.

`python benchmarks/panels.py --player` shows two films of 240 frames in a real JupyterLab; it needs chromium and Playwright.

The clip is the one of the toolkit's promise: 24 frames of 128×128 pixels, inverted in 50 steps, recorded in every layer at five timesteps.
"""

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.features import record
from tokenflow_nb.inversion import invert
from tokenflow_nb.panels.base import Worker
from tokenflow_nb.panels.features import FeaturePanel
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "marble", "grass", centre=(46, 70), radius=34, velocity=(0.9, -0.3), spin=0.02, pan=(0.6, 0.2))


def seconds(work: Callable[[], object]) -> float:
    "How long one call takes."
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(what: str, times: list[float], promise: str) -> None:
    "One line: median and worst."
    median, worst = (f"{1000 * time:7.1f} ms" for time in (statistics.median(times), max(times)))
    print(f"{what:52s} median {median} · worst {worst} · promised {promise}", flush=True)


def features(frames: int, steps: int) -> None:
    "Recording beside inversion, sliders and clicks of a `FeaturePanel`."
    store, model = Store(tempfile.mkdtemp()), load_model("toy", device="cpu")
    clip, panels, paths = SCENE.render(frames), [], []
    inversion = seconds(lambda: paths.append(invert(model, clip, SCENE.caption, steps, store=store, progress=False)))
    recording = seconds(lambda: record(model, paths[0], store=store, progress=False))
    print(f"inversion of {frames} frames in {steps} steps: {inversion:.1f} s")
    print(f"recording of every layer at 5 timesteps: {recording:.1f} s · promised: less than the inversion")
    open_panel = seconds(lambda: panels.append(FeaturePanel(paths[0], clip, model, store=store, worker=Worker(threaded=False))))
    print(f"opening a FeaturePanel on what is recorded, redundancy included: {open_panel:.1f} s")
    panel = panels[0]
    sliders(panel)
    clicks(panel)
    print(panel.state.cache)
    panel.close()


def sliders(panel: FeaturePanel) -> None:
    "The time from a slider's new value to new pictures in the widgets, everywhere for the first time, then again."
    compare, panel.state._compare = panel.state._compare, lambda stop: None  # on the worker, so nobody waits for it
    places = [(layer, timestep) for timestep in panel.timestep.options for layer in panel.layer.options]
    for what, visited in (("slider, first time there", places), ("slider, there before", places[-20:])):
        show(what, [seconds(lambda: turn(panel, *place)) for place in visited], "100 ms")
    panel.state._compare = compare
    finest = [layer.name for layer in panel.state.recording.layers if layer.side == "input" and "32×32" in layer.name]
    panel.layer.value = panel.layer.options[0]
    panel.state.cache.clear()
    show("redundancy of a fine layer, on the worker", [seconds(lambda: turn(panel, name, panel.timestep.value)) for name in finest], "nothing")


def turn(panel: FeaturePanel, layer: str, timestep: int) -> None:
    panel.layer.value, panel.timestep.value = layer, timestep


def clicks(panel: FeaturePanel) -> None:
    "The time from a click to its marks, in the finest layer."
    panel.layer.value = "up 3 · 32×32 · attn 1"
    places = [dict(row=0, frame=frame, x=x, y=0.5) for frame in range(0, len(panel.state.recording), 4) for x in (0.2, 0.5, 0.8)]
    show("click", [seconds(lambda: setattr(panel.strip, "picked", place)) for place in places], "100 ms")


# ---- films in a real page


PREPARED = """
import numpy as np
from tokenflow_nb.panels.films import Film, Player

VIDEO, FRAMES, HEIGHT, WIDTH = {video!r}, {frames}, {height}, {width}
if VIDEO:  # as often as needed, scaled
    from tokenflow_nb.clip import fit_clip, read_clip
    given = fit_clip(read_clip(VIDEO, max_frames=FRAMES), size=(HEIGHT, WIDTH)).frames
    source = given[np.arange(FRAMES) % len(given)]
else:  # smooth shapes with grain, which move
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    waves = [128 + 60 * np.sin(columns / (9 + 7 * c) + rows / 31) + 50 * np.cos(rows / (13 + 5 * c)) for c in range(3)]
    picture = np.stack(waves, -1) + np.random.default_rng(0).normal(0, 2, (HEIGHT, WIDTH, 3))
    picture = picture.clip(0, 255).astype(np.uint8)
    source = np.stack([np.roll(picture, 3 * frame, 1) for frame in range(FRAMES)])
edited = np.roll(source, 1, -1)
"""
SHOWN = 'player = Player(films=[Film(source), Film(edited)], names=["source", "edited"], view="wipe", fps=24)\nplayer'
FIRST = """() => new Promise((done) => {
  const look = () => {
    const canvas = document.querySelector(".tfnb-player-canvas");
    const seen = canvas?.width > 2 && canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data[3];
    if (seen) done(performance.now()); else requestAnimationFrame(look);
  };
  look();
})"""
UPDATES = """async ([kind, seconds]) => {
  const [stage, seek, grip] = [".tfnb-player-stage", ".tfnb-player-frame", ".tfnb-grip"].map((name) => document.querySelector(name));
  const canvas = document.querySelector(".tfnb-player-canvas");
  const shown = () => canvas.getContext("2d").getImageData(0, canvas.height / 2, canvas.width, 1).data.join();
  const next = () => new Promise(requestAnimationFrame);
  const began = performance.now();
  let [turns, changed, before] = [0, 0, shown()];
  while (performance.now() - began < 1000 * seconds) {
    turns += 1;
    if (kind === "scrub") {
      seek.value = (37 * turns) % (Number(seek.max) + 1);
      seek.dispatchEvent(new Event("input", { bubbles: true }));
    } else {
      const key = Math.floor(turns / 40) % 2 ? "ArrowLeft" : "ArrowRight";
      grip.dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey: false, bubbles: true }));
    }
    do await next(); while (stage.getAttribute("aria-busy") !== "false");
    const now = shown();
    changed += now !== before;
    before = now;
  }
  return { turns, changed, seconds: (performance.now() - began) / 1000 };
}"""


@contextlib.contextmanager
def lab_page():
    "A page with a new notebook in a JupyterLab of its own, in chromium; and the bytes that the page receives."
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as root, contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        own = {f"JUPYTER_{name}_DIR": f"{root}/.{name.lower()}" for name in ("CONFIG", "DATA", "RUNTIME")}
        options = f"--allow-root --no-browser --port={port} --IdentityProvider.token= --ServerApp.root_dir={root} --expose-app-in-browser"
        command = [sys.executable, "-m", "jupyter", "lab", *options.split()]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server = subprocess.Popen(command, env=os.environ | own | {"JUPYTER_PREFER_ENV_PATH": "1"}, **quiet)
        try:
            with sync_playwright() as playwright:
                found = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))))
                browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
                yield browser.new_page(viewport=dict(width=1200, height=1000)), Path(root), f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def run_cell(page, number: int) -> None:
    "Runs a cell and returns at once."
    page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-editor").nth(number).click()
    page.keyboard.press("Control+Enter")


def player(video: str | None, frames: int, height: int, width: int) -> None:
    "Two films in a `Player`: when something is seen, how often wipe and scrubbing are drawn, what was sent."
    import nbformat

    cells = [PREPARED.format(video=video and os.path.abspath(video), frames=frames, height=height, width=width), SHOWN]
    with lab_page() as (page, root, url):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = dict(name="python3", display_name="Python 3")
        nbformat.write(notebook, root / "films.ipynb")
        received, last = [0], [time.monotonic()]

        def count(event):
            size = len(event["response"]["payloadData"])
            received[0] += size * 3 // 4 if event["response"]["opcode"] == 2 else size
            last[0] = last[0] if size < 10_000 else time.monotonic()

        page.set_default_timeout(300_000)
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on("Network.webSocketFrameReceived", count)
        for _ in range(120):
            try:
                page.goto(f"{url}/lab/tree/films.ipynb?reset")
                break
            except Exception:  # the server is starting
                time.sleep(0.5)
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        page.wait_for_timeout(5000)
        run_cell(page, 0)
        page.locator(".jp-InputPrompt", has_text="[1]:").wait_for()
        received[0] = 0
        page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-editor").nth(1).click()
        began = page.evaluate("performance.now()")
        page.keyboard.press("Control+Enter")
        first = page.evaluate(FIRST) - began
        start = time.monotonic()
        while time.monotonic() - last[0] < 4:
            page.wait_for_timeout(200)
        print(f"two films of {frames} frames of {width}×{height}, {'a video' if video else 'made'}")
        print(f"first picture after {first / 1000:.2f} s · promised 2 s")
        print(f"everything had arrived {first / 1000 + last[0] - start:.1f} s after the cell was run")
        for kind, promise in (("wipe", 30), ("scrub", 30)):
            found = page.evaluate(UPDATES, [kind, 4])
            rate = found["turns"] / found["seconds"]
            print(f"{kind}: {rate:.0f} updates a second, {found['changed']} of {found['turns']} changed the picture · promised {promise}")
        print(f"sent: {received[0] / 1e6:.1f} MB · promised 6 MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--player", action="store_true", help="two films in a player, in JupyterLab and chromium, instead of features")
    parser.add_argument("--video", help="with --player: a video to show instead of made pictures")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.player:
        player(options.video, 240, 360, 640)
    else:
        features(options.frames, options.steps)
