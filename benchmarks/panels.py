"""How fast features are recorded, shown and clicked: `python benchmarks/panels.py`. Prints; asserts nothing.

The clip is the one of the toolkit's promise: 24 frames of 128×128 pixels, inverted in 50 steps, recorded in every layer at five timesteps.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    features(options.frames, options.steps)
