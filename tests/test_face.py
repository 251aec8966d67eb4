"What is seen of an object in a saved notebook without its kernel: on a forge, in nbconvert, in Quarto."

import base64
import io
import re
import sys

import nbformat
import numpy as np
import pytest
import torch
import traitlets
from nbconvert import HTMLExporter
from PIL import Image

from tokenflow_nb.clip import SEAM, SIDE, Clip, player_html, show_clips
from tokenflow_nb.config import EditConfig
from tokenflow_nb.features import record
from tokenflow_nb.inversion import invert
from tokenflow_nb.measure.metrics import Measure
from tokenflow_nb.measure.report import Report, Row
from tokenflow_nb.panels import ComparePanel, EditPanel
from tokenflow_nb.panels.base import WIDGET, Note, Panel, Worker
from tokenflow_nb.result import EditResult
from tokenflow_nb.store import Store
from tokenflow_nb.support.face import MOST_BYTES, WIDEST, card, drawn, sheet, small_png, spread
from tokenflow_nb.support.moving import MovingPicture
from tokenflow_nb.toy.world import Scene

CLIP = Scene("star", "blue", "grass", velocity=(2, 1)).render(frames=9)
GOLD = Scene("star", "gold", "grass", velocity=(2, 1)).render(frames=9)
RESULT = EditResult(GOLD, CLIP, EditConfig("a <b>gold</b> star"), dict(name="toy"), dict(edit=1.5))


class BrightnessState(traitlets.HasTraits):
    "A state as a panel of somebody else's has it."

    words, error = traitlets.Unicode("brightness 90 of 255"), traitlets.Unicode()

    def __init__(self):
        super().__init__()
        self.worker, self.clip = Worker(threaded=False), CLIP

    def close(self):
        self.clip = None


class BrightnessPanel(Panel):
    "A panel that draws nothing itself."

    def __init__(self):
        super().__init__(BrightnessState(), [Note("x")], "brightness")


@pytest.fixture(scope="module")
def inverted(model, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("cache"))
    trajectory = invert(model, CLIP[:3], "a blue star on grass", 3, store=store, progress=False)
    return trajectory, record(model, trajectory, ["up 3 attn 1", "mid attn 0"], store=store, progress=False)


def report() -> Report:
    measure = lambda value: Measure("warp_error", value, [value, value])  # noqa: E731
    rows = [Row(name, "star", {"warp_error": measure(value)}) for name, value in (("vae", 0.001), ("tokenflow", 0.002))]
    return Report(rows, {})


@pytest.fixture(params=["clip", "result", "moving", "report", "trajectory", "recording", "edit panel", "compare panel", "other panel"])
def shown(request):
    simple = dict(clip=lambda: CLIP, result=lambda: RESULT, moving=lambda: CLIP.show("what to see"), report=report)
    if request.param in simple:
        return simple[request.param]()
    if request.param in ("trajectory", "recording"):
        return request.getfixturevalue("inverted")[request.param == "recording"]
    makers = {"edit panel": lambda: EditPanel("toy"), "compare panel": lambda: ComparePanel([CLIP, GOLD], ["a", "b"])}
    panel = makers.get(request.param, BrightnessPanel)()
    request.addfinalizer(panel.close)
    return panel


def picture(bundle: dict) -> Image.Image:
    content = base64.b64decode(bundle["image/png"])
    assert len(content) <= 100_000
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_everything_has_a_picture_and_a_line(shown):
    bundle = shown._repr_mimebundle_()
    seen = picture(bundle)
    assert seen.width <= WIDEST and len(np.unique(np.asarray(seen))) > 20
    assert bundle["text/plain"] and (isinstance(shown, Report) or "\n" not in bundle["text/plain"])
    assert (WIDGET in bundle) == isinstance(shown, Panel)


def as_page(bundle: dict) -> str:
    "What nbconvert makes of a notebook with this saved output."
    output = nbformat.v4.new_output("execute_result", data=nbformat.from_dict(bundle), execution_count=1)
    cell = nbformat.v4.new_code_cell("shown", outputs=[output])
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    return page.partition("<body")[2]


def test_nbconvert_shows_an_image(shown):
    page = as_page(shown._repr_mimebundle_())
    (source, *_) = re.findall(r"<img[^>]*\ssrc=[\"']data:image/\w+;base64,([^\"']+)", page) or [""]
    if isinstance(shown, Report):
        assert "<table" in page
    else:
        assert Image.open(io.BytesIO(base64.b64decode(source))).width > 100


def test_a_player_has_pictures_for_where_no_film_plays():
    html = RESULT._repr_html_()
    assert "&lt;b&gt;gold" in html and "<b>" not in html
    for found in (*re.findall(r'poster="data:image/webp;base64,([^"]+)', html), *re.findall(r'<img src="data:image/webp;base64,([^"]+)', html)):
        assert Image.open(io.BytesIO(base64.b64decode(found))).width > 200
    assert html.count("poster=") == html.count("<img ") == html.count("<video ") == 1
    assert html.index("<video") < html.index("<img") < html.index("</video>")  # is shown instead of the film


@pytest.mark.parametrize("size", [(128, 128), (36, 64), (640, 360), (20, 400)])
def test_a_result_is_large_enough_and_its_controls_are_below(size):
    clip = Clip(np.zeros((2, *size, 3), np.uint8))
    wide, tall = map(int, re.search(r"aspect-ratio:(\d+)/(\d+)", player_html([clip, clip], ["source", "edited"])).groups())
    side = (wide - SEAM) / 2
    if max(size) <= 2 * min(size):
        assert min(side, tall - 72) >= SIDE - SEAM
    assert abs(side / (tall - 72) - size[1] / size[0]) < 0.1 * size[1] / size[0]


