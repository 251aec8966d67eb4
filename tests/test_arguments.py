"Arguments, seen from the settings of an edit: each field is checked before any work, and every remedy that an error names is executed here."

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenflow_nb.backbones.base import Model
from tokenflow_nb.bench import bench
from tokenflow_nb.compare import compare, external, make_methods
from tokenflow_nb.compare.atlas import LayeredAtlas
from tokenflow_nb.compare.data import davis, load_pairs, toy_benchmark
from tokenflow_nb.compare.patches import KeyframePatches, match_patches
from tokenflow_nb.compare.suite import run_suite
from tokenflow_nb.compare.text2video_zero import Text2VideoZero
from tokenflow_nb.compare.tune_a_video import TuneAVideo
from tokenflow_nb.config import Execution, Reading
from tokenflow_nb.edit import Edit, EditConfig, edit_video, known_device
from tokenflow_nb.editors import Editor, PlugAndPlay, SDEdit, make_editor
from tokenflow_nb.keyframes import intervals, joint_groups, keyframe_table
from tokenflow_nb.measure.evaluate import evaluate
from tokenflow_nb.measure.metrics import Case, Measure
from tokenflow_nb.measure.page import film_strip, report_page
from tokenflow_nb.measure.report import Report, Row, bootstrap_interval
from tokenflow_nb.scale.jobs import EditJob, edit_many
from tokenflow_nb.scale.shard import cut_shards, edit_sharded
from tokenflow_nb.scale.workers import LocalExecutor
from tokenflow_nb.store import digest
from tokenflow_nb.support.settings import check_of
from tokenflow_nb.toy.world import Scene

TEXTS = ("prompt", "source_prompt", "negative_prompt")
NUMBERS = [each.name for each in fields(EditConfig) if isinstance(each.default, (int, float)) and not isinstance(each.default, bool)]
NUMBERS += ["guidance_scale", "keyframe_interval", "inversion_steps"]


def config(**changes):
    return EditConfig(**dict(prompt="a gold star") | changes)


def refused(name, value, **others):
    with pytest.raises(ValueError) as caught:
        config(**{name: value}, **others)
    message = str(caught.value)
    assert message.startswith(f"{name}=") and "\n" not in message and len(message) < 400, message
    return message


@pytest.fixture(scope="module")
def clip():
    return Scene("star", "blue", "grass", radius=36).render(frames=4, size=64)


# ---- every field


WRONG = [object(), b"pnp", Path("pnp"), [1, 2], {}, np.zeros(3), 1j, float("nan"), float("inf"), np.float64("nan"), -1.5]


@pytest.mark.parametrize("name", [each.name for each in fields(EditConfig)])
@pytest.mark.parametrize("wrong", [*WRONG, np.datetime64("2026-01-01")], ids=lambda value: f"{type(value).__name__} {value!s:.9}")
def test_no_field_takes_what_it_cannot_use(name, wrong):
    refused(name, wrong)


@pytest.mark.parametrize("kind, each", [(kind, each) for kind in (EditConfig, Execution, Reading, PlugAndPlay, SDEdit) for each in fields(kind)],
                         ids=lambda it: getattr(it, "name", None) or it.__name__)
