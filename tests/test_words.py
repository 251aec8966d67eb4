"Weights of words, prompts over time, and prompts that were embedded elsewhere."

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kept import run_kept
from pipelines import add_textual_inversion, toy_pipe, xl_pipe

from tokenflow_nb.backbones.base import Model
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.cli.command import main
from tokenflow_nb.clip import Clip, write_clip
from tokenflow_nb.compare.methods import compare
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.edit import Edit, edit_key, edit_video, kept_steps
from tokenflow_nb.inversion import invert
from tokenflow_nb.keyframes import groups_by_stretch, intervals, joint_groups, keyframe_table
from tokenflow_nb.measure.evaluate import evaluate
from tokenflow_nb.measure.metrics import Case, ClipJudge, Evidence
from tokenflow_nb.panels.base import Worker
from tokenflow_nb.panels.denoise import DenoisePanel
from tokenflow_nb.panels.state import EditState
from tokenflow_nb.propagation import RULES, make_plan
from tokenflow_nb.scale.shard import edit_sharded
from tokenflow_nb.store import Store
from tokenflow_nb.support.words import described, parse, unmarked
from tokenflow_nb.toy.world import Scene

SCENE = Scene.random(5)
CLIP = SCENE.render(frames=6, size=64)
FEW = dict(num_inference_steps=2, keyframe_interval=2, progress=False, size=(64, 64), source_prompt=SCENE.caption)
OVER_TIME = {0: "a red star", 3: "a gold star"}


@pytest.fixture
def edit(model, store):
    return lambda prompt=None, **changes: edit_video(CLIP, prompt, **dict(model=model, store=store) | FEW | changes)


@pytest.fixture
def untouched(monkeypatch):
    "Any question to the network fails the test."
    monkeypatch.setattr(Model, "predict", lambda *_, **__: pytest.fail("the network was asked"))


# ---- weights


@pytest.mark.parametrize(
    "prompt, pieces",
    [
        ("a (gold:1.3) star", [("a ", 1), ("gold", 1.3), (" star", 1)]),
        ("a (gold) star", [("a ", 1), ("gold", 1.1), (" star", 1)]),
        ("((gold))", [("gold", 1.21)]),
        ("[gold]", [("gold", 0.909091)]),
        ("[(gold)]", [("gold", 1)]),
        ("(a (gold:1.2) star:0.5)", [("a ", 0.5), ("gold", 0.6), (" star", 0.5)]),
        (r"a \(gold\) \[star\] \\ here", [(r"a (gold) [star] \ here", 1)]),
        ("(gold: .5 )", [("gold", 0.5)]),
        ("(gold:0)", [("gold", 0)]),
        ("(a clock: red)", [("a clock: red", 1.1)]),
        ("(gold:abc)", [("gold:abc", 1.1)]),
        ("(4:3)", [("4", 3)]),
        ("a gold star: 2 eyes", [("a gold star: 2 eyes", 1)]),
        ("(a:1)(b:1)", [("ab", 1)]),
        ("a man (smiling)", [("a man ", 1), ("smiling", 1.1)]),
        ("", []),
    ],
    ids=str,
)
def test_marks_are_read_as_other_programs_write_them(prompt, pieces):
    assert parse(prompt) == pieces
    assert unmarked(prompt) == "".join(words for words, _ in pieces)


