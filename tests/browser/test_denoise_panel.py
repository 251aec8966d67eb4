"The denoise panel's story: step, back, jump, run and pause, look at features, fork another material, run both to the end."

import re

CELL = """
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.edit import Edit, EditConfig
from tokenflow_nb.inversion import invert
from tokenflow_nb.panels.denoise import DenoisePanel
from tokenflow_nb.toy.world import Scene

scene = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)
clip, model = scene.render(4), load_model("toy", device="cpu")
trajectory = invert(model, clip, scene.caption, steps=5, progress=False)
config = EditConfig("a gold star on grass", scene.caption, num_inference_steps=5, keyframe_interval=2, pnp_attn_t=0.5)
panel = DenoisePanel(Edit(model, trajectory, config, clip))
panel
"""
PANEL = ".tfnb-denoise"


def test_a_person_walks_an_edit_and_forks_it(show, shots):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    page = show(CELL, f"{PANEL} .tfnb-strip-row")
    panel, films = page.locator(PANEL), page.locator(f"{PANEL} .tfnb-player-name")
    rows, notes = page.locator(f"{PANEL} .tfnb-strip-row"), page.locator(f"{PANEL} .tfnb-note")

    def press(name: str):
        page.get_by_role("button", name=name, exact=True).click()

    def arrived(step: int, branches: int = 1):
        "Waits until every branch stands there, and every frame is decoded."
        expect(notes.filter(has_text=f"step {step} of 5")).to_have_count(branches, timeout=240_000)
        expect(panel.locator(".tfnb-player-count")).to_have_text(re.compile("of 0–3$"), timeout=240_000)
        expect(notes.filter(has_text=" …")).to_have_count(0, timeout=240_000)  # else the strip may still be grey

    # at the start: latents only, nothing to go back to
    arrived(0)
    expect(rows).to_have_count(1)
    expect(page.get_by_role("button", name="◀ Back")).to_be_disabled()

    # a step: clean frames appear, keyframes are named; back and forth is the picture as it was
    press("Step ▶")
    arrived(1)
    expect(rows).to_have_count(2)
    expect(films).to_have_text(["source", "A: predicted clean"])
    expect(notes.filter(has_text="keyframes ◆")).to_have_text(re.compile(r"keyframes ◆: [01], [23]"))
    first = rows.nth(1).evaluate("canvas => canvas.toDataURL()")
    press("Step ▶")
    arrived(2)
    press("◀ Back")
    arrived(1)
    page.wait_for_function("([selector, before]) => document.querySelectorAll(selector)[1].toDataURL() === before", arg=[f"{PANEL} .tfnb-strip-row", first])
    expect(panel.locator("svg")).to_have_attribute("aria-label", re.compile("step 1 of 5.*attention up to step 2, features up to step 4"))

    # source and edited features of the step
    panel.locator('input[type="checkbox"]').check()
    expect(rows).to_have_count(4, timeout=240_000)
    assert panel.locator(".tfnb-strip-title").all_inner_texts()[2:] == ["source features", "edited features"]
    shots(page, PANEL, "denoise-features")
    panel.locator('input[type="checkbox"]').uncheck()

    # fork here, with another prompt; without a change it is refused in words
    press("Fork here")
    expect(panel.locator(".tfnb-error")).to_contain_text("without a change")
    prompt = panel.locator('input[type="text"]').first
    prompt.fill("a <b>red</b> star")
    prompt.press("Tab")
    press("Fork here")
    expect(panel.locator(".tfnb-strip")).to_have_count(2, timeout=240_000)
    expect(panel.locator(".tfnb-error")).to_have_count(0)
    expect(notes.filter(has_text="B · A from step 1")).to_contain_text("<b>red</b>")

    # run, pause, and on to the end: both branches
    press("Run")
    press("Pause")
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled(timeout=240_000)
    assert not notes.filter(has_text="step 5 of 5").count()
    press("Run")
    arrived(5, branches=2)
    expect(films).to_have_text(["source", "A: predicted clean", "B: predicted clean"])
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_disabled()

    # a click in the strip looks at that frame; the slider jumps by the keyboard
    row = panel.locator(".tfnb-strip-row").first
    row.click(position=dict(x=row.bounding_box()["width"] * 2.4 / 4, y=30))
    expect(panel.locator(".tfnb-player-count")).to_have_text("frame 2 of 0–3")
    shots(page, PANEL, "denoise")
    panel.locator(".noUi-handle").first.focus()
    page.keyboard.press("Home")
    arrived(0, branches=2)
    expect(panel.locator(".tfnb-error")).to_have_count(0)
