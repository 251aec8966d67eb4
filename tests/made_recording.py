"Recordings made by hand, for tests of what is done with them: no model, and the right answers are known."

import numpy as np
import torch

from tokenflow_nb.clip import Clip
from tokenflow_nb.features import Layer, Recording
from tokenflow_nb.store import Store, digest
from tokenflow_nb.toy.world import Truth

_PLACES = {
    "up 1 · 4×4 · attn 0": ("up_blocks.1.attentions.0.transformer_blocks.0.attn1", "input", (4, 4)),
    "up 2 · 8×8 · attn 1": ("up_blocks.2.attentions.1.transformer_blocks.0.attn1", "input", (8, 8)),
    "up 2 · 8×8 · attn 1 out": ("up_blocks.2.attentions.1.transformer_blocks.0.attn1", "output", (8, 8)),
}
LAYERS = {name: Layer(*place, name) for name, place in _PLACES.items()}


def made_recording(
    root,  # a folder
    frames: int = 6,
    speed: int = 1,  # tokens of the 8×8 grid that everything moves to the right in each frame
    timesteps: tuple[int, ...] = (1, 501),
    of: str = "source",
    noise: float = 0.0,  # on the tokens
    model_digest: str = "m",
) -> tuple[Recording, Clip, Truth]:
    "A recording of a random picture that rolls to the right, its clip of 32×32 pixels, and its exact flow."
    generator = torch.Generator().manual_seed(1)
    world = torch.randn(8, 8 + frames * speed, 12, generator=generator)

    def seen(frame: int, grid: tuple[int, int]) -> torch.Tensor:  # (s, c)
        first = (frames - frame) * speed
        tokens = world[:, first : first + 8]
        step = 8 // grid[0]
        tokens = tokens.unflatten(0, (grid[0], step)).unflatten(2, (grid[1], step)).mean((1, 3)).flatten(0, 1)
        return tokens + noise * torch.randn(tokens.shape, generator=generator)

    brightness = (world[..., :3].clamp(-2, 2) * 60 + 128).byte().repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
    pictures = np.stack([brightness[:, 4 * (frames - frame) * speed :][:, :32] for frame in range(frames)])
    clip = Clip(pictures)
    meta = dict(
        of=of, prompt="<b>a picture</b> that moves", timesteps=list(timesteps), frames=list(range(frames)), model_digest=model_digest,
        clip_digest=digest(clip.frames),
        layers=[[layer.module, layer.side, list(layer.grid), layer.name] for layer in LAYERS.values()],
    )
    store, key = Store(root), "features-" + digest(meta, noise, speed)
    with store.writing(key, meta) as writer:
        for timestep in timesteps:
            for start in range(0, frames, 4):
                block = range(start, min(start + 4, frames))
                tokens = {layer.key: torch.stack([seen(frame, layer.grid) for frame in block]).half() for layer in LAYERS.values()}
                writer.put(f"t{timestep}-{start:06d}", tokens)
    return Recording(store.get(key)), clip, _truth(frames, 4 * speed)


def _truth(frames: int, shift: int) -> Truth:
    flow = np.zeros((max(frames - 1, 0), 32, 32, 2), np.float32)
    flow[..., 0] = shift
    column = np.arange(32)
    forward = np.broadcast_to(column + shift < 32, flow.shape[:3]).copy()
    backward = np.broadcast_to(column - shift >= 0, flow.shape[:3]).copy()
    return Truth(flow, -flow, forward, backward, np.zeros((frames, 32, 32), bool))
