"The edit panel as an artist and an engineer use it, and by the keyboard alone."

import re
import struct

import numpy as np
import pytest

from tokenflow_nb.clip import Clip, read_clip, write_clip
from tokenflow_nb.toy.world import Scene

CELL = """
from tokenflow_nb.panels import EditPanel
panel = EditPanel({arguments})
panel
"""
PANEL = ".tfnb-edit"
FEW = "num_inference_steps=3, keyframe_interval=2, max_frames=4"


@pytest.fixture
def phone_film(tmp_path):
    "An upright film of 60 MB: 30 frames, and a box of unused bytes as some phones write."
    frames = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3)).render(30).frames[:, :, 28:100]
    path = write_clip(tmp_path / "holiday.mp4", Clip(np.ascontiguousarray(frames), 15))
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 60_000_000, b"free") + bytes(59_999_992))
    return path


def button(panel, name):
    return panel.get_by_role("button", name=name, exact=True)


def open_group(panel, title):
    panel.locator("summary", has_text=title).click()


def drawn(player):
    "The pixels of the first film of a player."
    return player.locator("canvas").first.evaluate("(canvas) => canvas.toDataURL()")


def test_an_artist_edits_a_phone_film(show, shots, axe, phone_film, tmp_path):
    from playwright.sync_api import expect

    page = show(CELL.format(arguments=FEW.replace("max_frames=4", "max_frames=24")), PANEL)
    panel = page.locator(PANEL)
    expect(panel.locator(".tfnb-section").first).to_contain_text("No clip yet")
    button(panel, "Render").click()
    expect(panel.locator("[role=alert]", has_text="no clip yet").first).to_be_visible()

    panel.locator(".tfnb-upload input[type=file]").set_input_files(phone_film)
    about = panel.locator(".tfnb-section").first
    expect(about).to_contain_text("24 of 30 frames")
    expect(about).to_contain_text("72 × 128 pixels, upright")
    expect(about).to_contain_text("There is no GPU here, so the toy model is chosen")
    expect(panel.locator(".tfnb-stage canvas").first).to_be_visible()  # the clip is seen before anything is done
    open_group(panel, "Part and size")
    panel.get_by_label("Frames, at most").fill("4")
    panel.get_by_label("Frames, at most").press("Tab")
    expect(about).to_contain_text("4 of 30 frames")
    panel.get_by_label("Begin, s").fill("99")
    panel.get_by_label("Begin, s").press("Tab")
    expect(panel.locator(".tfnb-field[data-name=start]")).to_contain_text("start earlier")  # below its input
    panel.get_by_label("Begin, s").fill("0")
    panel.get_by_label("Begin, s").press("Tab")
    expect(panel.locator(".tfnb-field[data-name=start] .tfnb-field-error")).to_be_hidden()

    panel.get_by_label("Source prompt").fill("a blue star on grass")
    panel.get_by_label("Prompt: what the edit should show").fill("a gold star on <b>grass</b>")
    button(panel, "Preview").click()
    expect(panel.locator(".tfnb-strip canvas").first).to_be_visible()
    expect(panel.locator(".tfnb-strip")).to_contain_text("preview: a gold star on <b>grass</b>")
    shots(page, PANEL, "edit-preview")
    axe(page, PANEL)

    panel.get_by_label("Prompt: what the edit should show").fill("a gold star on grass")
    expect(panel.locator(".tfnb-strip")).to_contain_text("of an earlier prompt")
    open_group(panel, "Steps and guidance")
    panel.get_by_label("Num inference steps").fill("40")
    button(panel, "Render").click()
    expect(panel.locator(".tfnb-strip")).to_contain_text("expected after step")  # live
    button(panel, "Cancel").first.click()
    line = panel.locator(".tfnb-job")
    expect(line).to_contain_text("stopped at: editing, step")
    button(line, "Go on").click()
    expect(button(panel, "Film (mp4)")).to_be_visible()
    expect(line).to_have_count(0)
    panel.get_by_label("Num inference steps").fill("3")
    panel.get_by_label("Prompt: what the edit should show").fill("a red star on grass")
    button(panel, "Render").click()
    cards = panel.locator(".tfnb-card")
    expect(cards).to_have_count(2)

    for name, suffix in {"Film (mp4)": "edited.mp4", "Before and after (mp4)": "before-after.mp4", "Settings (run.json)": "run.json"}.items():
        with page.expect_download() as waiting:
            button(panel, name).click()
        path = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(path)
        assert path.name == f"holiday-{suffix}"
        if path.suffix == ".mp4":
            film = read_clip(path)
            assert len(film) == 4 and film.frames.std() > 10
    shots(page, PANEL, "edit-phone")
    axe(page, PANEL)

    cards.nth(1).locator(".tfnb-card-show").click()
    expect(panel.get_by_label("Prompt: what the edit should show")).to_have_value("a gold star on grass")
    for card in cards.all():
        card.locator("input").check()
    button(panel, "Compare these 2").click()
    expect(panel.locator(".tfnb-compare")).to_be_visible()


