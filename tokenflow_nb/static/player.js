// Films that play in step: beside one another, or two of them over one another with a wipe between.
const decode = (film) => Promise.all(film.map((bytes) => createImageBitmap(new Blob([bytes]))));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const make = (tag, className, parent, attributes = {}) => {
  const node = document.createElement(tag);
  node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
};

function render({ model, el }) {
  const box = make("div", "tfnb-player", el);
  const stage = make("div", "tfnb-player-stage", box);
  const controls = make("div", "tfnb-player-controls", box);
  const slider = (text, className) => {
    const label = make("label", className, controls);
    make("span", "tfnb-player-label", label).textContent = text;
    return make("input", "tfnb-player-slider", label, { type: "range", min: 0, "aria-label": text });
  };
  const play = make("button", "tfnb-player-play", controls, { type: "button" });
  const seek = slider("Frame", "tfnb-player-frame");
  const count = make("output", "tfnb-player-count", controls);
  const wipe = slider("Wipe", "tfnb-player-wipe");
  wipe.max = 100;

  let films = [];
  let canvases = [];
  let request = 0;
  let frame = 0;
  let timer = 0;

  const wiped = () => model.get("wipe") && films.length >= 2;
  const length = () => Math.max(0, ...films.map((film) => film.length));
  const at = (film) => film[Math.min(frame, film.length - 1)];

  function layOut() {
    stage.replaceChildren();
    const names = model.get("names");
    const groups = wiped() ? [films.slice(0, 2)] : films.map((film) => [film]);
    canvases = groups.map((group, index) => {
      const figure = make("figure", "tfnb-player-film", stage);
      const title = wiped() ? names.slice(0, 2).join(" | ") : names[index] ?? "";
      const canvas = make("canvas", "tfnb-player-canvas", figure, { role: "img", "aria-label": title });
      make("figcaption", "tfnb-player-name", figure).textContent = title;
      const first = group[0][0];
      const scale = Math.max(1, Math.round(model.get("height") / first.height)); // whole pixels where there is room
      Object.assign(canvas, { width: first.width * scale, height: first.height * scale });
      canvas.style.width = `${Math.round((model.get("height") * first.width) / first.height)}px`;
      return canvas;
    });
    seek.max = Math.max(0, length() - 1);
    const moving = length() > 1;
    for (const node of [play, seek.parentNode, count]) node.hidden = !moving;
    wipe.parentNode.hidden = !wiped();
    draw();
  }

  function draw() {
    frame = clamp(frame, 0, Math.max(0, length() - 1));
    seek.value = frame;
    count.textContent = `${frame + 1} / ${length()}`;
    wipe.value = Math.round(100 * model.get("position"));
    const playing = model.get("playing");
    play.textContent = playing ? "Pause" : "Play";
    play.setAttribute("aria-pressed", playing);
    canvases.forEach((canvas, index) => {
      const pen = canvas.getContext("2d");
      pen.imageSmoothingEnabled = false;
      pen.drawImage(at(films[index]), 0, 0, canvas.width, canvas.height);
      if (wiped()) drawWipe(pen, canvas.width, canvas.height);
    });
  }

  function drawWipe(pen, width, height) {
    const edge = Math.round(width * model.get("position"));
    pen.save();
    pen.beginPath();
    pen.rect(edge, 0, width - edge, height);
    pen.clip();
    pen.drawImage(at(films[1]), 0, 0, width, height);
    pen.restore();
    const line = Math.max(2, width / 128);
    pen.fillStyle = "#000";
    pen.fillRect(edge - line, 0, 2 * line, height);
    pen.fillStyle = "#fff";
    pen.fillRect(edge - line / 2, 0, line, height);
  }

  const tell = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  function go(number) {
    frame = clamp(number, 0, Math.max(0, length() - 1));
    draw();
  }
  function tick() {
    clearInterval(timer);
    timer = model.get("playing") && length() > 1
      ? setInterval(() => go((frame + 1) % length()), 1000 / model.get("fps"))
      : 0;
    draw();
  }
  play.addEventListener("click", () => {
    model.set("frame", frame); // while it plays the kernel is not told of every frame
    tell("playing", !model.get("playing"));
  });
  seek.addEventListener("input", () => {
    go(Number(seek.value));
    tell("frame", frame);
  });
  wipe.addEventListener("input", () => tell("position", wipe.value / 100));

  let dragging = false;
  const drag = (event) => {
    const corner = canvases[0].getBoundingClientRect();
    tell("position", clamp((event.clientX - corner.left) / corner.width, 0, 1));
  };
  stage.addEventListener("pointerdown", (event) => {
    if (!wiped() || event.target !== canvases[0]) return;
    dragging = true;
    canvases[0].setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", (event) => dragging && drag(event));
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => (dragging = false));
  controls.addEventListener("keydown", (event) => event.stopPropagation()); // the notebook has its own shortcuts

  async function load() {
    const mine = ++request;
    const decoded = await Promise.all(model.get("films").map(decode));
    if (mine !== request) return decoded.flat().forEach((picture) => picture.close());
    const before = films;
    films = decoded.filter((film) => film.length);
    layOut();
    tick();
    before.flat().forEach((picture) => picture.close());
  }

  const listeners = { "change:films": load, "change:position": draw, "change:frame": () => go(model.get("frame")) };
  for (const name of ["names", "height", "wipe"]) listeners[`change:${name}`] = layOut;
  for (const name of ["playing", "fps"]) listeners[`change:${name}`] = tick;
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  frame = model.get("frame");
  load();

  return () => {
    request = -1;
    clearInterval(timer);
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    films.flat().forEach((picture) => picture.close());
  };
}

export default { render };
