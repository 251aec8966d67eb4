"""x"""

import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .attention import Context, installed, self_attentions
from .clip import Clip
from .denoiser import WITHOUT_PROPAGATION, Conditioning, Denoiser
from .inversion import check_size, find_correction, inversion_grid
from .keyframes import frame_attention, intervals, joint_groups
from .model import Blocks, Model, trim_memory
from .propagation import Plan

if TYPE_CHECKING:
    from .edit import EditConfig


@dataclass(frozen=True)
class Work:
    "Rows that the UNet evaluates in an edit, by stage. A row is one frame in one branch."

    invert: int
    record: int  # of the source branch, where it is recorded
    keyframes: int  # keyframe passes, guests of groups included
    frames: int  # frame passes

    @property
    def total(self) -> int:
        return self.invert + self.record + self.keyframes + self.frames


def joint_passes(
    frames: int,  # of the clip
    config: "EditConfig",
) -> list[int]:
    "How many frames each joint pass of a step holds: keyframes and guests; all frames for the rule `joint`, no pass for `per_frame`."
    if config.rule in WITHOUT_PROPAGATION:
        return [frames] if config.rule == "joint" else []
    keyframes = len(intervals(frames, config.keyframe_interval or min(8, frames)))
    return [len(group.everybody) for group in joint_groups(keyframes, config.max_joint_keyframes)]


def count_work(
    frames: int,  # of the clip
    config: "EditConfig",
    guided: bool = True,  # a guidance scale other than 1: then there is a negative branch
    visited: int | None = None,  # timesteps of the inversion; None: as many as the edit's
) -> Work:
    "The `Work` of an edit that finds nothing in the store."
    steps, passes = config.num_inference_steps, joint_passes(frames, config)
    taken, branches = steps - config.editor.first_step(steps), 3 if guided else 2
    recorded = config.source_branch == "recorded" and config.rule not in WITHOUT_PROPAGATION
    return Work(
        invert=frames * (visited or steps) * find_correction(config.correction).evaluations,
        record=steps * (sum(passes) + frames) if recorded else 0,
        keyframes=taken * branches * sum(passes),
        frames=0 if config.rule == "joint" else taken * (branches - recorded) * frames,
    )


