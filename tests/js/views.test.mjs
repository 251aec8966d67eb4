import assert from "node:assert/strict";
import test from "node:test";
import { load } from "./load.mjs";

const { cutOf, cutSize, difference, frameAt, heat, paintHeat, scaleFor, scaleInWords, summary, zoomed } = await load("views.js");

test("the difference is the mean over red, green and blue, as a share of black to white", () => {
  const shares = difference([0, 0, 0, 255, 10, 20, 30, 255], [255, 255, 255, 255, 10, 20, 60, 255]);
  assert.ok(Math.abs(shares[0] - 1) < 1e-6 && Math.abs(shares[1] - 10 / 255) < 1e-6);
  const { mean, most } = summary(shares);
  assert.ok(Math.abs(mean - (1 + 10 / 255) / 2) < 1e-6 && Math.abs(most - 1) < 1e-6);
  assert.deepEqual(summary([]), { mean: 0, most: 0 });
});

test("equal is black, the end of the scale is light, and beyond it nothing changes", () => {
  assert.deepEqual([heat(0), heat(1), heat(9)], [[0, 0, 4], [252, 255, 164], [252, 255, 164]]);
  const pixels = new Uint8ClampedArray(12);
  paintHeat([0, 0.05, 0.5], 0.05, pixels);
  assert.deepEqual([...pixels], [0, 0, 4, 255, 252, 255, 164, 255, 252, 255, 164, 255]);
});

test("there are few scales, and they are said in words", () => {
  assert.deepEqual([0, 0.02, 0.03, 0.6, 2].map(scaleFor), [0.02, 0.02, 0.05, 1, 1]);
  assert.equal(
    scaleInWords(0.2, { mean: 0.031, most: 0.12 }, true),
    "black: equal, light yellow: 20 % of black to white apart; in this frame 3.1 % on average, 12 % at most",
  );
  assert.match(scaleInWords(1, { mean: 0, most: 0 }, false), /compressed/);
});

test("a cut takes a row, time down, or a column, time to the right", () => {
  assert.deepEqual(cutOf("x–t", 0.5, 16, 12, 3), { number: 6, from: [0, 6, 16, 1], to: [0, 3, 16, 1] });
  assert.deepEqual(cutOf("y–t", 1, 16, 12, 3), { number: 15, from: [15, 0, 1, 12], to: [3, 0, 1, 12] });
  assert.deepEqual([cutSize("x–t", 16, 12, 5), cutSize("y–t", 16, 12, 5)], [[16, 5], [5, 12]]);
});

test("frames follow the clock, whatever was drawn", () => {
  assert.deepEqual([0, 124, 125, 1000, 3000].map((since) => frameAt(0, since, 8, 24)), [0, 0, 1, 8, 0]);
  assert.equal(frameAt(20, 1000, 8, 24), 4);
});

test("an enlarged picture never leaves its box", () => {
  assert.deepEqual(zoomed(1, [0.9, 0.1]), { centre: [0.5, 0.5], left: 0, top: 0 });
  const { centre, left, top } = zoomed(4, [0, 1]);
  assert.deepEqual([centre, left, top], [[0.125, 0.875], 0, -3]);
});