def test_the_source_is_above_the_edit_in_a_result():
    seen = np.asarray(RESULT.face()).astype(int)
    height = len(seen)
    above, below = seen[height // 4], seen[3 * height // 4]
    assert (above[:, 2] > above[:, 0] + 60).sum() > 100 and (below[:, 2] > below[:, 0] + 60).sum() < 10


def test_a_trajectory_becomes_noise(inverted):
    seen = np.asarray(inverted[0].face().convert("L")).astype(float)
    rough = np.abs(np.diff(seen[40:140], axis=1)).mean(0)
    assert rough[-120:].mean() > rough[:120].mean()


def test_damaged_data_still_says_what_it_is(model, tmp_path):
    trajectory = invert(model, CLIP[:2], "a star", 2, store=Store(tmp_path), progress=False)
    for part in trajectory.entry.path.glob("*.safetensors"):
        part.unlink()
    assert set(trajectory._repr_mimebundle_()) == {"text/plain"} and drawn(3) is None


def test_pictures_are_small_whatever_they_show():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1600, 3), np.uint8))
    for made in (small_png(noise), small_png(noise, most=5000), small_png(Image.new("RGB", (1, 1)))):
        assert len(made) <= MOST_BYTES and Image.open(io.BytesIO(made)).width <= WIDEST
    assert spread(1) == [0] and spread(100) == [0, 20, 40, 59, 79, 99]
    frames = list(CLIP.frames[:6])
    assert sheet([frames], ["x" * 500], range(6)).width <= WIDEST
    assert card("t" * 500, ["word " * 300, "x" * 900], Image.new("RGB", (2000, 100))).width == 720


# Panels


@pytest.fixture
def displayed(monkeypatch):
    "What is sent to the notebook: display or update, its data, its options."
    sent = []
    base = sys.modules["tokenflow_nb.panels.base"]
    monkeypatch.setattr(base, "display", lambda data, **options: sent.append(("display", data, options)))
    monkeypatch.setattr(base, "update_display", lambda data, **options: sent.append(("update", data, options)))
    return sent


def test_a_panel_says_what_it_is():
    panel = EditPanel("toy")
    assert re.match(r"EditPanel · 24 frames · a gold star on grass · ", panel._repr_mimebundle_()["text/plain"])


def test_a_closed_panel_says_so(displayed):
    panel = BrightnessPanel()
    panel.close()
    panel.close()
    panel._ipython_display_()
    assert displayed == [("display", {"text/plain": "BrightnessPanel · closed"}, dict(raw=True))]


def test_elsewhere_a_panel_is_one_output(displayed, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    panel = BrightnessPanel()
    panel._ipython_display_()
    panel.state.worker.start("looking", lambda stop: None)
    ((kind, data, _),) = displayed
    assert kind == "display" and set(data) == {WIDGET, "image/png", "text/plain"}
    panel.close()


def test_in_jupyterlab_the_picture_is_an_output_that_follows_the_work(displayed, monkeypatch):
    monkeypatch.setattr(sys.modules["tokenflow_nb.panels.base"], "in_lab", lambda: True)
    panel = BrightnessPanel()
    panel.state.worker.start("looking", lambda stop: None)
    assert not displayed  # nobody sees it yet
    panel._ipython_display_()
    panel.state.worker.start("looking", lambda stop: setattr(panel.state, "words", "brightness 12 of 255"))
    kinds = [kind for kind, _, _ in displayed]
    (_, view, _), (_, first, once), (_, second, again) = displayed
    assert kinds == ["display", "display", "update"] and once["display_id"] == again["display_id"]
    assert set(view) == {WIDGET, "text/plain"} and set(first) == {"image/png", "text/plain"}
    assert "12 of 255" in second["text/plain"] and first["image/png"] != second["image/png"]
    panel.close()


def test_three_saved_panels_are_small(monkeypatch):
    panels = [EditPanel("toy"), ComparePanel([CLIP, GOLD], ["a", "b"]), BrightnessPanel()]
    assert sum(len(str(panel._repr_mimebundle_())) for panel in panels) < 500_000
    for panel in panels:
        panel.close()


# Moving pictures


def test_a_moving_picture_moves(tmp_path):
    made = show_clips({"source": CLIP, "edited: <i>": GOLD}, "one <i> is gold")
    film = Image.open(made.save(tmp_path / "x.webp"))
    assert film.n_frames == len(CLIP) and film.width > 2 * 200 and "&lt;i&gt;" in made._repr_html_() and "<i>" not in made._repr_html_()
    still = np.asarray(film.convert("RGB")).astype(int)
    film.seek(8)
    assert np.abs(np.asarray(film.convert("RGB")).astype(int) - still).mean() > 0.5


@pytest.mark.parametrize("films", [{}, {"a": CLIP.frames, "b": CLIP.frames[:3]}, {"a": CLIP.frames, "b": CLIP.frames[:, ::2]}])
def test_films_of_one_length_and_size_only(films):
    with pytest.raises(ValueError, match="films="):
        MovingPicture(films)


def test_a_moving_picture_is_a_webp(tmp_path):
    with pytest.raises(ValueError, match="webp"):
        CLIP.show().save(tmp_path / "x.gif")
