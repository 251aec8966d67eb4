// A film strip: one canvas for each row of pictures, inside one box that scrolls and has the keyboard.
const GAP = 4; // pixels between pictures
const NUMBER = 16; // pixels below a picture for its number
const PAUSE = 100; // milliseconds between messages to the kernel while the pointer is dragged

const make = (tag, className, parent) => {
  const node = document.createElement(tag);
  node.className = className;
  parent.append(node);
  return node;
};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const decode = (film) => Promise.all(film.map((bytes) => createImageBitmap(new Blob([bytes]))));

function render({ model, el }) {
  const box = make("div", "tfnb-strip", el);
  box.tabIndex = 0;
  box.setAttribute("role", "application");
  box.setAttribute("aria-roledescription", "film strip");
  const spoken = make("div", "tfnb-spoken", el);
  spoken.setAttribute("aria-live", "polite");

  let films = []; // decoded pictures, row by row
  let canvases = [];
  let request = 0; // the decoding that counts: a slower, older one is dropped
  let cursor = { row: 0, frame: 0, x: 0.5, y: 0.5 };

  const numberOf = (frame) => model.get("numbers")[frame] ?? frame;
  const size = () => {
    const height = model.get("height");
    const first = films.flat()[0];
    return { width: first ? Math.round((height * first.width) / first.height) : height, height };
  };

  function layOut() {
    box.setAttribute("aria-label", model.get("label"));
    box.replaceChildren();
    canvases = films.map((film, row) => {
      const title = make("div", "tfnb-strip-title", box);
      title.textContent = model.get("titles")[row] ?? "";
      title.hidden = !title.textContent;
      return make("canvas", "tfnb-strip-row", box);
    });
    draw();
  }

  function draw() {
    canvases.forEach(drawRow);
  }

  function drawRow(canvas, row) {
    const { width, height } = size();
    const ratio = window.devicePixelRatio || 1;
    const [across, down] = [films[row].length * (width + GAP) - GAP, height + NUMBER];
    Object.assign(canvas, { width: Math.round(across * ratio), height: Math.round(down * ratio) });
    Object.assign(canvas.style, { width: `${across}px`, height: `${down}px` });
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    films[row].forEach((picture, frame) => {
      pen.save();
      pen.translate(frame * (width + GAP), 0);
      pen.imageSmoothingEnabled = picture.width * 2 > width; // tokens stay squares
      pen.drawImage(picture, 0, 0, width, height);
      drawNumber(pen, frame, width, height);
      pen.restore();
    });
    model.get("marks").filter((mark) => (mark.row ?? row) === row).forEach((mark) => drawMark(pen, mark, width, height));
    if (document.activeElement === box && cursor.row === row) drawCursor(pen, width, height);
  }

  function drawNumber(pen, frame, width, height) {
    const style = getComputedStyle(box);
    const outlined = model.get("outlined").includes(frame);
    const current = model.get("current") === frame;
    pen.fillStyle = style.color;
    pen.font = `${outlined || current ? "bold " : ""}11px ${style.fontFamily}`;
    pen.textAlign = "center";
    pen.fillText(`${current ? "▶ " : ""}${outlined ? "◆ " : ""}${numberOf(frame)}`, width / 2, height + 12);
    if (!outlined && !current) return;
    pen.strokeStyle = style.getPropertyValue(outlined ? "--tfnb-accent" : "--tfnb-text").trim() || style.color;
    pen.lineWidth = 3;
    pen.strokeRect(1.5, 1.5, width - 3, height - 3);
  }

  function drawMark(pen, mark, width, height) {
    const [x, y] = [mark.frame * (width + GAP) + mark.x * width, mark.y * height];
    for (const [colour, thickness] of [["#000", 5], ["#fff", 3.5], [mark.colour ?? "#e6550d", 2]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = thickness;
      pen.beginPath();
      pen.arc(x, y, 6, 0, 2 * Math.PI);
      pen.stroke();
    }
    if (!mark.text) return;
    const style = getComputedStyle(box);
    pen.font = `bold 11px ${style.fontFamily}`;
    pen.textAlign = "center";
    const half = pen.measureText(mark.text).width / 2 + 1;
    const left = mark.frame * (width + GAP);
    const middle = half * 2 > width ? left + width / 2 : clamp(x, left + half, left + width - half);
    const base = y > height - 24 ? y - 11 : y + 19;
    pen.lineWidth = 3;
    pen.strokeStyle = "#000";
    pen.strokeText(mark.text, middle, base);
    pen.fillStyle = "#fff";
    pen.fillText(mark.text, middle, base);
  }

  function drawCursor(pen, width, height) {
    const [x, y] = [cursor.frame * (width + GAP) + cursor.x * width, cursor.y * height];
    for (const [colour, thickness] of [["#000", 4], ["#fff", 2]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = thickness;
      pen.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        pen.moveTo(x + 3 * dx, y + 3 * dy);
        pen.lineTo(x + 9 * dx, y + 9 * dy);
      }
      pen.stroke();
    }
  }

  // ---- picking: at most ten messages a second, the last one always
  let waiting = null;
  let timer = 0;
  function send() {
    timer = 0;
    if (!waiting) return;
    model.set("picked", waiting);
    model.save_changes();
    waiting = null;
    timer = setTimeout(send, PAUSE);
  }
  function pick(place) {
    cursor = place;
    waiting = { ...place };
    if (!timer) send();
    say();
    draw();
  }

  function say() {
    const { row, frame, x, y } = cursor;
    const here = model.get("marks").filter((mark) => mark.frame === frame && (mark.row ?? row) === row && mark.text);
    const title = model.get("titles")[row] ?? `row ${row}`;
    const marks = here.map((mark) => `, marked ${mark.text}`).join("");
    spoken.textContent = `${title}, frame ${numberOf(frame)}, ${Math.round(100 * x)} % across, ${Math.round(100 * y)} % down${marks}`;
  }

  function placeOf(event, row) {
    const { width, height } = size();
    const corner = canvases[row].getBoundingClientRect();
    const across = event.clientX - corner.left;
    const frame = clamp(Math.floor(across / (width + GAP)), 0, films[row].length - 1);
    const x = clamp((across - frame * (width + GAP)) / width, 0, 0.9999);
    return { row, frame, x, y: clamp((event.clientY - corner.top) / height, 0, 0.9999) };
  }

  let dragged = -1; // the row in which the pointer went down
  box.addEventListener("pointerdown", (event) => {
    const row = canvases.indexOf(event.target);
    if (row < 0 || event.button) return;
    if (event.pointerType !== "touch") {
      dragged = row; // a finger scrolls the strip, so it only taps
      canvases[row].setPointerCapture(event.pointerId);
    }
    pick(placeOf(event, row));
  });
  box.addEventListener("pointermove", (event) => dragged >= 0 && pick(placeOf(event, dragged)));
  for (const end of ["pointerup", "pointercancel"]) box.addEventListener(end, () => (dragged = -1));

  const MOVES = {
    ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0],
    PageUp: [0, 0, -1], PageDown: [0, 0, 1], Home: [0, 0, -Infinity], End: [0, 0, Infinity],
  };
  function move([across, down, frames]) {
    const step = 1 / model.get("cells");
    let { row, frame, x, y } = cursor;
    [x, y] = [x + across * step, y + down * step];
    if (x < 0 && frame > 0) [frame, x] = [frame - 1, x + 1];
    if (x >= 1 && frame < films[row].length - 1) [frame, x] = [frame + 1, x - 1];
    if (y < 0 && row > 0) [row, y] = [row - 1, y + 1];
    if (y >= 1 && row < films.length - 1) [row, y] = [row + 1, y - 1];
    frame = clamp(frame + frames, 0, films[row].length - 1);
    const last = 1 - step / 2;
    cursor = { row, frame, x: clamp(x, step / 2, last), y: clamp(y, step / 2, last) };
    const { width } = size();
    const left = frame * (width + GAP);
    if (left < box.scrollLeft || left + width > box.scrollLeft + box.clientWidth) box.scrollLeft = left - GAP;
    say();
    draw();
  }
  box.addEventListener("keydown", (event) => {
    if (!films.length) return;
    if (event.key in MOVES) move(MOVES[event.key]);
    else if (event.key === "Enter" || event.key === " ") pick(cursor);
    else return;
    event.preventDefault();
    event.stopPropagation(); // the notebook has its own ideas about Enter
  });
  for (const change of ["focus", "blur"]) box.addEventListener(change, draw);

  async function load() {
    const mine = ++request;
    const decoded = await Promise.all(model.get("rows").map(decode));
    if (mine !== request) return decoded.flat().forEach((picture) => picture.close());
    const before = films;
    films = decoded;
    cursor.row = clamp(cursor.row, 0, Math.max(films.length - 1, 0));
    if (films.length) cursor.frame = clamp(cursor.frame, 0, films[cursor.row].length - 1);
    const place = box.scrollLeft;
    layOut();
    box.scrollLeft = place;
    before.flat().forEach((picture) => picture.close());
  }

  const listeners = { "change:rows": load };
  for (const name of ["titles", "height", "label"]) listeners[`change:${name}`] = layOut;
  for (const name of ["marks", "outlined", "current", "numbers"]) listeners[`change:${name}`] = draw;
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  const theme = new MutationObserver(draw);
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "class"] });
  load();

  return () => {
    request = -1;
    clearTimeout(timer);
    theme.disconnect();
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    films.flat().forEach((picture) => picture.close());
  };
}

export default { render };
