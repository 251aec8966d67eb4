"The examples of CONTRIBUTING.md do what it says, as they stand there."

import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from tokenflow_nb.backbones.load import MODELS
from tokenflow_nb.clip import Clip
from tokenflow_nb.compare import compare
from tokenflow_nb.edit import edit_video
from tokenflow_nb.editors import editors
from tokenflow_nb.editors.base import EDITORS
from tokenflow_nb.measure.metrics import METRICS, Case
from tokenflow_nb.measure.evaluate import evaluate
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
SCENE = Scene("star", "blue", "grass", velocity=(2, 0))
FEW = dict(num_inference_steps=2, keyframe_interval=2, progress=False)


@pytest.fixture
def example(monkeypatch):
    "Runs the code below a heading, in a module of its own; what it registers is forgotten afterwards."
    editors(), len(METRICS), len(MODELS)  # those of installed packages are there
    for registry in (EDITORS, METRICS, MODELS):
        monkeypatch.setattr(registry, "_things", dict(registry._things))

    def run(heading: str) -> types.ModuleType:
        code = re.search(rf"^### {heading}\n.*?^```python\n(.*?)^```", TEXT, re.M | re.S)[1]
        module = types.ModuleType("an_example")
        monkeypatch.setitem(sys.modules, "an_example", module)
        exec(compile(code, f"CONTRIBUTING.md, {heading}", "exec"), module.__dict__)
        return module

    return run


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=3, size=64)


def test_an_editor(example, model, clip, tmp_path):
    example("An editor")
    options = dict(model=model, size=(64, 64), store=Store(tmp_path), **FEW)
    some, all_of_it = (edit_video(clip, "a gold star", method="faint", share=share, **options) for share in (0.3, 1.0))
    source = model.decode(model.encode(clip.frames)).astype(int)
    assert np.abs(all_of_it.frames - source).mean() < 1 < np.abs(some.frames - source).mean()
    assert some.record()["config"]["share"] == 0.3


def test_a_metric(example):
    example("A metric")
    red, grey = Clip(np.full((2, 8, 8, 3), (240, 0, 0), np.uint8)), Clip(np.full((2, 8, 8, 3), 90, np.uint8))
    for clip, share in ((red, 241 / 243), (grey, 1 / 3)):
        report = evaluate({"mine": clip}, Case("one", clip, "a red wall"), metrics=["redness"])
        assert report.rows[0].measures["redness"] == pytest.approx(share)


def test_a_method_to_compare_with(example, model, clip, tmp_path):
    halfway = example("A method to compare with").halfway
    found = compare(clip, "a gold star", {"halfway": halfway}, model=model, size=(64, 64), store=Store(tmp_path), **FEW)
    frames = found["halfway"].frames
    assert frames.shape == clip.frames.shape and np.abs(frames.astype(int) - clip.frames // 2 - 64).max() == 0


def test_a_family_of_models(example, tmp_path):
    example("A family of models")
    clip = SCENE.render(frames=3, size=16)
    result = edit_video(clip, "a gold star", model="cells", store=Store(tmp_path), **FEW)
    assert result.frames.shape == (3, 16, 16, 3) and result.model["name"] == "cells"
    assert MODELS["cells"].description.startswith("one attention layer")


def test_a_panel(example, clip):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        panel = example("A panel").BrightnessPanel(clip)
    slider, note, *_ = panel.children
    slider.value = 2
    assert f"frame 2: brightness {clip.frames[2].mean():.0f}" in note.value and panel.errors.text == ""
    panel.close()
    assert panel.state.clip is None


def test_every_kind_that_the_entry_points_name_is_read():
    groups = re.findall(r'entry-points."([\w.]+)"', TEXT)
    assert groups == [EDITORS.group, METRICS.group, MODELS.group]
