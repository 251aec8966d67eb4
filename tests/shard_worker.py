"What the processes run that tests/test_shard.py launches: each function gets the folder of the run."

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.clip import Clip
from tokenflow_nb.edit import EditConfig
from tokenflow_nb.scale.shard import Ranks, cut_shards, joined, say, shard_edit
from tokenflow_nb.store import Store

CPU = torch.device("cpu")


def edit(folder: Path):
    "All cases, one after the other; leaves the shard's latents of each."
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with joined(cut_shards(world, 1, world), CPU, 300) as all_ranks:
        for name, case in json.loads((folder / "cases.json").read_text()).items():
            model = load_model("toy", device="cpu", dtype=getattr(torch, case["dtype"]))
            config, frames = EditConfig(**case["config"]), np.load(folder / "clip.npy")[: case["frames"]]
            ranks = Ranks(cut_shards(len(frames), config.keyframe_interval, world), rank, all_ranks.group)
            clip = Clip(frames[ranks.own.frames.start : ranks.own.frames.stop])
            latents = shard_edit(model, clip, config, Store(folder / "store"), ranks).run().latents
            save_file(dict(latents=latents.contiguous()), folder / f"{name}-{rank}.safetensors")


def stumble(folder: Path):
    "The second process fails in the way that `what` says, while the other one waits for it."
    rank, what = int(os.environ["RANK"]), (folder / "what").read_text()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 1 and what == "exits early":
        raise SystemExit("no camel fits through here")
    with joined(cut_shards(2, 1, 2), CPU, 10 if what == "hang" else 300) as ranks:
        if rank == 1 and what == "stopped early":
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.wait()
        if rank == 0:
            say(folder, stage="met")
        if rank == 1:
            fail(what)
        if what == "stay":
            time.sleep(600)
        ranks.gather(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def fail(what: str):
    if what == "raise":
        raise ValueError("the dog ate the keyframes")
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if what == "hang":
        time.sleep(600)
    if number := dict(killed=signal.SIGKILL, crashed=signal.SIGSEGV, stopped=signal.SIGSTOP, terminated=signal.SIGTERM).get(what):
        os.kill(os.getpid(), number)
        time.sleep(600)
