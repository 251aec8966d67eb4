// A film strip: rows of frames inside one box that scrolls and has the keyboard. Only what is in sight is drawn.
import { Films, clamp, make, onTheme, paced, perFrame, themeColour } from "./film.js";

const GAP = 4; // pixels between pictures
const NUMBER = 18; // pixels below a picture for its number
const LARGEST = 3; // a few frames are enlarged to fill the width, at most to so many times the height that was asked for

function render({ model, el }) {
  const box = make("div", "tfnb-strip", el, {
    tabindex: 0, role: "application", "aria-roledescription": "film strip", "data-lm-suppress-shortcuts": "true",
  });
  const spoken = make("div", "tfnb-spoken", el, { "aria-live": "polite" });

  let rows = []; // title, track and canvas of each row
  let cursor = { row: 0, frame: 0, x: 0.5, y: 0.5 };
  let dragged = -1; // the row in which the pointer went down

  const redraw = perFrame(draw);
  // frames are decoded at the size at which they are drawn: hundreds of them are in sight at once
  const scale = (film) => {
    const ratio = Math.min(1, (size().height * (window.devicePixelRatio || 1)) / film.height);
    if (ratio > 0.75) return undefined;
    return { resizeWidth: Math.max(1, Math.round(film.width * ratio)), resizeHeight: Math.max(1, Math.round(film.height * ratio)), resizeQuality: "high" };
  };
  const films = new Films(model, redraw, { scale, decode: (blob, options) => createImageBitmap(blob, options) });
  const numberOf = (frame) => model.get("numbers")[frame] ?? frame;

  // Width and height of a frame on the page: as asked for, or more if all of them fit.
  function size() {
    const least = model.get("height");
    const first = films.list.find((film) => film.frames);
    if (!first) return { width: least, height: least };
    const aspect = first.width / first.height;
    const room = (box.clientWidth - 8 - GAP * (films.length - 1)) / films.length;
    const height = clamp(Math.floor(room / aspect), least, LARGEST * least);
    return { width: Math.max(1, Math.round(height * aspect)), height };
  }

  function layOut() {
    box.setAttribute("aria-label", model.get("label"));
    if (rows.length !== films.list.length) {
      box.replaceChildren();
      rows = films.list.map(() => {
        const title = make("div", "tfnb-strip-title", box);
        const track = make("div", "tfnb-strip-track", box);
        return { title, track, canvas: make("canvas", "tfnb-strip-row", track, { "aria-hidden": "true" }) };
      });
    }
    rows.forEach(({ title }, row) => {
      title.textContent = model.get("titles")[row] ?? "";
      title.hidden = !title.textContent;
    });
    draw();
  }

  function draw() {
    if (!box.clientWidth) return; // not on the page yet: the observer of its size draws it
    const { width, height } = size();
    const first = Math.floor(box.scrollLeft / (width + GAP));
    const last = Math.ceil((box.scrollLeft + box.clientWidth) / (width + GAP));
    films.look(clamp(first, 0, Math.max(0, films.length - 1)));
    const drawn = rows.map((_, row) => drawRow(row, width, height, first, last));
    box.setAttribute("aria-busy", !drawn.every(Boolean));
  }

  function drawRow(row, width, height, first, last) {
    const { track, canvas } = rows[row];
    const { frames } = films.list[row];
    const ratio = window.devicePixelRatio || 1;
    const whole = Math.max(0, frames * (width + GAP) - GAP);
    const [across, down] = [Math.max(1, Math.min(whole, box.clientWidth)), height + NUMBER];
    Object.assign(track.style, { width: `${whole}px`, height: `${down}px` });
    Object.assign(canvas.style, { width: `${across}px`, height: `${down}px` });
    Object.assign(canvas, { width: Math.round(across * ratio), height: Math.round(down * ratio) }); // this clears it
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.translate(-leftOf(row), 0);
    let complete = true;
    for (let frame = Math.max(0, first); frame < Math.min(frames, last); frame++) {
      const picture = films.picture(row, frame);
      complete &&= Boolean(picture);
      pen.save();
      pen.translate(frame * (width + GAP), 0);
      if (picture) {
        pen.imageSmoothingEnabled = films.list[row].width * 2 > width; // tokens stay squares
        pen.drawImage(picture, 0, 0, width, height);
      } else {
        pen.strokeStyle = themeColour(box, "line");
        pen.strokeRect(0.5, 0.5, width - 1, height - 1);
      }
      drawNumber(pen, frame, width, height);
      pen.restore();
    }
    model.get("marks").filter((mark) => (mark.row ?? row) === row).forEach((mark) => drawMark(pen, mark, width, height));
    if (document.activeElement === box && cursor.row === row) drawCursor(pen, width, height);
    return complete;
  }

  // How far the canvas of a row is from the beginning of the row: it stays in sight while the box scrolls.
  const leftOf = (row) => rows[row].canvas.getBoundingClientRect().left - rows[row].track.getBoundingClientRect().left;

  function drawNumber(pen, frame, width, height) {
    const style = getComputedStyle(box);
    const outlined = model.get("outlined").includes(frame);
    const current = model.get("current") === frame;
    pen.fillStyle = style.color;
    pen.font = `${outlined || current ? "bold " : ""}12px ${style.fontFamily}`;
    pen.textAlign = "center";
    pen.fillText(`${current ? "▶ " : ""}${outlined ? "◆ " : ""}${numberOf(frame)}`, width / 2, height + 13);
    if (!outlined && !current) return;
    pen.strokeStyle = themeColour(box, outlined ? "accent" : "text");
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
  const send = paced((place) => {
    model.set("picked", place);
    model.save_changes();
  });
  function pick(place) {
    cursor = place;
    send({ ...place });
    say();
    redraw();
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
    const corner = rows[row].track.getBoundingClientRect();
    const across = event.clientX - corner.left;
    const frame = clamp(Math.floor(across / (width + GAP)), 0, films.list[row].frames - 1);
    const x = clamp((across - frame * (width + GAP)) / width, 0, 0.9999);
    return { row, frame, x, y: clamp((event.clientY - corner.top) / height, 0, 0.9999) };
  }

  box.addEventListener("pointerdown", (event) => {
    const row = rows.findIndex(({ canvas }) => canvas === event.target);
    if (row < 0 || event.button || !films.list[row].frames) return;
    if (event.pointerType !== "touch") {
      dragged = row; // a finger scrolls the strip, so it only taps
      event.target.setPointerCapture(event.pointerId);
    }
    pick(placeOf(event, row));
  });
  box.addEventListener("pointermove", (event) => dragged >= 0 && pick(placeOf(event, dragged)));
  for (const end of ["pointerup", "pointercancel"]) box.addEventListener(end, () => (dragged = -1));
  box.addEventListener("scroll", redraw, { passive: true });

  const MOVES = {
    ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0],
    PageUp: [0, 0, -1], PageDown: [0, 0, 1], Home: [0, 0, -Infinity], End: [0, 0, Infinity],
  };
  function move([across, down, frames]) {
    const step = 1 / model.get("cells");
    const lengths = films.list.map((film) => film.frames);
    let { row, frame, x, y } = cursor;
    [x, y] = [x + across * step, y + down * step];
    if (x < 0 && frame > 0) [frame, x] = [frame - 1, x + 1];
    if (x >= 1 && frame < lengths[row] - 1) [frame, x] = [frame + 1, x - 1];
    if (y < 0 && row > 0) [row, y] = [row - 1, y + 1];
    if (y >= 1 && row < lengths.length - 1) [row, y] = [row + 1, y - 1];
    frame = clamp(frame + frames, 0, Math.max(0, lengths[row] - 1));
    const last = 1 - step / 2;
    cursor = { row, frame, x: clamp(x, step / 2, last), y: clamp(y, step / 2, last) };
    const { width } = size();
    const left = frame * (width + GAP);
    if (left < box.scrollLeft || left + width > box.scrollLeft + box.clientWidth) box.scrollLeft = left - GAP;
    say();
    redraw();
  }
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.key === "Tab") return;
    event.stopPropagation(); // the notebook has its own ideas about these keys
    if (!films.list.length) return;
    if (event.key in MOVES) move(MOVES[event.key]);
    else if (event.key === "Enter" || event.key === " ") pick(cursor);
    else return;
    event.preventDefault();
  });
  for (const change of ["focus", "blur"]) box.addEventListener(change, redraw);

  function onRows() {
    films.show(model.get("_shown"));
    cursor.row = clamp(cursor.row, 0, Math.max(films.list.length - 1, 0));
    if (films.list.length) cursor.frame = clamp(cursor.frame, 0, Math.max(0, films.list[cursor.row].frames - 1));
    layOut();
  }

  const listeners = { "change:_shown": onRows };
  for (const name of ["titles", "height", "label"]) listeners[`change:${name}`] = layOut;
  for (const name of ["marks", "outlined", "current", "numbers"]) listeners[`change:${name}`] = redraw;
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  const endTheme = onTheme(redraw);
  const resized = new ResizeObserver(redraw);
  resized.observe(box);
  onRows();

  return () => {
    for (const each of [redraw, send]) each.end();
    endTheme();
    resized.disconnect();
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    films.close();
  };
}

export default { render };
