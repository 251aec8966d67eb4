// Gives every slider of the panel around it a name. ipywidgets shows a slider's description beside it, but a screen
// reader that comes to the handle hears only a number.
const HANDLES = ".noUi-handle, .ui-slider-handle"; // of ipywidgets 8 and 7
const READOUT = ".widget-readout[contenteditable]"; // the number beside a slider, which can be edited

function render({ el }) {
  el.style.display = "none";
  const name = (panel) => {
    for (const node of panel.querySelectorAll(`${HANDLES}, ${READOUT}`)) {
      const label = node.closest(".widget-inline-hbox, .jupyter-widgets")?.querySelector(".widget-label")?.textContent;
      if (label && node.ariaLabel !== label) node.ariaLabel = label;
      if (node.matches(READOUT) && node.role !== "textbox") node.role = "textbox";
    }
  };
  let waiting = 0;
  const observer = new MutationObserver((changes, self) => name(self.panel));
  const watch = () => {
    const panel = el.closest(".tfnb-panel");
    if (!panel) return void (waiting = requestAnimationFrame(watch)); // not on the page yet
    observer.panel = panel;
    observer.observe(panel, { subtree: true, childList: true });
    name(panel);
  };
  watch();
  return () => {
    cancelAnimationFrame(waiting);
    observer.disconnect();
  };
}

export default { render };
