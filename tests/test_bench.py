"The benchmark: its slow path computes what the fast one does, its counts are those of the forecast, its table says what was measured."

import csv
import json
import os
import signal

import pytest
import torch

from tokenflow_nb.attention import TokenFlowAttention
from tokenflow_nb.backbones.untrained import _Untrained, random_model
from tokenflow_nb.bench import bench
from tokenflow_nb.bench.growth import by_length, growth_table, run_apart, run_order
from tokenflow_nb.bench.presets import PRESETS, Preset, Subject, rendered, sd_subjects
from tokenflow_nb.bench.run import Run, operations, run_job
from tokenflow_nb.bench.table import table
from tokenflow_nb.cli import command as cli
from tokenflow_nb.compare.written_out import WRITTEN_OUT
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.edit import Edit
from tokenflow_nb.forecast.work import count_work
from tokenflow_nb.inversion import invert
from tokenflow_nb.toy.evaluate import EditCase
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3))
TINY = dict(  # SD 2.1 with thin layers: the same blocks, names and heads
    unet=dict(sample_size=8, block_out_channels=(32, 64, 64, 64), attention_head_dim=(1, 2, 2, 2), cross_attention_dim=32, use_linear_projection=True),
    vae=dict(
        sample_size=64, block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ),
)


@pytest.fixture(scope="module")
def subject(model):
    case = EditCase(SCENE, "gold")
    return Subject("a star", model, lambda frames: rendered(SCENE, (64, 64), frames), SCENE.caption, case.ideal.caption, case)


@pytest.mark.parametrize("rule, interval, block", [("published", 2, 2), ("published", 3, 4), ("paper", 2, 3)])
@pytest.mark.parametrize("step", [0, 3])  # with injected queries and keys, and without
def test_written_out_is_the_same_noise(model, store, rule, interval, block, step):
    trajectory = invert(model, SCENE.render(6, size=64), SCENE.caption, steps=4, store=store, progress=False)
    config = EditConfig("a gold star", num_inference_steps=4, keyframe_interval=interval, rule=rule)
    edit = Edit(model, trajectory, config, execution=Execution(block_size=block))
    edit.index = step
    plain = edit.predict().noise
    edit.denoiser.kernels = WRITTEN_OUT
    written = edit.predict().noise
    assert torch.allclose(written, plain, atol=2e-3) and not torch.equal(written, plain)
    assert not any(isinstance(module, TokenFlowAttention) for module in (layer.processor for layer in model.unet.modules() if hasattr(layer, "to_q")))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_job_takes_the_rows_that_are_counted(subject, preset, monkeypatch):
    monkeypatch.setattr("tokenflow_nb.backbones.compiled.CompiledPasses.backend", "eager")  # the compiler takes minutes
    changes = dict(num_inference_steps=2) | (dict(inversion_steps=4, keyframe_interval=4) if preset == "published" else {})
    run = run_job(subject, PRESETS[preset], 4, **changes)
    config, execution = PRESETS[preset].config("a star", **changes), PRESETS[preset].execution(**changes)
    film = 4 * 4 if preset == "published" else 0
    assert run.rows == count_work(4, config, execution=execution, visited=config.inversion_steps).total + film
    assert set(run.seconds) == {"invert", "film" if preset == "published" else "record", "edit", "decode"}
    assert len(run.edited) == 4 and run.memory > 0


def test_published_is_what_people_ran(subject):
    config = PRESETS["published"].config("a star", "a circle")
    assert config == EditConfig.published("a star", source_prompt="a circle") and config.inversion_steps == 500
    work = count_work(24, config, execution=PRESETS["published"].execution(), visited=500)
    assert (work.total + 500 * 24) / 24 == 1168.75  # METHOD, section 5


def test_what_is_not_recorded_is_no_stage(subject):
    run = run_job(subject, Preset("live", dict(source_branch="live", num_inference_steps=2)), 3)
    assert set(run.seconds) == {"invert", "edit", "decode"} and min(run.seconds.values()) > 0