def test_a_newcomer_presses_render(show, shots, axe):
    from playwright.sync_api import expect

    page = show("from tokenflow_nb.panels import EditPanel\npanel = EditPanel('toy', num_inference_steps=10, max_frames=12)\npanel", PANEL)
    panel = page.locator(PANEL)
    expect(panel.locator(".tfnb-stage canvas").first).to_be_visible()
    button(panel, "Render").click()
    expect(button(panel, "Film (mp4)")).to_be_visible()
    expect(panel.locator(".tfnb-card")).to_have_count(1)
    shots(page, PANEL, "edit")
    axe(page, PANEL)


ENGINEER = """
from dataclasses import dataclass
from tokenflow_nb.editors import Editor, register
from tokenflow_nb.panels import EditPanel
from tokenflow_nb.support.settings import setting

@register
@dataclass(frozen=True)
class Faint(Editor):
    name, summary = "faint", "keeps a share of the source"
    share: float = setting(0.5, "share of the source that stays", 0, 1, short="faint_share")

    def after_step(self, step):
        return step.latents.lerp(step.source_latents, self.share)

panel = EditPanel("toy", num_inference_steps=2, max_frames=3, method="faint")
panel
"""


def run_cell(page, source):
    "Appends a cell, runs it, and waits for its end."
    from playwright.sync_api import expect

    page.evaluate("jupyterapp.commands.execute('notebook:move-cursor-down')")
    page.evaluate("jupyterapp.commands.execute('notebook:insert-cell-below')")
    page.evaluate("source => { jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.setSource(source) }", source)
    page.evaluate("jupyterapp.commands.execute('notebook:run-cell')")
    page.wait_for_timeout(300)
    expect(page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible()


def test_an_engineer_brings_an_editor(show):
    from playwright.sync_api import expect

    page = show(ENGINEER, PANEL)
    panel = page.locator(PANEL).first
    expect(panel.get_by_label("Method")).to_have_value("faint")
    share = panel.get_by_label("Share")
    share.focus()
    share.press("ArrowRight")
    expect(panel.locator(".tfnb-field[data-name=faint_share] output")).to_have_text("0.55")
    panel.get_by_label("Prompt: what the edit should show").press("Control+Enter")
    expect(button(panel, "Film (mp4)")).to_be_visible()
    open_group(panel, "Code of this edit")
    button(panel, "Copy").click()
    code = page.evaluate("navigator.clipboard.readText()")
    assert "method='faint'" in code and "faint_share=0.55" in code
    run_cell(page, code + "\n(result.frames == panel.state.rendered.frames).all()")
    expect(page.locator(".jp-OutputArea-output", has_text="True").last).to_be_visible()

    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.wait_for_timeout(1000)
    page.wait_for_function("jupyterapp.shell.currentWidget?.sessionContext.session?.kernel?.status === 'idle'")
    page.evaluate("jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    run_cell(page, ENGINEER)
    again = page.locator(PANEL).last
    expect(again.locator(".tfnb-card")).to_have_count(1)
    again.locator(".tfnb-card-show").click()
    expect(button(again, "Film (mp4)")).to_be_visible()
    expect(again.locator(".tfnb-field[data-name=faint_share] output")).to_have_text("0.55")


def test_an_edit_by_keyboard_alone(show):
    from playwright.sync_api import expect

    page = show(CELL.format(arguments=f'"toy", {FEW}'), PANEL)
    panel = page.locator(PANEL)

    def tab_to(name: str):
        "Presses Tab until the element with this name has the focus."
        for _ in range(80):
            page.keyboard.press("Tab")
            here = page.evaluate("""() => { const node = document.activeElement;
                return [node.getAttribute('aria-label'), node.labels?.[0]?.textContent, node.textContent].filter(Boolean).map((text) => text.trim()) }""")
            if name in here:
                return
        raise AssertionError(f"{name} is not reached by Tab")

    panel.locator(".tfnb-upload button").first.focus()
    tab_to("Part and size")
    page.keyboard.press("Enter")
    tab_to("Begin, s")
    tab_to("Prompt: what the edit should show")
    page.keyboard.press("Control+A")
    page.keyboard.type("a red star on grass")
    tab_to("Preview")
    page.keyboard.press("Enter")
    expect(panel.locator(".tfnb-strip")).to_contain_text("preview: a red star on grass")
    tab_to("Render")
    page.keyboard.press("Enter")
    expect(button(panel, "Film (mp4)")).to_be_visible()
    wipe = panel.get_by_role("slider", name="Wipe")
    wipe.focus()
    before = drawn(panel.locator(".tfnb-player"))
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)
    assert drawn(panel.locator(".tfnb-player")) != before
    assert page.locator(".jp-Notebook .jp-CodeCell").count() <= 2  # no key reached the notebook


def test_a_path_an_interrupt_and_the_same_edit_again(show, phone_film):
    from playwright.sync_api import expect

    page = show(CELL.format(arguments='model="toy", num_inference_steps=3, keyframe_interval=2, max_frames=3'), PANEL)
    panel = page.locator(PANEL)
    path, about = panel.get_by_label("Film", exact=True), panel.locator(".tfnb-section").first.get_by_role("status").first
    path.fill("/nowhere/film.mp4")
    path.press("Enter")
    expect(panel.locator(".tfnb-field[data-name=path] [role=alert]")).to_contain_text("/nowhere/film.mp4")
    expect(path).to_have_attribute("aria-invalid", "true")
    path.fill(str(phone_film))
    path.press("Enter")
    expect(about).to_contain_text("3 of 30 frames")
    expect(panel.locator(".tfnb-field[data-name=path] [role=alert]")).to_be_hidden()
    focus = path.evaluate("(node) => [getComputedStyle(node).outlineStyle, getComputedStyle(node.closest('.tfnb-line')).overflow]")
    assert focus[0] != "none" and focus[1] == "visible"  # the ring is there, and nothing cuts it

    panel.get_by_label("Source prompt").fill("a blue star on grass")
    prompt = panel.get_by_label("Prompt: what the edit should show")
    prompt.fill("a gold star on grass")
    open_group(panel, "Steps and guidance")
    steps = panel.get_by_label("Num inference steps")
    steps.fill("60")
    prompt.press("Control+Enter")
    line = panel.locator(".tfnb-job")
    expect(line).to_contain_text("running")
    expect(panel.get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile(r"^[1-9]"))
    page.evaluate("jupyterapp.commands.execute('notebook:interrupt-kernel')")  # the button with the square
    expect(line).to_contain_text("stopped")
    expect(panel.get_by_role("status").filter(has_text="Render the same again, and it goes on from there")).to_be_visible()
    button(line, "Remove").click()
    steps.fill("3")
    prompt.press("Control+Enter")
    expect(button(panel, "Film (mp4)")).to_be_visible()
    prompt.press("Control+Enter")
    expect(panel.get_by_role("status").filter(has_text="kept from an earlier render")).to_be_visible()
    expect(panel.locator(".tfnb-card")).to_have_count(1)


def test_two_panels_and_a_cell_that_is_run_again(show):
    from playwright.sync_api import expect

    page = show("from tokenflow_nb.panels import EditPanel\nEditPanel('toy', num_inference_steps=30, max_frames=8)", PANEL)
    button(page.locator(PANEL), "Render").click()
    expect(page.locator(f"{PANEL} .tfnb-job")).to_contain_text("running")
    run_cell(page, "named = EditPanel('toy', num_inference_steps=3, max_frames=3)\nnamed")
    second = page.locator(PANEL).last
    expect(second).to_contain_text("Another panel of this notebook is rendering")
    button(second, "Render").click()
    expect(second).to_contain_text("waiting")
    button(second, "Stop it").click()
    expect(button(second, "Film (mp4)")).to_be_visible()  # and the kernel lives
    button(page.locator(PANEL).first, "Go on").click()
    page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-editor").first.click()
    page.keyboard.press("Control+Enter")
    expect(page.locator(f"{PANEL} .tfnb-job")).to_have_count(0)
    page.wait_for_timeout(5000)
    run_cell(page, "from tokenflow_nb.panels.edit import _PANELS\nf'{sum(each.comm is not None for each in _PANELS)} panels are open'")
    expect(page.locator(".jp-OutputArea-output", has_text="2 panels are open")).to_be_visible()  # that of the first run is closed
