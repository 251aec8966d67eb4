// Two films compared, computed from the pixels that the browser has.
const HEAT = [
  [0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164],
]; // matplotlib's inferno at nine even steps
const SCALES = [0.02, 0.05, 0.1, 0.2, 0.5, 1]; // of black to white: what is shown brightest

// The colour of a share from 0 to 1.
export function heat(share) {
  const place = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[low].map((value, channel) => Math.round(value + (HEAT[low + 1][channel] - value) * (place - low)));
}

// The mean absolute difference over red, green and blue of two RGBA pictures: a share of black to white for each pixel.
export function difference(one, other) {
  const shares = new Float32Array(one.length / 4);
  for (let pixel = 0, at = 0; pixel < shares.length; pixel++, at += 4) {
    const apart = Math.abs(one[at] - other[at]) + Math.abs(one[at + 1] - other[at + 1]) + Math.abs(one[at + 2] - other[at + 2]);
    shares[pixel] = apart / 765;
  }
  return shares;
}

export function summary(shares) {
  let [sum, most] = [0, 0];
  for (const share of shares) {
    sum += share;
    if (share > most) most = share;
  }
  return { mean: shares.length ? sum / shares.length : 0, most };
}

// The least scale that shows `most` without clipping. Only a few: a scale for each frame would make equal pixels flicker.
export const scaleFor = (most) => SCALES.find((scale) => most <= scale) ?? 1;

// Differences as colours, into the pixels of an ImageData.
export function paintHeat(shares, scale, pixels) {
  const table = Array.from({ length: 256 }, (_, level) => heat(level / 255));
  for (let pixel = 0, at = 0; pixel < shares.length; pixel++, at += 4) {
    const [red, green, blue] = table[Math.min(255, Math.round((255 * shares[pixel]) / scale))];
    pixels[at] = red;
    pixels[at + 1] = green;
    pixels[at + 2] = blue;
    pixels[at + 3] = 255;
  }
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

export function scaleInWords(scale, { mean, most }, lossless) {
  const colours = `black: equal, light yellow: ${percent(scale)} of black to white apart`;
  const here = `in this frame ${percent(mean)} on average, ${percent(most)} at most`;
  return `${colours}; ${here}${lossless ? "" : ". The films were compressed for this page: that alone makes small differences"}`;
}

// What a cut takes from one frame of width × height, and where it goes in the picture of the cut: x–t takes a row, and
// time runs down; y–t takes a column, and time runs to the right. `line` in [0, 1] is where the cut goes through the frame.
export function cutOf(axis, line, width, height, frame) {
  if (axis === "x–t") {
    const row = Math.min(height - 1, Math.floor(line * height));
    return { number: row, from: [0, row, width, 1], to: [0, frame, width, 1] };
  }
  const column = Math.min(width - 1, Math.floor(line * width));
  return { number: column, from: [column, 0, 1, height], to: [frame, 0, 1, height] };
}

export const cutSize = (axis, width, height, frames) => (axis === "x–t" ? [width, frames] : [frames, height]);

// The frame at a time while films play. It follows the clock: a late picture is skipped, the speed stays true.
export const frameAt = (began, since, fps, frames) => (began + Math.floor((since * fps) / 1000)) % Math.max(1, frames);

// Where a picture is drawn in a box of the same shape: enlarged by `zoom` around `centre`, which is kept inside.
export function zoomed(zoom, [x, y]) {
  const half = 0.5 / zoom;
  const inside = (value) => Math.min(Math.max(value, half), 1 - half);
  const centre = [inside(x), inside(y)];
  return { centre, left: 0.5 - centre[0] * zoom, top: 0.5 - centre[1] * zoom };
}