def _status(name: str) -> float:
    "A figure of /proc/self/status in bytes; NaN where there is none."
    with suppress(OSError, StopIteration):
        return next(float(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return math.nan


def _forget_peak() -> bool:
    "Whether the system's peak is now what is resident now."
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _look_now_and_then(watch: weakref.ref) -> None:
    "Keeps the highest figure for as long as anybody holds the watch."
    while (held := watch()) is not None:
        held.highest = max(held.highest, _status("VmRSS"))
        del held
        time.sleep(0.005)


class PeakMemory:
    "The most memory that was needed since it was made, above what was there: allocated on a GPU, resident elsewhere."

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        trim_memory()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif not _forget_peak():
            self.highest = _status("VmRSS")
            Thread(target=_look_now_and_then, args=(weakref.ref(self),), daemon=True).start()
        self.before = self._now()

    def _now(self) -> float:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else _status("VmRSS")

    @property
    def bytes(self) -> float:
        "Until now; NaN where the system does not say."
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, getattr(self, "highest", _status("VmHWM")) - self.before)

    @property
    def left(self) -> float:
        "What is still there."
        trim_memory()
        return max(0, self._now() - self.before)


class Cost(NamedTuple):
    "Seconds, and bytes above what was there before."

    seconds: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Probe:
    "What the parts of an edit cost on one device at one size, measured."

    rows: int  # frames of a block
    joint: int  # frames of the keyframe pass
    branches: int
    invert: Cost  # of a row in the inversion
    keyframes: Cost  # of the keyframe pass
    frames: Cost  # of a frame in the frame pass, all branches
    encode: Cost  # of a frame
    decode: Cost  # of a frame
    record: float  # seconds of a frame in the frame pass, the source branch alone; NaN: not asked for
    pair: float  # seconds for the attention of one frame to one other, all layers
    kept: int  # bytes that a keyframe leaves for the frame pass, without its outputs
    output: int  # bytes that a keyframe's outputs take in each branch
    recorded: int  # bytes of a frame and step in a record of the source branch
    warm_up: float = 0.0  # bytes that the first evaluation of a process takes for good

    def keyframe_pass(self, joint: int, branches: int) -> Cost:
        "Of another number of frames or branches."
        factor = joint * branches / max(1, self.joint * self.branches)
        more = (branches - 1) * joint * (joint - self.joint) * self.pair
        return Cost(max(0.0, factor * self.keyframes.seconds + more), factor * self.keyframes.bytes)


@dataclass(frozen=True)
class _Noise:
    "A trajectory of noise."

    latents: torch.Tensor  # (f, c, h, w)

    def at(self, timestep: int | None, frames: list[int] | None = None) -> torch.Tensor:
        return self.latents if frames is None else self.latents[frames]


def _walked(values: Iterator, count: int, device: torch.device, clock: Callable[[], float]) -> list[Cost]:
    "What each of the next values costs; fewer when there are fewer."
    costs = []
    for _ in range(count):
        memory, start = PeakMemory(device), clock()
        if next(values, None) is None:
            break
        costs.append(Cost(clock() - start, memory.bytes))
    return costs


def _best(first: list[Cost], second: list[Cost]) -> list[Cost]:
    "The shorter time and the larger memory of the same work, done twice."
    return [Cost(min(one.seconds, other.seconds), max(one.bytes, other.bytes)) for one, other in zip(first, second)]


def _sizes(
    model: Model,
    latents: torch.Tensor,  # (1, c, h, w)
    embeds: torch.Tensor,
) -> tuple[list[tuple[int, int]], int]:
    "Tokens and channels of each self-attention, and the bytes of a frame's features that an editor may inject."
    tokens, features, modules = [], [], dict(model.unet.named_modules())
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, named: tokens.append((args or (named["hidden_states"],))[0].shape[1:]), with_kwargs=True)
        for layer in self_attentions(model.unet).values()
    ]
    hooks += [modules[name].register_forward_hook(lambda _, args, output: features.append(output[0].nbytes)) for name in model.backbone.features]
    try:
        model.predict(latents, 1, embeds)
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(shape) for shape in tokens], sum(features)


def _pair(model: Model, sizes: list[tuple[int, int]], clock: Callable[[], float]) -> float:
    "Seconds for the attention of one frame to one other, all layers together."
    seconds = {}
    for tokens, channels in set(sizes):
        heads = next(layer.heads for layer in self_attentions(model.unet).values() if layer.to_q.in_features == channels)
        x = torch.randn(1, tokens, channels).to(model.device, model.dtype)
        work = (float(frame_attention(x, x, x, heads).sum()) for _ in range(3))  # a number on the CPU: then a GPU is done
        seconds[tokens, channels] = min(cost.seconds for cost in _walked(work, 3, model.device, clock))
    return sum(seconds[size] for size in sizes)


def _cost(
    work: Callable[[], object],
    count: int,  # frames in it
    device: torch.device,
    clock: Callable[[], float],
) -> Cost:
    "What a frame of some work costs, done twice."
    costs = _walked((work() for _ in range(2)), 2, device, clock)
    return Cost(min(cost.seconds for cost in costs) / count, max(cost.bytes for cost in costs) / count)


