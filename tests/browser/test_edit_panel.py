"The edit panel's story: no clip, a preview, a render that is cancelled and goes on, the wipe, the code."

import re

CELL = """
from tokenflow_nb.panels import EditPanel
panel = EditPanel()
panel
"""


def test_edit_panel(show, shots):
    from playwright.sync_api import expect

    page = show(CELL, ".tfnb-edit")
    panel = page.locator(".tfnb-edit")
    button = lambda name: panel.get_by_role("button", name=name, exact=True)  # noqa: E731

    button("Render clip").click()
    expect(panel.locator(".tfnb-error")).to_contain_text("no clip yet")

    button("Use the toy clip").click()
    expect(panel.get_by_label("Prompt", exact=True)).to_have_value("a gold star on grass")
    expect(panel.locator(".tfnb-error")).to_have_count(0)
    expect(panel.locator(".tfnb-note").first).to_contain_text("24 frames")

    panel.get_by_label("Prompt", exact=True).fill("   ")
    button("Preview keyframes").click()
    expect(panel.locator(".tfnb-error")).to_contain_text("say what the edited clip shows")
    panel.get_by_label("Prompt", exact=True).fill("a gold star on <b>grass</b>")
    panel.get_by_text("Settings", exact=True).click()
    steps = panel.get_by_role("slider").locator("xpath=self::*[@aria-valuemax='100.0']").first
    steps.focus()
    for _ in range(16):  # by keyboard, from 20 to 4
        page.keyboard.press("ArrowLeft")
    expect(steps).to_have_attribute("aria-valuenow", re.compile(r"^4(\.0)?$"))
    shots(page, ".tfnb-edit", "edit-settings")
    panel.get_by_text("Settings", exact=True).click()

    button("Preview keyframes").click()
    expect(panel.locator(".tfnb-strip-row")).to_have_count(2)
    expect(panel.locator(".tfnb-strip-title").last).to_contain_text("a gold star on <b>grass</b>")

    panel.get_by_label("Prompt", exact=True).fill("a gold star on grass")
    button("Render clip").click()
    expect(panel.locator(".tfnb-note", has_text="left")).to_be_visible()  # the bar knows the time left
    expect(button("Render clip")).to_be_disabled()
    button("Cancel").click()
    expect(panel.locator(".tfnb-note", has_text="Stopped at")).to_contain_text("goes on from there")
    button("Render clip").click()
    expect(panel.locator(".tfnb-player-canvas")).to_be_visible()
    expect(panel.locator(".tfnb-note", has_text="24 frames in")).to_be_visible()

    canvas = panel.locator(".tfnb-player-canvas")
    pixels = "(canvas) => canvas.toDataURL()"
    grip = panel.get_by_role("slider", name="Wipe")

    def wiped(key: str, before: str) -> str:
        "Moves the wipe by a key. The picture that is there then."
        grip.press(key)
        page.wait_for_function("([canvas, before]) => canvas.toDataURL() !== before", arg=[canvas.element_handle(), before])
        return canvas.evaluate(pixels)

    edited = wiped("Home", canvas.evaluate(pixels))
    source = wiped("End", edited)
    box = canvas.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    expect(grip).to_have_attribute("aria-valuenow", "50")
    page.wait_for_function("([canvas, before]) => canvas.toDataURL() !== before", arg=[canvas.element_handle(), source])
    assert canvas.evaluate(pixels) not in (source, edited)
    grip.press("ArrowRight")
    expect(grip).to_have_attribute("aria-valuenow", "51")

    panel.get_by_label("Frame", exact=True).fill("3")
    expect(panel.locator(".tfnb-player-count")).to_have_text("frame 3 of 0–23")
    button("Play").click()
    expect(panel.locator(".tfnb-player-count")).not_to_have_text("frame 3 of 0–23")
    button("Pause").click()
    panel.get_by_label("Frame", exact=True).fill("3")

    button("Copy").click()
    expect(button("Copied")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == panel.locator(".tfnb-code pre").inner_text() and "num_inference_steps=4" in code
    compile(code, "cell", "exec")
    shots(page, ".tfnb-edit", "edit")
