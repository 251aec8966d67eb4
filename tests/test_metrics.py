"The evaluator on clips whose faults are known: no model but the toy CLIP."

import csv
import json
import math
import pickle
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.cli import command as cli; from tokenflow_nb.measure import metrics
from tokenflow_nb.clip import Clip, ClipError
from tokenflow_nb.edit import EditConfig, EditResult
from tokenflow_nb.measure.evaluate import evaluate
from tokenflow_nb.measure.flow import Flow, estimate_flow
from tokenflow_nb.measure.metrics import METRICS, Case, ClipJudge, Evidence, Measure, masked_psnr, metric, sharpness
from tokenflow_nb.measure.metrics import warp_error
from tokenflow_nb.measure.page import report_page
from tokenflow_nb.measure.report import Report, Row, bootstrap_interval
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
    from tokenflow_nb.measure.flow import estimate_flow

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
    case = Case("the ideal edit", cases[0].ideal, "a star")
    once, twice = blurred(case.source), blurred(blurred(case.source))
    assert sharpness(case.source) > sharpness(once) > sharpness(twice)
    assert 1 > metrics.ssim(Evidence(case, once)) > metrics.ssim(Evidence(case, twice))


def test_clip_metrics_by_hand(judge, cases):
    case = cases[0]
    seen, (wanted, shown) = judge.pictures(case.ideal.frames), judge.sentences([case.prompt, case.source_prompt])
    before = judge.pictures(case.source.frames)
    cosines = (seen @ seen.T).double().numpy()
    ideal = Evidence(case, case.ideal, judge=judge)
    assert metrics.clip_score(ideal) == pytest.approx(float((seen @ wanted).mean()), abs=1e-5)
    assert metrics.clip_gain(ideal) == pytest.approx(float(((seen - before) @ wanted).mean()), abs=1e-5)
    moved, direction = seen - before, wanted - shown
    expected = float((moved @ direction / moved.norm(dim=1) / direction.norm()).mean())
    assert metrics.directional_similarity(ideal) == pytest.approx(expected, abs=1e-5)
    pairs = [(i, j) for i in range(FRAMES) for j in range(FRAMES)]
    consecutive = np.mean([cosines[i, j] for i, j in pairs if j == i + 1])
    every = np.mean([cosines[i, j] for i, j in pairs if i != j])
    vbench = np.mean([(cosines[0, j] + cosines[j - 1, j]) / 2 for j in range(1, FRAMES)])
    assert metrics.consistency_consecutive(ideal) == pytest.approx(consecutive, abs=1e-5)
    assert metrics.consistency_all_pairs(ideal) == pytest.approx(every, abs=1e-5)
    assert metrics.consistency_vbench(ideal) == pytest.approx(vbench, abs=1e-5)


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
    for compare in (masked_psnr, lambda source, edited: metrics.ssim(Evidence(Case("a", source, "b"), edited))):
        with pytest.raises(ClipError, match="one length and one size"):
            compare(clip, other)
    with pytest.raises(ClipError, match="give larger frames"):
        metrics.ssim(Evidence(Case("a", Clip(clip.frames[:, :10, :10]), "b"), clip.frames[:, :10, :10]))
    with pytest.raises(ValueError, match="not one pixel"):
        masked_psnr(clip, clip, np.zeros(clip.frames.shape[:3], bool))
    with pytest.raises(ValueError, match="say what the picture shows"):
        judge.sentences([" "])
    with pytest.raises(ValueError, match="no direction"):
        metrics.directional_similarity(Evidence(Case("a", clip, "a gold star", "a gold star"), clip, judge=judge))


def test_frames_add_up_to_the_share_of_right_materials(cases, judge):
    mixed = np.concatenate([cases[0].ideal.frames[:2], cases[0].source.frames[2:]])
    assert metrics.material_accuracy(Evidence(cases[0], mixed, judge=judge)) == pytest.approx(2 / FRAMES)


# A metric of somebody else


@pytest.fixture
def registry(monkeypatch):
    "What a test registers is forgotten after it."
    len(METRICS)  # those of installed packages are there
    monkeypatch.setattr(METRICS, "_things", dict(METRICS._things))
    return METRICS


def brightness(evidence):
    "Mean of all values, for each frame."
    return evidence.edited.frames.mean((1, 2, 3))


