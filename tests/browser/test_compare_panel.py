"The compare panel's story: play, wipe, subtract, cut along time, then vote without knowing which is which, and read the table."

CELL = """
import numpy as np
from tokenflow_nb.clip import Clip
from tokenflow_nb.panels.compare import ComparePanel
from tokenflow_nb.toy.world import Scene

scene = Scene("star", "blue", "grass", centre=(52, 64), velocity=(1.5, 0), radius=34)
source, ideal = scene.render(8), scene.replace(material="gold").render(8)
offsets = np.random.default_rng(0).uniform(0, 200, (8, 2))
alone = [scene.replace(material="gold", object_offset=tuple(offset)).image(128, frame) for frame, offset in enumerate(offsets)]
alone = Clip((np.stack(alone) * 255).round().astype(np.uint8))
ComparePanel([source, ideal, alone], ["source", "ideal <b>edit</b>", "frame by frame"])
"""
PANEL = ".tfnb-compare"
NAMES = ("source", "ideal", "frame by frame")


def test_a_person_compares_and_votes(show, shots, axe):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    page = show(CELL, f"{PANEL} .tfnb-player-canvas")
    panel, films, button = page.locator(PANEL), page.locator(f"{PANEL} .tfnb-player-name"), page.get_by_role("button", exact=True, name="Play")

    def choose(label: str, option: str):
        panel.locator(".widget-dropdown, .tfnb-player-view", has_text=label).locator("select").select_option(label=option)

    expect(films).to_have_text(["source", "ideal <b>edit</b>"])  # shown as it was written

    # both films move, in step
    seek = panel.locator('input[aria-label="Frame"]')
    expect(seek).to_have_attribute("max", "7")
    button.click()
    page.wait_for_function("selector => document.querySelector(selector).value !== '0'", arg=f'{PANEL} input[aria-label="Frame"]')
    page.get_by_role("button", name="Pause").click()
    seek.fill("3")
    expect(panel.locator(".tfnb-player-count")).to_have_text("frame 3 of 0–7")

    # wipe: the line is moved by the keyboard, the picture changes
    choose("View", "wipe")
    expect(panel.locator(".tfnb-player-left")).to_have_text("source")
    expect(panel.locator(".tfnb-player-right")).to_have_text("ideal <b>edit</b>")
    canvas, grip = panel.locator(".tfnb-player-canvas").first, panel.get_by_role("slider", name="Wipe")
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    grip.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    expect(grip).to_have_attribute("aria-valuenow", "60")
    changed = "([canvas, before]) => canvas.toDataURL() !== before"
    page.wait_for_function(changed, arg=[canvas.element_handle(), before])
    shots(page, PANEL, "compare-wipe")

    choose("View", "difference")
    expect(panel.locator(".tfnb-player-note")).to_contain_text("black: equal")
    choose("View", "cut along time")
    choose("Right", "frame by frame")
    expect(films.last).to_contain_text("frame by frame, row 64: time runs down")
    shots(page, PANEL, "compare-cut")

    # the vote: no name is on the page until its end
    rounds, cells = panel.locator('input[type="number"]'), page.locator(".jp-Notebook .jp-Cell").count()
    rounds.fill("2")
    rounds.press("Tab")
    page.get_by_role("button", name="Start blind vote").click()
    for question in range(6):
        expect(panel).to_contain_text(f"Question {question + 1} of 6")
        expect(films).to_have_text(["A", "B"])
        assert not any(name in panel.evaluate("panel => panel.outerHTML") for name in NAMES)
        if question == 2:
            shots(page, PANEL, "compare-vote")
            axe(page, PANEL)
        if question < 2:
            page.get_by_role("button", name=f"{'AB'[question]} is better").click()
        else:
            expect(panel.locator(".tfnb-player-stage")).to_have_attribute("aria-busy", "false")
            page.keyboard.press("abcb"[question - 2])  # wherever the keyboard is in the panel

    expect(panel.locator("tbody tr")).to_have_count(3)
    expect(panel.locator("tbody b")).to_have_count(0)
    expect(panel).to_contain_text("A was chosen 2 of 5 times")
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells  # no key of the vote was a shortcut of the notebook
    choose("View", "side by side")
    expect(films).to_have_text(["source", "frame by frame"])
    expect(panel.locator(".tfnb-error")).to_have_count(0)
    shots(page, PANEL, "compare")
    axe(page, PANEL)
