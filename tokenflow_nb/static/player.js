// Films that play in step: beside one another, or two of them compared by a wipe, their difference, or a cut along time.
import { Films, clamp, make, onTheme, paced, perFrame, prefersStill, themeColour } from "./film.js";
import { cutOf, cutSize, difference, frameAt, paintHeat, scaleFor, scaleInWords, summary, zoomed } from "./views.js";
import { makeGrip } from "./grip.js";

const MOST_ZOOM = 16;
const SHARPEST = 2048; // pixels of a canvas on its longer side
const COARSE = 160; // films this narrow are enlarged without smoothing: tokens and the toy world are looked at pixel by pixel
const COMPARED = 640; // the difference of larger frames is computed at this width
const AHEAD = 6; // frames decoded before they are shown

function controlsOf(box) {
  const bar = make("div", "tfnb-player-controls", box);
  const button = (className, text, name) => {
    const node = make("button", `tfnb-button ${className}`, bar, { type: "button" });
    node.textContent = text;
    if (name) node.setAttribute("aria-label", name);
    return node;
  };
  const select = (className, name) => {
    const label = make("label", className, bar);
    make("span", "", label).textContent = name;
    return make("select", "tfnb-select", label, { "aria-label": name });
  };
  const play = button("tfnb-player-play", "Play");
  const seek = make("input", "tfnb-player-frame", bar, { type: "range", min: 0, "aria-label": "Frame" });
  const count = make("output", "tfnb-player-count", bar);
  const view = select("tfnb-player-view", "View");
  const axis = select("tfnb-player-axis", "Cut");
  for (const [value, text] of [["x–t", "a row over time (x–t)"], ["y–t", "a column over time (y–t)"]]) {
    axis.append(new Option(text, value));
  }
  const less = button("tfnb-player-zoom", "−", "Zoom out");
  const zoom = button("tfnb-player-zoom", "100 %");
  const more = button("tfnb-player-zoom", "+", "Zoom in");
  const full = button("tfnb-player-full", "Full screen");
  full.hidden = !document.fullscreenEnabled;
  return { play, seek, count, view, axis, less, zoom, more, full };
}