def test_a_metric_of_this_file_is_in_the_report_with_its_title_and_direction(cases, registry, tmp_path):
    metric("brightness of 255", better="lower", digits=1)(brightness)
    clips = dict(dark=[dimmed(case.source, 0.5) for case in cases], light=[case.source for case in cases])
    report = evaluate(clips, cases, metrics=["brightness", "ssim"])
    expected = np.mean([case.source.frames.mean() for case in cases])
    assert report.summary("brightness")["light"].value == pytest.approx(expected)
    assert len(report.values("brightness", "light")[cases[0].name].per_frame) == FRAMES
    light = report.summary("brightness")["light"]
    cell = f"{light.value:.1f} [{light.low:.1f}, {light.high:.1f}]"
    assert "brightness of 255 ↓" in report.markdown() and cell in report.markdown()
    assert "brightness of 255 ↓" in report._repr_html_() and "brightness of 255 ↓" in report_page(report)
    assert report.figure(["brightness"]).axes[0].get_xlabel() == "brightness of 255 ←"
    again = Report.from_json(report.to_json(tmp_path / "cards.json"))
    assert again.summary("brightness") == report.summary("brightness")
    assert "brightness" in evaluate(clips, cases, judge="toy").metrics  # all that the cases allow


def test_what_a_metric_needs_is_asked_of_the_case_and_made_once(cases, registry, tmp_path, monkeypatch):
    calls = []

    def counted(clip, *rest):
        calls.append(clip)
        return estimate_flow(clip, *rest)

    monkeypatch.setattr(metrics, "estimate_flow", counted)
    metric("pixels in the mask", needs=("mask",), name="in_mask")(lambda evidence: evidence.mask.sum())
    metric("speed", needs=("flow",), name="speed")(lambda evidence: np.abs(evidence.flow.forward_flow).mean())
    metric("a secret", needs=("scene", "ideal"), name="secret")(lambda evidence: float(evidence.scene.radius))
    bare = Case("bare", cases[0].source, "a gold star")
    clips = dict(one=[bare.source, cases[1].source], other=[bare.source, cases[1].source])
    names = ["in_mask", "speed", "secret"]
    report = evaluate(clips, [bare, cases[1]], metrics=names, store=Store(tmp_path))
    assert report.values("in_mask", "one") == {cases[1].name: cases[1].mask.sum()}
    assert report.values("secret", "other") == {cases[1].name: cases[1].scene.radius}
    assert set(report.values("speed", "one")) == {"bare", cases[1].name} and len(calls) == 1  # the other's flow is known
    assert sorted(report.errors)[:2] == [
        "one, bare: in_mask: needs mask: Case(..., mask=...)",
        "one, bare: secret: needs scene and ideal: Case(..., scene=...)",
    ]
    remedied = replace(bare, mask=cases[0].mask)
    assert evaluate(bare.source, remedied, metrics=["in_mask"]).values("in_mask", "edited") == {"bare": cases[0].mask.sum()}


def test_a_metric_that_needs_no_clip_model_loads_none(cases, registry, monkeypatch):
    monkeypatch.setattr(ClipJudge, "load", lambda *_: pytest.fail("a CLIP model was loaded"))
    metric("brightness")(brightness)
    assert evaluate(cases[0].source, cases[0], metrics=["brightness"]).metrics == ["brightness"]


def broken(evidence):
    raise KeyError("depth")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (broken, "KeyError: 'depth'"),
        (lambda evidence: "bright", "odd returned 'bright': return a number, one for each frame, or a Measure"),
        (lambda evidence: None, "odd returned None"),
        (lambda evidence: [], "return a number"),
        (lambda evidence: evidence.edited.frames, "return a number"),
    ],
)
def test_a_metric_that_fails_costs_no_other_its_number(cases, registry, function, words):
    metric("odd", name="odd")(function)
    report = evaluate(cases[0].ideal, cases[0], metrics=["odd", "ssim"])
    assert report.metrics == ["ssim"] and len(report.errors) == 1 and words in report.errors[0]
    metric("odd", name="odd", better="")(function)  # the same function may be defined anew
    with pytest.raises(ValueError, match="nothing could be measured"):
        evaluate(cases[0].ideal, cases[0], metrics=["odd"])


