"""Where does the flicker come in? TokenFlow propagates the outputs of self-attention; everything else of the UNet still sees a
frame's own latents. This propagates more and more of it along the same correspondences, injects more of the source, guides fewer of the
steps, and measures what that changes.

    python benchmarks/flicker.py --scenes 6

Means over held-out toy scenes: warp error ×10⁻³ along the exact flow, consistency recovered (0: per frame, 1: the VAE's own), PSNR in dB of the
object to the ideal edit and of the background to the source, sharpness outside the object relative to the source.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from tokenflow_nb.attention import TokenFlowAttention
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.backbones.unet import self_attentions
from tokenflow_nb.compare import Job
from tokenflow_nb.compare.ablation import vae
from tokenflow_nb.compare.data import toy_benchmark
from tokenflow_nb.edit import EditConfig
from tokenflow_nb.measure.evaluate import measure
from tokenflow_nb.measure.metrics import Evidence, consistency_recovered
from tokenflow_nb.propagation import blend
from tokenflow_nb.store import Store

FIGURES = ("warp_error", "ideal_inside", "background_psnr", "sharpness_kept")


class Propagated:
    "A forward hook that propagates a module's output from the keyframes, along the fields of a self-attention that ran before it."

    def __init__(self, attention: torch.nn.Module):
        self.attention, self.kept = attention, {}

    def __call__(self, module, inputs, output):
        if not isinstance(self.attention.processor, TokenFlowAttention):
            return None
        tensor = output[0] if isinstance(output, tuple) else output.sample if hasattr(output, "sample") else output
        context, layer = self.attention.processor.context, self.attention.processor.layer
        rows = context.split(tensor)
        if context.joint:
            self.kept |= {branch: self._tokens(part) for branch, part in rows.items()}
        if context.plan is None:
            return None
        fields, changed = context.source[layer], {}
        for branch, part in rows.items():
            moved = blend(self.kept[branch], context.plan, *fields)
            changed[branch] = part if branch == "source" else moved if part.ndim == 3 else moved.transpose(1, 2).reshape(part.shape)
        joined = context.join(changed)
        return (joined, *output[1:]) if isinstance(output, tuple) else type(output)(sample=joined) if hasattr(output, "sample") else joined

    @staticmethod
    def _tokens(part: torch.Tensor) -> torch.Tensor:  # (f, s, c)
        return part if part.ndim == 3 else part.flatten(2).transpose(1, 2)


@contextmanager
def propagating(unet: torch.nn.Module, what: str, where: tuple[str, ...]) -> Iterator[None]:
    "More of the UNet propagated: `attn2`, `ff`, or `block`: all that a transformer gives, with its residual path."
    modules = dict(unet.named_modules())
    with ExitStack() as stack:
        for name, attention in self_attentions(unet).items():
            if name.startswith(where):
                block = name.removesuffix(".attn1")
                target = {"attn2": f"{block}.attn2", "ff": f"{block}.ff", "block": block.partition(".transformer_blocks")[0]}[what]
                stack.callback(modules[target].register_forward_hook(Propagated(attention)).remove)
        yield


EVERYWHERE = ("down", "mid", "up")
STEADY = dict(guidance_stop=0.4)
VARIANTS = {  # name: (what more is propagated, where), changes of the settings
    "TokenFlow": (None, {}),
    "source features at every step": (None, dict(pnp_f_t=1.0)),
    "source attention at every step": (None, dict(pnp_attn_t=1.0)),
    "both": (None, dict(pnp_f_t=1.0, pnp_attn_t=1.0)),
    "guidance stops at 0.6 of the steps": (None, dict(guidance_stop=0.6)),
    "guidance stops at 0.4": (None, STEADY),
    "guidance stops at 0.2": (None, dict(guidance_stop=0.2)),
    "at 0.4, source attention to 0.8": (None, STEADY | dict(pnp_attn_t=0.8)),
    "at 0.4, source attention at every step": (None, STEADY | dict(pnp_attn_t=1.0)),
    "at 0.4, linear weights": (None, STEADY | dict(rule="linear")),
    "at 0.4, per frame": (None, STEADY | dict(rule="per_frame")),
    "at 0.4, to 0.8, per frame": (None, STEADY | dict(pnp_attn_t=0.8, rule="per_frame")),
    "at 0.4, at every step, per frame": (None, STEADY | dict(pnp_attn_t=1.0, rule="per_frame")),
    "+ cross-attention": (("attn2", EVERYWHERE), {}),
    "+ feed-forward": (("ff", EVERYWHERE), {}),
    "+ residual path, not the last block": (("block", ("down", "mid", "up_blocks.1", "up_blocks.2")), {}),
    "+ residual path, last block": (("block", ("up_blocks.3",)), {}),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--scenes", type=int, default=6)
    options.add_argument("--frames", type=int, default=8)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--interval", type=int, default=4, help="a keyframe in every so many frames")
    options.add_argument("--variants", default="", help="names, separated by semicolons; all when not given")
    options = options.parse_args()
    chosen = options.variants.split(";") if options.variants else list(VARIANTS)
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise SystemExit(f"--variants {unknown}: there are {'; '.join(VARIANTS)}")
    model, found = load_model("toy", device="cpu"), {}
    for block in model.unet.modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(None)  # the hooks see whole batches
    for case in toy_benchmark(options.scenes, 1, frames=options.frames):
        how = dict(num_inference_steps=options.steps, keyframe_interval=options.interval)
        config = EditConfig(case.prompt, case.source_prompt, guidance_stop=1.0, pnp_attn_t=0.5, **how)
        with tempfile.TemporaryDirectory() as folder:
            job = Job(model, case.source, config, store=Store(folder))
            clips = {"per frame": job.edit(rule="per_frame"), "VAE": vae(job)}
            clips["VAE of the ideal edit"] = vae(Job(model, case.ideal, config, store=Store(folder)))
            for name in chosen:
                more, changes = VARIANTS[name]
                with propagating(model.unet, *more) if more else ExitStack():
                    clips[name] = job.edit(**changes)
        for name, clip in clips.items():
            row = measure(name, clip, Evidence(case), FIGURES)
            found.setdefault(name, []).append([row.measures[figure].value for figure in FIGURES])
        print(case.name, flush=True)
    means = {name: np.mean(figures, 0) for name, figures in found.items()}
    print(f"\n| {'':<38} | warp error | recovered | object dB | background dB | sharpness |\n|---|---|---|---|---|---|")
    for name, (warp, inside, outside, sharp) in means.items():
        share = consistency_recovered(warp, means["per frame"][0], means["VAE"][0])
        print(f"| {name:<38} | {1e3 * warp:.2f} | {share:.2f} | {inside:.1f} | {outside:.1f} | {sharp:.2f} |")


if __name__ == "__main__":
    main()
