"The evaluator on clips whose faults are known: no model but the toy CLIP."

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb import metrics
from tokenflow_nb.clip import Clip, ClipError
from tokenflow_nb.edit import EditConfig, EditResult
from tokenflow_nb.flow import Flow
from tokenflow_nb.metrics import ClipJudge, Measure, masked_psnr, sharpness, warp_error
from tokenflow_nb.report import METRICS, Case, Report, Row, bootstrap_interval, evaluate
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

FRAMES, SIZE = 6, 64


@pytest.fixture(scope="module")
def judge():
    return ClipJudge.load("toy")


@pytest.fixture(scope="module")
def cases():
    scenes = [Scene.random(seed, held_out=True) for seed in (36, 37, 38, 39)]
    return [Case.toy(scene, "gold" if scene.material != "gold" else "blue", FRAMES, SIZE) for scene in scenes]


def noisy(clip, strength, seed=0):
    "Other noise in each frame."
    drawn = np.random.default_rng(seed).normal(0, 255 * strength, clip.frames.shape)
    return Clip(np.clip(clip.frames + drawn, 0, 255).round().astype(np.uint8), clip.fps)


def dimmed(clip, strength):
    "Every second frame is darker."
    frames = clip.frames.astype(float)
    frames[::2] *= 1 - strength
    return Clip(frames.round().astype(np.uint8), clip.fps)