@pytest.mark.parametrize(
    "wrong, said, right",
    [
        ("a (gold:1.3.2) star", "is no weight from 0 to 3", "a (gold:1.3) star"),
        ("a (gold:) star", "is no weight from 0 to 3", r"a \(gold:\) star"),
        ("a (gold:-1) star", "is no weight from 0 to 3", "a (gold:0) star"),
        ("a (gold:3.1) star", "is no weight from 0 to 3", "a (gold:3) star"),
        ("a (gold:nan) star", "is no weight from 0 to 3", r"a \(gold:nan\) star"),
        ("a (gold:inf) star", "is no weight from 0 to 3", "a (gold:3) star"),
        ("a clock (at 10:30)", "is no weight from 0 to 3", r"a clock \(at 10:30\)"),
        ("a [gold:0.5] star", "write (word:0.8) for a weight", "a (gold:0.8) star"),
        ("a (gold star", "( is not closed", r"a \(gold star"),
        ("a gold) star", ") closes no bracket", r"a gold\) star"),
        ("a (gold] star", "] closes no bracket", "a (gold) star"),
        ("a () star", "brackets without words", r"a \(\) star"),
        ("a ((gold:2):2) star", "weigh 4: the most is 3", "a (gold:2) star"),
    ],
)
def test_marks_that_cannot_be_read_are_refused_in_one_line(edit, untouched, wrong, said, right):
    for name in ("prompt", "source_prompt", "negative_prompt"):
        with pytest.raises(ValueError) as caught:
            edit(**dict(prompt="a star") | {name: wrong})
        message = str(caught.value)
        assert message.startswith(f"{name}=") and said in message and "\n" not in message
        assert getattr(EditConfig(**dict(prompt="a star") | {name: right}), name) == right


@given(st.text(alphabet="ab ()[]:.15\\", max_size=12))
def test_any_text_is_read_or_refused(prompt):
    "Never another error; and escaped, every text is itself."
    try:
        assert all(words and 0 <= weight <= 3 for words, weight in parse(prompt))
    except ValueError as error:
        assert str(error).startswith("prompt=") and "\n" not in str(error)
    escaped = "".join(f"\\{sign}" if sign in "()[]\\" else sign for sign in prompt)
    assert parse(escaped) == ([(prompt, 1.0)] if prompt else [])


@pytest.mark.parametrize("make", [lambda: load_model("toy", device="cpu"), lambda: load_model(toy_pipe()), lambda: load_model(xl_pipe())], ids=["toy", "sd", "xl"])
def test_weights_move_the_states_of_their_words_alone(make):
    model = make()
    plain, empty, one = (model.embed(text) for text in ("a gold star", "", "a (gold:1) star"))
    assert torch.equal(one.states, plain.states)
    double, none = model.embed("a (gold:2) star").states, model.embed("a (gold:0) star").states
    assert torch.equal(none[:, 2], empty.states[:, 2])
    assert torch.allclose(double[:, 2] - plain.states[:, 2], plain.states[:, 2] - empty.states[:, 2], atol=1e-5)
    others = [token for token in range(plain.states.shape[1]) if token != 2]
    assert torch.equal(double[:, others], plain.states[:, others])
    if plain.pooled is not None:
        assert plain.states.shape[-1] == 64  # of both encoders
        assert torch.equal(model.embed("a (gold:2) star").pooled, plain.pooled)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.embed(" ".join(["a (gold:1.3) star"] * 9))
    said = [str(each.message) for each in caught if "longer than" in str(each.message)]
    assert len(said) == 1 and "(" not in said[0].partition("left out")[2]
    assert model.unread("a (gold:1.3) star on (grass:1.2) " + "in the sky") == ""


def test_a_textual_inversion_of_several_vectors_has_one_weight():
    model = load_model(add_textual_inversion(toy_pipe()))
    plain, heavy = (model.embed(text).states for text in ("a <mine> star", "a (<mine>:2) star"))
    assert (plain != heavy).any(-1)[0].nonzero()[:, 0].tolist() == [2, 3]


def test_weight_one_is_the_same_film_to_the_bit(edit):
    plain = edit("a gold star on grass")
    assert np.array_equal(edit("a (gold:1) [(star)] on grass").frames, plain.frames)
    assert not np.array_equal(edit("a (gold:2) star on grass").frames, plain.frames)


def test_judges_see_the_words_without_marks():
    marked, plain = (Case("one", CLIP, text, source) for text, source in (("a (gold:1.4) star", "[a] star"), ("a gold star", "a star")))
    assert Evidence(marked, CLIP).prompt == "a gold star" and Evidence(marked, CLIP).source_prompt == "a star"
    judge, names = ClipJudge.load("toy"), ["clip_score", "directional_similarity"]
    one, other = (evaluate(CLIP.frames[::-1].copy(), case, metrics=names, judge=judge).rows[0].measures for case in (marked, plain))
    assert one == other
    with pytest.raises(ValueError, match=r"prompt='a \(star'.*write \\\( and \\\)"):
        Case("one", CLIP, "a (star")


