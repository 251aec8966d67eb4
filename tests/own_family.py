"""A family of models from outside the package: a small transformer over patches, trained as nothing, with the schedule of a rectified flow.

Its latents are the pixels of patches, so that its «VAE» is exact. Everything is named differently than in Stable Diffusion: one projection for
queries, keys and values, text that comes pooled and with a mask, no convolution whose output could be injected.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tokenflow_nb.attention import Injection, TokenFlowAttention
from tokenflow_nb.backbones.base import Model, Prompt, Site
from tokenflow_nb.backbones.load import register_model
from tokenflow_nb.backbones.schedule import Level, Prediction, Schedule

PATCH, CHANNELS, WIDTH = 4, 48, 32


class FlowSchedule(Schedule):
    "x_t = (1 − t)·x₀ + t·ε; the network predicts the velocity ε − x₀. Timestep 999 is noise alone."

    length = 1000

    def timesteps(self, steps, argument="num_inference_steps"):
        return np.linspace(999, 999 / self.count(steps, argument), steps).round().astype(int).tolist()

    def level(self, timestep):
        t = 0.0 if timestep is None else timestep / 999
        return Level(1 - t, t)

    def prediction(self, output, latents, timestep):
        alpha, sigma = self.level(timestep)
        return Prediction(latents - sigma * output, latents + alpha * output)

    def target(self, prediction, timestep):
        return prediction.noise - prediction.clean

    identity = ("flow",)


class Attention(nn.Module):
    heads = 2

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.processor = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), PlainAttention()

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, tokens):
        return self.processor(self, tokens)


class PlainAttention:
    def __call__(self, attn, tokens):
        query, key, value = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in attn.qkv(tokens).chunk(3, -1))
        return attn.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class FlowAttention(TokenFlowAttention):
    def project(self, attn, tokens):
        return attn.qkv(tokens).chunk(3, -1)

    def unite(self, attn, mixed):
        return attn.proj(mixed)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.text = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens, words):
        tokens = tokens + self.attn(self.norm(tokens))
        return tokens + self.text(words)[:, None] + self.mlp(tokens)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, latents, t, states, mask, pooled):
        words = pooled + (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) + t / 1000
        tokens = self.enter(latents.flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, words)
        return self.leave(tokens).transpose(1, 2).view_as(latents)


def vector(word: str) -> torch.Tensor:
    "Always the same numbers for a word."
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest())
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


@dataclass(eq=False)
class Patches(Model):
    "A transformer over patches."

    network: nn.Module
    schedule: Schedule
    name: str = "patches"
    guidance_scale: float = 2.0

    size, multiple, latent_channels, latent_scale = 64, PATCH, CHANNELS, PATCH
    injectable = Injection(attention=("blocks.1.attn",))
    processor = FlowAttention

    @property
    def parts(self):
        return (self.network,)

    def encode(self, frames):
        return F.pixel_unshuffle(torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2) / 127.5 - 1, PATCH)

    def decode(self, latents):
        return ((F.pixel_shuffle(latents, PATCH) + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()

    def embed(self, prompt):
        words = prompt.split()[:8]
        states = torch.stack([*map(vector, words), *[torch.zeros(WIDTH)] * (8 - len(words))])
        mask = torch.tensor([1.0] * max(1, len(words)) + [0.0] * (8 - max(1, len(words))))
        return Prompt(states[None], pooled=vector(prompt)[None], mask=mask[None])

    def output(self, latents, timestep, prompt, **extra):
        return self.network(latents, timestep, prompt.states, prompt.mask, prompt.pooled, **extra)

    def attentions(self):
        return {f"blocks.{index}.attn": block.attn for index, block in enumerate(self.network.blocks)}

    def sites(self, size=None):
        rows, columns = (side // PATCH for side in size or (self.size, self.size))
        return [Site(name, f"block {index} · {rows}×{columns}", (rows, columns)) for index, name in enumerate(self.attentions())]


@register_model("patches", "a transformer over patches, untrained; 64×64")
def load(device, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network().to(device, dtype).requires_grad_(False).eval()
    for parameter in network.leave.parameters():
        parameter.mul_(0.3)  # a tame field, which can be inverted
    return Patches(network, FlowSchedule())
