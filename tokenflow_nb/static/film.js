// What all widgets that show films have in common: frames are asked for, decoded when they are drawn, and dropped again.
const BATCH = 16; // frames in one request
const REQUESTS = 2; // under way at once: a new current frame waits for no more than these
const PATIENCE = 20000; // milliseconds until a request counts as lost, as after a restart of the server
const MEMORY = 150e6; // bytes of decoded pictures

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

export const make = (tag, className, parent, attributes = {}) => {
  const node = document.createElement(tag);
  node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent?.append(node);
  return node;
};

export const prefersStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Calls `changed` when the theme of the notebook changes. Returns what ends it.
export function onTheme(changed) {
  const watch = new MutationObserver(changed);
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-vscode-theme-kind", "class"] });
  return () => watch.disconnect();
}

// A colour of the theme as a canvas wants it.
export function themeColour(node, name) {
  const style = getComputedStyle(node);
  return style.getPropertyValue(`--tfnb-${name}`).trim() || style.color;
}

// At most one call in `pause` milliseconds, the last one always. `end` forgets what waits.
export function paced(call, pause = 100) {
  let waiting = null;
  let timer = 0;
  const send = () => {
    timer = 0;
    if (!waiting) return;
    const values = waiting;
    waiting = null;
    timer = setTimeout(send, pause);
    call(...values);
  };
  const pacedCall = (...values) => {
    waiting = values;
    if (!timer) send();
  };
  pacedCall.end = () => clearTimeout(timer);
  return pacedCall;
}

// At most one call for each picture of the screen.
export function perFrame(call) {
  let wanted = 0;
  const ask = () => {
    wanted ||= requestAnimationFrame(() => {
      wanted = 0;
      call();
    });
  };
  ask.end = () => cancelAnimationFrame(wanted);
  return ask;
}

// The numbers 0 to count - 1, those near `middle` first; ahead of it counts as nearer, because films are played forward.
export function around(middle, count) {
  const distance = (frame) => (frame >= middle ? frame - middle : 3 * (middle - frame));
  return Array.from({ length: count }, (_, frame) => frame).sort((one, other) => distance(one) - distance(other));
}

// Values by name, the least recently used dropped first when together they weigh more than `most`.
export class Lru {
  constructor(most, dropped = () => {}) {
    Object.assign(this, { most, dropped, weight: 0, values: new Map() });
  }
  get(name) {
    const found = this.values.get(name);
    if (!found) return undefined;
    this.values.delete(name);
    this.values.set(name, found);
    return found.value;
  }
  has(name) {
    return this.values.has(name);
  }
  set(name, value, weight) {
    this.drop(name);
    this.values.set(name, { value, weight });
    this.weight += weight;
    for (const oldest of this.values.keys()) {
      if (this.weight <= this.most || oldest === name) break; // the newest stays, however heavy
      this.drop(oldest);
    }
  }
  drop(name) {
    const found = this.values.get(name);
    if (!found) return;
    this.values.delete(name);
    this.weight -= found.weight;
    this.dropped(found.value);
  }
  clear() {
    for (const name of [...this.values.keys()]) this.drop(name);
  }
}

// The films of a widget: `picture` gives a decoded frame, or asks for it and calls `came(place, frame)` when it is there.
export class Films {
  constructor(model, came, { memory = MEMORY, decode = (blob) => createImageBitmap(blob), scale } = {}) {
    Object.assign(this, { model, came, decode, scale, list: [], frame: 0, waiting: [], decoding: new Set(), timer: 0 });
    this.failure = "";
    this.pictures = new Lru(memory, (picture) => picture.close());
    this.heard = (content, buffers) => this.take(content, buffers);
    model.on("msg:custom", this.heard);
  }

  // Shows the films of the trait `_shown`. What is known of a film with the same id is kept. At the place of another film,
  // that one's pictures are given out until there are new ones.
  show(told) {
    const before = this.list;
    const known = new Map(before.map((film) => [film.id, film]));
    const earlier = before.flatMap((film) => (film.before ? [film, film.before] : [film]));
    this.failure = "";
    this.list = told.map((each, place) => {
      if (!known.has(each.id)) known.set(each.id, this.begin(each));
      const film = known.get(each.id); // the same for a film that is shown twice
      const old = before[place];
      if (old && old !== film && !film.decoded.size) film.before = old.decoded.size ? old : old.before;
      return film;
    });
    for (const film of this.list) if (film.before) film.before.before = null; // one film back is enough
    const alive = new Set(this.list.flatMap((film) => [film.id, film.before?.id]));
    for (const film of earlier) if (!alive.has(film.id)) this.forget(film);
    this.waiting = this.waiting.filter((request) => this.list.some((film) => film.id === request.film));
    this.ask();
  }

  begin({ id, frames, width, height, poster, exact, lossless }) {
    const film = { id, frames, width, height, lossless, rough: !exact, before: null };
    Object.assign(film, { bytes: new Map(), decoded: new Set(), broken: new Set() });
    if (frames) film.bytes.set(0, new Blob([poster]));
    return film;
  }