def test_every_setting_has_a_check(kind, each):
    with pytest.raises(ValueError, match=f"^{each.name}="):
        check_of(each)(each.name, object())
    assert each.metadata["help"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_bool_is_no_number(name):
    for wrong in (True, False, np.True_):
        refused(name, wrong)


def test_a_number_is_no_bool():
    for wrong in (0, 1, 1.0, "True", None):
        assert "give True or False" in refused("remeasure", wrong)
    assert config(remeasure=np.True_).remeasure is True


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_no_file_can_hold_is_refused(name):
    for wrong in ("a\0star", "a star \ud83d", "\udcff"):
        refused(name, wrong)
    assert getattr(config(**{name: "$\\frac$ <script> ✨\n نجم"}), name) == "$\\frac$ <script> ✨\n نجم"


def test_none_is_no_text_as_in_diffusers(clip, model, store):
    assert config(negative_prompt=None, source_prompt=None) == config()
    options = dict(model=model, num_inference_steps=2, size=(64, 64), store=store, progress=False)
    none, empty = (edit_video(clip, "a gold star", source_prompt=given, negative_prompt=given, **options) for given in (None, ""))
    assert np.array_equal(none.edited.frames, empty.edited.frames) and none.record()["config"]["negative_prompt"] == ""


def test_numpys_numbers_give_the_same_settings_json_and_digest():
    values = dict(
        num_inference_steps=12, guidance_scale=7.5, guidance_stop=0.25, keyframe_interval=4, seed=5, pnp_f_t=0.5, pnp_attn_t=0.75,
        inversion_steps=20, max_joint_keyframes=4,
    )
    plain = config(**values)
    for kind in (np.asarray, torch.tensor, lambda value: np.float32(value) if isinstance(value, float) else np.int32(value)):
        given = config(**{name: kind(value) for name, value in values.items()}, method=np.str_("pnp"))
        one, other = given.settings(), plain.settings()
        assert given == plain and digest(one) == digest(other) and json.dumps(one) == json.dumps(other)
        assert config(method="sdedit", strength=kind(0.5)) == config(method="sdedit", strength=0.5)
        assert Execution(block_size=kind(3)) == Execution(block_size=3)
    assert config(guidance_scale=7) == config(guidance_scale=7.0)
    assert digest(config(guidance_scale=7).settings()) == digest(config(guidance_scale=7.0).settings())
    assert config(seed=np.uint64(2**64 - 1)).seed == 2**64 - 1
    refused("seed", 2**64)  # PyTorch takes no more


def test_numpys_numbers_are_numbers_where_tables_and_groups_are_made():
    four, two = np.int64(4), np.uint8(2)
    assert intervals(four, two) == intervals(4, 2) == [range(0, 2), range(2, 4)]
    assert torch.equal(keyframe_table(four, two, np.int16(3), np.int64(5)), keyframe_table(4, 2, 3, 5))
    assert joint_groups(9, np.int64(4)) == joint_groups(9, 4)
    assert PlugAndPlay(np.float64(0.5), np.int64(1)) == PlugAndPlay(0.5, 1.0) and SDEdit(np.float64(0.5)) == SDEdit(0.5)
    assert KeyframePatches(np.int64(1), np.int64(5)) == KeyframePatches(1, 5) and TuneAVideo(np.int64(3), np.float64(1e-4)) == TuneAVideo(3, 1e-4)
    assert LayeredAtlas(np.int64(1)).keyframe == 1 and Text2VideoZero(fall=np.int64(9)).fall == 9
    assert [case.name for case in toy_benchmark(np.int64(1), np.int64(1), frames=np.int64(2), size=32)] == [case.name for case in toy_benchmark(1, 1, frames=2, size=32)]
    with LocalExecutor(np.int64(1)) as executor:
        assert repr(executor) == "LocalExecutor(1 worker)"


def test_a_negative_seed_is_one_for_every_method():
    guide = np.random.default_rng(0).random((6, 6, 3), np.float32)
    assert match_patches(guide, guide, seed=config(seed=-1).seed).shape == (6, 6, 2)


# ---- fields that must fit each other; what an error says to do is done


@pytest.mark.parametrize(
    "wrong, words, right",
    [
        (dict(inversion_steps=10), "give at least num_inference_steps, or None", dict(inversion_steps=25)),
        (dict(inversion_steps=10), "or None", dict(inversion_steps=None)),
        (dict(method="sdedit", strength=0.01), "strength=0.01 runs no step of 25: give at least 0.04, up to 1", dict(method="sdedit", strength=0.04)),
        (dict(method="sdedit", strength=0), "give a fraction above 0", dict(method="sdedit", strength=0.1)),
        (dict(method="pnpp"), "did you mean 'pnp'?", dict(method="pnp")),
        (dict(rule="papr"), "did you mean 'paper'?", dict(rule="paper")),
        (dict(correction="predict"), "did you mean 'predicted'?", dict(correction="predicted")),
        (dict(strength=0.5), "it is a setting of method='sdedit', not of 'pnp': give that method", dict(method="sdedit", strength=0.5)),
        (dict(editor="sdedit"), "or its name as method", dict(method="sdedit")),
        (dict(editor=SDEdit), "give an editor", dict(editor=SDEdit())),
        (dict(max_joint_keyframes=1), "at least 2, or None for all together", dict(max_joint_keyframes=None)),
        (dict(keyframe_interval=0), "at least 1, or None for 8", dict(keyframe_interval=1)),
        (dict(guidance_scale=101), "from 0 to 100, or None for the model's own; 1 is no guidance", dict(guidance_scale=1)),
        (dict(pnp_f_t=80), "from 0 to 1", dict(pnp_f_t=0.8)),
        (dict(prompt=b"a star"), "value.decode() makes it", dict(prompt=b"a star".decode())),
        (dict(prompt=Path("star")), "str(value) makes it", dict(prompt=str(Path("star")))),
        (dict(prompt="a\0star"), r"value.replace('\x00', '') leaves it out", dict(prompt="a\0star".replace("\x00", ""))),
        (dict(prompt="\ud83d star"), r"value.replace('\ud83d', '') leaves it out", dict(prompt="\ud83d star".replace("\ud83d", ""))),
        (dict(prompt=" "), "'a gold star on grass' for instance", dict(prompt="a gold star on grass")),
    ],
    ids=str,
)
def test_what_an_error_says_to_do_is_accepted(wrong, words, right):
    with pytest.raises(ValueError) as caught:
        config(**wrong)
    assert words in str(caught.value)
    config(**right)


# ---- seen from the functions that take such arguments


@pytest.mark.parametrize(
    "options",
    [
        dict(size="64x64"), dict(size=(64, 10**6)), dict(size=(64.5, 64)), dict(size=(True, 64)), dict(fps=0), dict(fps=float("nan")), dict(start=-1), dict(start="0"),
        dict(stop=0), dict(max_frames=0), dict(max_frames=True), dict(restore_size=1), dict(resume=None), dict(progress=2), dict(device="cdua"), dict(device=5),
        dict(device="cuda:99"), dict(store="cache"), dict(seed=None), dict(method=None), dict(keyframe_interval=5), dict(inversion_steps=1), dict(negative_prompt=5),
        dict(out=""), dict(out=5), dict(out=b"x"), dict(out="x.avi"), dict(out="x" * 300), dict(out="a\0b"),
    ],
    ids=str,
)
def test_edit_video_refuses_before_it_loads_a_model(clip, options, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenflow_nb.edit.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    [name] = options
    with pytest.raises(ValueError, match=rf"^{name}=") as caught:
        edit_video(clip, "a gold star", **dict(progress=False) | options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_device_beside_a_loaded_model_is_obeyed_or_refused(clip, model, store):
    options = dict(model=model, num_inference_steps=2, size=np.array([64, 64]), store=store, progress=False)
    with pytest.raises(ValueError, match="device='meta'|device="):
        edit_video(clip, "a gold star", device="meta", **options)
    assert edit_video(clip, "a gold star", device="cpu", **options).edited.size == (64, 64)


def test_steps_beyond_the_schedule_are_refused_before_the_probe_of_a_forecast(clip, model, monkeypatch):
    monkeypatch.setattr(Model, "predict", lambda *_, **__: pytest.fail("the UNet was asked"))
    with pytest.raises(ValueError, match="inversion_steps=5000"):
        edit_video(clip, "a gold star", model=model, inversion_steps=5000, size=(64, 64), progress=True)


@pytest.mark.parametrize("options, words", [
    (dict(size="64"), "size="), (dict(fps=-1), "fps="), (dict(max_frames=1.5), "max_frames="), (dict(restore_size="no"), "restore_size="), (dict(device="cdua"), "device="),
    (dict(out="a\0b"), "out="), (dict(out="x" * 300), "out="),
])
def test_a_job_checks_all_its_options_when_it_is_made(clip, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        EditJob(**dict(source=clip, prompt="a star", out=tmp_path / "out") | options)


def test_a_job_may_ask_for_a_device_of_another_machine(clip, tmp_path):
    job = EditJob(clip, "a star", out=tmp_path / "out", device="cuda:3", seed=np.int64(5), size=[64, np.int64(64)])
    assert (job.config.seed, job.device, job.reading.size) == (5, "cuda:3", (64, 64)) and type(job.config.seed) is int
    assert job.digest == EditJob(clip, "a star", out=tmp_path / "out", device="cuda:3", seed=5, size=(64, 64)).digest


def test_compare_refuses_before_it_loads_a_model(clip, monkeypatch):
    monkeypatch.setattr("tokenflow_nb.edit.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for options in (dict(size=(0, 64)), dict(keyframe_interval=5), dict(device="cdua"), dict(store="x"), dict(progress=None)):
        with pytest.raises(ValueError, match=next(iter(options))):
            compare(clip, "a gold star", **options)


def test_a_method_does_not_invert_for_an_interval_that_cannot_be(clip, model, store, monkeypatch):
    from tokenflow_nb.compare import Job

    monkeypatch.setattr(Model, "predict", lambda *_, **__: pytest.fail("the UNet was asked"))
    with pytest.raises(ValueError, match="keyframe_interval=9"):
        Job(model, clip, config(keyframe_interval=9), store=store).edit()


@pytest.mark.parametrize("arguments", [
    dict(cases=5), dict(cases=["x"]), dict(metrics=[]), dict(processes=True), dict(progress=1), dict(store="x"), dict(out=""), dict(out="x" * 300), dict(seed="x"),
])
def test_a_suite_refuses(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(cases=toy_benchmark(1, 1, frames=2, size=32), methods=["vae"], out="out", model="toy", progress=False, num_inference_steps=2) | arguments
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        run_suite(**given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [
    dict(scenes=0), dict(scenes=True), dict(lengths=(True,)), dict(growth_steps=1), dict(resolution=(64,)), dict(resolution=(128, 192)), dict(steps=0), dict(steps=600), dict(progress=1),
])
def test_a_bench_refuses_before_it_measures(wrong, monkeypatch):
    monkeypatch.setattr("tokenflow_nb.bench.machine.matrix_rate", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(ValueError, match=next(iter(wrong)) if wrong.keys() != {"steps"} else "steps="):
        bench(**wrong)


@pytest.mark.parametrize("wrong", [dict(name=""), dict(name=None), dict(name="a\0b"), dict(prompt="\ud800"), dict(prompt=5), dict(source_prompt=5)])
def test_a_case_refuses_what_cannot_be_written(clip, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Case(**dict(name="a case", source=clip, prompt="a star") | wrong)
    assert Case("a case", clip, "a star", None).source_prompt == ""


# ---- no raw error from any value, in whatever argument

ODD = [None, 5, -1, 0, True, 2.5, float("nan"), "x", "", b"x", [], {}, object(), np.zeros(2), Path("nowhere")]


def report():
    return Report([Row("m", "c", {"ssim": Measure("ssim", 0.5, [0.5] * 3, choices={})})], {})


CALLS = {
    "make_editor": lambda odd, clip: make_editor(Editor(), odd),
    "editor": lambda odd, clip: EditConfig("p", editor=odd),
    "Execution": lambda odd, clip: Execution(block_size=odd, store=odd),
    "published": lambda odd, clip: EditConfig.published(odd),
    "known_device": lambda odd, clip: known_device("device", odd),
    "Edit.load": lambda odd, clip: Edit.load(odd),
    "film_strip height": lambda odd, clip: film_strip(clip, odd),
    "film_strip frames": lambda odd, clip: film_strip(clip, 64, odd),
    "film_strip quality": lambda odd, clip: film_strip(clip, 64, 2, odd),
    "report_page films": lambda odd, clip: report_page(report(), odd),
    "report_page title": lambda odd, clip: report_page(report(), (), odd),
    "report_page bytes": lambda odd, clip: report_page(report(), {"c": {"m": clip}}, "t", odd),
    "bootstrap values": lambda odd, clip: bootstrap_interval(odd),
    "bootstrap level": lambda odd, clip: bootstrap_interval([1, 2], level=odd),
    "bootstrap draws": lambda odd, clip: bootstrap_interval([1, 2], draws=odd),
    "values": lambda odd, clip: report().values(odd, "m"),
    "values method": lambda odd, clip: report().values("ssim", odd),
    "summary": lambda odd, clip: report().summary(odd),
    "figure": lambda odd, clip: report().figure(odd),
    "frames_figure": lambda odd, clip: report().frames_figure(odd),
    "markdown": lambda odd, clip: report().markdown(odd),
    "from_json": lambda odd, clip: Report.from_json(odd),
    "evaluate cases": lambda odd, clip: evaluate(clip, odd),
    "evaluate metrics": lambda odd, clip: evaluate(clip, Case("a", clip, "b"), metrics=odd if odd is not None else 5),
    "evaluate flow": lambda odd, clip: evaluate(clip, Case("a", clip, "b"), metrics=["ssim"], flow=odd),
    "case source": lambda odd, clip: Case("a", odd, "b"),
    "case ideal": lambda odd, clip: Case("a", clip, "b", ideal=odd),
    "load_pairs": lambda odd, clip: load_pairs(odd),
    "davis": lambda odd, clip: davis(odd),
    "davis resolution": lambda odd, clip: davis("nowhere", resolution=odd),
    "toy seed": lambda odd, clip: toy_benchmark(1, 1, odd, frames=1, size=32),
    "suite methods": lambda odd, clip: run_suite([Case("a", clip, "b")], odd, "out", processes=0),
    "suite flow": lambda odd, clip: run_suite([Case("a", clip, "b")], ["vae"], "out", flow=odd, judge="nowhere"),
    "presets": lambda odd, clip: bench(presets=odd, scenes=0),
    "lengths": lambda odd, clip: bench(lengths=odd, scenes=0),
    "job source": lambda odd, clip: EditJob(odd, "p", out="out"),
    "job out": lambda odd, clip: EditJob(clip, "p", out=odd),
    "job model": lambda odd, clip: EditJob(clip, "p", out="out", model=odd),
    "job config": lambda odd, clip: EditJob(clip, "p", odd, out="out"),
    "jobs": lambda odd, clip: edit_many(odd),
    "methods": lambda odd, clip: make_methods(odd),
    "external name": lambda odd, clip: external(odd, "."),
    "external folder": lambda odd, clip: external("a", odd),
    "patches": lambda odd, clip: KeyframePatches(odd, odd, odd),
    "motion": lambda odd, clip: Text2VideoZero(motion=odd),
    "visits": lambda odd, clip: LayeredAtlas(visits=odd),
    "cut": lambda odd, clip: cut_shards(4, odd, odd),
    "shard config": lambda odd, clip: edit_sharded(clip, "p", odd or "pnp", shards=1, model="toy", device="cpu"),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_value_ends_in_a_raw_error(name, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenflow_nb.compare.suite.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for odd in ODD:
        try:
            CALLS[name](odd, clip)
        except (ValueError, RuntimeError, OSError) as error:
            assert str(error) and not str(error).startswith("'"), odd
        except BaseException as error:
            if "a model was loaded" not in str(error):  # the value is good
                raise AssertionError(f"{odd!r}: {error!r}") from error