# ---- embeddings


def test_an_embedding_edits_as_its_prompt_does(edit, model):
    states, wanted = model.embed("a gold star").states, edit("a gold star", negative_prompt="red")
    found = edit("a label", prompt_embeds=states, negative_prompt_embeds=model.embed("red").states)
    assert np.array_equal(found.frames, wanted.frames) and found.config.prompt == "a label"
    assert "embeddings" in found.record()["model"] and "embeddings" not in wanted.record()["model"]
    again = edit(prompt_embeds=states)
    assert again.config.prompt == "given as prompt_embeds" and np.array_equal(again.frames, edit("a gold star").frames)
    other = edit(prompt_embeds=model.embed("a red circle").states)  # the same words, another key in the store
    assert not np.array_equal(other.frames, again.frames)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(prompt_embeds=torch.zeros(1, 16, 95)), r"prompt_embeds is float32 (1, 16, 95): give floating-point numbers (1, 16, 96)"),
        (dict(prompt_embeds=torch.zeros(1, 15, 96)), "give floating-point numbers (1, 16, 96)"),
        (dict(negative_prompt_embeds=torch.zeros(2, 16, 96)), "negative_prompt_embeds is float32 (2, 16, 96)"),
        (dict(prompt_embeds=torch.zeros(1, 16, 96, dtype=torch.int64)), "is int64"),
        (dict(prompt_embeds=torch.full((1, 16, 96), torch.nan)), "prompt_embeds holds NaN or infinity: make it again, in float32"),
        (dict(prompt_embeds=np.zeros((1, 16, 96))), "give a tensor of a text encoder"),
        (dict(prompt_embeds=torch.zeros(1, 16, 96), pooled_prompt_embeds=torch.zeros(1, 5)), "the model reads none: leave it out"),
        (dict(pooled_prompt_embeds=torch.zeros(1, 5)), "pooled_prompt_embeds without prompt_embeds: give both, or neither"),
        (dict(prompt="a (gold:2) star", prompt_embeds=torch.zeros(1, 16, 96)), "weights do not act on prompt_embeds: leave one of them out"),
        (dict(prompt=OVER_TIME, prompt_embeds=torch.zeros(1, 16, 96)), "is one embedding for all frames: leave it out, or give one prompt"),
        (dict(negative_prompt="red", negative_prompt_embeds=torch.zeros(1, 16, 96)), "negative_prompt_embeds is given too: leave one of them out"),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)
def test_an_embedding_that_does_not_fit_is_refused_before_any_work(edit, untouched, wrong, said):
    with pytest.raises(ValueError) as caught:
        edit(**dict(prompt="a gold star") | wrong)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_stable_diffusion_xl_takes_the_pooled_embedding_too(store):
    pipe = xl_pipe()
    model = load_model(pipe)
    prompt, how = model.embed("a gold star"), dict(model=pipe, store=store) | FEW
    found = edit_video(CLIP, prompt_embeds=prompt.states, pooled_prompt_embeds=prompt.pooled, **how)
    assert np.array_equal(found.frames, edit_video(CLIP, "a gold star", **how).frames)
    with pytest.raises(ValueError, match="pooled_prompt_embeds is missing: the model reads it: give it too"):
        edit_video(CLIP, prompt_embeds=prompt.states, **how)


def test_a_fork_keeps_the_embeddings_of_the_prompts_that_it_does_not_change(model, store):
    trajectory = invert(model, CLIP, SCENE.caption, 2, store=store, progress=False)
    config = EditConfig("a label", source_prompt=SCENE.caption, num_inference_steps=2, keyframe_interval=2)
    plain = Edit(model, trajectory, config, CLIP)
    given = replace(plain.conditioning, positive=model.embed("a gold star"))
    edit = Edit(model, trajectory, config, CLIP, conditioning=given)
    assert torch.equal(edit.fork(seed=3).conditioning.positive.states, given.positive.states)
    assert torch.equal(edit.fork(negative_prompt="red").conditioning.positive.states, given.positive.states)
    assert torch.equal(edit.fork(prompt="a red star").conditioning.positive.states, model.embed("a red star").states)
    assert edit_key(edit) != edit_key(plain)


