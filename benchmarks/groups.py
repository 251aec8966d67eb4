"""Which keyframes should a group see that are not its own? A clip with more keyframes than attend to each other is edited in groups; this edits
long toy clips with other guests than the package's, and measures what that changes.

    python benchmarks/groups.py --scenes 2

For each held-out scene and choice: frames that a keyframe pass holds for each keyframe, warp error ×10⁻³ along the exact flow, PSNR in dB of the object to the ideal edit,
over the clip and in its last third: an edit that drifts away from where it began is far from it there.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tokenflow_nb import denoiser
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.compare import Job
from tokenflow_nb.compare.data import toy_benchmark
from tokenflow_nb.edit import EditConfig
from tokenflow_nb.keyframes import JointGroup, joint_groups
from tokenflow_nb.measure.metrics import masked_psnr, warp_error
from tokenflow_nb.store import Store

Guests = Callable[[range, int], Iterable[int]]  # of a group's members among so many keyframes


def grouped(members: int, guests: Guests) -> Callable[[int, int | None], list[JointGroup]]:
    "What `joint_groups` would be with so many members and these guests."

    def groups(keyframes: int, most: int | None) -> list[JointGroup]:
        count = -(-keyframes // members)
        edges = [keyframes * number // count for number in range(count + 1)]
        found = [range(*edge) for edge in zip(edges, edges[1:])]
        return [JointGroup(own, sorted({*own} | {each for each in guests(own, keyframes) if 0 <= each < keyframes})) for own in found]

    return groups


CHOICES = {
    "the package's": joint_groups,
    "four, no guest": grouped(4, lambda own, _: ()),
    "four, the one before": grouped(4, lambda own, _: (own.start - 1,)),
    "three, the one before and the first": grouped(3, lambda own, _: (own.start - 1, 0)),
}


@contextmanager
def replaced(groups: Callable[[int, int | None], list[JointGroup]]) -> Iterator[None]:
    "The denoiser with other groups."
    denoiser.joint_groups = groups
    try:
        yield
    finally:
        denoiser.joint_groups = joint_groups


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("scenes", 2), ("frames", 96), ("steps", 15), ("interval", 4)):
        options.add_argument(f"--{name}", type=int, default=default)
    options = options.parse_args()
    model, last = load_model("toy", device="cpu"), slice(options.frames * 2 // 3, None)
    print("| scene | groups | passes | warp error | object dB | in the last third |\n|---|---|---|---|---|---|")
    for case in toy_benchmark(options.scenes, 1, frames=options.frames):
        config = EditConfig(case.prompt, case.source_prompt, num_inference_steps=options.steps, keyframe_interval=options.interval)
        with tempfile.TemporaryDirectory() as folder:
            job = Job(model, case.source, config, store=Store(folder))
            for name, groups in CHOICES.items():
                with replaced(groups):
                    edited = job.edit(rule="paper")
                keyframes = -(-options.frames // options.interval)
                passes = sum(len(group.everybody) for group in groups(keyframes, config.max_joint_keyframes)) / keyframes
                near = [masked_psnr(edited[part], case.ideal[part], case.mask[part]).value for part in (slice(None), last)]
                figures = f"{passes:.2f} | {1e3 * warp_error(edited, case.flow).value:.2f} | {near[0]:.1f} | {near[1]:.1f}"
                print(f"| {case.name} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
