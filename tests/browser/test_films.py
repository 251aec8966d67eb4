"Films in a real page: how they arrive, every view of the player, the strip, and an upload."

import re

# 240 frames of 640×360, twice, as an edit and its source: waves with grain, which move
LONG = """
import numpy as np
from tokenflow_nb.panels.films import Film, Player

rows, columns = np.mgrid[:360, :640]
grain = np.random.default_rng(0).normal(0, 2, (360, 640, 3))
waves = [128 + 60 * np.sin(columns / (9 + 7 * c) + rows / 31) + 50 * np.cos(rows / (13 + 5 * c)) for c in range(3)]
picture = (np.stack(waves, -1) + grain).clip(0, 255).astype(np.uint8)


class Rolled:
    "240 frames that are made when they are asked for."

    def __init__(self, channel):
        self.picture = np.roll(picture, channel, -1)

    def __len__(self):
        return 240

    def __getitem__(self, frame):
        return np.roll(self.picture, 3 * frame, 1)

    def __iter__(self):
        return iter([self.picture])


player = Player(films=[Film(Rolled(0)), Film(Rolled(1))], names=["source", "an edit with <b>a long name</b>"], view="wipe", fps=24)
player.add_class("under-test")
player
"""
PLAYER, STAGE = ".tfnb-player", ".tfnb-player-stage"


def frame_of(page) -> int:
    return int(re.search(r"frame (\d+) of", page.locator(f"{PLAYER} .tfnb-player-count").inner_text())[1])


def pixels(page, number=0):
    return page.locator(f"{PLAYER} .tfnb-player-canvas").nth(number).evaluate("canvas => canvas.toDataURL()")


def differs(page, before, number=0):
    page.wait_for_function(
        "([selector, number, before]) => document.querySelectorAll(selector)[number].toDataURL() !== before",
        arg=[f"{PLAYER} .tfnb-player-canvas", number, before],
    )


def test_two_films_of_240_frames(show, shots):
    "They are there at once, arrive in a few megabytes, and every view works on what has arrived."
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    page = show(LONG, f"{PLAYER} .tfnb-player-canvas")
    player, count, grip = page.locator(PLAYER), page.locator(f"{PLAYER} .tfnb-player-count"), page.locator(f"{PLAYER} .tfnb-grip")
    expect(count).to_have_text("frame 0 of 0–239")
    expect(page.locator(f"{PLAYER} .tfnb-player-left")).to_have_text("source")
    expect(page.locator(f"{PLAYER} .tfnb-player-right")).to_have_text("an edit with <b>a long name</b>")
    canvas = player.locator(".tfnb-player-canvas")
    assert canvas.bounding_box()["width"] > 800  # it fills the page

    # far away, long before everything in between was sent
    page.locator(STAGE).focus()
    page.keyboard.press("End")
    expect(count).to_have_text("frame 239 of 0–239")
    before = pixels(page)
    page.keyboard.press("ArrowLeft")
    expect(count).to_have_text("frame 238 of 0–239")
    differs(page, before)
    page.keyboard.press("Home")
    expect(count).to_have_text("frame 0 of 0–239")

    # the grip: keys, then the pointer
    before = pixels(page)
    grip.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    expect(grip).to_have_attribute("aria-valuenow", "60")
    differs(page, before)
    box = canvas.bounding_box()
    handle = grip.bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40, steps=5)
    page.mouse.up()
    expect(grip).to_have_attribute("aria-valuenow", "25")
    shots(page, PLAYER, "films-wipe")

    # it plays at 24 frames a second by its own clock, and stops where it was
    page.locator(STAGE).focus()
    page.keyboard.press("Space")
    expect(player.get_by_role("button", name="Pause")).to_be_visible()
    page.wait_for_function(f"() => !document.querySelector('{PLAYER} .tfnb-player-count').textContent.startsWith('frame 0 ')")
    page.keyboard.press("Space")
    expect(player.get_by_role("button", name="Play", exact=True)).to_be_visible()
    stopped = frame_of(page)
    page.wait_for_timeout(300)
    assert frame_of(page) == stopped > 0

    # zoom stays in the picture, and nothing of it reaches the notebook
    before = pixels(page)
    player.get_by_role("button", name="Zoom in").click()
    differs(page, before)
    expect(player.locator(".tfnb-player-zoom").nth(1)).to_have_text("150 %")
    page.locator(STAGE).focus()
    for key in ("0", "d", "d", "a", "b", "x"):
        page.keyboard.press(key)
    expect(player.locator(".tfnb-player-zoom").nth(1)).to_have_text("100 %")
    assert page.locator(".jp-Notebook .jp-CodeCell").count() <= 2 and player.is_visible()

    player.locator("select").first.select_option("difference")
    expect(player.locator(".tfnb-player-note")).to_contain_text("of black to white apart")
    shots(page, PLAYER, "films-difference")
    player.locator("select").first.select_option("cut along time")
    expect(player.locator(".tfnb-player-name").nth(1)).to_have_text("source, row 180: time runs down")
    line, before = player.locator(".tfnb-grip"), pixels(page, 1)
    line.focus()
    page.keyboard.press("PageDown")
    expect(player.locator(".tfnb-player-name").nth(1)).to_have_text("source, row 216: time runs down")
    differs(page, before, 1)
    expect(page.locator(STAGE)).to_have_attribute("aria-busy", "false")
    shots(page, PLAYER, "films-cut")
    player.locator("select").nth(1).select_option(label="a column over time (y–t)")
    expect(player.locator(".tfnb-player-name").nth(1)).to_contain_text("time runs to the right")

    # full screen, by its button; the page comes back as it was
    player.get_by_role("button", name="Full screen").click()
    page.wait_for_function("() => document.fullscreenElement !== null")
    page.evaluate("document.exitFullscreen()")
    expect(player.get_by_role("button", name="Full screen", exact=True)).to_be_visible()