  forget(film) {
    for (let frame = 0; frame < film.frames; frame++) this.pictures.drop(`${film.id}/${frame}`);
    film.bytes.clear();
    film.decoded.clear();
  }

  get length() {
    return Math.max(0, ...this.list.map((film) => film.frames));
  }

  // The decoded frame at a place, or one of the film that was there before; undefined while there is none.
  picture(place, frame) {
    const own = this.own(place, frame);
    const before = this.list[place]?.before;
    return own ?? (before && this.pictures.get(`${before.id}/${clamp(frame, 0, before.frames - 1)}`));
  }

  // The decoded frame of this film, undefined while there is none. A shorter film stays at its last frame.
  own(place, frame) {
    const film = this.list[place];
    if (!film?.frames) return undefined;
    const number = clamp(frame, 0, film.frames - 1);
    const found = this.pictures.get(`${film.id}/${number}`);
    if (!found) this.open(film, number);
    return found;
  }

  // Whether the browser has this frame of every film, decoded or not.
  has(frame) {
    return this.list.every((film) => !film.frames || film.bytes.has(clamp(frame, 0, film.frames - 1)));
  }

  // The frame that is looked at: it is asked for first, then those around it.
  look(frame) {
    this.frame = frame;
    this.ask();
  }

  async open(film, frame) {
    const name = `${film.id}/${frame}`;
    const blob = film.bytes.get(frame);
    if (!blob || this.decoding.has(name) || film.broken.has(frame)) return;
    this.decoding.add(name);
    try {
      const picture = await this.decode(blob, this.scale?.(film));
      if (film.bytes.get(frame) === blob) {
        film.decoded.add(frame);
        this.pictures.set(name, picture, 4 * picture.width * picture.height);
      } else picture.close(); // the film is gone, or a better picture came meanwhile
    } catch (error) {
      film.broken.add(frame);
      this.failure = `frame ${frame} cannot be decoded: ${error.message ?? error}`;
    }
    this.decoding.delete(name);
    if (film.bytes.get(frame) !== blob) return this.open(film, frame);
    if (film.before && film.decoded.size >= film.frames) {
      if (!this.list.includes(film.before)) this.forget(film.before);
      film.before = null;
    }
    this.list.forEach((each, place) => each === film && this.came(place, frame));
  }

  missing(film) {
    const asked = new Set(this.waiting.filter((request) => request.film === film.id).flatMap((request) => [...request.frames]));
    const here = (frame) => film.bytes.has(frame) && !(frame === 0 && film.rough);
    return around(clamp(this.frame, 0, Math.max(0, film.frames - 1)), film.frames).filter((frame) => !here(frame) && !asked.has(frame));
  }

  ask() {
    clearTimeout(this.timer);
    const now = performance.now();
    this.waiting = this.waiting.filter((request) => now - request.at < PATIENCE);
    while (this.waiting.length < REQUESTS) {
      const wishes = this.list.map((film) => ({ film, frames: this.missing(film) })).filter(({ frames }) => frames.length);
      if (!wishes.length) break;
      // the film whose frames are furthest behind; of the others, what they lack at the current frame comes next
      wishes.sort((one, other) => Math.abs(one.frames[0] - this.frame) - Math.abs(other.frames[0] - this.frame));
      const { film, frames } = wishes[0];
      const batch = frames[0] === clamp(this.frame, 0, film.frames - 1) ? frames.slice(0, 1) : frames.slice(0, BATCH);
      this.waiting.push({ film: film.id, frames: new Set(batch), at: now });
      this.model.send({ want: batch, film: film.id });
    }
    if (this.waiting.length) this.timer = setTimeout(() => this.ask(), PATIENCE + 100);
  }

  take(content, buffers) {
    const film = this.list.find((each) => each.id === content.film);
    if (content.failed && film) {
      this.failure = content.failed;
      return this.came(this.list.indexOf(film), this.frame);
    }
    if (!film || !content.frames) return;
    content.frames.forEach((frame, place) => {
      film.bytes.set(frame, new Blob([buffers[place]]));
      if (frame === 0 && film.rough) {
        film.rough = false;
        this.pictures.drop(`${film.id}/0`);
        film.decoded.delete(0);
        film.broken.delete(0);
      }
    });
    for (const request of this.waiting.filter((each) => each.film === film.id)) {
      content.frames.forEach((frame) => request.frames.delete(frame));
    }
    this.waiting = this.waiting.filter((request) => request.frames.size);
    this.list.forEach((each, place) => each === film && content.frames.forEach((frame) => this.came(place, frame)));
    this.ask();
  }

  close() {
    clearTimeout(this.timer);
    this.model.off("msg:custom", this.heard);
    for (const film of this.list) {
      if (film.before) this.forget(film.before);
      this.forget(film);
    }
    this.pictures.clear();
    this.list = [];
    this.waiting = [];
  }
}