function render({ model, el }) {
  const box = make("div", "tfnb-player", el, { "data-lm-suppress-shortcuts": "true" });
  const stage = make("div", "tfnb-player-stage", box, {
    tabindex: 0, role: "group", "aria-roledescription": "player", "aria-keyshortcuts": "Space ArrowLeft ArrowRight Home End",
  });
  const note = make("div", "tfnb-player-note", box, { role: "status" });
  const controls = controlsOf(box);
  const { play, seek, count } = controls;

  let figures = []; // what is on the stage: its canvas, its size in pixels of the film, and how it is drawn
  let [laidOut, frame, running] = ["", model.get("frame"), 0];
  let [zoom, centre] = [1, [0.5, 0.5]];
  let heatOf = {}; // the last difference
  let cuts = { key: "", done: [], canvases: [] };
  let answered = -1; // the last question that a key has answered

  const redraw = perFrame(draw);
  const films = new Films(model, came);
  const names = () => model.get("names");
  const named = (place) => names()[place] ?? "";
  const two = () => films.list.filter((film) => film.frames).length >= 2;
  const view = () => (two() ? model.get("view") : "side by side");
  const tell = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };
  const tellFrame = paced(() => tell({ frame }));
  const tellPlace = paced((values) => tell(values));

  // ---- the stage

  function layOut() {
    const shown = films.list.map((film, place) => ({ film, place })).filter(({ film }) => film.frames);
    const of = ({ film: { width, height }, place }, kind) => ({ kind, place, width, height });
    const wanted = {
      "side by side": () => shown.map((each) => of(each, "film")),
      wipe: () => [of(shown[0], "wipe")],
      difference: () => [of(shown[0], "difference")],
      "cut along time": () => [of(shown[0], "line"), ...shown.map((each) => of(each, "cut"))],
    }[view()]();
    const signature = JSON.stringify(wanted);
    if (signature !== laidOut) {
      laidOut = signature;
      stage.replaceChildren();
      figures = wanted.map(newFigure);
    }
    figures.forEach(label);
    const height = model.get("height");
    stage.style.setProperty("--tfnb-tall", height ? `${height}px` : "75vh");
    stage.setAttribute("aria-label", names().filter(Boolean).join(", ") || "films");
    const views = model.get("views");
    controls.view.replaceChildren(...views.map((each) => new Option(each, each)));
    controls.view.value = view();
    controls.view.parentNode.hidden = !two() || views.length < 2;
    controls.axis.value = model.get("axis");
    controls.axis.parentNode.hidden = view() !== "cut along time";
    seek.max = Math.max(0, films.length - 1);
    for (const node of [play, seek, count]) node.hidden = films.length < 2;
    for (const node of [controls.less, controls.zoom, controls.more]) node.hidden = !films.length || view() === "cut along time";
    if (view() !== "difference") note.textContent = "";
    draw();
  }

  function newFigure(wanted) {
    const node = make("figure", "tfnb-player-film", stage);
    node.style.setProperty("--tfnb-aspect", wanted.width / wanted.height);
    const title = make("figcaption", "tfnb-player-name", node);
    const hold = make("div", "tfnb-player-hold", node);
    const canvas = make("canvas", "tfnb-player-canvas", hold, { role: "img" });
    const figure = { ...wanted, node, title, hold, canvas };
    if (wanted.kind === "wipe") figure.grip = makeGrip(hold, (value, finished) => slide("position", value, finished));
    if (wanted.kind === "line") figure.grip = makeGrip(hold, (value, finished) => slide("line", value, finished));
    watch(figure);
    return figure;
  }

  function label(figure) {
    const { kind, place, title, canvas } = figure;
    const cut = `${model.get("axis") === "x–t" ? "row" : "column"} ${cutOf(model.get("axis"), model.get("line"), figure.width, figure.height, 0).number}`;
    const direction = model.get("axis") === "x–t" ? "time runs down" : "time runs to the right";
    const text = {
      film: named(place),
      wipe: `${named(0)} | ${named(1)}`,
      difference: `${named(0)} − ${named(1)}`,
      line: `${named(place)}, ${cut}`,
      cut: `${named(place)}, ${cut}: ${direction}`,
    }[kind];
    canvas.setAttribute("aria-label", text);
    title.replaceChildren();
    if (kind !== "wipe") return void (title.textContent = text);
    make("span", "tfnb-player-left", title).textContent = named(0);
    make("span", "tfnb-player-right", title).textContent = named(1);
  }

  function slide(trait, value, finished) {
    model.set(trait, value);
    figures.forEach(label);
    redraw();
    if (finished) tell({ [trait]: value });
    else tellPlace({ [trait]: value });
  }

  // ---- drawing. Each `paint` returns whether it had the pictures; a canvas keeps what it shows until there are new ones.

  function penOf({ canvas, width, height }, like) {
    const across = canvas.clientWidth * (window.devicePixelRatio || 1);
    const scale = Math.min(1, SHARPEST / Math.max(across, (across * height) / width));
    const [wide, tall] = [Math.max(1, Math.round(across * scale)), Math.max(1, Math.round((across * scale * height) / width))];
    if (canvas.width !== wide || canvas.height !== tall) Object.assign(canvas, { width: wide, height: tall });
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = !(like <= COARSE && wide * zoom >= 2 * like);
    pen.imageSmoothingQuality = wide * zoom < like ? "high" : "low"; // enlarged, both look alike, and one is fast
    return { pen, wide, tall };
  }

  function drawZoomed(pen, picture, wide, tall) {
    const { left, top } = zoomed(zoom, centre);
    pen.drawImage(picture, left * wide, top * tall, zoom * wide, zoom * tall);
  }

  const paint = {
    film(figure) {
      const picture = films.picture(figure.place, frame);
      if (!picture) return false;
      const { pen, wide, tall } = penOf(figure, picture.width);
      pen.clearRect(0, 0, wide, tall);
      drawZoomed(pen, picture, wide, tall);
      return true;
    },

    wipe(figure) {
      const [left, right] = [0, 1].map((place) => films.picture(place, frame));
      const position = model.get("position");
      figure.grip.show(position, { name: "Wipe", text: `${Math.round(100 * position)} %: ${named(0)} left, ${named(1)} right` });
      if (!left || !right) return false;
      const { pen, wide, tall } = penOf(figure, left.width);
      const edge = Math.round(wide * position);
      pen.clearRect(0, 0, wide, tall);
      for (const [picture, from, to] of [[left, 0, edge], [right, edge, wide]]) {
        pen.save();
        pen.beginPath();
        pen.rect(from, 0, to - from, tall);
        pen.clip();
        drawZoomed(pen, picture, wide, tall);
        pen.restore();
      }
      return true;
    },

    difference(figure) {
      const pictures = [0, 1].map((place) => films.own(place, frame));
      if (!pictures[0] || !pictures[1]) return false;
      compare(pictures);
      const { pen, wide, tall } = penOf(figure, pictures[0].width);
      drawZoomed(pen, heatOf.canvas, wide, tall);
      const lossless = films.list.slice(0, 2).every((film) => film.lossless);
      note.textContent = scaleInWords(heatOf.scale, heatOf.found, lossless);
      return true;
    },

    line(figure) {
      const line = model.get("line");
      const row = model.get("axis") === "x–t";
      const { number } = cutOf(model.get("axis"), line, figure.width, figure.height, 0);
      figure.grip.show(line, { vertical: !row, name: "Line of the cut", text: `${row ? "row" : "column"} ${number}` });
      const picture = films.picture(figure.place, frame);
      if (!picture) return false;
      const { pen, wide, tall } = penOf(figure, picture.width);
      pen.clearRect(0, 0, wide, tall);
      pen.drawImage(picture, 0, 0, wide, tall); // not enlarged: the line belongs to the whole frame
      return true;
    },

    cut(figure) {
      cutAll();
      const canvas = cuts.canvases[figure.place];
      const { pen, wide, tall } = penOf(figure, Math.min(canvas.width, canvas.height));
      pen.clearRect(0, 0, wide, tall);
      pen.drawImage(canvas, 0, 0, wide, tall);
      pen.fillStyle = themeColour(box, "accent");
      const share = (frame + 0.5) / films.list[figure.place].frames;
      if (films.list[figure.place].frames > 1) {
        if (model.get("axis") === "x–t") for (const left of [0, wide - 8]) pen.fillRect(left, tall * share - 1.5, 8, 3);
        else for (const top of [0, tall - 8]) pen.fillRect(wide * share - 1.5, top, 3, 8);
      }
      return cuts.done[figure.place].size === films.list[figure.place].frames;
    },
  };

  // The difference of two pictures, on a canvas of its own. Its scale only grows: the same colour means the same in all frames.
  function compare(pictures) {
    const pair = films.list.slice(0, 2).map((film) => film.id).join();
    if (heatOf.pair === pair && heatOf.pictures?.every((picture, place) => picture === pictures[place])) return;
    const scale = Math.min(1, COMPARED / pictures[0].width);
    const [wide, tall] = [Math.round(pictures[0].width * scale) || 1, Math.round(pictures[0].height * scale) || 1];
    const pixels = pictures.map((picture) => {
      const canvas = new OffscreenCanvas(wide, tall);
      const pen = canvas.getContext("2d", { willReadFrequently: true });
      pen.drawImage(picture, 0, 0, wide, tall);
      return pen.getImageData(0, 0, wide, tall);
    });
    const shares = difference(pixels[0].data, pixels[1].data);
    const found = summary(shares);
    const most = Math.max(found.most, heatOf.pair === pair ? heatOf.most : 0);
    paintHeat(shares, scaleFor(most), pixels[0].data);
    const canvas = new OffscreenCanvas(wide, tall);
    canvas.getContext("2d").putImageData(pixels[0], 0, 0);
    heatOf = { pair, pictures, found, most, scale: scaleFor(most), canvas };
  }

  // The cuts of all films. They grow while frames are decoded; for another line or axis they are made anew.
  function cutAll() {
    const key = [model.get("axis"), model.get("line"), ...films.list.map((film) => film.id)].join();
    if (key === cuts.key) return;
    const before = cuts.canvases;
    cuts = { key, done: films.list.map(() => new Set()), canvases: [] };
    films.list.forEach((film, place) => {
      const [wide, tall] = cutSize(model.get("axis"), film.width || 1, film.height || 1, Math.max(1, film.frames));
      const canvas = new OffscreenCanvas(wide, tall);
      if (before[place]) canvas.getContext("2d").drawImage(before[place], 0, 0, wide, tall); // until the new rows are there
      cuts.canvases.push(canvas);
      for (let each = 0; each < film.frames; each++) cutOne(place, each);
    });
  }

  function cutOne(place, number) {
    const film = films.list[place];
    if (!cuts.done[place] || cuts.done[place].has(number) || (number === 0 && film.rough)) return;
    const picture = films.own(place, number);
    if (!picture) return;
    const { from, to } = cutOf(model.get("axis"), model.get("line"), picture.width, picture.height, number);
    cuts.canvases[place].getContext("2d").drawImage(picture, ...from, ...to);
    cuts.done[place].add(number);
  }

  function came(place, number) {
    if (view() === "cut along time") cutOne(place, number);
    if (number === clamp(frame, 0, films.list[place].frames - 1) || view() === "cut along time") redraw();
  }

  function draw() {
    frame = clamp(frame, 0, Math.max(0, films.length - 1));
    seek.value = frame;
    seek.setAttribute("aria-valuetext", `frame ${frame} of 0 to ${films.length - 1}`);
    const late = films.failure || (films.has(frame) ? "" : "loading");
    count.textContent = `frame ${frame} of 0–${Math.max(0, films.length - 1)}${late && ` · ${late}`}`;
    play.textContent = running ? "Pause" : "Play";
    controls.zoom.textContent = `${Math.round(100 * zoom)} %`;
    controls.zoom.setAttribute("aria-label", `Zoom ${Math.round(100 * zoom)} %, click for 100 %`);
    box.classList.toggle("tfnb-zoomed", zoom > 1);
    if (!stage.clientWidth) return; // not on the page, or hidden while the theme changes: the observer of its size draws it
    stage.setAttribute("aria-busy", !figures.map((figure) => paint[figure.kind](figure)).every(Boolean));
  }

  // ---- frames and time

  function go(number) {
    frame = clamp(number, 0, Math.max(0, films.length - 1));
    films.look(frame);
    draw();
  }

  function step(number) {
    if (running) stop();
    go(number);
    tellFrame();
  }

  function start() {
    cancelAnimationFrame(running);
    let [began, at] = [frame, performance.now()];
    const tick = (now) => {
      running = requestAnimationFrame(tick);
      const next = frameAt(began, Math.max(0, now - at), model.get("fps"), films.length);
      if (next !== frame && !films.has(next)) {
        [began, at] = [frame, now]; // wait for what has not been sent yet
        films.look(next);
      } else if (next !== frame) {
        go(next);
        for (let ahead = 1; ahead <= AHEAD; ahead++) films.list.forEach((_, place) => films.own(place, (next + ahead) % films.length));
      }
    };
    running = requestAnimationFrame(tick);
    draw();
  }

  function stop() {
    cancelAnimationFrame(running);
    running = 0;
    draw();
    if (model.get("playing")) tell({ frame, playing: false });
  }

  function toggle() {
    if (running) return stop();
    if (films.length < 2) return;
    tell({ frame, playing: true }); // while it plays the kernel is not told of every frame
    start();
  }

  // The kernel asks to play: not if the reader wants nothing to move by itself.
  function follow() {
    if (!model.get("playing") && running) stop();
    if (model.get("playing") && !running && films.length > 1 && !prefersStill()) start();
  }

  // ---- zoom

  function zoomTo(value, [x, y] = [0.5, 0.5]) {
    const before = zoom;
    zoom = clamp(value, 1, MOST_ZOOM);
    if (zoom < 1.01) zoom = 1;
    const at = [x, y].map((share, axis) => centre[axis] + (share - 0.5) / before); // the point that stays where it is
    ({ centre } = zoomed(zoom, at.map((share, axis) => share - ([x, y][axis] - 0.5) / zoom)));
    draw();
  }

  function watch({ hold, canvas, grip }) {
    const share = (event) => {
      const corner = canvas.getBoundingClientRect();
      return [(event.clientX - corner.left) / corner.width, (event.clientY - corner.top) / corner.height];
    };
    hold.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // without it the page scrolls
      event.preventDefault();
      zoomTo(zoom * Math.exp(-event.deltaY / 300), share(event));
    }, { passive: false });
    let from = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      if (zoom === 1) return void grip?.begin(event);
      from = share(event);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!from) return;
      const to = share(event);
      ({ centre } = zoomed(zoom, centre.map((value, axis) => value - (to[axis] - from[axis]) / zoom)));
      from = to;
      redraw();
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (from = null));
  }

  // ---- controls and keys

  function fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else box.requestFullscreen?.().catch(() => (controls.full.hidden = true)); // a frame that may not, as in Colab
  }
  const onFullScreen = () => {
    controls.full.textContent = document.fullscreenElement === box ? "Leave full screen" : "Full screen";
  };
  document.addEventListener("fullscreenchange", onFullScreen);

  play.addEventListener("click", toggle);
  seek.addEventListener("input", () => step(Number(seek.value)));
  controls.view.addEventListener("change", () => {
    tell({ view: controls.view.value });
    layOut();
  });
  controls.axis.addEventListener("change", () => {
    tell({ axis: controls.axis.value });
    layOut();
  });
  controls.less.addEventListener("click", () => zoomTo(zoom / 1.5));
  controls.more.addEventListener("click", () => zoomTo(zoom * 1.5));
  controls.zoom.addEventListener("click", () => zoomTo(1));
  controls.full.addEventListener("click", fullScreen);

  const KEYS = {
    " ": toggle,
    ArrowLeft: () => step(frame - 1), ArrowRight: () => step(frame + 1),
    Home: () => step(0), End: () => step(films.length - 1),
    "+": () => zoomTo(zoom * 1.5), "-": () => zoomTo(zoom / 1.5), 0: () => zoomTo(1), f: fullScreen,
  };
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.key === "Tab") return;
    event.stopPropagation(); // the notebook has its own shortcuts
    const own = event.target.matches("select, input") || (event.key === " " && event.target.matches("button"));
    if (own || !(event.key in KEYS)) return;
    KEYS[event.key]();
    event.preventDefault();
  });

  // Letters that the kernel waits for count in the whole panel, before a shortcut of the notebook takes them.
  const onLetter = (event) => {
    const around = box.closest(".tfnb-panel") ?? box;
    const letter = event.key.toLowerCase();
    const writes = event.target.matches?.("textarea, select, input:not([type=range]):not([type=checkbox])");
    if (event.ctrlKey || event.metaKey || event.altKey || writes || !around.contains(event.target)) return;
    if (!model.get("letters").includes(letter)) return;
    event.preventDefault();
    event.stopPropagation();
    const question = model.get("question");
    const seen = films.list.every((_, place) => films.own(place, frame));
    if (answered === question || !seen) return; // a key is no answer to what was not shown yet
    answered = question;
    model.send({ pressed: letter, question });
  };
  document.addEventListener("keydown", onLetter, true);
  const onLetters = () => {
    const focused = document.activeElement;
    const around = box.closest(".tfnb-panel") ?? box;
    if (model.get("letters").length && (focused === document.body || around.contains(focused))) stage.focus({ preventScroll: true });
  };

  const onFilms = () => {
    films.show(model.get("_shown"));
    films.look(frame);
    layOut();
    follow();
  };
  const listeners = {
    "change:_shown": onFilms,
    "change:position": redraw,
    "change:line": layOut,
    "change:frame": () => model.get("frame") !== frame && go(model.get("frame")),
    "change:playing": follow,
    "change:fps": () => running && start(),
    "change:letters": onLetters,
  };
  for (const name of ["names", "height", "view", "views", "axis"]) listeners[`change:${name}`] = layOut;
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  const size = new ResizeObserver(redraw);
  size.observe(stage);
  const endTheme = onTheme(redraw);
  onFilms();

  return () => {
    cancelAnimationFrame(running);
    running = 0;
    for (const each of [redraw, tellFrame, tellPlace]) each.end();
    size.disconnect();
    endTheme();
    document.removeEventListener("fullscreenchange", onFullScreen);
    document.removeEventListener("keydown", onLetter, true);
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    films.close();
  };
}

export default { render };