# ---- over time


@given(st.integers(1, 40), st.integers(1, 10), st.sets(st.integers(1, 39), max_size=4), st.integers(2, 5) | st.none(), st.integers(0, 999))
def test_no_frame_draws_on_a_keyframe_of_another_prompt(frames, interval, cuts, most, seed):
    changes = sorted(cut for cut in cuts if cut < frames)
    interval = min(interval, frames)
    edges = [0, *changes, frames]
    stretch = lambda frame: sum(frame >= edge for edge in edges[:-1])  # noqa: E731
    pieces, table = intervals(frames, interval, changes), keyframe_table(frames, interval, 3, seed, changes)
    assert [frame for piece in pieces for frame in piece] == list(range(frames)) and max(map(len, pieces)) <= interval
    assert all(stretch(piece[0]) == stretch(piece[-1]) for piece in pieces)
    for keyframes in table:
        assert all(frame in piece for frame, piece in zip(keyframes.tolist(), pieces, strict=True))
        for rule in RULES:
            plan = make_plan(rule, frames, keyframes, interval, changes)
            for frame in range(frames):
                assert {stretch(int(keyframes[which[frame]])) for which in (plan.first, plan.second)} == {stretch(frame)}
        groups = groups_by_stretch(keyframes.tolist(), most, changes)
        assert [member for group in groups for member in group.members] == list(range(len(keyframes)))
        assert all(len({stretch(int(keyframes[each])) for each in group.everybody}) == 1 for group in groups)
    if not changes:
        assert groups == joint_groups(len(pieces), most)


@pytest.mark.parametrize(
    "wrong, said, right",
    [
        ({}, "it is empty: give a prompt for frame 0", {0: "a star"}),
        ({3: "a star"}, "the frames before 3 have no prompt: begin with frame 0", {0: "a", 3: "a star"}),
        ({0: "a star", 5: "b", 3: "c"}, "frame 3 comes after frame 5: give the frames in ascending order", {0: "a star", 3: "c", 5: "b"}),
        ({0: "a star", -1: "b"}, "at least 0", {0: "a star", 1: "b"}),
        ({0: "a star", 2.5: "b"}, "give a whole number", {0: "a star", 2: "b"}),
        ({0: "a star", 6: "b"}, "the clip has no frame 6: give frames from 0 to 5", {0: "a star", 5: "b"}),
        ({0: "a star", 3: "a (gold"}, "( is not closed", {0: "a star", 3: r"a \(gold"}),
    ],
    ids=str,
)
def test_wrong_prompts_over_time_are_refused_before_any_work(edit, model, store, untouched, wrong, said, right):
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(ValueError) as caught:
            edit(**dict(prompt="a star") | {name: wrong})
        message = str(caught.value)
        assert message.startswith(name) and said in message and "\n" not in message
        EditConfig(**dict(prompt="a star") | {name: right}).check_frames(6)
    with pytest.raises(ValueError, match=r"prompt\[3\]=' ' is empty: say what the clip shows from frame 3 on"):
        edit({0: "a star", 3: " "})
    with pytest.raises(ValueError, match="source_prompt=.*give text"):
        EditConfig("a star", source_prompt={0: "a star"})


def test_settings_with_prompts_over_time_survive_json():
    config = EditConfig(OVER_TIME, negative_prompt={0: "blue", 4: "green"})
    again = EditConfig(**json.loads(json.dumps(config.settings())))
    assert again == config and again.prompt == OVER_TIME and again.changes == (3, 4)
    assert config.words == "a red star → a gold star" == described(OVER_TIME)
    assert replace(config, seed=1).prompt == OVER_TIME and EditConfig({0: "a star"}).prompt == "a star"