TOY = """
from tokenflow_nb.panels.films import Player, Strip
from tokenflow_nb.toy.world import Scene
import ipywidgets

scene = Scene("star", "blue", "grass", centre=(52, 64), velocity=(1.5, 0), radius=34)
films = [scene.render(8).frames, scene.replace(material="gold").render(8).frames]
player = Player(films=films, names=["source", "edited"], playing=True)
strip = Strip(
    rows=films, titles=["source, a title that is rather long and wraps where the page is narrow", "edited"], current=2, outlined=[0, 4],
    marks=[dict(frame=1, x=0.4, y=0.5, text="0.93", colour="#e6550d")],
)
box = ipywidgets.VBox([player, strip])
box.add_class("tfnb-panel")
box
"""


def test_a_short_film_and_its_strip(show, shots):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    page = show(TOY, ".tfnb-strip-row")
    rows, canvas = page.locator(".tfnb-strip-row"), page.locator(f"{PLAYER} .tfnb-player-canvas")
    expect(rows).to_have_count(2)
    expect(canvas).to_have_count(2)
    expect(page.locator(f"{PLAYER} .tfnb-player-play")).to_have_text("Pause")
    page.locator(f"{PLAYER} .tfnb-player-play").click()
    expect(page.locator(".tfnb-strip")).to_have_attribute("aria-busy", "false")
    assert rows.first.bounding_box()["width"] > 0.9 * page.locator(".tfnb-strip").bounding_box()["width"]  # they fill the width
    page.locator(".tfnb-strip").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator(".tfnb-spoken")).to_contain_text("frame 0")
    shots(page, ".tfnb-panel", "films-strip")

    # a reloaded page asks again
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    page.reload()
    expect(page.locator(".tfnb-strip")).to_have_attribute("aria-busy", "false", timeout=120_000)


UPLOAD = """
from tokenflow_nb.panels.upload import Upload
import ipywidgets

upload, path = Upload(), ipywidgets.HTML()
upload.observe(lambda change: setattr(path, "value", change.new and f"kept {open(change.new, 'rb').read()[:4]} of {len(open(change.new, 'rb').read())}"), "path")
ipywidgets.VBox([upload, path])
"""


def test_an_upload_of_many_parts(show, shots, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=120_000)
    page = show(UPLOAD, ".tfnb-upload-choose")
    film, text = tmp_path / "wölf.mp4", tmp_path / "notes.pdf"
    film.write_bytes(b"film" + bytes(23_000_000))  # more than one message of the server may hold
    text.write_bytes(b"text")
    page.locator(".tfnb-upload-file").set_input_files(text)
    expect(page.locator(".tfnb-upload .tfnb-error")).to_contain_text("notes.pdf is no film")
    shots(page, ".tfnb-upload", "upload")
    page.locator(".tfnb-upload-file").set_input_files(film)
    expect(page.get_by_text("kept b'film' of 23000004")).to_be_visible()
    expect(page.locator(".tfnb-upload-words")).to_contain_text("uploaded")
    expect(page.locator(".tfnb-upload .tfnb-error")).to_be_hidden()
