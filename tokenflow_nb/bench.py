"""x"""

import csv
import gc
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from matplotlib.figure import Figure

from .attention import TokenFlowAttention
from .clip import Clip, gather_frames
from .edit import Edit, EditConfig
from .inversion import invert, inversion_grid, psnr, reconstruct
from .metrics import ClipJudge
from .model import Model, NoiseSchedule, load_model, out_of_memory
from .planner import PeakMemory, count_work, finite, in_bytes, joint_passes, traced
from .propagation import blend
from .source import record_source
from .store import Store
from .toy.evaluate import EditCase, judge_edit
from .toy.world import Scene


def softmax_attention(
    query: torch.Tensor,  # (n, s, c)
    key: torch.Tensor,  # (n, m, c)
    value: torch.Tensor,  # (n, m, c)
    heads: int,
) -> torch.Tensor:
    "Attention `(n, s, c)` with its matrices in memory, a head at a time."
    outputs = []
    for one, other, third in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value))):
        similarity = torch.bmm(one, other.transpose(1, 2)) * one.shape[-1] ** -0.5
        outputs.append(torch.bmm(similarity.softmax(-1), third))
    return torch.cat(outputs, -1)


def whole_nearest(
    queries: torch.Tensor,  # (n, c)
    keys: torch.Tensor,  # (m, c)
) -> torch.Tensor:
    "The index `(n,)` of the key with the largest cosine, from the whole matrix of cosines."
    queries, keys = (x / x.norm(dim=-1, keepdim=True) for x in (queries, keys))
    return (queries @ keys.T).argmax(-1)