def test_each_frame_has_the_prompt_of_its_time(model, store):
    trajectory = invert(model, CLIP, SCENE.caption, 2, store=store, progress=False)
    config = EditConfig(OVER_TIME, source_prompt=SCENE.caption, negative_prompt={0: "", 5: "red"}, num_inference_steps=2, keyframe_interval=2)
    edit = Edit(model, trajectory, config, CLIP)
    red, gold, nothing = (model.embed(text).states[0] for text in ("a red star", "a gold star", ""))
    rows = edit.conditioning.positive.states
    assert all(torch.equal(row, red if frame < 3 else gold) for frame, row in enumerate(rows)) and len(rows) == 6
    assert torch.equal(edit.conditioning.negative.states[4], nothing) and not torch.equal(edit.conditioning.negative.states[5], nothing)
    some = edit.excerpt([1, 2, 4])
    assert some.config.prompt == {0: "a red star", 2: "a gold star"} and torch.equal(some.conditioning.positive.states, rows[[1, 2, 4]])
    assert edit.excerpt([4, 5]).config.prompt == "a gold star" and len(edit.preview(2)) == 2
    other = edit.step().fork(prompt={0: "a red star", 2: "a gold star"})
    assert other.index == 1 and torch.equal(other.conditioning.positive.states[2], gold) and other.denoiser.changes == (2, 5)
    assert edit_key(edit) != edit_key(other)
    assert torch.equal(Edit.load(edit.save(store.root / "edit.safetensors"), model, store).latents, edit.latents)


@pytest.mark.parametrize("rule", [*RULES, "joint", "per_frame"])
def test_how_it_is_computed_changes_nothing(edit, rule):
    "Recorded or live, in blocks of any size, one branch at a time or all: the same film, to rounding."
    first = edit(OVER_TIME, rule=rule, max_joint_keyframes=2)
    for block_size, branch in ((1, "live"), (4, "recorded")):
        again = edit(OVER_TIME, rule=rule, max_joint_keyframes=2, block_size=block_size, source_branch=branch, keep=False)
        assert np.abs(again.frames.astype(int) - first.frames).max() <= 2


def test_a_stretch_is_the_edit_of_that_stretch_alone(edit, model, store):
    "With the same keyframes, the frames of a stretch come out as if the clip had no others."
    table = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])  # one in each of 0..1, 2, 3..4 and 5
    config = dict(source_prompt=SCENE.caption, num_inference_steps=2, keyframe_interval=2)
    trajectory = invert(model, CLIP, SCENE.caption, 2, store=store, progress=False)
    whole = Edit(model, trajectory, EditConfig(OVER_TIME, **config), CLIP, keyframes=table).run()
    part = Edit(model, trajectory.excerpt([0, 1, 2]), EditConfig("a red star", **config), keyframes=table[:, :2]).run()
    assert torch.allclose(whole.latents[:3], part.latents, atol=1e-4)


def test_an_interrupted_edit_over_time_goes_on(model, tmp_path):
    trajectory = invert(model, CLIP, SCENE.caption, 2, store=Store(tmp_path), progress=False)
    config = EditConfig(OVER_TIME, source_prompt=SCENE.caption, num_inference_steps=2, keyframe_interval=2)
    make = lambda: Edit(model, trajectory, config, CLIP, Execution(store=Store(tmp_path)), keep_history=False)  # noqa: E731
    whole = make().run()
    begun = make()
    begun.execution = Execution(store=Store(tmp_path))
    walk = kept_steps(begun)
    next(walk)
    walk.close()
    again = make()
    assert run_kept(again, Store(tmp_path)) == 1 and torch.allclose(again.latents, whole.latents, atol=1e-5)


def test_the_command_line_takes_prompts_over_time(tmp_path, cache, capsys):
    write_clip(tmp_path / "clip.mp4", CLIP)
    how = [str(tmp_path / "clip.mp4"), "a (red:1.2) star", "--model", "toy", "--size", "64", "--steps", "2", "--quiet", "--out", str(tmp_path / "made")]
    assert main(["edit", *how, "--prompt-at", "4:a blue star", "--prompt-at", "2:a gold star"]) in (0, None)
    record = json.loads((tmp_path / "made" / "run.json").read_text())
    assert record["config"]["prompt"] == {"0": "a (red:1.2) star", "2": "a gold star", "4": "a blue star"}
    with pytest.raises(SystemExit):
        main(["edit", *how, "--prompt-at", "gold"])
    assert 'such as 12:"a gold star"' in capsys.readouterr().err


