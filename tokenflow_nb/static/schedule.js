// A schedule to click: the drawing comes from Python, and its width is divided into steps. The step that was asked for
// last is kept here until Python answers, so that two quick key presses are two steps.
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "tfnb-schedule";
  box.tabIndex = 0;
  box.setAttribute("role", "slider");
  el.append(box);
  let wish = model.get("wish");

  const drawing = () => box.querySelector(".tfnb-schedule-steps");
  function mark() {
    const line = box.querySelector(".tfnb-schedule-wish");
    if (line) line.style.left = `${(100 * wish) / model.get("last")}%`;
    if (line) line.hidden = wish === model.get("position");
    const there = wish === model.get("position");
    box.setAttribute("aria-valuenow", wish);
    box.setAttribute("aria-valuetext", there ? model.get("text") : `going to step ${wish}`);
  }
  function draw() {
    box.innerHTML = model.get("picture");
    mark();
  }
  function follow() {
    wish = model.get("wish");
    box.setAttribute("aria-label", model.get("label"));
    box.setAttribute("aria-valuemin", model.get("first"));
    box.setAttribute("aria-valuemax", model.get("last"));
    mark();
  }
  function ask(step, message = { step }) {
    const asked = clamp(step, model.get("first"), model.get("last"));
    if (asked === wish) return;
    wish = asked;
    mark();
    model.send(message);
  }
  const move = (by) => ask(wish + by, { by }); // relative, so that no press is lost while an answer is on its way
  const stepAt = (event) => {
    const corner = drawing().getBoundingClientRect();
    return Math.round(((event.clientX - corner.left) / corner.width) * model.get("last"));
  };

  let dragged = false;
  box.addEventListener("pointerdown", (event) => {
    if (event.button || !drawing()) return;
    dragged = event.pointerType !== "touch"; // a finger scrolls the page, so it only taps
    if (dragged) box.setPointerCapture(event.pointerId);
    ask(stepAt(event));
  });
  box.addEventListener("pointermove", (event) => dragged && ask(stepAt(event)));
  for (const end of ["pointerup", "pointercancel"]) box.addEventListener(end, () => (dragged = false));
  const far = () => Math.max(2, Math.round(model.get("last") / 5));
  const KEYS = {
    ArrowLeft: () => move(-1), ArrowDown: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(1),
    PageDown: () => move(-far()), PageUp: () => move(far()),
    Home: () => ask(model.get("first")), End: () => ask(model.get("last")),
  };
  box.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS)) return;
    KEYS[event.key]();
    event.preventDefault();
    event.stopPropagation(); // the notebook has its own shortcuts
  });

  const listeners = { "change:picture": draw };
  // `busy`: after an error the wish is where it was, and only the end of the work tells of it
  for (const name of ["wish", "position", "busy", "first", "last", "text", "label"]) listeners[`change:${name}`] = follow;
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  draw();
  follow();
  return () => {
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
  };
}

export default { render };
