"What a process runs that tests/test_shard.py starts by torchrun: `shard_worker.py FOLDER WHAT`."

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tokenflow_nb.clip import Clip
from tokenflow_nb.edit import EditConfig, invert_for
from tokenflow_nb.model import load_model
from tokenflow_nb.shard import Ranks, cut_shards, joined, reporting, say, shard_edit
from tokenflow_nb.store import Store

CPU = torch.device("cpu")


def edit(folder: Path, rank: int):
    "All cases, one after the other; leaves the shard's latents of each."
    world = int(os.environ["WORLD_SIZE"])
    with joined(cut_shards(world, 1, world), CPU, 300) as all_ranks:
        for name, case in json.loads((folder / "cases.json").read_text()).items():
            model = load_model("toy", device="cpu", dtype=getattr(torch, case["dtype"]))
            config, frames = EditConfig(**case["config"]), np.load(folder / "clip.npy")[: case["frames"]]
            ranks = Ranks(cut_shards(len(frames), config.keyframe_interval, world), rank, all_ranks.group)
            clip = Clip(frames[ranks.own.frames.start : ranks.own.frames.stop])
            trajectory = invert_for(model, clip, config, Store(folder / "store"), progress=False)
            ranks.wait()
            latents = shard_edit(model, trajectory, config, clip, ranks).run().latents
            save_file(dict(latents=latents.contiguous()), folder / f"{name}-{rank}.safetensors")


def stumble(folder: Path, rank: int, what: str):
    "The second process fails in some way while the other one waits for it."
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    with joined(cut_shards(2, 1, 2), CPU, 10 if what == "hang" else 300) as ranks:
        if rank == 1 and what == "stopped early":
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.wait()
        if rank == 0:
            say(stage="met")
        if rank == 1 and what in ("stopped", "terminated"):
            os.kill(os.getpid(), signal.SIGSTOP if what == "stopped" else signal.SIGTERM)
            time.sleep(600)
        if rank == 1 and what == "raise":
            raise ValueError("the dog ate the keyframes")
        if rank == 1 and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and what == "hang":
            time.sleep(600)
        if what == "stay":
            time.sleep(600)
        ranks.gather(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    with reporting(folder) as rank:
        edit(folder, rank) if what == "edit" else stumble(folder, rank, what)
