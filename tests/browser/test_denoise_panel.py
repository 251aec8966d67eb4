"The denoise panel's story: step, back, jump, run and pause, look at features, fork another material, run both to the end."

import re

SET_UP = """
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.edit import Edit, EditConfig
from tokenflow_nb.inversion import invert
from tokenflow_nb.panels.denoise import DenoisePanel
from tokenflow_nb.panels.features import FeaturePanel
from tokenflow_nb.panels.linked import link
from tokenflow_nb.toy.world import Scene

scene = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)
clip, model = scene.render(4), load_model("toy", device="cpu")
trajectory = invert(model, clip, scene.caption, steps=5, progress=False)
config = EditConfig("a gold star on grass", scene.caption, num_inference_steps=5, keyframe_interval=2, pnp_attn_t=0.5)
panel = DenoisePanel(Edit(model, trajectory, config, clip))
"""
CELL = f"{SET_UP}panel"
PANEL = ".tfnb-denoise"
ROWS = f"{PANEL} .tfnb-strip-row"
GREY = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(4, 4, Math.min(canvas.width, 2000) - 8, 40);
  let grey = 0;
  for (let at = 0; at < data.length; at += 4) grey += data[at] === 128 && data[at + 1] === 128 && data[at + 2] === 128;
  return grey;
}"""


class Stage:
    "The panel on a page, and what a person waits for."

    def __init__(self, page):
        from playwright.sync_api import expect

        self.expect, self.page, self.panel, self.rows = expect, page, page.locator(PANEL), page.locator(ROWS)
        self.notes, self.films = page.locator(f"{PANEL} .tfnb-note"), page.locator(f"{PANEL} .tfnb-player-name")
        self.schedule, self.place = self.panel.get_by_role("slider", name="Step", exact=True), page.locator(f"{PANEL} .tfnb-denoise-head .tfnb-note[role=status]").first

    def button(self, name: str):
        return self.panel.get_by_role("button", name=name, exact=True)

    def press(self, name: str):
        self.button(name).click()

    def click_step(self, step: int, last: int = 5):
        box = self.panel.locator(".tfnb-schedule-steps").bounding_box()
        self.page.mouse.click(box["x"] + box["width"] * step / last, box["y"] + 20)

    def arrived(self, step: int):
        "Waits until the panel is at a step, and every frame is decoded."
        self.expect(self.notes.filter(has_text=re.compile(f"^step {step} of 5$"))).to_have_count(1, timeout=240_000)
        self.expect(self.notes.filter(has_text=" …")).to_have_count(0, timeout=240_000)


def test_a_person_walks_an_edit_and_forks_it(show, shots, axe):
    stage = Stage(show(CELL, ROWS))
    page, panel, expect = stage.page, stage.panel, stage.expect

    # at the start there is nothing to go back to, and only noise to see
    stage.arrived(0)
    expect(stage.rows).to_have_count(1)
    expect(stage.button("◀ Back")).to_be_disabled()
    expect(stage.films).to_have_text(["source", "A: noisy"])

    # a step: the expected frames, keyframes are named; back and forth is the picture as it was
    stage.press("Step ▶")
    stage.arrived(1)
    expect(stage.rows).to_have_count(1)
    expect(stage.films).to_have_text(["source", "A: expected"])
    expect(stage.notes.filter(has_text="keyframes of this step ◆")).to_have_text(re.compile(r"◆ [01], [23]$"))
    first = stage.rows.nth(0).evaluate("canvas => canvas.toDataURL()")
    stage.press("Step ▶")
    stage.press("Step ▶")  # at once: two steps
    stage.arrived(3)
    stage.press("◀ Back")
    stage.press("◀ Back")
    stage.arrived(1)
    page.wait_for_function("([selector, before]) => document.querySelectorAll(selector)[0].toDataURL() === before", arg=[ROWS, first])

    # one schedule: a click jumps, and guidance is drawn on it
    expect(stage.schedule).to_have_attribute("aria-valuetext", re.compile("step 1 of 5.*guidance: steps 1 to 2; attention injected: steps 1 to 2; features injected: steps 1 to 4"))
    expect(panel.locator(".tfnb-schedule")).to_have_count(1)
    stage.click_step(3)
    stage.arrived(3)
    expect(stage.notes.filter(has_text="Guidance acts in steps 1 to 2")).to_be_visible()
    stage.click_step(1)
    stage.arrived(1)
    expect(stage.notes.filter(has_text="Guidance acts")).to_have_count(0)

    # noisy or expected
    panel.get_by_role("radio", name="noisy").check()
    expect(stage.films).to_have_text(["source", "A: noisy"])
    panel.get_by_role("radio", name="expected").check()
    expect(stage.films).to_have_text(["source", "A: expected"])

    # source and edited features of the step
    panel.locator('input[type="checkbox"]').check()
    expect(stage.rows).to_have_count(3, timeout=240_000)
    assert panel.locator(".tfnb-strip-title").all_inner_texts() == ["expected", "source features", "edited features"]
    shots(page, PANEL, "denoise-features")
    panel.locator('input[type="checkbox"]').uncheck()

    # fork here, with another prompt; without a change it is refused in words beside the button
    stage.press("Fork here")
    expect(panel.locator(".tfnb-denoise-head .tfnb-error")).to_contain_text("without a change")
    prompt = panel.get_by_label("Prompt", exact=True)
    prompt.fill("a <b>red</b> star")
    prompt.press("Tab")
    stage.press("Fork here")
    expect(panel.locator(".tfnb-strip")).to_have_count(2, timeout=240_000)
    expect(panel.locator(".tfnb-error")).to_have_count(0)
    expect(stage.notes.filter(has_text="B · A from step 1")).to_contain_text("<b>red</b>")

    # run, pause, and on to the end: both branches
    stage.press("Run")
    stage.press("Pause")
    expect(stage.button("Run")).to_be_enabled(timeout=240_000)
    assert not stage.notes.filter(has_text="step 5 of 5").count()
    stage.press("Run")
    stage.arrived(5)
    expect(stage.films).to_have_text(["source", "A: expected", "B: expected"])
    for name in ("Run", "Step ▶", "Last ⇥", "Fork here"):
        expect(stage.button(name)).to_be_disabled()
    expect(stage.notes.filter(has_text="The edit is done")).to_be_visible()

    # a click in the strip looks at that frame
    box = stage.rows.first.bounding_box()
    stage.rows.first.click(position=dict(x=box["width"] * 0.6, y=30))
    expect(panel.locator('input[aria-label="Frame"]')).to_have_value("2")
    shots(page, PANEL, "denoise")
    axe(page, PANEL)

    # in a narrow window the panel is narrow, and film strips scroll
    page.set_viewport_size(dict(width=600, height=1200))
    expect(panel.locator(".tfnb-strip").first).to_be_visible()
    page.wait_for_function("selector => document.querySelector(selector).getBoundingClientRect().right <= innerWidth", arg=PANEL)

    # on a low screen the buttons and the schedule stay while one looks at the last strip
    page.set_viewport_size(dict(width=1200, height=800))
    panel.locator(".tfnb-strip").last.scroll_into_view_if_needed()
    head, whole = (panel.locator(name).first.bounding_box() for name in (".tfnb-denoise-head", "xpath=."))
    assert whole["y"] < 0 < head["y"], (whole, head)
    stage.press("⇤ First")
    stage.arrived(0)
    expect(panel.locator(".tfnb-error")).to_have_count(0)


def test_no_picture_turns_grey_and_the_player_stays(show):
    "Every frame of the strip and the player's controls are looked at in each frame that the browser draws."
    stage = Stage(show(CELL, ROWS))
    page, panel, expect = stage.page, stage.panel, stage.expect
    stage.arrived(0)
    page.wait_for_function(  # the first pictures are on the page, not only in the kernel
        "([rows, grey]) => [...document.querySelectorAll(rows)].every((canvas) => canvas.width > 99 && eval(grey)(canvas) < 1000)",
        arg=[ROWS, GREY],
    )
    page.evaluate(
        """([rows, play, grey]) => {
          window.seen = { grey: 0, hidden: 0, looks: 0 };
          const count = eval(grey);
          const look = () => {
            seen.looks += 1;
            for (const canvas of document.querySelectorAll(rows)) if (canvas.width > 99) seen.grey = Math.max(seen.grey, count(canvas));
            if (document.querySelector(play).hidden) seen.hidden += 1;
            requestAnimationFrame(look);
          };
          look();
        }""",
        [ROWS, f"{PANEL} .tfnb-player-play", GREY],
    )
    for step in (1, 2):
        stage.press("Step ▶")
        stage.arrived(step)
    stage.press("◀ Back")
    stage.arrived(1)
    seen = page.evaluate("seen")
    assert seen["looks"] > 10 and seen["hidden"] == 0 and seen["grey"] < 1000, seen  # a grey frame has 96 × 40 grey pixels
    expect(panel.locator(".tfnb-player-play")).to_be_visible()


def test_the_main_moves_by_keyboard_alone(show):
    stage = Stage(show(CELL, ROWS))
    page, panel, expect = stage.page, stage.panel, stage.expect
    stage.arrived(0)
    stage.button("Step ▶").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    stage.arrived(2)
    stage.schedule.focus()
    page.keyboard.press("ArrowLeft")
    stage.arrived(1)
    for _ in range(3):
        page.keyboard.press("ArrowRight")  # three quick presses are three steps
    expect(stage.schedule).to_have_attribute("aria-valuenow", "4")
    stage.arrived(4)
    page.keyboard.press("Home")
    stage.arrived(0)
    expect(stage.schedule).to_be_focused()
    panel.get_by_role("radio", name="expected").focus()
    page.keyboard.press("ArrowLeft")
    expect(panel.get_by_role("radio", name="noisy")).to_be_checked()
    prompt = panel.get_by_label("Prompt", exact=True)
    prompt.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a red star on grass")
    page.keyboard.press("Tab")
    expect(stage.button("Fork here")).to_be_focused()
    page.keyboard.press("Enter")
    expect(panel.locator(".tfnb-strip")).to_have_count(2)
    assert panel.locator('[role="slider"]').evaluate_all("nodes => nodes.every((node) => node.ariaLabel || node.labels?.length)")


def test_the_kernels_interrupt_stops_a_run(show):
    stage = Stage(show(CELL.replace("steps=5", "steps=40").replace("num_inference_steps=5", "num_inference_steps=40"), ROWS))
    stage.expect(stage.notes.filter(has_text=" …")).to_have_count(0)
    stage.press("Run")
    stage.expect(stage.notes.filter(has_text=re.compile("^step [2-9] of 40$"))).to_have_count(1)
    stage.page.evaluate("jupyterapp.commands.execute('notebook:interrupt-kernel')")
    stage.expect(stage.button("Pause")).to_be_disabled()
    stage.expect(stage.button("Run")).to_be_enabled()
    assert not stage.notes.filter(has_text="step 40 of 40").count() and not stage.panel.locator(".tfnb-error").count()


LINKED = f"""{SET_UP}
features = FeaturePanel(trajectory, clip, model, layers=["up 2 attn 2", "mid attn 0"], timesteps=[1])
linked = link(panel, features)
display(features)
panel"""


def test_linked_panels_show_one_frame_and_take_the_advice_over(show):
    stage = Stage(show(LINKED, ROWS))
    page, expect = stage.page, stage.expect
    features = page.locator(".tfnb-features")
    page.get_by_text("(yellow)").wait_for()
    stage.arrived(0)
    box = features.locator(".tfnb-strip-row").first.bounding_box()
    features.locator(".tfnb-strip-row").first.click(position=dict(x=box["width"] * 0.9, y=50))
    expect(stage.panel.locator('input[aria-label="Frame"]')).to_have_value("3")
    features.get_by_role("button", name="Advise").click()
    features.get_by_text("keyframe_interval=").wait_for()
    features.get_by_role("button", name="Use this interval").click()
    advised = re.search(r"keyframe_interval=(\d+)", features.inner_text())[1]
    expect(stage.panel.get_by_label("Keyframe interval")).to_have_value(str(min(int(advised), 4)))
