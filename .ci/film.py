"""The moving picture at the top of README.md: three clips of the toy world, each wiped by its edit.

    make readme-film     # takes minutes: edits the clips, with the toy model and the default settings

The clips play forth and back, so that the picture has no jump; the line runs across them and back in the same time.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tokenflow_nb.cli.demo import demo_scene
from tokenflow_nb.edit import edit_video
from tokenflow_nb.support.face import font
from tokenflow_nb.toy.world import Scene

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "images" / "edits.webp"
FRAMES, STEPS, FPS = 16, 16, 10
SIDE, GAP, HEAD = 280, 10, 24  # pixels: of a clip, between clips, for the prompt
CIRCLE = Scene("circle", "red", "grass", centre=(62, 58), radius=38, velocity=(0.7, 0.4), spin=0.03, pan=(0.5, 0.2))
HEART = Scene("heart", "wooden", "sand", centre=(72, 60), radius=38, velocity=(-0.8, 0.3), spin=0.015, pan=(0.4, -0.3))
EDITS = [(demo_scene(), "gold"), (CIRCLE, "checkered"), (HEART, "blue")]


def wiped(source: np.ndarray, edited: np.ndarray, place: float) -> Image.Image:
    "A frame, at the left of a white line as it was, at the right as it was edited; `place` is from 0 to 1."
    large = [Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for frame in (source, edited)]
    across = round(place * SIDE)
    large[0].paste(large[1].crop((across, 0, SIDE, SIDE)), (across, 0))
    ImageDraw.Draw(large[0]).line([(across, 0), (across, SIDE)], "white", 3)
    return large[0]


def pictures(results: list) -> list[Image.Image]:
    "All frames of the moving picture."
    order = [*range(FRAMES), *range(FRAMES - 2, 0, -1)]
    places = 0.5 + 0.5 * np.cos(2 * np.pi * np.arange(len(order)) / len(order))
    found = []
    for frame, place in zip(order, places):
        page = Image.new("RGB", (len(results) * (SIDE + GAP) - GAP, HEAD + SIDE), "white")
        for column, result in enumerate(results):
            left = column * (SIDE + GAP)
            ImageDraw.Draw(page).text((left, 3), result.config.prompt, (70, 70, 70), font(14))
            page.paste(wiped(result.source.frames[frame], result.edited.frames[frame], place), (left, HEAD))
        found.append(page)
    return found


def main() -> int:
    results = []
    for scene, material in EDITS:
        prompt = scene.replace(material=material).caption
        how = dict(source_prompt=scene.caption, model="toy", num_inference_steps=STEPS)
        results.append(edit_video(scene.render(FRAMES), prompt, **how))
    first, *others = pictures(results)
    options = dict(save_all=True, append_images=others, duration=round(1000 / FPS), loop=0, quality=72, method=6)
    first.save(TARGET, "webp", **options)
    print(f"wrote {TARGET} · {TARGET.stat().st_size / 1e6:.2f} MB")
    return TARGET.stat().st_size > 2e6


if __name__ == "__main__":
    sys.exit(main())
