"The feature panel's story: look at the clip, choose another layer, click the object, drag over the film, take the advice over."

import re

CELL = """
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.edit import Edit, EditConfig
from tokenflow_nb.inversion import invert
from tokenflow_nb.panels import FeaturePanel
from tokenflow_nb.toy.world import Scene

scene = Scene("star", "marble", "sand", centre=(46, 70), radius=34, velocity=(1.5, -0.5), spin=0.03, pan=(0.6, 0.2))
clip, model = scene.render(6), load_model("toy", device="cpu")
trajectory = invert(model, clip, scene.caption, steps=3, progress=False)
"""
SOURCE = f"{CELL}\npanel = FeaturePanel(trajectory, clip, model, timesteps=[1, 334])\npanel"
EDIT = f"""{CELL}
config = EditConfig("a gold star on sand", scene.caption, num_inference_steps=3, keyframe_interval=3)
panel = FeaturePanel(Edit(model, trajectory, config, clip).run(), layers=["up 2 attn 2", "mid attn 0"])
panel"""
PANEL = ".tfnb-features"
ROWS = f"{PANEL} .tfnb-strip-row"


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
    return page.locator(f"{PANEL} .tfnb-strip-title").nth(row).inner_text()


def compared(page) -> None:
    "Waits until the redundancy of the chosen layer is shown."
    page.get_by_text("(yellow)").wait_for()


def test_a_person_looks_at_features_and_clicks(show, shots, axe):
    from playwright.sync_api import expect

    page = show(SOURCE, PANEL)
    panel, note = page.locator(PANEL), page.locator(f"{PANEL} .tfnb-note")
    button = lambda name: panel.get_by_role("button", name=name, exact=True)  # noqa: E731
    expect(panel).to_contain_text("Click a point of the clip: rings show where the model finds it again.")
    expect(panel.get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile(r"^\d+$"))
    compared(page)
    assert page.locator(ROWS).count() == 3 and page.locator(f"{PANEL} .tfnb-player-canvas").count() == 3
    assert "up 2 · 16×16 · attn 2" in title(page, 1) and "of the variance" in title(page, 1)
    expect(panel.get_by_role("progressbar")).to_be_hidden()
    expect(panel.get_by_role("status").filter(has_text="recorded 33 layers")).to_be_visible()

    # layers are in a list by block, and no name is cut off
    layer = panel.get_by_role("combobox", name="Layer")
    assert layer.locator("optgroup").evaluate_all("groups => groups.map((group) => group.label)")[-1] == "up 3 · 32×32"
    assert layer.evaluate("select => select.scrollWidth <= select.clientWidth")
    before = pixels(page, 1)
    layer.select_option(label="up 3 · 32×32 · attn 1")
    changed(page, 1, before)
    page.wait_for_function("() => document.querySelectorAll('.tfnb-features .tfnb-strip-title')[1].textContent.includes('up 3')")
    compared(page)
    panel.get_by_role("slider", name="Timestep").fill("0")
    expect(panel.locator(".tfnb-strip-title").nth(1)).to_contain_text("t = 1:")
    compared(page)

    # a click on the object of the first frame marks every frame; the legend says what the rings are
    before = [pixels(page, row) for row in range(3)]
    canvas = page.locator(ROWS).nth(0)
    canvas.click(position=dict(x=60, y=80))
    for row in range(3):
        changed(page, row, before[row])
    words = note.filter(has_text="Token (")
    words.wait_for()
    first = words.inner_text()
    assert "of frame 0" in first and "5 other frames" in first and re.search(r"[0-5] of 5 matches lead back", first)
    expect(panel.locator(".tfnb-legend")).to_contain_text("↺ 0 leads back")

    # dragging over the film to another frame follows
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 230, box["y"] + 82, steps=4)
    page.mouse.up()
    note.filter(has_text="of frame 1").wait_for()

    # the advice has a line of its own, and can be handed over
    expect(button("Use this interval")).to_be_disabled()
    button("Advise").click()
    note.filter(has_text="keyframe_interval=").wait_for()
    expect(words).to_be_visible()
    button("Use this interval").click()
    expect(note.filter(has_text="Handed over")).to_be_visible()

    # the player's frame slider moves, and plays
    panel.locator('input[aria-label="Frame"]').fill("4")
    panel.locator(".tfnb-player-play").click()
    page.wait_for_timeout(600)
    panel.locator(".tfnb-player-play").click()
    layer.select_option(label="up 2 · 16×16 · attn 2")  # the picture shall show a point inside the star, where matches are good
    expect(panel.locator(".tfnb-strip-title").nth(1)).to_contain_text("up 2")
    compared(page)
    box = canvas.bounding_box()
    canvas.click(position=dict(x=box["width"] / 6 * 0.42, y=(box["height"] - 18) * 0.5))
    note.filter(has_text="of frame 0").wait_for()
    shots(page, PANEL, "features")
    axe(page, PANEL)
    assert not panel.locator(".tfnb-error").count()


def test_the_main_moves_by_keyboard_alone(show):
    from playwright.sync_api import expect

    page = show(SOURCE, PANEL)
    panel, note = page.locator(PANEL), page.locator(f"{PANEL} .tfnb-note")
    compared(page)
    panel.get_by_role("combobox", name="Layer").focus()
    page.keyboard.press("ArrowDown")
    expect(panel.locator(".tfnb-strip-title").nth(1)).to_contain_text("up 2 · 16×16 · attn 2 out")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == "334"
    page.keyboard.press("Home")
    expect(panel.locator(".tfnb-strip-title").nth(1)).to_contain_text("t = 1:")
    compared(page)
    panel.locator(".tfnb-strip").focus()
    page.keyboard.press("PageDown")
    page.keyboard.press("Enter")
    note.filter(has_text="of frame 1").wait_for()
    panel.get_by_role("button", name="Advise").focus()
    page.keyboard.press("Enter")
    note.filter(has_text="keyframe_interval=").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(note.filter(has_text="Handed over")).to_be_visible()


def test_a_step_of_an_edit_is_chosen(show):
    from playwright.sync_api import expect

    page = show(EDIT, PANEL)
    panel = page.locator(PANEL)
    compared(page)
    step = panel.get_by_role("slider", name="Step", exact=True)
    expect(step).to_have_attribute("aria-valuetext", "3 of 3")
    expect(panel.get_by_role("slider", name="Timestep")).to_be_hidden()
    before = pixels(page, 1)
    step.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # at once: the last wish counts
    changed(page, 1, before)
    expect(panel.locator(".tfnb-strip-title").nth(1)).to_contain_text("edit's tokens")
    expect(step).to_have_attribute("aria-valuetext", "1 of 3")
    compared(page)
    assert not panel.locator(".tfnb-error").count()