def _passes(denoiser: Denoiser, twice: bool, clock: Callable[[], float]) -> tuple[Cost, Cost]:
    "What a keyframe pass of a denoiser of noise costs, and what a block of its frame pass."
    steps, model, latents = 50, denoiser.model, denoiser.trajectory.at(None)
    injection = denoiser.editor.injection(model.backbone, denoiser.editor.first_step(steps), steps)
    place = model.schedule.timesteps(steps)[0], injection, torch.arange(0, len(latents), denoiser.interval)

    def walk() -> list[Cost]:
        with closing(denoiser.by_blocks(latents, *place)) as blocks:
            return _walked(blocks, 2, model.device, clock)

    costs = _best(walk(), walk()) if twice else walk()
    if denoiser.rule in WITHOUT_PROPAGATION:  # there is only one of the passes
        return (costs[0], Cost()) if denoiser.rule == "joint" else (Cost(), costs[-1])
    return Cost(max(0.0, costs[0].seconds - costs[1].seconds), costs[0].bytes), costs[1]


PROBE_SECONDS = 4.0  # that the passes of a probe may take


def _probe_size(joint: int, rows: int, branches: int, seconds: float) -> tuple[int, int, bool]:
    "Keyframes and frames at a time when a row takes so many seconds, and whether there is time for all of it twice."
    def taken() -> float:
        return branches * (joint + 2 * rows) * seconds

    while taken() > PROBE_SECONDS and (joint > 2 or rows > 1):
        joint, rows = (max(2, joint // 2), rows) if joint > max(2, rows) or rows == 1 else (joint, rows // 2)
    return joint, rows, 2 * taken() <= PROBE_SECONDS


def _noise_job(model: Model, config: "EditConfig", words: Conditioning, joint: int, rows: int, shape: tuple[int, ...], **changes) -> Denoiser:
    "The denoiser of an edit of noise, with so many keyframes and two blocks of frames at least."
    interval = max(config.keyframe_interval or 8, -(-2 * rows // max(1, joint)))
    count = {"joint": joint, "per_frame": 2 * rows}.get(config.rule, joint * interval)
    noise = _Noise(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))
    return Denoiser(model, noise, words, config.editor, _guidance(config, model), config.rule, interval, Blocks(rows), **changes)


def _guidance(config: "EditConfig", model: Model) -> float:
    return model.guidance_scale if config.guidance_scale is None else config.guidance_scale


def probe(
    model: Model,
    size: tuple[int, int],  # height and width of the frames, in pixels
    config: "EditConfig",
    frames: int,  # of the clip
    clock: Callable[[], float] = time.perf_counter,
) -> Probe:
    "Measures what the parts of such an edit cost on the model's device."
    words, pictures, first = Conditioning.of(model, config), np.zeros((min(config.block_size, frames), *size, 3), np.uint8), PeakMemory(model.device)
    latents = model.encode(pictures[:1])
    model.decode(latents)
    tokens, features = _sizes(model, latents, words.source)
    warm_up, how = first.left, (model.device, clock)
    row = _cost(lambda: model.predict(latents, 1, words.source), 1, *how)
    joint, rows, twice = _probe_size(max(joint_passes(frames, config), default=0), len(pictures), 3, row.seconds)
    block, pictures = latents.expand(rows, -1, -1, -1), pictures[:rows]
    denoiser = _noise_job(model, config, words, joint, rows, latents.shape[1:])
    keyframes, passed = _passes(denoiser, twice, clock)
    recorded = math.nan
    if config.source_branch == "recorded" and config.rule not in WITHOUT_PROPAGATION:
        recorded = _passes(_noise_job(model, config, words, joint, rows, latents.shape[1:], branches=("source",)), twice, clock)[1].seconds / rows
    numbers = sum(count * channels for count, channels in tokens)
    return Probe(
        rows=rows, joint=joint, branches=len(denoiser.branches), keyframes=keyframes, frames=Cost(passed.seconds / rows, passed.bytes / rows),
        invert=_cost(lambda: model.predict(block, 1, words.source), rows, *how), record=recorded, pair=_pair(model, tokens, clock),
        encode=_cost(lambda: model.encode(pictures), rows, *how), decode=_cost(lambda: model.decode(block), rows, *how),
        kept=4 * numbers, output=model.dtype.itemsize * numbers, warm_up=warm_up,
        recorded=sum(4 * count for count, _ in tokens) + features,
    )


_PROBES: dict[tuple, Probe] = {}


def _key(model: Model, size: tuple[int, int], config: "EditConfig", frames: int) -> tuple:
    "Model, device, precision, size, rule; then what else a probe depends on."
    passes = joint_passes(frames, config)
    here = (model.digest, str(model.device), str(model.dtype), tuple(size), config.rule)
    return (*here, config.source_branch, _guidance(config, model) != 1, min(config.block_size, frames), max(passes, default=0))


def known_probe(model: Model, size: tuple[int, int], config: "EditConfig", frames: int) -> Probe | None:
    "What is known of such edits in this process, of one with other settings if need be; None: nothing."
    if not _PROBES:
        return None
    key = _key(model, size, config, frames)
    others = [found for other, found in _PROBES.items() if other[:6] == key[:6]]
    return _PROBES.get(key) or (others[-1] if others else None)


def _asked(model: Model, size: tuple[int, int], config: "EditConfig", frames: int) -> Probe:
    "The probe for such an edit, made now if it was not made before."
    key = _key(model, size, config, frames)
    if key not in _PROBES or math.isnan(_PROBES[key].invert.bytes):
        found = probe(model, size, config, frames)
        _PROBES[key] = replace(found, warm_up=0.0)
        return found
    return _PROBES[key]


def learn(
    model: Model,
    size: tuple[int, int],
    config: "EditConfig",
    frames: int,  # of the clip
    timings: dict[str, float],  # of the edit, which went from its first step to its last
) -> None:
    "Keeps what an edit took for forecasts without a probe, unless there was a probe."
    key, work = _key(model, size, config, frames), count_work(frames, config, _guidance(config, model) != 1)
    branches, joint = 3 if _guidance(config, model) != 1 else 2, max(joint_passes(frames, config), default=0)
    row = timings["edit"] / (work.keyframes + work.frames)
    up = timings["invert"] / work.invert if "invert" in timings else row
    each = dict(invert=up, keyframes=joint * branches * row, frames=branches * row, encode=0.0, decode=timings["decode"] / frames)
    costs = {part: Cost(seconds, math.nan) for part, seconds in each.items()}
    found = Probe(min(config.block_size, frames), joint, branches, **costs, record=row, pair=0.0, kept=0, output=0, recorded=0)
    _PROBES.setdefault(key, found)


class _Alive(TorchDispatchMode):
    "Adds up the bytes of the tensors that are alive, without those that were there before."

    def __init__(self, before: Iterator[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata: None for tensor in before}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                size, place = storage.nbytes(), storage._cdata
                self.now, self.peak = self.now + size, max(self.peak, self.now + size)
                self.seen[place] = weakref.ref(storage, lambda _, place=place, size=size: self._gone(place, size))
        return result

    def _gone(self, place: int, size: int) -> None:
        self.now -= size
        self.seen.pop(place, None)


class Traced(NamedTuple):
    "What a piece of work computes, and holds at its peak."

    operations: float  # a multiplication and an addition are two
    bytes: float


def _trace(work: Callable[[], object], *parts: torch.nn.Module) -> Traced:
    "Of some work with fake tensors, the parameters of these parts apart."
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention = {on_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with torch.no_grad(), counter, _Alive(parameter for part in parts for parameter in part.parameters()) as alive:
        work()
    return Traced(float(counter.get_total_flops()), float(alive.peak))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def traced(
    model: Model,  # may be on the meta device
    size: tuple[int, int],  # height and width of the frames, in pixels
    joint: int = 8,  # frames of the keyframe pass
    rows: int = 8,  # frames of a block
) -> tuple[dict[str, Traced], list[tuple[int, int]]]:
    "By part (encode, decode and row: a block; keyframes and frames: the whole pass of three branches), and tokens and channels of each self-attention."
    shape, tokens = [model.vae.config.latent_channels, *(side // model.vae_scale for side in size)], []
    with _default_dtype(model.dtype), FakeTensorMode():
        unet, vae = (type(part).from_config(part.config) for part in (model.unet, model.vae))
        words, latents = torch.empty(1, 77, unet.config.cross_attention_dim), torch.empty(rows, *shape)
        call = lambda count: unet(torch.empty(count, *shape), 1, words.expand(count, -1, -1))  # noqa: E731
        found = dict(encode=_trace(lambda: vae.encode(torch.empty(rows, 3, *size)), vae), decode=_trace(lambda: vae.decode(latents), vae))
        found["row"] = _trace(lambda: call(rows), unet)
        with installed(unet, Context(("source", "negative", "positive"), joint=True)) as context:
            found["keyframes"] = _trace(lambda: call(3 * joint), unet)
            context.keep(slice(0, joint), 0)
            tokens = [tuple(kept.keys.shape[1:]) for kept in context.keyframes.values()]
            context.joint, context.branches = False, ("negative", "positive")
            context.plan = Plan(*torch.zeros(2, rows, dtype=torch.int64), torch.ones(rows))
            context.source = {layer: (torch.zeros(rows, count, dtype=torch.int64),) * 2 for layer, (count, _) in zip(context.keyframes, tokens)}
            two = _trace(lambda: call(2 * rows), unet)
    search = sum(4 * count**2 * channels for count, channels in tokens) * rows
    found["frames"] = Traced(1.5 * two.operations + search, 1.5 * two.bytes)
    return found, tokens


def assumed_probe(
    model: Model,  # may be on the meta device
    size: tuple[int, int],
    config: "EditConfig",
    frames: int,  # of the clip
    rate: float,  # operations a second that the device reaches in such work
) -> Probe:
    "What a probe would find on a device of this rate, from the model's configuration."
    joint, rows = max(joint_passes(frames, config), default=1), min(config.block_size, frames)
    parts, tokens = traced(model, size, joint, rows)
    numbers, pair = sum(count * channels for count, channels in tokens), sum(4 * count**2 * channels for count, channels in tokens)
    each = {part: Cost(found.operations / rate / rows, found.bytes / rows) for part, found in parts.items()}
    features = model.dtype.itemsize * numbers // len(tokens)  # about: the features that are injected are one layer's
    return Probe(
        rows=rows, joint=joint, branches=3, invert=each["row"], keyframes=Cost(parts["keyframes"].operations / rate, parts["keyframes"].bytes),
        frames=each["frames"], encode=each["encode"], decode=each["decode"], record=(each["frames"].seconds + 2 * pair / rate) / 3,
        pair=pair / rate, kept=4 * numbers, output=model.dtype.itemsize * numbers, recorded=sum(4 * count for count, _ in tokens) + features,
    )


def in_bytes(count: float) -> str:
    "An amount of memory or disk as people say it; – for NaN."
    if math.isnan(count):
        return "–"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def in_time(seconds: float) -> str:
    "A duration as people say it; – for NaN."
    if math.isnan(seconds):
        return "–"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def finite(count: float | None, digits: int | None = None) -> float | None:
    "Rounded; None for NaN, which JSON does not know."
    return None if count is None or math.isnan(count) else round(count, digits)


@dataclass(frozen=True)
class Stage:
    "What a stage of an edit needs."

    name: str  # as in an edit's timings
    part: str
    evaluations: int  # rows of the UNet
    seconds: float
    memory: float  # bytes above the loaded model, at its peak
    disk: float  # bytes
    reason: str


@dataclass(frozen=True)
class Forecast:
    "What an edit will need, with the reasons. Shows itself as a table."

    frames: int  # of the clip
    device: str
    stages: tuple[Stage, ...]
    warnings: tuple[str, ...] = ()  # sentences: it does not fit, and what would
    advice: tuple[str, ...] = ()  # sentences: what may be worth it
    block_size: int | None = None  # the largest that fits, up to the one asked for; None: not one frame does

    evaluations = property(lambda self: sum(stage.evaluations for stage in self.stages), doc="Rows of the UNet.")
    seconds = property(lambda self: sum(stage.seconds for stage in self.stages), doc="In all; NaN: not measured yet.")
    memory = property(lambda self: max(stage.memory for stage in self.stages), doc="Bytes above the loaded model, at the peak.")
    disk = property(lambda self: sum(stage.disk for stage in self.stages), doc="Bytes, in the store and in temporary files.")

    @property
    def by_stage(self) -> dict[str, float]:
        "Seconds by the names that an edit's timings have."
        found: dict[str, float] = {}
        for stage in self.stages:
            found[stage.name] = found.get(stage.name, 0.0) + stage.seconds
        return found

    @property
    def line(self) -> str:
        "All of it in a line."
        count = f"{self.evaluations / self.frames:.0f} evaluations a frame, {self.evaluations:,} in all"
        if math.isnan(self.seconds):
            return f"{count} · {in_bytes(self.disk)} of disk"
        memory = "" if math.isnan(self.memory) else f" · {in_bytes(self.memory)} above the model"
        return f"{count} · about {in_time(self.seconds)} on {self.device}{memory} · {in_bytes(self.disk)} of disk"

    def rows(self) -> list[tuple[str, ...]]:
        "The table as text, headings first."
        head = ("stage", "evaluations", "time", "memory", "disk", "because")
        body = [(s.part, f"{s.evaluations:,}", in_time(s.seconds), in_bytes(s.memory), in_bytes(s.disk), s.reason) for s in self.stages]
        whole = ("in all", f"{self.evaluations:,}", in_time(self.seconds), in_bytes(self.memory), in_bytes(self.disk), f"{self.frames} frames on {self.device}")
        return [head, *body, whole]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), row[-1]]) for row in rows]
        return "\n".join([*lines, *self.warnings, *self.advice])

    def _repr_html_(self) -> str:
        head, *body = [[escape(cell) for cell in row] for row in self.rows()]
        lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>", *(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in body)]
        return f"<table>{''.join(lines)}</table>" + "".join(f"<p>{escape(sentence)}</p>" for sentence in (*self.warnings, *self.advice))

    def record(self) -> dict:
        "What `run.json` keeps of it."
        seconds = {stage: finite(count, 3) for stage, count in self.by_stage.items()}
        return dict(evaluations=self.evaluations, seconds=seconds, memory=finite(self.memory), disk=finite(self.disk), warnings=list(self.warnings))


@dataclass(frozen=True)
class _Job:
    "An edit that is planned."

    frames: int
    size: tuple[int, int]
    config: "EditConfig"
    guided: bool
    visited: int  # timesteps of the inversion
    kept: int  # of them, in the trajectory
    latents: int  # bytes of a frame's latents
    probe: Probe | None

    @property
    def branches(self) -> int:
        return 3 if self.guided else 2

    @property
    def passes(self) -> list[int]:
        return joint_passes(self.frames, self.config)

    @property
    def recorded(self) -> bool:
        return self.config.source_branch == "recorded" and self.config.rule not in WITHOUT_PROPAGATION

    @property
    def pictures(self) -> int:
        return math.prod((self.frames, *self.size, 3))

    def work(self) -> Work:
        return count_work(self.frames, self.config, self.guided, self.visited)


def _seconds(job: _Job) -> dict[str, float]:
    "By part; NaN without a probe."
    parts, probe, config = ("invert", "record", "keyframes", "frames", "decode"), job.probe, job.config
    if probe is None:
        return dict.fromkeys(parts, math.nan)
    steps = config.num_inference_steps
    taken = steps - config.editor.first_step(steps)
    passes = [sum(probe.keyframe_pass(joint, branches).seconds for joint in job.passes) for branches in (1, job.branches)]
    frame = probe.frames.seconds * job.branches / probe.branches
    alone = frame / job.branches if math.isnan(probe.record) else probe.record
    in_frames = 0 if config.rule == "joint" else job.frames
    return dict(
        invert=job.frames * probe.encode.seconds + job.work().invert * probe.invert.seconds,
        record=job.recorded * steps * (passes[0] + job.frames * alone),
        keyframes=taken * passes[1],
        frames=taken * in_frames * (frame - job.recorded * alone),
        decode=job.frames * probe.decode.seconds,
    )


_FRAMES_IN_MEMORY = 4 << 20  # bytes: more frames lie in a file


def _memory(job: _Job, rows: int) -> dict[str, float]:
    "Peak bytes by part, with so many frames at a time; NaN without a probe."
    probe, rows = job.probe, min(rows, job.frames)
    if probe is None:
        return dict.fromkeys(("invert", "record", "keyframes", "frames", "decode"), math.nan)
    joint, clip = max(job.passes, default=0), 3 * job.frames * job.latents
    kept = joint * (probe.kept + job.branches * probe.output)
    earlier = kept if len(job.passes) > 1 else 0
    block = rows * probe.frames.bytes * job.branches / probe.branches
    path = 2 * rows * (job.kept + 1) * job.latents
    parts = dict(
        invert=rows * max(probe.encode.bytes, probe.invert.bytes) + path,
        record=(earlier + kept + block / job.branches + rows * probe.recorded) if job.recorded else 0.0,
        keyframes=clip + earlier + probe.keyframe_pass(joint, job.branches).bytes,
        frames=clip + kept + block if job.config.rule != "joint" else 0.0,
        decode=job.frames * job.latents + rows * probe.decode.bytes + min(job.pictures, _FRAMES_IN_MEMORY),
    )
    return {part: need + probe.warm_up if need else 0.0 for part, need in parts.items()}


def _disk(job: _Job, recorded: int = 0) -> dict[str, float]:
    "Bytes by part; `recorded` bytes of a frame and step in a record."
    files = job.pictures if job.pictures > _FRAMES_IN_MEMORY else 0
    return dict(
        invert=job.frames * (job.kept + 1) * job.latents + files,
        record=job.frames * job.config.num_inference_steps * recorded if job.recorded else 0,
        keyframes=0,
        frames=2 * job.frames * job.latents,  # the checkpoint before goes when the next one is there
        decode=files,
    )


def _reasons(job: _Job) -> dict[str, str]:
    "By part, in words."
    config, work, passes = job.config, job.work(), job.passes
    steps = config.num_inference_steps
    taken, times = steps - config.editor.first_step(steps), find_correction(config.correction).evaluations
    groups = f" in {len(passes)} groups with guests" if len(passes) > 1 else ""
    tokens = f", and the tokens of {max(passes)} keyframes" if passes and config.rule not in WITHOUT_PROPAGATION else ""
    branches = job.branches - job.recorded
    return dict(
        invert=f"{job.frames} frames × {job.visited} steps × {times} evaluation{'s' * (times > 1)}; {job.kept + 1} latents a frame are kept",
        record=f"({job.frames} frames + {sum(passes)} keyframes) × {steps} steps, the source branch alone; not again for another prompt" if job.recorded else "",
        keyframes=f"{sum(passes)} keyframes{groups} × {taken} steps × {job.branches} branches; {max(passes, default=0)} at once" if work.keyframes else "",
        frames=f"{job.frames} frames × {taken} steps × {branches} branches; {min(config.block_size, job.frames)} at a time{tokens}" if work.frames else "",
        decode=f"{job.frames} frames",
    )


def free_memory(device: torch.device | str) -> float:
    "Bytes that are free on a device; NaN where the system does not say. In a container no more than it may have."
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, StopIteration):
        free = next(float(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        with suppress(OSError, ValueError):
            groups = Path("/sys/fs/cgroup")
            free = min(free, float((groups / "memory.max").read_text()) - float((groups / "memory.current").read_text()))
        return free
    return math.nan


def fitting_block(job: _Job, memory: float) -> int | None:
    "The largest block that fits into nine tenths of so many bytes: the one asked for, or a half, a quarter, ... of it; None when one frame does not."
    rows = job.config.block_size
    while rows and max(_memory(job, rows).values()) > 0.9 * memory:
        rows //= 2
    return rows or None


def _warnings(job: _Job, memory: float, fits: int | None) -> tuple[str, ...]:
    "That the edit does not fit into so many bytes, and what to change."
    if fits == job.config.block_size:
        return ()
    need = f"It needs {in_bytes(max(_memory(job, job.config.block_size).values()))} where {in_bytes(memory)} are free"
    if fits:
        return (f"{need}: block_size={fits} fits.",)
    return (f"{need}, and no block_size makes it fit: try {'max_joint_keyframes=4' if max(job.passes, default=0) > 4 else 'a smaller size'}.",)


def _advice(job: _Job) -> tuple[str, ...]:
    "Whether to record the source branch."
    if job.recorded or not job.probe.recorded or job.config.rule in WITHOUT_PROPAGATION:
        return ()
    rows = job.config.num_inference_steps * job.frames
    return (
        f"For several prompts on this clip, source_branch='recorded' saves {rows:,} evaluations and all searches in each but the first; "
        f"it takes {in_bytes(rows * job.probe.recorded)} of disk.",
    )


def forecast(
    frames: int,  # of the clip
    size: tuple[int, int],  # height and width that are edited
    config: "EditConfig",
    model: Model,
    found: Probe | None,  # None: evaluations and disk alone
    memory: float | None = None,  # bytes that it may need; None: what is free on the device
) -> Forecast:
    "The `Forecast` of an edit from what a probe found."
    visited, kept = inversion_grid(model, config.num_inference_steps, config.inversion_steps)
    latents = 4 * model.vae.config.latent_channels * math.prod(side // model.vae_scale for side in size)
    job = _Job(frames, size, config, _guidance(config, model) != 1, len(visited), len(kept), latents, found)
    memory = free_memory(model.device) if memory is None else memory
    fits = fitting_block(job, memory) if found and memory == memory else config.block_size
    seconds, needs, disk, reasons, work = _seconds(job), _memory(job, config.block_size), _disk(job, found.recorded if found else 0), _reasons(job), job.work()
    names = dict(invert="invert", record="record", keyframes="edit", frames="edit", decode="decode")
    titles = dict(invert="inversion", record="record source", keyframes="keyframe passes", frames="frame passes", decode="decoding")
    stages = tuple(
        Stage(names[part], titles[part], getattr(work, part, 0), seconds[part], needs[part], disk[part], reasons[part]) for part in names if reasons[part]
    )
    said = (_warnings(job, memory, fits), _advice(job)) if found else ((), ())
    return Forecast(frames, str(model.device), stages, *said, fits)


def plan(
    clip: Clip,  # at the size that is edited
    config: "EditConfig",
    model: Model,
    memory: float | None = None,  # bytes that it may need above the loaded model; None: what is free on the device
    measure: bool = True,  # ask the device, for about two seconds; else only what is known of it in this process
) -> Forecast:
    "The `Forecast` of an edit that finds nothing in the store. Raises `ValueError` for a clip or settings that do not fit the model."
    check_size(model, clip)
    if config.keyframe_interval is not None:
        intervals(len(clip), config.keyframe_interval)
    found = (_asked if measure else known_probe)(model, clip.size, config, len(clip))
    return forecast(len(clip), clip.size, config, model, found, memory)

