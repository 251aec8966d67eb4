"""What is offered to threads, with threads: loading, one model for several edits, panels, a pool of jobs.

Each story is told once; TOKENFLOW_TEST_REPEAT=20 repeats it."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from films import same_film
from kept import run_kept
from tokenflow_nb.attention import Context, TokenFlowAttention
from tokenflow_nb.backbones.base import Prompt
from tokenflow_nb.backbones.load import load_model, shared_model
from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.backbones.unet import self_attentions
from tokenflow_nb.clip import Clip, read_clip, write_clip
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.edit import Edit, edit_video
from tokenflow_nb.features import FeatureError, record
from tokenflow_nb.inversion import invert
from tokenflow_nb.measure.metrics import ClipJudge
from tokenflow_nb.panels.base import Progress, Worker, its_turn
from tokenflow_nb.panels.state import EditState
from tokenflow_nb.scale.jobs import EditJob, edit_many
from tokenflow_nb.store import Store
from tokenflow_nb.support.locks import lock_of
from tokenflow_nb.toy.world import Scene

REPEAT = int(os.environ.get("TOKENFLOW_TEST_REPEAT", 1))
repeated = pytest.mark.parametrize("turn", range(REPEAT))

CLIP = Scene("star", "blue", "grass").render(3, size=64)
OTHER = Scene("circle", "red", "sky").render(3, size=64)
SETTINGS = dict(num_inference_steps=2, size=(64, 64), keyframe_interval=2, progress=False)
PROMPTS = ("a gold star on grass", "a marble star on grass", "a yellow star on grass", "a wooden star on grass")


def at_once(*calls):
    "The results of calls that begin together, each in a thread of its own."
    gate = threading.Barrier(len(calls))

    def begin(call):
        gate.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begin, calls))


def processors(model) -> set[type]:
    return {type(layer.processor) for layer in self_attentions(model.unet).values()}


@pytest.fixture(scope="module")
def films(model, tmp_path_factory):
    "What each prompt gives when nothing else runs."
    store = Store(tmp_path_factory.mktemp("alone"))
    return {prompt: edit_video(CLIP, prompt, model=model, store=store, **SETTINGS).edited.frames for prompt in PROMPTS}


COLD = """
import threading, torch
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.measure.metrics import ClipJudge
gate, loaded, wrong = threading.Barrier(4), [], []
def load(what):
    gate.wait()
    try:
        loaded.append(what())
    except BaseException as error:
        wrong.append(repr(error))
