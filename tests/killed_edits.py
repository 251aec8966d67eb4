"""Edits that are killed, and gone on with. A program, so that it can fork children that have everything imported:
`killed_edits.py FOLDER SEED SIGKILL=20 SIGINT=6 SIGTERM=6`.

Prints a line of JSON for each killed edit, and one for two edits that run at the same time.
"""

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch

import tokenflow_nb.edit as room
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.edit import edit_video
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

torch.set_num_threads(1)
room.CHECKPOINT_SECONDS = 0.0
MODEL = load_model("toy", device="cpu")
SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)
CLIP = SCENE.render(frames=6, size=64)


def edit(root: Path, prompt: str = "a gold star on grass"):
    options = dict(num_inference_steps=4, size=(64, 64), keyframe_interval=2, block_size=2, source_branch="recorded", progress=False)
    return edit_video(CLIP, prompt, source_prompt=SCENE.caption, model=MODEL, store=Store(root), **options)


def child(root: Path, **options) -> int:
    "The process number of a fork that makes the edit."
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # it may come before the child can catch it
    number = os.fork()
    if number:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return number
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        edit(root, **options)
        os._exit(0)
    except BaseException as error:  # a child must not come back to the loop
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def latents(root: Path) -> list[str]:
    "Checksums of what the finished edits hold."
    return sorted(file["sha256"] for entry in Store(root).entries() if entry.meta["kind"] == "edit" for file in entry.manifest["files"].values())


def faults(root: Path) -> list[str]:
    "Warnings about damage when every entry is opened and its checksums are compared."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for entry in Store(root).entries():
            Store(root).get(entry.key)
    return [str(each.message) for each in caught]


def run_for(seconds: float, root: Path, kind: signal.Signals = signal.SIGKILL) -> tuple[bool, float]:
    "Whether a signal after so many seconds met the edit still running, and how long it ran."
    begun, number = time.monotonic(), child(root)
    timer = threading.Timer(seconds, os.kill, (number, kind))
    timer.start()
    status = os.waitpid(number, 0)[1]
    timer.cancel()
    timer.join()  # a thread that still runs would be lost in the next fork
    return status != 0, time.monotonic() - begun


def killed(root: Path, moment: float, kind: signal.Signals, wanted: list[str]) -> dict:
    "What a killed edit left, and what became of it when it was made again."
    store = Store(root)
    left, broken = sorted(key.split("-")[0] for key in store.drafts()), faults(root)
    ended = os.waitstatus_to_exitcode(os.waitpid(child(root), 0)[1])
    about = dict(kind=kind.name, moment=round(moment, 3), left=left, broken=broken, ended=ended)
    return about | dict(same=latents(root) == wanted, others=store.others())


def together(root: Path) -> dict:
    "Two processes that want the same edit, and a third that wants another of the same clip, all at once."
    numbers = [child(root), child(root), child(root, prompt="a marble star on grass")]
    return dict(ended=[os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers], broken=faults(root), edits=latents(root))


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell is born deaf to it
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    kinds = [signal.Signals[name] for name, count in (each.split("=") for each in sys.argv[3:]) for _ in range(int(count))]
    length = run_for(threading.TIMEOUT_MAX, folder / "straight")[1]
    wanted, draw, roots = latents(folder / "straight"), random.Random(seed), (folder / f"run-{number}" for number in itertools.count())
    assert wanted, "the edit that nobody kills did not end"
    while kinds:
        root, moment = next(roots), draw.uniform(0, length)
        was_killed, ran = run_for(moment, root, kinds[-1])
        if was_killed:
            print(json.dumps(killed(root, moment, kinds.pop(), wanted)), flush=True)
        else:  # the machine became faster than it was: moments are drawn from the shorter run, so that they fall into the work
            length = ran
    print(json.dumps(together(folder / "together") | dict(wanted=wanted)), flush=True)


if __name__ == "__main__":
    main()