def test_what_takes_one_prompt_says_so(edit, model, store):
    result, words = edit(OVER_TIME), "takes no prompts over time: give one, 'a red star' for instance, or use edit_video"
    assert result.config.title in repr(result)
    trajectory = invert(model, CLIP, SCENE.caption, 2, store=store, progress=False)
    config = EditConfig(OVER_TIME, source_prompt=SCENE.caption, num_inference_steps=2)
    for refused in (
        lambda prompt: DenoisePanel(Edit(model, trajectory, replace(config, prompt=prompt), CLIP)).close(),
        lambda prompt: compare(CLIP, prompt, ["vae"], model=model, store=store, progress=False, num_inference_steps=2),
        lambda prompt: evaluate(replace(result, config=replace(config, prompt=prompt)), metrics=["clip_score"], judge=ClipJudge.load("toy")),
    ):
        with pytest.raises(ValueError) as caught:
            refused(OVER_TIME)
        assert words in str(caught.value)
        refused("a red star")
    state = EditState(CLIP, model=model, store=store, worker=Worker(threaded=False), prompt=OVER_TIME)
    state.render()
    assert "this panel takes no prompts over time" in state.error and not state.jobs
    state.close()
    with pytest.raises(ValueError, match="edit_sharded takes no prompts over time"):
        edit_sharded(CLIP, OVER_TIME, shards=1, model="toy")


# ---- what they do to a film


def judged(model, judge, scene, material, store, weights):
    "The judge's score of the material for each weight of its word: two frames, without guidance, so that it is not saturated."
    target, clip = scene.replace(material=material).caption, scene.render(frames=9, size=128)
    clip = Clip(clip.frames[[0, 8]])
    trajectory, scores = invert(model, clip, scene.caption, 8, store=store, progress=False), []
    for weight in weights:
        prompt = target.replace(material, f"({material}:{weight})")
        config = EditConfig(prompt, scene.caption, num_inference_steps=8, guidance_scale=1, rule="per_frame")
        edit = Edit(model, trajectory, config, clip, Execution(source_branch="live"), keep_history=False).run()
        scores.append(float(judge.score(edit.decode().frames, [target]).mean()))
    return scores


@pytest.mark.slow
def test_the_weight_of_a_material_raises_what_the_judge_sees_of_it(model, store):
    "Strictly in the mean of six scenes; in each of them with at most one pair of neighbours in another order."
    judge, weights = ClipJudge.load("toy"), (0.5, 0.75, 1, 1.25, 1.5)
    scores = np.array([judged(model, judge, Scene.random(seed), "gold", store, weights) for seed in range(6)])
    print(scores.round(3), scores.mean(0).round(3))
    assert (np.diff(scores.mean(0)) > 0).all()
    ranks = scores.argsort(1).argsort(1)
    assert (1 - ((ranks - np.arange(5)) ** 2).sum(1) / 20 >= 0.9).all()  # Spearman's
    assert (scores[:, -1] - scores[:, 0] > 0.1).all()


def far(one, other):
    "The mean difference of two films in each frame."
    return np.abs(one.frames.astype(float) - other.frames).mean((1, 2, 3))


@pytest.mark.slow
def test_a_prompt_that_changes_at_frame_12_changes_the_film_there_and_nowhere_else(model, store):
    scene, judge = Scene.random(5), ClipJudge.load("toy")
    clip, red, gold = scene.render(frames=24, size=128), scene.replace(material="red").caption, scene.replace(material="gold").caption
    how = dict(model=model, store=store, source_prompt=scene.caption, num_inference_steps=8, keyframe_interval=8, progress=False, size=(128, 128))
    both = edit_video(clip, {0: red, 12: gold}, **how)
    plain = {(prompt, seed): edit_video(clip, prompt, seed=seed, **how) for prompt in (red, gold) for seed in (0, 1)}
    for prompt, part in ((red, slice(0, 12)), (gold, slice(12, 24))):
        own = far(plain[prompt, 0], plain[prompt, 1])[part].mean()
        print(prompt, far(both, plain[prompt, 0])[part].mean(), own)
        assert far(both, plain[prompt, 0])[part].mean() < 1.5 * own
    scores = judge.score(both.frames, [red, gold])
    assert ((scores[:, 0] > scores[:, 1]) == torch.arange(24).lt(12)).all()