def test_the_published_preset_computes_channels_first(subject, monkeypatch):
    seen = []
    layout = lambda: subject.model.unet.conv_in.weight.is_contiguous()  # noqa: E731
    begun = lambda *args, **named: seen.append(layout()) or (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr("tokenflow_nb.bench.run.stages", begun)
    for preset in ("default", "published"):
        with pytest.raises(KeyboardInterrupt):
            run_job(subject, PRESETS[preset], 2)
    assert seen == [False, True] and not layout()


def test_operations_are_those_of_the_rows(subject):
    half, whole = (operations(subject, PRESETS["default"], 8, num_inference_steps=steps) for steps in (4, 8))
    fixed = 2 * half - whole  # encoding and decoding
    assert 0 < fixed < half and operations(subject, PRESETS["published"], 8) > 4 * operations(subject, PRESETS["default"], 8)


@pytest.fixture(scope="module")
def found():
    return bench(presets=["default", "draft"], frames=3, lengths=(2, 4), steps=2, growth_steps=2, resolution=(64, 64))


def test_the_table_has_a_row_for_each_preset(found):
    lines = table(found.lines).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| default | 3 |") and "warp error" in lines[0] and "film" not in lines[0]
    assert len({line.count("|") for line in lines}) == 1 and "nan" not in str(found)
    assert [run.frames for run in found.runs] == [2, 4, 2, 4]
    growth = growth_table(found.runs).splitlines()
    assert len(growth) == 4 and growth[2].startswith("| 2 |") and growth[3].startswith("| 4 |") and "| 2, " in growth[3]


def test_the_shorter_a_length_the_more_often_it_runs_all_along():
    order = run_order((24, 48, 96, 192, 384, 24))
    assert {frames: order.count(frames) for frames in order} == {24: 16, 48: 8, 96: 4, 192: 2, 384: 2} and run_order((2000, 24)).count(24) == 16
    for frames in (24, 48, 96):
        assert order[:16].count(frames) == order[16:].count(frames) == order.count(frames) // 2
    assert run_order(()) == [] and run_order((24, 2000), most=1) == [24, 2000]


def test_a_length_is_told_by_the_mean_time_and_the_median_memory_of_its_runs():
    runs = [Run(8, 80, dict(edit=seconds), memory) for seconds, memory in [(4.0, 7e6), (1.0, 9e6), (1.0, 5e6)]] + [Run(4, 40, dict(edit=2.0), 4e6)]
    (four, (alone,)), (eight, same) = by_length(runs)
    assert (four, alone.frames) == (runs[3], 4) and (eight.frames, eight.rows, eight.total, eight.memory, same) == (8, 80, 2.0, 7e6, runs[:3])
    assert "| 8 | 2.0 | 0.250 | -50% | 7.0 MB | +75% | 3, 5.0 MB – 9.0 MB |" in growth_table(runs)


def test_what_is_saved_can_be_read(found, tmp_path):
    names = [path.name for path in found.save(tmp_path / "new" / "folder")]
    assert names == ["bench.md", "bench.csv", "bench.json", "growth.png"]
    read = json.loads((tmp_path / "new/folder/bench.json").read_text())
    assert [row["preset"] for row in read["presets"]] == ["default", "draft"] and read["clock"] == "wall" and len(read["growth"]) == 4
    with (tmp_path / "new/folder/bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["evaluations_a_frame"]) == found.lines[0].evaluations


@pytest.mark.parametrize("wrong, words", [
    (dict(size="xl"), "sizes are toy and sd"), (dict(presets=["fast"]), "default, draft, fifty, compiled, published"), (dict(clock="sun"), "wall and cpu"),
    (dict(lengths=(0,)), "at least 2"), (dict(frames=1), "at least 2"),
])
def test_bad_questions_are_refused_before_any_work(wrong, words):
    with pytest.raises(ValueError, match=words):
        bench(**wrong)


def test_a_preset_that_does_not_fit_is_told(monkeypatch):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("tokenflow_nb.bench.machine.bench_preset", full)
    told = bench(presets=["published"], frames=2, lengths=(), resolution=(64, 64))
    assert told.failed == ("published: out of memory with 2 frames",) and "out of memory" in str(told)


def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_length_whose_process_is_killed_costs_its_row(monkeypatch):
    asked = []
    monkeypatch.setattr("tokenflow_nb.bench.growth._run_here", killed)
    monkeypatch.setattr("tokenflow_nb.bench.machine.run_apart", lambda *about: asked.append(about) or run_apart(*about))
    told = bench(presets=["default"], frames=2, lengths=(4,), steps=2, resolution=(64, 64))
    assert len(told.lines) == len(told.failed) == 1 == len(asked) and told.runs == ()  # not asked at each turn
    assert "growth" in told.failed[0] and "SIGKILL" in told.failed[0] and "4 frames" in str(told)


def test_each_length_is_measured_in_a_process_of_its_own_from_the_loaded_model(monkeypatch):
    monkeypatch.setattr("tokenflow_nb.bench.growth.run_job", None)  # of this process
    run = run_apart("toy", 3, steps=2, resolution=(64, 64))
    assert run.frames == 3 and run.edited is None and set(run.seconds) == {"invert", "record", "edit", "decode"}
    assert run.memory > 20e6  # with what the first job takes


def test_random_weights_are_the_same_each_time_and_cost_no_random_number():
    state = torch.random.get_rng_state()
    first, second = random_model(**TINY, device="cpu"), random_model(**TINY, device="cpu")
    assert first.digest == second.digest and torch.equal(first.embed("a star").states, second.embed("a star").states)
    assert not torch.equal(first.embed("a star").states, first.embed("a circle").states) and torch.equal(torch.random.get_rng_state(), state)


def test_a_random_model_is_edited_like_any_other():
    model = random_model(**TINY, device="cpu")
    subject = Subject("random", model, lambda frames: rendered(SCENE, (64, 64), frames), "a", "b")
    run = run_job(subject, PRESETS["default"], 4, num_inference_steps=2)
    assert isinstance(model, _Untrained) and model.multiple == 32 and run.edited.size == (64, 64)


@pytest.mark.slow
def test_stable_diffusions_size_runs():
    assert sd_subjects((64, 64))[0].model.unet.num_parameters() == 865_910_724
    found = bench("sd", frames=2, lengths=(), steps=2, resolution=(64, 64))
    assert [line.preset for line in found.lines] == ["default", "draft", "fifty", "published"] and "warp" not in str(found)


def test_the_command_writes_the_folder(capsys, tmp_path):
    out = tmp_path / "bench"
    command = ["bench", "--presets", "default", "--frames", "2", "--lengths", "", "--steps", "2", "--resolution", "64", "--quiet", "--out", str(out)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "| default | 2 |" in said and "bench.csv" in said and (out / "bench.md").is_file() and not (out / "growth.png").exists()
    assert cli.main(["bench", "--presets", "quick", "--lengths", ""]) == 2 and "Valid: default, draft" in capsys.readouterr().err