calls = [lambda: load_model("toy", device="cpu")] * 3 + [lambda: ClipJudge.load("toy")]
threads = [threading.Thread(target=load, args=(call,)) for call in calls]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
digests = {each.digest for each in loaded if hasattr(each, "digest")}
print(len(loaded), len(digests), wrong, torch.nn.Linear(2, 2).weight.device, torch.nn.init.normal_(torch.zeros(9)).abs().sum() > 0)
"""


@repeated
def test_four_cold_loads_at_once(turn):
    "Nothing is imported yet: the worst moment, and the usual one in a notebook with two panels."
    told = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, timeout=300)
    assert told.stdout.strip() == "4 1 [] cpu tensor(True)", told.stderr[-2000:]


@repeated
def test_four_warm_loads_at_once_leave_torch_as_it_was(turn):
    models = at_once(*[lambda: load_model("toy", device="cpu")] * 2, *[lambda: ClipJudge.load("toy")] * 2)
    assert models[0].digest == models[1].digest and models[0] is not models[1]
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.equal(models[2].sentences(["a star"]), models[3].sentences(["a star"]))


def test_who_asks_for_a_model_that_is_loaded_gets_that_one():
    models = at_once(*[lambda: shared_model("toy", "cpu")] * 4)
    assert len({id(model) for model in models}) == 1 and shared_model(models[0]) is models[0]


@repeated
def test_edits_and_an_inversion_at_once_with_one_model(model, films, tmp_path, turn):
    "Bit for bit what they are alone; the processors are the model's own afterwards; what is stored is right."
    alone = invert(model, OTHER, "a red circle", 2, store=Store(tmp_path / "alone"), progress=False)
    before, store = processors(model), Store(tmp_path / "together")

    def edit(prompt):
        return lambda: edit_video(CLIP, prompt, model=model, store=store, **SETTINGS).edited.frames

    *edited, trajectory = at_once(
        edit(PROMPTS[0]), edit(PROMPTS[1]), lambda: invert(model, OTHER, "a red circle", 2, store=store, progress=False)
    )
    assert all(np.array_equal(film, films[prompt]) for film, prompt in zip(edited, PROMPTS))
    assert all(torch.equal(trajectory.at(t), alone.at(t)) for t in [None, *alone.timesteps])
    assert processors(model) == before and lock_of(model.unet).changes == []
    again = [edit_video(CLIP, prompt, model=model, store=store, **SETTINGS).edited.frames for prompt in PROMPTS[:2]]
    assert all(np.array_equal(film, films[prompt]) for film, prompt in zip(again, PROMPTS))


@repeated
def test_predictions_words_and_pictures_at_once(model, turn):
    "Everything that a model does, in threads: none sees the others' processors, and the tokenizer is nobody's for long."
    latents, text = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), "a gold star on grass"
    words = model.embed(text)
    right = model.predict(latents, 500, words).noise, words.states, model.decode(latents), model.encode(CLIP.frames), model.digest

    def use():
        return [
            (model.predict(latents, 500, words).noise, model.embed(text).states, model.decode(latents), model.encode(CLIP.frames), model.digest)
            for _ in range(2)
        ]

    def change():
        for _ in range(6):
            with model.installed(Context(("source", "positive"), joint=True)):
                model.predict(latents, 500, words)

    *seen, _ = at_once(use, use, use, change)
    for one in sum(seen, []):
        assert all(torch.equal(a, b) for a, b in zip(one[:2], right)) and np.array_equal(one[2], right[2])
        assert torch.equal(one[3], right[3]) and one[4] == right[4]


@repeated
def test_jobs_in_a_pool_of_threads(films, tmp_path, turn):
    before, options = torch.get_num_threads(), {name: value for name, value in SETTINGS.items() if name != "progress"}
    jobs = [EditJob(CLIP, prompt, out=tmp_path / f"{number}.mp4", model="toy", device="cpu", **options) for number, prompt in enumerate(PROMPTS)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = edit_many(jobs, pool, store=Store(tmp_path / "store"), progress=False).raise_failed()
    assert [outcome.status for outcome in outcomes] == ["done"] * 4 and torch.get_num_threads() == before
    for job in jobs:
        write_clip(tmp_path / "alone.mp4", Clip(films[job.prompt], CLIP.fps))
        assert same_film(job.clip_path, read_clip(tmp_path / "alone.mp4").frames)


@repeated
def test_four_panels_on_one_model(tmp_path, turn):
    clip, settings = CLIP[:2], dict(num_inference_steps=2, keyframe_interval=2)
    states = [EditState(clip, model="toy", prompt=prompt, store=Store(tmp_path), **settings) for prompt in PROMPTS]
    try:
        for state in states:
            state.render()
        assert all(state.worker.wait(300) for state in states)
        assert [state.error for state in states] == [""] * 4
        model = states[0]._loaded
        assert all(state._loaded is model for state in states)
        for state in states:
            alone = edit_video(clip, state.prompt, model=model, store=Store(tmp_path / "alone"), progress=False, **settings)
            assert np.array_equal(state.rendered.edited.frames, alone.edited.frames)
    finally:
        for state in states:
            state.close()


def test_a_panel_says_that_it_waits_and_can_be_stopped_while_it_does(model):
    said, progress, stop, lock = threading.Event(), Progress(), threading.Event(), lock_of(model.unet)
    progress.observe(lambda change: said.set() if "another panel" in change.new else None, "text")
    got = []

    def wait():
        with its_turn(lock, stop, progress.finish) as free:
            got.append(free)

    with lock:
        thread = threading.Thread(target=wait)
        thread.start()
        assert said.wait(30)
        stop.set()
        thread.join(30)
    assert got == [False]
    stop.clear()
    wait()
    assert got == [False, True] and lock.acquire(0)
    lock.release()


def test_nothing_that_foreign_processors_compute_is_stored(model, tmp_path):
    "Inside a block that has exchanged the processors, in the thread that may use the model."
    store = Store(tmp_path)
    trajectory = invert(model, CLIP, "a star", 2, store=store, progress=False)
    kept = [entry.key for entry in store.entries()]
    edit = Edit(model, trajectory, EditConfig("a gold star", num_inference_steps=2, keyframe_interval=2), CLIP)
    with model.installed(Context(("source",))):
        for work in (
            lambda: invert(model, OTHER, "a circle", 2, store=store, progress=False),
            lambda: run_kept(edit, store),
            lambda: record(model, trajectory, store=store, progress=False),
        ):
            with pytest.raises(ModelError, match="attention processors are exchanged; leave the `with` block first"):
                work()
    assert [entry.key for entry in store.entries()] == kept and store.drafts() == {}
    assert TokenFlowAttention not in processors(model)
    invert(model, OTHER, "a circle", 2, store=store, progress=False)  # the remedy


def test_an_error_in_the_middle_gives_the_model_back(model, tmp_path):
    trajectory = invert(model, CLIP, "a star", 2, store=Store(tmp_path), progress=False)
    edit = Edit(model, trajectory, EditConfig("a gold star", num_inference_steps=2, keyframe_interval=2), CLIP)
    before, calls = processors(model), []

    def broken(*_):
        calls.append(processors(model))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit.predict(watch=broken)
    assert calls == [{TokenFlowAttention}] and processors(model) == before
    assert at_once(lambda: model.predict(torch.zeros(1, 4, 16, 16), 500, model.embed("")).noise)[0].isfinite().all()  # nobody holds it
    edit.step()


# A fingerprint of all that computes, as it is now


def fused(model):
    "A LoRA of rank 1, fused as peft does it: through `.data`, which torch's own counter of changes does not see."
    weight = next(iter(self_attentions(model.unet).values())).to_q.weight
    weight.data += 0.05 * torch.outer(torch.linspace(-1, 1, weight.shape[0]), torch.linspace(1, -1, weight.shape[1]))


class Lora(torch.nn.Module):
    "A layer with an adapter, as peft makes it: the strength is a plain attribute."

    def __init__(self, base, strength):
        super().__init__()
        self.base_layer, self.scaling = base, {"style": strength}
        self.down = torch.nn.Parameter(torch.full((1, base.in_features), 0.1), requires_grad=False)

    def forward(self, x):
        return self.base_layer(x) + self.scaling["style"] * torch.nn.functional.linear(x, self.down)


def adapted(model, strength=1.0):
    layer = next(iter(self_attentions(model.unet).values()))
    layer.to_q = Lora(layer.to_q, strength)


def weaker(model):
    adapted(model)
    next(iter(self_attentions(model.unet).values())).to_q.scaling["style"] = 0.2


def learned_word(model):
    "Textual inversion: a new word with a vector of its own."
    model.tokenizer.add_tokens(["<wolf>"])
    model.text_encoder.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)


def other_vae_scale(model):
    model.vae.register_to_config(scaling_factor=model.vae.config.scaling_factor * 1.1)


def other_betas(model):
    model.schedule.scheduler.alphas_cumprod *= 0.999


def halved_output(model):
    model.unet.conv_out.register_forward_hook(lambda module, inputs, output: output * 0.5)


def slicker_processor(model):
    layer = next(iter(self_attentions(model.unet).values()))
    layer.processor.scale = 0.5


CHANGES = {
    "weights in place": lambda model: [p.mul_(0.7) for p in model.unet.parameters()],
    "weights through data": fused,
    "text encoder": lambda model: next(model.text_encoder.parameters()).data.mul_(1.1),
    "vae": lambda model: next(model.vae.decoder.parameters()).data.mul_(1.1),
    "an adapter": adapted,
    "its strength": weaker,
    "a new word": learned_word,
    "another scaling factor": other_vae_scale,
    "the noise levels": other_betas,
    "training": lambda model: model.unet.train(),
    "a hook": halved_output,
    "a processor's setting": slicker_processor,
    "FreeU": lambda model: model.unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "injected layers": lambda model: setattr(model, "injectable", replace(model.injectable, features=())),
}


def test_every_change_of_what_computes_changes_the_fingerprint():
    first, seen = load_model("toy", device="cpu").digest, {}
    for name, change in CHANGES.items():
        changed = load_model("toy", device="cpu")
        assert changed.digest == first  # loaded anew: the same
        change(changed)
        seen[name] = changed.digest
    assert len({first, *seen.values()}) == len(CHANGES) + 1, seen


def test_what_only_decides_how_it_is_run_does_not(model):
    first = model.digest
    model.embed("a gold star on grass")  # leaves the tokenizer with its padding
    model.schedule.timesteps(7)
    model.vae.disable_slicing()
    assert model.digest == first
    model.vae.enable_slicing()
    assert replace(model, name="mine").digest == first
    assert model.unet.to(memory_format=torch.contiguous_format) is model.unet and model.digest == first
    model.unet.to(memory_format=torch.channels_last)


def test_the_fingerprint_is_the_same_in_another_process(model):
    ask = "from tokenflow_nb.backbones.load import load_model; print(load_model('toy', device='cpu').digest)"
    other = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=300)
    assert other.stdout.strip() == model.digest, other.stderr[-2000:]


@pytest.mark.parametrize("change", ["weights in place", "weights through data", "its strength", "a hook"])
def test_a_changed_model_gives_a_new_film_and_the_old_one_when_it_is_changed_back(films, tmp_path, change):
    model, store = load_model("toy", device="cpu"), Store(tmp_path)
    edit = lambda: edit_video(CLIP, PROMPTS[0], model=model, store=store, **SETTINGS)  # noqa: E731
    assert np.array_equal(edit().edited.frames, films[PROMPTS[0]])
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    CHANGES[change](model)
    changed = edit()
    assert changed.resumed_at == 0 and not np.array_equal(changed.edited.frames, films[PROMPTS[0]])
    if change.startswith("weights"):
        model.unet.load_state_dict(before)
        assert np.array_equal(edit().edited.frames, films[PROMPTS[0]])


def test_an_edit_of_an_older_trajectory_is_the_model_of_now(tmp_path):
    "Inverted, then changed, then edited: the film of the changed model is not kept under the other's name."
    model, store = load_model("toy", device="cpu"), Store(tmp_path)
    trajectory = invert(model, CLIP, "", 2, store=store, progress=False)
    config = EditConfig(PROMPTS[0], num_inference_steps=2, keyframe_interval=2)

    def latents():
        edit = Edit(model, trajectory, config, CLIP)
        run_kept(edit, store)
        return edit.latents

    first = latents()
    fused(model)
    second = latents()
    assert not torch.equal(first, second)
    other = Edit(model, trajectory, config, CLIP)
    other.conditioning = replace(other.conditioning, positive=Prompt(other.conditioning.positive.states * 0.5))
    fresh = Edit(model, trajectory, config, CLIP, conditioning=other.conditioning)
    run_kept(fresh, store)
    assert not torch.equal(fresh.latents, second)  # other states for the same words


@pytest.mark.parametrize("stage", ["inversion", "source record", "edit", "features"])
def test_a_model_that_is_changed_at_work_keeps_nothing(tmp_path, monkeypatch, stage):
    model, store = load_model("toy", device="cpu"), Store(tmp_path)
    config = EditConfig(PROMPTS[0], num_inference_steps=2, keyframe_interval=2)
    trajectory = None if stage == "inversion" else invert(model, CLIP, "", 2, store=store, progress=False)
    kept, calls, predict = [entry.key for entry in store.entries()], [], type(model).predict

    def once_changed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            fused(self)
        return predict(self, *args, **kwargs)

    works = {
        "inversion": lambda: invert(model, CLIP, "", 2, store=store, progress=False),
        "source record": lambda: edit_video(CLIP, PROMPTS[0], model=model, store=store, **SETTINGS),
        "edit": lambda: run_kept(Edit(model, trajectory, config, CLIP), store),
        "features": lambda: record(model, trajectory, store=store, progress=False),
    }
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "predict", once_changed)
        with pytest.raises(ModelError, match="was changed while it was at work .* start again"):
            works[stage]()
    assert [entry.key for entry in store.entries()] == kept and store.drafts() == {}
    if stage == "features":  # of the trajectory's model, which is no more
        with pytest.raises(FeatureError, match="invert again"):
            works[stage]()
        trajectory = invert(model, CLIP, "", 2, store=store, progress=False)
    works[stage]()  # the remedy


def test_a_judge_that_is_changed_judges_anew():
    judge = ClipJudge.load("toy")
    before = judge.pictures(CLIP.frames)
    assert torch.equal(judge.pictures(CLIP.frames), before)
    next(judge.model.vision_model.parameters()).data.mul_(1.5)
    assert not torch.equal(judge.pictures(CLIP.frames), before)


@repeated
def test_one_judge_in_four_threads(turn):
    judge = ClipJudge.load("toy")
    clips = [Scene.random(seed).render(2, size=64).frames for seed in range(6)]
    alone = [judge.score(frames, list(PROMPTS)) for frames in clips]
    together = at_once(*[lambda: [ClipJudge.score(judge, frames, list(PROMPTS)) for frames in clips * 3]] * 4)
    assert all(torch.equal(one, other) for scores in together for one, other in zip(scores, alone * 3))


def test_a_worker_of_a_closed_panel_takes_nothing_along(tmp_path):
    "A panel that is closed while it waits for the model ends, and the model is free."
    state = EditState(CLIP, model="toy", prompt=PROMPTS[0], num_inference_steps=2, keyframe_interval=2, store=Store(tmp_path), worker=Worker())
    held = shared_model("toy")
    with held.lock:
        state.render()
        state.close()
        assert state.worker.wait(60)
    assert state.rendered is None and state.error == ""
