"What is left of a panel in a saved notebook: a picture of its last state, which is not shown while the panel lives."

import base64
import io

import nbformat
from PIL import Image

CELL = """
from tokenflow_nb.panels import EditPanel
panel = EditPanel("toy")
panel.state.num_inference_steps = 2
panel
"""
KERNEL = "jupyterapp.shell.currentWidget.sessionContext.session.kernel"


def picture(notebook) -> Image.Image:
    (found,) = [output.data["image/png"] for output in notebook.cells[0].outputs if "image/png" in output.get("data", {})]
    assert len(found) < 140_000
    return Image.open(io.BytesIO(base64.b64decode(found)))


def test_a_saved_panel_shows_its_last_state(show, lab, folder, request):
    from playwright.sync_api import expect

    page, path = show(CELL, ".tfnb-edit"), lab[0] / f"{request.node.name}.ipynb"
    save = lambda: page.evaluate("jupyterapp.commands.execute('docmanager:save')")  # noqa: E731
    face = page.locator(".jp-RenderedImage")
    expect(face).to_have_count(1)
    expect(face).to_be_hidden()
    save()
    before = picture(nbformat.read(path, 4))

    panel = page.locator(".tfnb-edit")
    panel.evaluate("panel => panel.dataset.same = 'yes'")
    panel.get_by_role("button", name="Preview", exact=True).click()
    expect(panel.locator(".tfnb-strip-row")).to_have_count(2)
    expect(panel.get_by_role("button", name="Preview", exact=True)).to_be_enabled()
    page.wait_for_timeout(8000)
    page.screenshot(path=folder / "live-panel.png")
    expect(page.locator(".tfnb-edit[data-same]")).to_have_count(1)  # the view was not made anew
    expect(page.locator(".tfnb-edit")).to_have_count(1)
    expect(face).to_be_hidden()
    save()
    saved = nbformat.read(path, 4)
    assert picture(saved).size != before.size  # source and edit now, and not the source alone
    assert len(path.read_bytes()) < 300_000

    page.evaluate(f"{KERNEL}.shutdown()")
    page.reload()
    expect(page.locator(".jp-RenderedImage")).to_be_visible()
    page.wait_for_timeout(3000)
    page.screenshot(path=folder / "saved-panel.png")