class WrittenOutAttention(TokenFlowAttention):
    "The processor of one self-attention layer as the published program computes it."

    def _attend(self, attn, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        context, outputs = self.context, {}
        for branch, x in tokens.items():
            query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
            if self.layer in context.injection.attention:
                if branch == "source":
                    context.source[self.layer] = (query, key)
                query, key = context.source[self.layer]
            if context.joint and branch != "source":
                key, value = (each.flatten(0, 1).unsqueeze(0).repeat(len(x), 1, 1) for each in (key, value))
            outputs[branch] = attn.to_out[0](softmax_attention(query, key, value, attn.heads))
        if context.joint:
            self._keep(tokens, outputs)
        return outputs

    def _propagate(self, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        context, kept, source = self.context, self.context.keyframes[self.layer], tokens["source"]
        fields = []
        for which in (context.plan.first, context.plan.second):
            found = torch.empty(source.shape[:2], dtype=torch.int64, device=source.device)
            for keyframe in which.unique().tolist():
                rows = (which == keyframe).to(source.device)
                found[rows] = whole_nearest(source[rows].flatten(0, 1).float(), kept.keys[keyframe]).view(-1, source.shape[1])
            fields.append(found)
        return {branch: blend(kept.outputs[branch], context.plan, *fields) for branch in tokens}


@dataclass(frozen=True)
class Preset:
    "Settings with a name."

    about: str
    settings: dict = field(default_factory=dict)  # of `EditConfig`
    published: bool = False  # `EditConfig.published`, the film of the inversion, and everything written out

    def config(self, prompt: str, source_prompt: str = "", **changes) -> EditConfig:
        make = EditConfig.published if self.published else EditConfig
        return make(prompt, source_prompt=source_prompt, **self.settings | changes)


PRESETS = dict(
    default=Preset("EditConfig as it is"),
    draft=Preset("a first look", dict(num_inference_steps=12)),
    published=Preset("the authors' program: 500 steps up, 500 down for a film that nothing reads, everything written out", published=True),
)


def find_preset(name: str) -> Preset:
    "The preset of a name. Raises `ValueError` for another."
    if name not in PRESETS:
        raise ValueError(f"presets={name!r} is unknown: presets are {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class Subject:
    "A model and a clip of any length."

    name: str
    model: Model
    clip: Callable[[int], Clip]  # of so many frames
    source_prompt: str
    prompt: str
    case: EditCase | None = None  # what the ideal edit is; None: quality cannot be told


def toy_subjects(scenes: int, size: int = 128) -> list[Subject]:
    "Held-out scenes with another material."
    model = load_model("toy", device="cpu")
    return [
        Subject(f"{case.scene.caption} → {case.material}", model, partial(rendered, case.scene, (size, size)), case.scene.caption, case.ideal.caption, case)
        for case in EditCase.drawn(scenes)
    ]


def rendered(scene: Scene, size: tuple[int, int], frames: int) -> Clip:
    "A scene as a clip that lies in a file when it is long, as one that was read does."
    clip, (height, width) = scene.render(frames, max(size)), size
    return replace(clip, frames=gather_frames(frame[:height, :width] for frame in clip.frames))


SD_UNET = dict(
    sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True,
)
SD_VAE = dict(
    sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)
SD_SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False,
)


class RandomModel(Model):
    "A `Model` without a text encoder: each prompt has random states `(1, 77, c)`, the same each time."

    @torch.no_grad()
    def embed(self, prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int.from_bytes(blake2b(prompt.encode(), digest_size=4).digest()))
        return torch.randn(1, 77, self.unet.config.cross_attention_dim, generator=generator).to(self.device, self.dtype)


def random_model(
    unet: dict = SD_UNET,  # configuration; the default is that of SD 2.1
    vae: dict = SD_VAE,
    device: str | torch.device | None = None,  # None: CUDA where it is, else the CPU
    dtype: torch.dtype | None = None,  # None: float16 on CUDA, float32 elsewhere
) -> Model:
    "A model with random weights, always the same on the same device. It costs what a trained one costs."
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        parts = [kind(**config).to(dtype).eval().requires_grad_(False) for kind, config in ((UNet2DConditionModel, unet), (AutoencoderKL, vae))]
    return RandomModel(*parts, torch.nn.Module(), None, NoiseSchedule(SD_SCHEDULE), name="random weights")


def sd_subjects(size: tuple[int, int] = (512, 512)) -> list[Subject]:
    "A rendered scene at Stable Diffusion's size, and a model that paints noise."
    scene = Scene("star", "blue", "grass")
    return [Subject(f"random weights, {size[0]}×{size[1]}", random_model(), partial(rendered, scene, size), scene.caption, scene.replace(material="gold").caption)]


@dataclass(frozen=True)
class Run:
    "A job that was measured."

    frames: int
    rows: int  # that the UNet evaluated
    seconds: dict[str, float]  # by stage
    memory: float  # bytes above what was there before, at the peak
    edited: Clip = field(repr=False, default=None)
    reconstruction: float = math.nan  # PSNR in dB of the inverted clip, denoised with the source prompt

    total = property(lambda self: sum(self.seconds.values()), doc="Seconds of all stages.")


@contextmanager
def rows_counted(unet: UNet2DConditionModel) -> Iterator[list[int]]:
    "A list of the batch sizes that the UNet sees."
    seen: list[int] = []
    hook = unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        hook.remove()


class Stopwatch:
    "Seconds and peak memory of stages that follow one another."

    def __init__(
        self,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        base: float | None = None,  # bytes from which memory counts; None: what is there now
    ):
        self.device, self.clock, self.seconds, self.highest = device, clock, {}, 0.0
        self.base = PeakMemory(device).before if base is None else base

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        memory, start = PeakMemory(self.device), self.clock()
        yield
        self.seconds[name] = self.clock() - start
        self.highest = max(self.highest, memory.before + memory.bytes - self.base)


def run_job(
    subject: Subject,
    preset: Preset,
    frames: int,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
    gate: bool = False,  # measure the reconstruction, too
    base: float | None = None,  # bytes from which memory counts; None: what is there when it begins
    **changes,  # of the preset's settings
) -> Run:
    "Edits a clip by a preset from beginning to end, and measures it."
    model, clip, config = subject.model, subject.clip(frames), preset.config(subject.prompt, subject.source_prompt, **changes)
    watch, film = Stopwatch(model.device, clock, base), None
    with tempfile.TemporaryDirectory() as folder, rows_counted(model.unet) as rows:
        store = Store(folder)
        with watch.stage("invert"):
            how = config.num_inference_steps, config.inversion_steps, config.block_size, store, progress, config.correction
            trajectory = invert(model, clip, config.source_prompt, *how)
        if preset.published:
            with watch.stage("film"):
                film = reconstruct(model, trajectory, config.inversion_steps, config.block_size)
        edit = Edit(model, trajectory, config, clip, keep_history=False)
        if config.source_branch == "recorded":
            with watch.stage("record"):
                edit.denoiser.record = _record(edit, store, progress)
        edit.denoiser.processor = WrittenOutAttention if preset.published else TokenFlowAttention
        with watch.stage("edit"):
            edit.run(progress=progress)
        with watch.stage("decode"):
            edited = edit.decode()
        count = sum(rows)
        film = reconstruct(model, trajectory, block_size=config.block_size) if gate and film is None else film
    return Run(frames, count, watch.seconds, watch.highest, edited, math.nan if film is None else psnr(clip.frames, film.frames))


def _record(edit: Edit, store: Store, progress: bool):
    config = edit.config
    return record_source(
        edit.model, edit.trajectory, edit.timesteps, edit.keyframes, edit.interval, config.rule, config.max_joint_keyframes, config.block_size, store, progress
    )


def matrix_rate(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 1.0,  # to spend on it, about
) -> float:
    "Operations a second in products of large square matrices, the best of several."
    side, best = 8192 if device.type == "cuda" else 1024, 0.0
    first, second = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    result, end = first @ second, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(first, second, out=result)
        float(result[0, 0])  # waits for a GPU
        best = max(best, 4 * 2 * side**3 / (time.perf_counter() - start))
    return best


def operations(subject: Subject, preset: Preset, frames: int, **changes) -> float:
    "Operations of a job by the default ways: what a preset asks for, not what it wastes."
    config, model = preset.config(subject.prompt, subject.source_prompt, **changes), subject.model
    size, passes = subject.clip(1).size, joint_passes(frames, config)
    work = count_work(frames, config, visited=len(inversion_grid(model, config.num_inference_steps, config.inversion_steps)[0]))
    rows = min(config.block_size, frames)
    parts, _ = traced(model, size, max(passes, default=1), rows)
    a_row = {part: found.operations / rows for part, found in parts.items()}
    a_row["keyframes"] = parts["keyframes"].operations / 3 / max(passes, default=1)
    up = work.invert + (config.inversion_steps or 0) * frames * preset.published
    return (
        up * a_row["row"] + work.keyframes * a_row["keyframes"] + work.frames * a_row["frames"] / 3
        + frames * (a_row["encode"] + (1 + preset.published) * a_row["decode"])
    )


@dataclass(frozen=True)
class Line:
    "A preset's row: means over the subjects."

    preset: str
    frames: int
    evaluations: float  # a frame
    seconds: dict[str, float]  # a frame, by stage
    memory: float  # bytes above the loaded model, at the peak
    floor: float  # share of the machine's rate that was reached
    quality: dict[str, float]  # reconstruction, warp, judged, gain, background

    total = property(lambda self: sum(self.seconds.values()), doc="Seconds a frame.")


@cache
def _judge() -> ClipJudge:
    return ClipJudge.load("toy")


def bench_preset(
    name: str,
    subjects: Sequence[Subject],
    frames: int,
    rate: float,  # of the machine, see `matrix_rate`
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
    keep: Callable[[Subject, Run], None] = lambda subject, run: None,  # is given each job when it is done
    **changes,  # of the preset's settings
) -> Line:
    "Measures a preset on some subjects."
    preset, runs, quality = find_preset(name), [], []
    for subject in subjects:
        run = run_job(subject, preset, frames, clock, progress, gate=subject.case is not None, **changes)
        quality.append(dict(reconstruction=run.reconstruction) | (judge_edit(_judge(), subject.case, subject.clip(frames), run.edited) if subject.case else {}))
        keep(subject, run)
        runs.append(run)
    seconds = {stage: float(np.mean([run.seconds[stage] for run in runs])) / frames for stage in runs[0].seconds}
    floor = operations(subjects[0], preset, frames, **changes) / rate / (frames * sum(seconds.values()))
    means = {figure: float(np.mean([found[figure] for found in quality])) for figure in quality[0]}
    return Line(name, frames, float(np.mean([run.rows for run in runs])) / frames, seconds, max(run.memory for run in runs), floor, means)


STAGES = ("invert", "film", "record", "edit", "decode")
_QUALITY = {  # name: heading, format
    "reconstruction": ("reconstruction, dB", "{:.1f}"),
    "warp": ("warp error ×10⁻³", "{:.2f}"),
    "judged": ("material", "{:.0%}"),
    "gain": ("nearer to ideal, dB", "{:+.1f}"),
    "background": ("background, dB", "{:.1f}"),
}


def table(lines: Sequence[Line]) -> str:
    "Markdown: a row for each preset."
    stages = [stage for stage in STAGES if any(stage in line.seconds for line in lines)]
    figures = [figure for figure in _QUALITY if any(finite(line.quality.get(figure)) is not None for line in lines)]
    head = ["preset", "frames", "evaluations a frame", *(f"{stage}, s a frame" for stage in stages), "s a frame", "peak memory", "of the floor"]
    rows = [[*head, *(_QUALITY[figure][0] for figure in figures)]]
    rows.append(["---"] * len(rows[0]))
    for line in lines:
        times = [f"{line.seconds[stage]:.3f}" if stage in line.seconds else "–" for stage in stages]
        numbers = [line.preset, str(line.frames), f"{line.evaluations:.1f}", *times, f"{line.total:.3f}", in_bytes(line.memory), f"{line.floor:.0%}"]
        known = [finite(line.quality.get(figure), 6) for figure in figures]
        rows.append([*numbers, *("–" if value is None else _QUALITY[figure][1].format(value) for figure, value in zip(figures, known))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def flat(line: Line) -> dict[str, float | str]:
    "A row for a CSV file."
    return dict(
        preset=line.preset, frames=line.frames, evaluations_a_frame=line.evaluations, seconds_a_frame=line.total, memory=line.memory, floor=line.floor,
        **{f"{stage}_seconds_a_frame": line.seconds.get(stage, 0.0) for stage in STAGES}, **{figure: finite(value, 6) for figure, value in line.quality.items()},
    )


def growth(
    subject: Subject,
    lengths: Sequence[int],
    steps: int = 4,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
) -> list[Run]:
    "The default preset at each length, the shortest first."
    runs = []
    run_job(subject, PRESETS["default"], min(8, *lengths), num_inference_steps=2)
    base = PeakMemory(subject.model.device).before
    for frames in sorted(lengths):
        gc.collect()
        run = run_job(subject, PRESETS["default"], frames, clock, progress, base=base, num_inference_steps=steps)
        runs.append(replace(run, edited=None))
    return runs


def plot_growth(runs: Sequence[Run], path: str | Path, title: str) -> Path:
    "Seconds and peak memory over frames, as a PNG."
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    frames = [run.frames for run in runs]
    for stage in STAGES:
        if any(stage in run.seconds for run in runs):
            left.plot(frames, [run.seconds.get(stage, 0) for run in runs], "o-", label=stage)
    left.set(xlabel="frames", ylabel="seconds", ylim=(0, None), xlim=(0, None))
    left.legend(frameon=False)
    right.plot(frames, [run.memory / 1e6 for run in runs], "o-", color="0.3")
    right.set(xlabel="frames", ylabel="peak memory above the model, MB", ylim=(0, None), xlim=(0, None))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return Path(path)


def growth_table(runs: Sequence[Run]) -> str:
    "Markdown: a row for each length, beside the shortest."
    first = runs[0]
    rows = [["frames", "seconds", "s a frame", "beside the shortest", "peak memory", "beside the shortest"], ["---"] * 6]
    for run in runs:
        each = run.total / run.frames
        rows.append([
            str(run.frames), f"{run.total:.1f}", f"{each:.3f}", f"{each / (first.total / first.frames) - 1:+.0%}",
            in_bytes(run.memory), f"{run.memory / max(1.0, first.memory) - 1:+.0%}",
        ])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def machine(device: torch.device | str) -> str:
    "What it runs on, in a line."
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = (names or [platform.processor() or platform.machine()])[0]
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


LENGTHS = (24, 48, 96, 192, 384)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Bench:
    "What was measured, and on what. Shows itself as Markdown."

    about: dict
    lines: tuple[Line, ...]
    runs: tuple[Run, ...]  # the growth with the length
    failed: tuple[str, ...] = ()  # presets that did not fit, and why

    def __str__(self) -> str:
        about = f"{self.about['machine']}; {self.about['clock']} clock; large matrices {self.about['rate'] / 1e12:.3g}·10¹² operations a second"
        parts = [about, *(f"- {subject}" for subject in self.about["subjects"]), "", table(self.lines) if self.lines else "", *self.failed]
        if self.runs:
            parts += ["", f"Growth of the default preset with the length, {self.about['growth_steps']} steps:", "", growth_table(self.runs)]
        return "\n".join(parts)

    _repr_markdown_ = __str__

    def save(self, out: str | Path) -> list[Path]:
        "Writes bench.md, bench.csv, bench.json and, where lengths were measured, growth.png into a folder; returns their paths."
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.md").write_text(f"{self}\n", encoding="utf-8")
        rows = [flat(line) for line in self.lines]
        with (out / "bench.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        runs = [dict(frames=run.frames, rows=run.rows, seconds=run.seconds, memory=run.memory) for run in self.runs]
        (out / "bench.json").write_text(json.dumps(dict(self.about, presets=rows, growth=runs, failed=self.failed), indent=1) + "\n", encoding="utf-8")
        written = [out / "bench.md", out / "bench.csv", out / "bench.json"]
        return written + ([plot_growth(self.runs, out / "growth.png", self.about["machine"])] if self.runs else [])


def bench(
    size: str = "toy",  # toy, or sd: Stable Diffusion 2.1 with random weights
    presets: Sequence[str] = tuple(PRESETS),
    frames: int | None = None,  # of the table; None: 24 for toy, 40 for sd
    lengths: Sequence[int] = LENGTHS,  # of the growth; none: leave it out
    scenes: int = 1,  # toy: over how many the table takes its means
    steps: int | None = None,  # denoising steps of all presets; None: each preset's own
    growth_steps: int = 4,
    resolution: tuple[int, int] | None = None,  # height and width; None: 128×128 for toy, 512×512 for sd
    clock: str = "wall",  # or cpu: the time that this process computes, on a machine that others use too
    progress: bool = False,
    keep: Callable[[str, Subject, Run], None] = lambda preset, subject, run: None,  # is given each job when it is done
) -> Bench:
    "Measures presets and growth on this machine. Raises `ValueError` for an unknown size, preset or clock."
    if size not in ("toy", "sd") or clock not in CLOCKS:
        raise ValueError(f"size={size!r}, clock={clock!r}: sizes are toy and sd, clocks are {' and '.join(CLOCKS)}")
    for name in presets:
        find_preset(name)
    if any(not isinstance(count, int) or count < 2 for count in (*lengths, frames or 24)):
        raise ValueError(f"frames={frames!r}, lengths={lengths!r}: give whole numbers of frames, at least 2")
    subjects = toy_subjects(scenes, (resolution or (128, 128))[0]) if size == "toy" else sd_subjects(resolution or (512, 512))
    frames, model, changes = frames or (24 if size == "toy" else 40), subjects[0].model, dict(num_inference_steps=steps) if steps else {}
    rate, lines, failed = matrix_rate(model.device, model.dtype), [], []
    run_job(subjects[0], PRESETS["default"], 2, num_inference_steps=2)  # what only the first job takes
    for name in presets:
        try:
            lines.append(bench_preset(name, subjects, frames, rate, CLOCKS[clock], progress, partial(keep, name), **changes))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed.append(f"{name}: out of memory with {frames} frames")
    runs = growth(subjects[0], lengths, growth_steps, CLOCKS[clock], progress) if lengths else []
    about = dict(
        size=size, machine=machine(model.device), dtype=str(model.dtype), clock=clock, rate=rate, frames=frames, steps=steps, growth_steps=growth_steps,
        subjects=[subject.name for subject in subjects], model=model.digest, versions=dict(torch=torch.__version__, python=platform.python_version()),
    )
    return Bench(about, tuple(lines), tuple(runs), tuple(failed))

