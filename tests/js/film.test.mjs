import assert from "node:assert/strict";
import test, { afterEach } from "node:test";
import { Model, load, settled } from "./load.mjs";

const { Films, Lru, around, clamp, paced } = await load("film.js");

const about = (id, frames = 5, more = {}) => ({ id, frames, width: 4, height: 2, poster: `${id} poster`, exact: false, lossless: true, ...more });
const answer = (model, film, frames) => model.fire("msg:custom", { film, frames }, frames.map((frame) => `${film} ${frame}`));

const opened = [];
function newFilms(options) {
  const [model, came] = [new Model(), []];
  const films = new Films(model, (...place) => came.push(place), options);
  opened.push(films);
  return { model, came, films };
}
afterEach(() => opened.splice(0).forEach((films) => films.close())); // else its timer keeps node alive

test("the least recently used is dropped first, and the newest always stays", () => {
  const dropped = [];
  const lru = new Lru(10, (value) => dropped.push(value));
  lru.set("a", 1, 4);
  lru.set("b", 2, 4);
  assert.equal(lru.get("a"), 1);
  lru.set("c", 3, 4);
  assert.deepEqual(dropped, [2]);
  lru.set("huge", 4, 99);
  assert.deepEqual([dropped, lru.weight, lru.get("huge")], [[2, 1, 3], 99, 4]);
  lru.clear();
  assert.equal(lru.weight, 0);
});

test("frames around the current one come first, those ahead before those behind", () => {
  assert.deepEqual(around(2, 6), [2, 3, 4, 1, 5, 0]);
  assert.equal(clamp(7, 0, 5), 5);
});

test("messages are paced, and the last one is never lost", async () => {
  const calls = [];
  const send = paced((value) => calls.push(value), 20);
  for (const value of [1, 2, 3]) send(value);
  assert.deepEqual(calls, [1]);
  await new Promise((resolve) => setTimeout(resolve, 60));
  assert.deepEqual(calls, [1, 3]);
  send.end();
});

test("the current frame is asked for first and alone, then the rest in batches", () => {
  const { model, films } = newFilms();
  films.frame = 30;
  films.show([about("a", 60)]);
  assert.deepEqual(model.sent.map(({ want }) => want.slice(0, 4)), [[30], [31, 32, 29, 33]]);
  assert.equal(model.sent[1].want.length, 16);
  answer(model, "a", [30]);
  assert.equal(model.sent.length, 3); // two requests are under way, not more
});

test("all films get their current frame before one of them gets the next", () => {
  const { model, films } = newFilms();
  films.show([about("a"), about("b")]);
  assert.deepEqual(model.sent.map(({ film, want }) => [film, ...want]), [["a", 0], ["b", 0]]);
});

test("a poster is shown at once, and the frame itself replaces it", async () => {
  const { model, came, films } = newFilms();
  films.show([about("a")]);
  assert.equal(films.own(0, 0), undefined);
  await settled();
  assert.equal(films.own(0, 0).text, "a poster");
  answer(model, "a", [0]);
  films.own(0, 0);
  await settled();
  assert.equal(films.own(0, 0).text, "a 0");
  assert.ok(came.length >= 2 && films.has(0) && !films.has(1));
});

test("an exact poster is not asked for again, nor a film that the browser has", async () => {
  const { model, films } = newFilms();
  films.show([about("a", 1, { exact: true })]);
  assert.deepEqual(model.sent, []);
  films.show([about("a", 1, { exact: true }), about("b", 2, { exact: true })]);
  assert.deepEqual(model.sent.map(({ film, want }) => [film, ...want]), [["b", 1]]);
});

test("old pictures stay until there are new ones, and are closed then", async () => {
  const { model, films } = newFilms();
  films.show([about("a", 2, { exact: true })]);
  films.own(0, 0);
  await settled();
  const old = films.picture(0, 0);
  films.show([about("b", 2, { exact: false })]);
  assert.equal(films.picture(0, 0), old);
  assert.equal(films.own(0, 0), undefined);
  answer(model, "b", [0, 1]);
  films.own(0, 1);
  await settled();
  assert.equal(films.picture(0, 0).text, "b 0");
  await settled();
  assert.ok(old.closed);
});

test("an answer for a film that is gone is dropped", async () => {
  const { model, films } = newFilms();
  films.show([about("a")]);
  films.show([about("b")]);
  answer(model, "a", [0]);
  assert.ok(films.list.every((film) => film.id === "b" && film.bytes.size === 1));
});

test("a film that is shown twice is sent once, and a shorter film stays at its last frame", async () => {
  const { model, films, came } = newFilms();
  films.show([about("a", 2, { exact: true }), about("a", 2, { exact: true }), about("c", 1, { exact: true })]);
  assert.deepEqual(model.sent.map(({ film, want }) => [film, ...want]), [["a", 1]]);
  answer(model, "a", [1]);
  assert.ok(films.has(1));
  films.own(1, 1);
  await settled();
  assert.equal(films.own(0, 1).text, "a 1");
  films.own(2, 1);
  await settled();
  assert.equal(films.own(2, 1).text, "c poster");
  assert.deepEqual(came.filter(([, frame]) => frame === 1).slice(-2).map(([place]) => place), [0, 1]);
});

test("decoded pictures are bounded, and what was dropped is decoded again", async () => {
  const { model, films } = newFilms({ memory: 3 * 32 }); // of 4 × 2 pixels
  films.show([about("a", 6, { exact: true })]);
  answer(model, "a", [1, 2, 3, 4, 5]);
  for (let frame = 0; frame < 6; frame++) films.own(0, frame);
  await settled();
  assert.equal(films.pictures.values.size, 3);
  assert.equal(films.own(0, 0), undefined);
  await settled();
  assert.equal(films.own(0, 0).text, "a poster");
});

test("a picture that cannot be decoded is said once, and not tried for ever", async () => {
  let tried = 0;
  const { films } = newFilms({ decode: async () => { tried++; throw new Error("no picture"); } });
  films.show([about("a", 1, { exact: true })]);
  for (let turn = 0; turn < 3; turn++) {
    films.own(0, 0);
    await settled();
  }
  assert.equal(tried, 1);
  assert.match(films.failure, /frame 0 cannot be decoded: no picture/);
});

test("after close nothing is left: no listener, no picture, no timer", async () => {
  const { model, films } = newFilms();
  films.show([about("a")]);
  films.own(0, 0);
  await settled();
  const picture = films.own(0, 0);
  films.close();
  assert.ok(picture.closed && model.listeners.size === 0 && films.pictures.weight === 0);
});
