"The feature panel's story: look at the clip, turn to another layer, click the object, drag over the film, ask for advice."

import re

CELL = """
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.inversion import invert
from tokenflow_nb.panels import FeaturePanel
from tokenflow_nb.toy.world import Scene

scene = Scene("star", "marble", "sand", centre=(46, 70), radius=34, velocity=(1.5, -0.5), spin=0.03, pan=(0.6, 0.2))
clip, model = scene.render(6), load_model("toy", device="cpu")
trajectory = invert(model, clip, scene.caption, steps=3, progress=False)
panel = FeaturePanel(trajectory, clip, model, timesteps=[1, 334])
panel
"""
ROWS = ".tfnb-features .tfnb-strip-row"


def pixels(page, row: int) -> str:
    "What a row of the film shows, to compare."
    return page.locator(ROWS).nth(row).evaluate("canvas => canvas.toDataURL()")


def changed(page, row: int, before: str) -> None:
    "Waits until a row of the film shows something else."
    page.wait_for_function(
        "([selector, row, before]) => { const canvas = document.querySelectorAll(selector)[row]; return canvas && canvas.toDataURL() !== before }",
        arg=[ROWS, row, before],
    )


def title(page, row: int) -> str:
    return page.locator(".tfnb-features .tfnb-strip-title").nth(row).inner_text()


def test_a_person_looks_at_features_and_clicks(show, shots):
    page = show(CELL, ".tfnb-features")
    note = page.locator(".tfnb-features .tfnb-note")
    page.get_by_text("(yellow)").wait_for()  # recorded, and frames compared
    assert page.locator(ROWS).count() == 3 and page.locator(".tfnb-features .tfnb-player-canvas").count() == 3
    assert "up 2 · 16×16 · attn 2" in title(page, 1) and "of the variance" in title(page, 1)

    # the layer slider, by the keyboard
    before = pixels(page, 1)
    handle = page.locator(".tfnb-features .noUi-handle").first
    handle.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    changed(page, 1, before)
    page.wait_for_function("() => document.querySelectorAll('.tfnb-features .tfnb-strip-title')[1].textContent.includes('up 3')")
    page.get_by_text("(yellow)").wait_for()

    # a click on the object of the first frame marks every frame
    before = [pixels(page, row) for row in range(3)]
    canvas = page.locator(ROWS).nth(0)
    box = canvas.bounding_box()
    wide, tall = box["width"] / 6, box["height"] - 18  # of a frame; its number is below
    canvas.click(position=dict(x=0.375 * wide, y=0.52 * tall))
    for row in range(3):
        changed(page, row, before[row])
    words = note.filter(has_text="Token")
    words.wait_for()
    first = words.inner_text()
    assert "of frame 0" in first and "5 other frames" in first and re.search(r"[0-5] of 5 matches lead back", first)

    # dragging over the film to another frame follows
    page.mouse.move(box["x"] + 0.4 * wide, box["y"] + 0.52 * tall)
    page.mouse.down()
    page.mouse.move(box["x"] + 1.4 * wide, box["y"] + 0.54 * tall, steps=4)
    page.mouse.up()
    note.filter(has_text="of frame 1").wait_for()

    # the keyboard picks too: to the next frame, and Enter
    page.locator(".tfnb-features .tfnb-strip").focus()
    page.keyboard.press("PageDown")
    page.keyboard.press("Enter")
    note.filter(has_text="of frame 2").wait_for()

    # the player's frame slider moves, and plays
    page.locator('.tfnb-features input[aria-label="Frame"]').fill("4")
    page.locator(".tfnb-features .tfnb-player-play").click()
    page.wait_for_timeout(600)
    page.locator(".tfnb-features .tfnb-player-play").click()

    shots(page, ".tfnb-features", "features")

    page.get_by_role("button", name="Advise").click()
    note.filter(has_text="keyframe_interval=").wait_for()
    assert not page.locator(".tfnb-features .tfnb-error").count()
