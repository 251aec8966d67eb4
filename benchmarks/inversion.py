"""How much of a clip comes back from each way to invert it, for how many evaluations: `python benchmarks/inversion.py`. Prints; asserts nothing.

Up by a scheme, down by plain DDIM, with the source prompt and no guidance: the way that an edit's source takes. PSNR in dB of the latents, and of the pictures to
those that the VAE alone gives back. BDIA and BELM are exact only for sampling with their own two-step schemes; an edit samples with DDIM, so that is how they are
judged here. `tokens`: how far the inputs of the self-attentions at the step's last evaluation lie from those at the latents that it led to, relative to these: what
features recorded during inversion are off by.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tokenflow_nb.backbones.base import Model, Prompt
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.backbones.schedule import Level, NoiseSchedule, Prediction
from tokenflow_nb.backbones.unet import StableDiffusion, self_attentions
from tokenflow_nb.inversion import CORRECTIONS, Correction, Predict, denoise, inversion_grid, psnr
from tokenflow_nb.toy.world import Scene

RANDOM = Path(__file__).parents[1] / "tests" / "reference"


def corrected(correction: Correction) -> Callable:
    "A walk up with a correction of the package."

    def walk(model: Model, latents: torch.Tensor, visited: list[int], predict: Predict) -> Iterator[torch.Tensor]:
        before = None
        for levels, timestep in zip(_levels(model, visited), visited):
            latents, before = correction(latents, before, *levels, lambda x: predict(x, timestep))
            yield latents

    return walk


def _levels(model: Model, visited: list[int]) -> list[tuple[Level, Level]]:
    levels = [model.schedule.level(timestep) for timestep in (None, *visited)]
    return list(zip(levels, levels[1:]))


def _ratio(level: Level) -> float:
    return level.sigma / level.alpha


def _move(latents: torch.Tensor, noise: torch.Tensor, source: Level, target: Level) -> torch.Tensor:
    "The latents at another level, along this noise."
    return Prediction((latents - source.sigma * noise) / source.alpha, noise).at(target)


def extrapolated(model: Model, latents: torch.Tensor, visited: list[int], predict: Predict) -> Iterator[torch.Tensor]:
    "As `predicted`, along the line through the noise of the last two steps."
    seen, levels = [], _levels(model, visited)
    for index, (pair, timestep) in enumerate(zip(levels, visited)):
        guess = latents
        if seen:
            guess = _move(latents, seen[-1], *pair)
        if len(seen) > 2:  # the first step is next to none, so nothing can be said from its length
            below, above = (_ratio(b) - _ratio(a) for a, b in (levels[index - 1], pair))
            guess = _move(latents, seen[-1] + min(1, above / below) * (seen[-1] - seen[-2]), *pair)
        seen.append(predict(guess, timestep).noise)
        latents = _move(latents, seen[-1], *pair)
        yield latents


def averaged(model: Model, latents: torch.Tensor, visited: list[int], predict: Predict) -> Iterator[torch.Tensor]:
    "Fixed point with the mean of the last two noises (as ReNoise does), 3 evaluations."
    for pair, timestep in zip(_levels(model, visited), visited):
        upper, seen = latents, []
        for _ in range(3):
            seen.append(predict(upper, timestep).noise)
            upper = _move(latents, sum(seen[-2:]) / len(seen[-2:]), *pair)
        latents = upper
        yield latents


def bdia(model: Model, latents: torch.Tensor, visited: list[int], predict: Predict) -> Iterator[torch.Tensor]:
    "Bi-directional integration (Zhang et al., γ = 1): from the level below the current one, the current one's noise twice."

    def step(older, current, noise, below, above):
        return older + _move(current, noise, *above) - _move(current, noise, *below[::-1])

    return _two_step(model, latents, visited, predict, step)


def belm(model: Model, latents: torch.Tensor, visited: list[int], predict: Predict) -> Iterator[torch.Tensor]:
    "The optimal bi-directional linear multistep scheme (Wang et al., O-BELM)."

    def step(older, current, noise, below, above):
        first, second = _ratio(below[1]) - _ratio(below[0]), _ratio(above[1]) - _ratio(above[0])
        ratio, older, current = second / first, older / below[0].alpha, current / below[1].alpha
        return above[1].alpha * (current + ratio**2 * (older - current) + ratio * (first + second) * noise)

    return _two_step(model, latents, visited, predict, step)


def _two_step(model: Model, latents: torch.Tensor, visited: list[int], predict: Predict, step: Callable) -> Iterator[torch.Tensor]:
    "The first two steps by DDIM (the first is next to none, and would be divided by), then from two levels."
    path, levels = [latents], _levels(model, visited)
    for index, timestep in enumerate(visited):
        if index < 2:
            path.append(_move(path[-1], predict(path[-1], timestep).noise, *levels[index]))
        else:
            noise = predict(path[-1], visited[index - 1]).noise
            path.append(step(path[-2], path[-1], noise, levels[index - 1], levels[index]))
        yield path[-1]


SCHEMES = {  # name: (walk, steps up to one step down)
    "none": (corrected(CORRECTIONS["none"]), 1),
    "predicted": (corrected(CORRECTIONS["predicted"]), 1),
    "extrapolated": (extrapolated, 1),
    "BDIA": (bdia, 1),
    "BELM": (belm, 1),
    "none, twice the steps": (corrected(CORRECTIONS["none"]), 2),
    "fixed point": (corrected(Correction(False, 2)), 1),
    "repeated": (corrected(CORRECTIONS["repeated"]), 1),
    "fixed point, averaged": (averaged, 1),
    "fixed point, 3": (corrected(Correction(False, 3)), 1),
    "predicted, 3": (corrected(Correction(True, 3)), 1),
}


@contextmanager
def tokens(unet: UNet2DConditionModel) -> Iterator[dict[str, torch.Tensor]]:
    "The inputs of the self-attentions of the evaluation that was last."
    seen, hooks = {}, []
    for name, attention in self_attentions(unet).items():

        def keep(module, args, kwargs, name=name):
            seen[name] = args[0] if args else kwargs["hidden_states"]

        hooks.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def measure(name: str, model: Model, clean: torch.Tensor, prompt: Prompt, steps: int) -> str:
    "A row of the table."
    walk, finer = SCHEMES[name]
    down, (visited, _) = model.schedule.timesteps(steps), inversion_grid(model, steps, finer * steps)
    evaluations, apart = 0, []

    def predict(latents: torch.Tensor, timestep: int) -> Prediction:
        nonlocal evaluations
        evaluations += 1
        return model.predict(latents, timestep, prompt)

    looked_at = {len(visited) // 5, len(visited) // 2, 4 * len(visited) // 5}
    with tokens(model.unet) as seen:
        for index, latents in enumerate(walk(model, clean, visited, predict)):
            if index in looked_at:
                recorded = dict(seen)
                model.predict(latents, visited[index], prompt)
                apart += [float((recorded[layer] - live).norm() / live.norm()) for layer, live in seen.items()]
    back = denoise(model, latents, down, lambda x, timestep: model.predict(x, timestep, prompt))
    span = float(clean.max() - clean.min())
    figures = [10 * torch.log10(span**2 / (back - clean).square().mean(dim=(1, 2, 3))).mean()]
    figures.append(float("nan") if model.vae is None else psnr(model.decode(clean), model.decode(back)))
    return f"| {steps} | {name} | {evaluations / steps:.0f} | {figures[0]:.1f} | {figures[1]:.1f} | {sum(apart) / len(apart):.4f} |"


def toy(scenes: int, frames: int) -> tuple[Model, torch.Tensor, Prompt]:
    "The toy model, and frames of some scenes with their prompts."
    model, found = load_model("toy", device="cpu"), [Scene.random(seed) for seed in range(scenes)]
    clean = torch.cat([model.encode(scene.render(6).frames[:frames]) for scene in found])
    return model, clean, Prompt.join([model.embed(scene.caption).expand(frames) for scene in found])


def random(frames: int) -> tuple[Model, torch.Tensor, Prompt]:
    "A UNet that has learned nothing, and latents that it never saw: as hard as it gets."
    unet = UNet2DConditionModel.from_config(json.loads((RANDOM / "config.json").read_text()))
    unet.load_state_dict(load_file(RANDOM / "unet.safetensors"))
    schedule, golden = json.loads((RANDOM / "golden.json").read_text())["scheduler"], load_file(RANDOM / "golden.safetensors")
    model = StableDiffusion(unet.eval(), None, None, None, NoiseSchedule(schedule), name="random")
    return model, golden["latents"][:frames], Prompt(golden["source_embeds"]).expand(frames)


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", choices=("toy", "random"), default=["random", "toy"])
    options.add_argument("--scenes", type=int, default=3)
    options.add_argument("--frames", type=int, default=6, help="of each scene, at most 6")
    options.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    options.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    options = options.parse_args()
    for name in options.models:
        task = toy(options.scenes, options.frames) if name == "toy" else random(options.frames)
        print(f"\n{name}, {len(task[1])} frames\n\n| steps | scheme | evaluations a step down | latents dB | pictures dB | tokens |")
        print("|---|---|---|---|---|---|")
        for steps in options.steps:
            for scheme in options.schemes:
                print(measure(scheme, *task, steps), flush=True)


if __name__ == "__main__":
    main()