def blurred(clip):
    moved = [np.roll(clip.frames.astype(float), (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return Clip((sum(moved) / 9).round().astype(np.uint8), clip.fps)


# Warp error


@given(st.integers(-4, 4), st.integers(-4, 4), st.integers(0, 99))
def test_warp_error_is_exactly_0_for_whole_pixel_translations(right, down, seed):
    wide = np.random.default_rng(seed).integers(0, 256, (56, 60, 3), dtype=np.uint8)
    tops, lefts = (20 + np.arange(5) * step for step in (down, right))
    frames = np.stack([wide[top : top + 16, left : left + 20] for top, left in zip(tops, lefts)])
    flow = np.broadcast_to(np.array([-right, -down], np.float32), (4, 16, 20, 2))
    row, column = np.mgrid[:16, :20]
    inside = (row - down >= 0) & (row - down < 16) & (column - right >= 0) & (column - right < 20)
    error = warp_error(frames, flow, np.broadcast_to(inside, (4, 16, 20)))
    assert error == 0 and (error.per_frame == 0).all()


@pytest.mark.parametrize("disturb", [dimmed, noisy])
def test_warp_error_grows_strictly_with_flicker(cases, disturb, tmp_path):
    for case in cases[:2]:
        for flow in (case.flow, metrics_flow(case, tmp_path)):
            errors = [warp_error(disturb(case.ideal, strength), flow) for strength in (0, 0.02, 0.04, 0.08, 0.16, 0.32)]
            assert all(one < other for one, other in zip(errors, errors[1:]))


def metrics_flow(case, folder):
    from tokenflow_nb.flow import estimate_flow

    return estimate_flow(case.source, "dis", Store(folder))


def test_warp_error_by_hand():
    "Two frames of 1×2 pixels, of which one is visible: black becomes (0.2, 0.4, 1)."
    frames = np.zeros((2, 1, 2, 3), np.uint8)
    frames[1, 0, 0] = 51, 102, 255
    visible = np.array([[[True, False]]])
    assert math.isclose(warp_error(frames, np.zeros((1, 1, 2, 2)), visible), 0.04 + 0.16 + 1)


def test_hidden_pixels_and_cuts_do_not_count():
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    frames[1] = frames[0]
    visible = np.ones((2, 4, 4), bool)
    visible[1] = False  # a cut
    error = warp_error(frames, np.zeros((2, 4, 4, 2)), visible)
    assert error == 0 and math.isnan(error.per_frame[1])


def test_dis_and_exact_flow_order_the_methods_alike(cases, tmp_path):
    clips = {
        "ideal": [case.ideal for case in cases],
        "slightly dimmed": [dimmed(case.ideal, 0.05) for case in cases],
        "dimmed": [dimmed(case.ideal, 0.12) for case in cases],
        "per frame": [noisy(case.ideal, 0.08) for case in cases],
        "per frame, blurred": [blurred(noisy(case.ideal, 0.08)) for case in cases],
        "very noisy": [noisy(case.ideal, 0.2) for case in cases],
    }
    orders = []
    for asked in (cases, [replace(case, flow=None) for case in cases]):
        found = evaluate(clips, asked, metrics=["warp_error"], store=Store(tmp_path)).summary("warp_error")
        orders.append(sorted(clips, key=lambda method: found[method].value))
    assert orders[0] == orders[1] and orders[0][0] == "ideal" and orders[0][-1] == "very noisy"
    assert len(Store(tmp_path).entries()) == len(cases)  # one flow for each source, whatever the number of methods


# Measures


def test_a_measure_is_a_number_that_keeps_its_choices_in_another_process():
    measure = Measure("psnr", 31.5, [31, 32, math.nan], "dB", dict(over="all pixels"))
    again = pickle.loads(pickle.dumps(measure))
    assert again == 31.5 and again.name == "psnr" and again.unit == "dB" and again.choices == measure.choices
    assert np.array_equal(again.per_frame, measure.per_frame, equal_nan=True) and "over all pixels" in repr(again)
    assert json.loads(json.dumps(dict(value=measure))) == dict(value=31.5)
    with pytest.raises(AttributeError, match="does not change"):
        measure.unit = ""
    with pytest.raises(ValueError, match="read-only"):
        measure.per_frame[0] = 0


def test_psnr_of_known_errors():
    dark, light = np.zeros((2, 12, 12, 3), np.uint8), np.zeros((2, 12, 12, 3), np.uint8)
    light[1] = 255
    mask = np.zeros((2, 12, 12), bool)
    mask[1, 0, 0] = True
    found = masked_psnr(dark, light, mask)
    assert found == 0 and math.isnan(found.per_frame[0]) and found.per_frame[1] == 0
    assert masked_psnr(dark, light, ~mask) > 0 and masked_psnr(dark, dark) == 99
    assert math.isclose(masked_psnr(dark, light), 10 * math.log10(2))


def test_sharpness_of_known_pictures():
    assert sharpness(np.full((1, 8, 8, 3), 90, np.uint8)) == pytest.approx(0, abs=1e-12)
    board = np.indices((8, 8)).sum(0) % 2 * 255
    frames = np.repeat(board[None, ..., None], 3, -1).astype(np.uint8)
    assert sharpness(frames) == pytest.approx(4)  # each pixel and its four neighbours differ by 1


def test_sharpness_and_ssim_fall_with_blur(cases):
    once, twice = blurred(cases[0].ideal), blurred(blurred(cases[0].ideal))
    assert sharpness(cases[0].ideal) > sharpness(once) > sharpness(twice)
    assert 1 > metrics.ssim(cases[0].ideal, once) > metrics.ssim(cases[0].ideal, twice)


def test_clip_metrics_by_hand(judge, cases):
    case = cases[0]
    seen, (wanted, shown) = judge.pictures(case.ideal.frames), judge.sentences([case.prompt, case.source_prompt])
    before = judge.pictures(case.source.frames)
    cosines = (seen @ seen.T).double().numpy()
    assert metrics.clip_score(case.ideal, case.prompt, judge) == pytest.approx(float((seen @ wanted).mean()), abs=1e-5)
    gain = float(((seen - before) @ wanted).mean())
    assert metrics.clip_gain(case.ideal, case.source, case.prompt, judge) == pytest.approx(gain, abs=1e-5)
    moved, direction = seen - before, wanted - shown
    expected = float((moved @ direction / moved.norm(dim=1) / direction.norm()).mean())
    found = metrics.directional_similarity(case.ideal, case.source, case.prompt, case.source_prompt, judge)
    assert found == pytest.approx(expected, abs=1e-5)
    pairs = [(i, j) for i in range(FRAMES) for j in range(FRAMES)]
    consecutive = np.mean([cosines[i, j] for i, j in pairs if j == i + 1])
    every = np.mean([cosines[i, j] for i, j in pairs if i != j])
    vbench = np.mean([(cosines[0, j] + cosines[j - 1, j]) / 2 for j in range(1, FRAMES)])
    assert metrics.consistency_consecutive(case.ideal, judge) == pytest.approx(consecutive, abs=1e-5)
    assert metrics.consistency_all_pairs(case.ideal, judge) == pytest.approx(every, abs=1e-5)
    assert metrics.consistency_vbench(case.ideal, judge) == pytest.approx(vbench, abs=1e-5)


def test_frames_are_looked_at_once_and_few_are_remembered(judge, cases):
    judge._seen.clear()
    first = judge.pictures(cases[0].source.frames)
    assert judge.pictures(cases[0].source.frames.copy()).equal(first) and len(judge._seen) == 1
    for value in range(20):
        judge.pictures(np.full((1, 16, 16, 3), value, np.uint8))
    assert len(judge._seen) == 16


# The report


@pytest.fixture(scope="module")
def report(cases, judge):
    clips = {
        "vae": [noisy(case.source, 0.005) for case in cases],
        "per_frame": [noisy(case.ideal, 0.08) for case in cases],
        "steady": [noisy(case.ideal, 0.02) for case in cases],
        "blurred": [blurred(blurred(case.ideal)) for case in cases],
        "untouched": [case.source for case in cases],
    }
    return evaluate(clips, cases, judge=judge)


def test_recovered_is_the_ratio_of_means(report):
    mean = {name: np.mean([*report.values("warp_error", name).values()]) for name in ("vae", "per_frame", "steady")}
    expected = (mean["per_frame"] - mean["steady"]) / (mean["per_frame"] - mean["vae"])
    found = report.recovered()
    assert found["steady"].value == pytest.approx(expected) and found["steady"].low <= expected <= found["steady"].high
    assert set(found) == set(report.methods) and (found["vae"].value, found["per_frame"].value) == (1, 0)


def test_nothing_is_recovered_by_the_image_editor_as_its_authors_run_it(report, cases):
    "Where it was run, it is the scale's end, and frames alone with TokenFlow's settings have a share of their own."
    wilder = evaluate({"plug_and_play": [noisy(case.ideal, 0.12) for case in cases]}, cases, metrics=["warp_error"])
    found = Report([*report.rows, *wilder.rows], report.card).recovered()
    assert found["plug_and_play"].value == 0 < found["per_frame"].low < found["per_frame"].value < found["steady"].value
    without = Report([row for row in report.rows if row.method != "per_frame"], report.card)
    assert without.recovered() == {}


def test_both_traps_are_named_and_an_honest_edit_is_not(report, cases):
    weak = [text for text in report.warnings if "too weak" in text]
    assert len(weak) == len(cases) and all("untouched" in text for text in weak)
    assert [text.split()[2] for text in report.warnings if "sharpness lost" in text] == ["blurred"]
    assert not any("steady" in text for text in report.warnings)


def test_the_ideal_edit_is_near_the_ideal(report, cases):
    inside = report.summary("ideal_inside")
    assert inside["steady"].value > inside["per_frame"].value > inside["untouched"].value
    assert report.summary("material_accuracy")["untouched"].value < 0.2
    assert report.summary("clip_gain")["untouched"] == (0, 0, 0, len(cases))


def test_what_is_written_is_read_again(report, tmp_path):
    again = Report.from_json(report.to_json(tmp_path / "cards.json"))
    assert repr(again) == repr(report) and again.card == report.card
    for row, other in zip(report.rows, again.rows):
        for name, found in row.measures.items():
            assert np.array_equal(found.per_frame, other.measures[name].per_frame, equal_nan=True)
    lines = report.to_csv(tmp_path / "report.csv").read_text().splitlines()
    assert len(lines) == 1 + len(report.rows) and lines[0].split(",")[:3] == ["method", "case", "warp_error"]
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a report"):
        Report.from_json(tmp_path / "other.json")


def test_table_and_figures(report):
    html = report._repr_html_()
    assert all(name in html for name in ("per_frame", "consistency recovered", "checkpoint", "too weak"))
    assert report.markdown(["warp_error"]).count("\n") == 1 + len(report.methods)
    assert len(report.figure().axes) == 3 and len(report.frames_figure().axes[0].lines) == len(report.methods)
    for wrong in (
        lambda: report.values("beauty", "steady"),
        lambda: report.values("ssim", "best"),
        lambda: report.figure(["beauty"]),
        lambda: report.frames_figure(case="none"),
    ):
        with pytest.raises(ValueError, match="this report has|is unknown: there are"):
            wrong()


def test_names_cannot_break_the_page():
    row = Row("<script>", "<b>", {"ssim": Measure("ssim", 1)}, {"warp_error": "<i>"})
    assert not any(tag in Report([row], {"<u>": "<s>"})._repr_html_() for tag in ("<script>", "<i>", "<u>", "<s>"))


def test_the_card_tells_the_choices(report):
    card = report.card
    assert card["checkpoint"] == "toy" and "exact" in card["flow"] and card["clips"] == 4 and card["mask"] == "4 of 4 clips"
    assert "pairs all" in card["choices"]["consistency_all_pairs"] and "projected" in card["choices"]["clip_score"]
    assert set(card["versions"]) >= {"torch", "tokenflow_nb"} and set(card["choices"]) == set(METRICS)


def test_an_edit_result_is_enough(cases, judge, tmp_path):
    case = cases[0]
    config = EditConfig(case.prompt, source_prompt=case.source_prompt)
    report = evaluate(EditResult(case.ideal, case.source, config, dict(name="toy"), {}), store=Store(tmp_path))
    assert report.methods == ["edited"] and report.card["checkpoint"] == "toy" and "DIS" in report.card["flow"]
    assert "directional_similarity" in report.metrics and "background_psnr" not in report.metrics and not report.errors
    assert math.isnan(report.summary("warp_error")["edited"].low)  # one clip has no interval


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_an_interval_lies_within_the_values(values):
    found = bootstrap_interval(values, draws=50)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack and found.count == len(values)


# Bad input


def test_one_bad_clip_costs_no_other_its_figures(cases, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    bad = [cases[0].ideal[:3], tmp_path / "broken.mp4", np.full((FRAMES, SIZE, SIZE, 3), np.nan), cases[3].ideal]
    report = evaluate({"good": [case.ideal for case in cases], "bad": bad}, cases, metrics=["warp_error", "ssim"])
    assert len(report.values("ssim", "good")) == 4 and list(report.values("warp_error", "bad")) == [cases[3].name]
    assert len(report.errors) == 3
    for words, text in zip(("one length and one size", "broken.mp4", "NaN"), report.errors):
        assert words in text


def test_a_missing_mask_costs_only_its_metric(cases):
    bare = replace(cases[0], mask=None)
    report = evaluate([bare.ideal, cases[1].ideal], [bare, cases[1]], metrics=["ssim", "background_psnr"])
    assert len(report.values("ssim", "edited")) == 2 and list(report.values("background_psnr", "edited")) == [cases[1].name]
    assert len(report.errors) == 1 and "needs mask" in report.errors[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(results=lambda cases: cases[0].ideal, cases=None), "does not say what was asked"),
        (dict(results=lambda cases: {"a": [cases[0].ideal]}), "1 clips for 4 cases"),
        (dict(metrics=["beauty"]), "'beauty' is unknown: there are warp_error"),
        (dict(judge="/no/such/checkpoint"), "cannot be loaded; give judge="),
        (dict(flow="farneback", metrics="warp_error", exact=False), "Valid: dis, raft"),
        (dict(results=lambda cases: [case.ideal[:2] for case in cases]), "nothing could be measured.*one length"),
    ],
)
def test_arguments_that_make_no_table_say_why(cases, change, words, tmp_path):
    arguments = dict(results=lambda cases: [case.ideal for case in cases], cases=cases, store=Store(tmp_path)) | change
    if not arguments.pop("exact", True):
        arguments["cases"] = [replace(case, flow=None) for case in cases]
    with pytest.raises(ValueError, match=words):
        evaluate(arguments.pop("results")(cases), arguments.pop("cases"), **arguments)


def test_cases_need_names_of_their_own(cases):
    with pytest.raises(ValueError, match="name of 2 cases"):
        evaluate([cases[0].ideal] * 2, [cases[0]] * 2)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (dict(prompt=""), "prompt='' is empty"),
        (dict(mask=np.ones((2, SIZE, SIZE), bool)), "mask of shape"),
        (dict(mask=np.ones((FRAMES, SIZE, SIZE))), "give a bool"),
        (dict(ideal=Scene().render(FRAMES, 32)), "ideal has frames"),
        (dict(flow=Flow.exact(Scene().truth(3, SIZE))), "flow has frames"),
    ],
)
def test_a_case_is_checked_when_it_is_made(cases, parts, words):
    with pytest.raises(ValueError, match=words):
        replace(cases[0], **parts)


def test_metrics_refuse_what_they_cannot_compare(cases, judge):
    clip, other = cases[0].source, Scene().render(FRAMES, 32)
    for metric in (masked_psnr, metrics.ssim):
        with pytest.raises(ClipError, match="one length and one size"):
            metric(clip, other)
    with pytest.raises(ValueError, match="not one pixel"):
        masked_psnr(clip, clip, np.zeros(clip.frames.shape[:3], bool))
    with pytest.raises(ValueError, match="say what the picture shows"):
        metrics.clip_score(clip, " ", judge)
    with pytest.raises(ValueError, match="no direction"):
        metrics.directional_similarity(clip, clip, "a gold star", "a gold star", judge)


def test_frames_add_up_to_the_share_of_right_materials(cases, judge):
    wanted = cases[0].scene
    mixed = np.concatenate([cases[0].ideal.frames[:2], cases[0].source.frames[2:]])
    assert metrics.material_accuracy(mixed, wanted, judge) == pytest.approx(2 / FRAMES)
