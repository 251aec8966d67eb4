// A line over a picture with a round handle, which a pointer, a finger or the arrow keys move.
import { clamp, make } from "./film.js";

// `moved(value, finished)` is called with a place from 0 to 1. Returns the node, and `show` for its place and names.
export function makeGrip(parent, moved) {
  const node = make("div", "tfnb-grip", parent, { role: "slider", tabindex: 0, "aria-valuemin": 0, "aria-valuemax": 100 });
  const handle = make("span", "tfnb-grip-handle", node, { "aria-hidden": "true" });
  let [value, upright, dragging] = [0.5, true, false];

  const placeOf = (event) => {
    const box = parent.getBoundingClientRect();
    const share = upright ? (event.clientX - box.left) / box.width : (event.clientY - box.top) / box.height;
    return clamp(share, 0, 1);
  };
  const move = (place, finished) => {
    value = place; // now, not when it is drawn: a second press may come before that
    moved(place, finished);
  };
  const begin = (event) => {
    if (event.button) return;
    dragging = true;
    node.setPointerCapture(event.pointerId);
    node.focus({ preventScroll: true });
    event.preventDefault();
    move(placeOf(event), false);
  };
  node.addEventListener("pointerdown", begin);
  node.addEventListener("pointermove", (event) => dragging && move(placeOf(event), false));
  for (const end of ["pointerup", "pointercancel"]) {
    node.addEventListener(end, (event) => {
      if (dragging) move(end === "pointerup" ? placeOf(event) : value, true);
      dragging = false;
    });
  }
  node.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 0.1 : 0.01;
    const to = {
      ArrowLeft: value - step, ArrowRight: value + step, ArrowUp: value + (upright ? step : -step), ArrowDown: value + (upright ? -step : step),
      PageUp: value + (upright ? 0.1 : -0.1), PageDown: value + (upright ? -0.1 : 0.1), Home: 0, End: 1,
    }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    move(clamp(to, 0, 1), true);
    event.preventDefault();
    event.stopPropagation();
  });

  function show(place, { vertical = true, name, text }) {
    [value, upright] = [place, vertical];
    node.className = `tfnb-grip ${vertical ? "tfnb-grip-upright" : "tfnb-grip-level"}`;
    node.style.left = vertical ? `${100 * place}%` : "0";
    node.style.top = vertical ? "0" : `${100 * place}%`;
    handle.textContent = vertical ? "↔" : "↕";
    node.setAttribute("aria-orientation", vertical ? "horizontal" : "vertical"); // the way in which it moves
    node.setAttribute("aria-label", name);
    node.setAttribute("aria-valuenow", Math.round(100 * place));
    node.setAttribute("aria-valuetext", text);
  }
  return { node, show, begin };
}
