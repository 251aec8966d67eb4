"""The forecast beside what four different toy jobs take: `python benchmarks/forecast.py`. Prints; asserts nothing.

Each job has a process of its own: it loads the model, measures one evaluation, and then makes the edit as
`tokenflow_nb bench` does, stage by stage. Memory is resident memory above the loaded model. With `--clock cpu` both
count only the time that the process computes: for a machine that others use too.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

JOBS = {  # name: frames, side in pixels, settings
    "default, 24 frames": (24, 128, dict(num_inference_steps=12)),
    "96 frames, live source": (96, 128, dict(num_inference_steps=5, source_branch="live")),
    "64 pixels, SDEdit, block of 4": (32, 64, dict(num_inference_steps=24, method="sdedit", block_size=4)),
    "published rule, all keyframes together": (
        80, 96, dict(num_inference_steps=6, rule="published", max_joint_keyframes=None, inversion_steps=12),
    ),
}


def compared(name: str, clock: str) -> dict:
    "Forecast and measurement of one job, in this process."
    from tokenflow_nb.bench.presets import Preset, Subject, rendered
    from tokenflow_nb.bench.run import CLOCKS, run_job
    from tokenflow_nb.forecast.measure import measure
    from tokenflow_nb.forecast.plan import finite, forecast
    from tokenflow_nb.support.memory import PeakMemory
    from tokenflow_nb.backbones.load import load_model
    from tokenflow_nb.toy.world import Scene

    frames, side, settings = JOBS[name]
    model, scene = load_model("toy", device="cpu"), Scene("star", "blue", "grass")
    model.digest  # reads all weights: what is loaded is in memory from now on
    preset = Preset(name, settings)
    config, base = preset.config("a gold star on grass", scene.caption), PeakMemory().before
    start = CLOCKS[clock]()
    costs = measure(model, (side, side), CLOCKS[clock])
    found = forecast(frames, (side, side), config, model, costs, preset.execution())
    asked = CLOCKS[clock]() - start
    clip = lambda count: rendered(scene, (side, side), count)  # noqa: E731
    subject = Subject(name, model, clip, scene.caption, "a gold star on grass")
    run = run_job(subject, preset, frames, CLOCKS[clock], base=base)
    expected = {stage: finite(seconds, 3) for stage, seconds in found.by_stage.items()}
    memory, rows = [found.memory, run.memory], [found.evaluations, run.rows]
    return dict(job=name, asked=asked, seconds=[expected, run.seconds], memory=memory, rows=rows)


def row(found: dict) -> str:
    "A row of the table."
    (expected, measured), (planned, needed), (counted, seen) = found["seconds"], found["memory"], found["rows"]
    stages = ", ".join(f"{stage} {expected[stage]:.1f} / {seconds:.1f}" for stage, seconds in measured.items())
    total, real = sum(expected.values()), sum(measured.values())
    return (
        f"| {found['job']} | {counted} / {seen} | {found['asked']:.1f} | {stages} "
        f"| {total:.1f} / {real:.1f} | {total / real:.2f} "
        f"| {planned / 1e6:.0f} / {needed / 1e6:.0f} | {planned / needed:.2f} |"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="NAME")
    options.add_argument("--one", choices=JOBS, help=argparse.SUPPRESS)  # what the process of one job is asked
    options = options.parse_args()
    if options.one:
        print(json.dumps(compared(options.one, options.clock)))
        return
    from tokenflow_nb.bench.machine import machine

    print(f"{machine('cpu')}; {options.clock} clock; planned / measured\n")
    print("| job | rows | measuring, s | by stage, s | seconds | | memory, MB | |\n|---|---|---|---|---|---|---|---|")
    for name in options.jobs:
        command = [sys.executable, Path(__file__), "--one", name, "--clock", options.clock]
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        print(row(json.loads(said.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