@pytest.mark.parametrize(
    ("register", "words"),
    [
        (lambda: metric("brighter", name="ssim")(brightness), "name='ssim': tokenflow_nb.measure.metrics.ssim is the metric of this name: take another"),
        (lambda: metric("two")(lambda edited, source: 0), "give a function of one Evidence"),
        (lambda: metric("none", name="none")(lambda: 0), "give a function of one Evidence"),
        (lambda: metric("no function")("brightness"), "give a function of one Evidence"),
        (lambda: metric("nameless")(lambda evidence: 0), "name='<lambda>': give the metric a name of letters"),
        (lambda: metric("a comma", name="a,b")(brightness), "give the metric a name of letters"),
        (lambda: metric(brightness), "give a heading, @metric"),
        (lambda: metric(" "), "give a heading, @metric"),
        (lambda: metric("up", better="up"), "better='up' is unknown: Valid: higher, lower"),
        (lambda: metric("deep", needs=("depth",)), "needs='depth' is unknown: Valid: flow, judge, mask"),
        (lambda: metric("deep", needs=5), "needs=5"),
        (lambda: metric("large", scale=0), "scale=0"),
        (lambda: metric("exact", digits=-1), "digits=-1"),
    ],
)
def test_a_metric_of_another_shape_is_refused_in_one_line(registry, register, words):
    before = dict(METRICS)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        register()
    assert "\n" not in str(caught.value) and dict(METRICS) == before


MODULE = '''
from tokenflow_nb.measure.metrics import metric

@metric("blueness of all", better="lower", digits=3)
def blueness(evidence):
    return evidence.edited.frames[..., 2].mean() / 255
'''
@pytest.fixture
def fresh(tmp_path, registry, monkeypatch):
    "Puts a package with some entry points on the path, as pip would install it, before METRICS is first read."

    def install(points):
        (tmp_path / "blue_metrics.py").write_text(MODULE)
        (tmp_path / "broken_metrics.py").write_text("def plain(evidence): return 0\n")
        info = tmp_path / "blue_metrics-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: blue-metrics\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[tokenflow_nb.metrics]\n" + "\n".join(points) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(METRICS, "_complete", False)

    yield install
    for name in ("blue_metrics", "broken_metrics"):
        sys.modules.pop(name, None)


def test_a_metric_of_an_installed_package_is_on_the_command_line(tmp_path, fresh, monkeypatch, capsys):
    fresh(["blueness = blue_metrics:blueness"])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "--list"]) == 0
    assert re.search(r"^  blueness +blueness of all, lower is better$", capsys.readouterr().out, re.M)
    argv = ["evaluate", "--suite", "toy", "--scenes", "1", "--prompts", "1", "--frames", "2", "--steps", "2", "--quiet"]
    argv += ["--methods", "vae", "--processes", "1", "--out", "report"]
    assert cli.main([*argv, "--metrics", "blueness,ssim"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^\| method \| blueness of all ↓ \| SSIM to the source ↑ \|$", said, re.M)
    [value] = re.findall(r"^\| vae \| (0\.\d{3}) \|", said, re.M)
    with open(tmp_path / "report" / "report.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert f"{float(row['blueness']):.3f}" == value and "blueness of all ↓" in (tmp_path / "report" / "report.html").read_text()
    assert cli.main([*argv, "--metrics", "bluenes"]) == 2 and "'bluenes' is unknown" in capsys.readouterr().err


def test_a_package_whose_metric_is_broken_costs_no_other_metric(fresh):
    points = ["none = broken_metrics:nothing", "plain = broken_metrics:plain", "away = no_such_module:metric"]
    fresh([*points, "all = blue_metrics"])
    with pytest.warns(UserWarning) as told:
        assert METRICS["blueness"].title == "blueness of all" and "ssim" in METRICS
    texts = [str(each.message) for each in told]
    assert len(texts) == 3 and all("is left out: " in said and "\n" not in said for said in texts)
    assert "'plain' of broken_metrics:plain is left out: ValueError: it is no metric: put @metric(...)" in texts[1]


@pytest.mark.parametrize("worst, scale", [(0.004, "linear"), (0.5, "log")])
def test_an_outlier_gets_a_logarithmic_axis(worst, scale):
    errors = dict(vae=0.001, one=0.002, two=0.003, worst=worst)
    rows = [Row(name, "a", {"warp_error": Measure("warp_error", value)}) for name, value in errors.items()]
    (axes,) = Report(rows, {}).figure(["warp_error"]).axes
    assert axes.get_xscale() == scale and ("(log)" in axes.get_xlabel()) == (scale == "log")
