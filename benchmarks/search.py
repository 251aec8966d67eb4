"""How long the exact search for nearest tokens takes beside the bare matrix product that it needs: `python benchmarks/search.py`. Prints; asserts nothing.

The product is taken a chunk of queries at a time into one piece of memory, as the search does. Search and product take turns, and the ratio is that of their
medians. With `--clock cpu` only the time that this process computes is counted: for a machine that others use too.
"""

import argparse
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tokenflow_nb.propagation import _LARGEST, nearest, nearest_fields, normalise_keys

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def product(queries: torch.Tensor, keys: torch.Tensor) -> None:
    "The cosines of queries `(n, c)` and keys `(m, c)`, each written once and looked at by nobody."
    rows = max(1, _LARGEST // len(keys))
    if len(queries) <= rows:
        queries @ keys.T
        return
    cosines = keys.new_empty(rows, len(keys))
    for part in queries.split(rows):
        torch.mm(part, keys.T, out=cosines[: len(part)])


def medians(works: list[Callable[[], object]], clock: Callable[[], float], device: str, budget: float) -> list[float]:
    "The median seconds of each work; they take turns for about `budget` seconds, each at least 3 times."
    times, end, wait = [[] for _ in works], time.perf_counter() + budget, torch.cuda.synchronize if device == "cuda" else lambda: None
    for work in works:
        work()
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 1000):
        for work, its in zip(works, times):
            wait()
            start = clock()
            work()
            wait()
            its.append(clock() - start)
    return [statistics.median(its) for its in times]


def peak(work: Callable[[], object], device: str) -> float:
    "Megabytes that the work needs at its peak, beside what is there before. NaN where the system does not say."
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
        before = _resident()
        work()
        return (_resident() - before) / 1e3
    except (OSError, AttributeError):
        return float("nan")


def _resident() -> int:
    "The most kilobytes that were resident."
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def machine(device: str) -> str:
    "What it runs on, in a line."
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name, capability = (names or [platform.processor() or platform.machine()])[0], torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096], help="tokens of a frame")
    options.add_argument("--channels", type=int, nargs="+", default=[48, 64, 320, 640])
    options.add_argument("--frames", type=int, nargs="+", default=[1, 8], help="frames at a time, half of them for each of two keyframes")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--clock", choices=CLOCKS, default="wall")
    options.add_argument("--seconds", type=float, default=1.0, help="for each row, at least")
    options = options.parse_args()
    print(f"{machine(options.device)}; {options.clock} clock\n")
    print("| frames | tokens | channels | product ms | search ms | ratio | peak MB |\n|---|---|---|---|---|---|---|")
    worst = 0.0
    for frames, tokens, channels in [(f, s, c) for f in options.frames for s in options.tokens for c in options.channels]:
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(frames, tokens, channels, generator=generator).to(options.device)
        keys = normalise_keys(torch.randn(2, tokens, channels, generator=generator)).to(options.device)
        which = torch.arange(frames) * 2 // frames
        parts = [(queries[which == keyframe].flatten(0, 1), keys[keyframe]) for keyframe in which.unique().tolist()]
        search = (lambda: nearest(*parts[0])) if frames == 1 else (lambda: nearest_fields(queries, keys, which))
        bare, found = medians([lambda: [product(*part) for part in parts], search], CLOCKS[options.clock], options.device, options.seconds)
        worst, megabytes = max(worst, found / bare), peak(search, options.device)
        print(f"| {frames} | {tokens} | {channels} | {1e3 * bare:.3f} | {1e3 * found:.3f} | {found / bare:.2f} | {megabytes:.0f} |", flush=True)
    print(f"\nworst ratio {worst:.2f}")


if __name__ == "__main__":
    main()
