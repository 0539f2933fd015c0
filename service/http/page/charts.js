// Draws lines, histograms and points as SVG. Colours are those of the style sheet; each figure has its sense as text.

import { drawn, element } from "./elements.js";

const WIDTH = 360;
const HEIGHT = 180;
const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 26;

/** A figure with a title, a drawing and a sentence that says what it shows. */
export function figure(title, sentence, drawing, entries = []) {
  return element(
    "figure",
    { class: "chart" },
    element("figcaption", {}, title),
    drawing,
    entries.length
      ? element(
          "ul",
          { class: "key", "aria-hidden": "true" },
          entries.map(([name, shade]) => element("li", {}, element("span", { class: `swatch ${shade}` }), name)),
        )
      : null,
    element("p", { class: "note" }, sentence),
  );
}

/** Lines over time; `series` are [values, shade] with null for unknown, all as long as `seconds` before now. */
export function lines(label, seconds, series, format) {
  const known = series.flatMap(([values]) => values.filter((value) => value !== null));
  const x = scale(Math.min(...seconds, -1), 0, LEFT, WIDTH - RIGHT);
  const [low, high] = [Math.min(...known, 0), Math.max(...known, 0)];
  const y = scale(low < 0 ? -niceMax(-low) : 0, high > 0 || low === 0 ? niceMax(high) : 0, HEIGHT - BOTTOM, TOP);
  return canvas(
    label,
    axes(x, y, (value) => `${Math.round(value)} s`, format),
    series.map(([values, shade]) => drawn("path", { class: `line ${shade}`, d: pathOf(seconds, values, x, y) })),
  );
}

/** Bars of shares in bins; `reference` is the share that is expected in each, as steps, or null. */
export function histogram(label, edges, shares, reference, format) {
  if (!shares.length) return canvas(label, [], [emptyNote()]);
  const x = scale(edges[0], edges[edges.length - 1], LEFT, WIDTH - RIGHT);
  const y = scale(0, niceMax(Math.max(...shares, ...(reference ?? [0]))), HEIGHT - BOTTOM, TOP);
  const bars = shares.map((share, index) =>
    drawn("rect", {
      class: "bar",
      x: x(edges[index]).toFixed(1),
      y: y(share).toFixed(1),
      width: Math.max(0.5, x(edges[index + 1]) - x(edges[index]) - 1).toFixed(1),
      height: Math.max(0, y(0) - y(share)).toFixed(1),
    }),
  );
  const steps = reference ? [drawn("path", { class: "line expected", d: stepsOf(edges, reference, x, y) })] : [];
  return canvas(label, axes(x, y, format, (value) => `${+(100 * value).toPrecision(2)} %`), [bars, steps]);
}

/** Points; those of which `isOdd` is true have another shape. */
export function points(label, xs, ys, isOdd, formats) {
  if (!xs.length) return canvas(label, [], [emptyNote()]);
  const x = scale(...spread(xs), LEFT + 4, WIDTH - RIGHT - 4);
  const y = scale(...spread(ys), HEIGHT - BOTTOM - 4, TOP + 4);
  const dots = xs.map((value, index) => {
    const [cx, cy] = [x(value), y(ys[index])];
    return isOdd[index]
      ? drawn("path", { class: "point odd", d: `M${cx - 3} ${cy - 3}l6 6m0 -6l-6 6` })
      : drawn("circle", { class: "point", cx: cx.toFixed(1), cy: cy.toFixed(1), r: 2 });
  });
  return canvas(label, axes(x, y, formats.x, formats.y), dots);
}

function canvas(label, frame, content) {
  return drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, frame, content.flat());
}

function emptyNote() {
  return drawn("text", { class: "tick", x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no items yet");
}

function axes(x, y, formatX, formatY) {
  const bottom = HEIGHT - BOTTOM;
  const marks = [
    drawn("path", { class: "axis", d: `M${LEFT} ${TOP}V${bottom}H${WIDTH - RIGHT}` }),
    ...ticks(y).map((value) => drawn("path", { class: "grid", d: `M${LEFT} ${y(value).toFixed(1)}H${WIDTH - RIGHT}` })),
    ...ticks(y).map((value) =>
      drawn("text", { class: "tick", x: LEFT - 4, y: y(value) + 4, "text-anchor": "end" }, formatY(value)),
    ),
  ];
  const anchors = ["start", "middle", "end"];
  const labels = ticks(x).map((value, index) =>
    drawn("text", { class: "tick", x: x(value), y: HEIGHT - 8, "text-anchor": anchors[index] }, formatX(value)),
  );
  return [...marks, ...labels];
}

/** Both ends of an axis and its middle. */
function ticks(axis) {
  return [axis.low, (axis.low + axis.high) / 2, axis.high];
}

function scale(low, high, from, to) {
  const width = high - low || 1;
  const place = (value) => from + ((value - low) / width) * (to - from);
  return Object.assign(place, { low, high: low + width });
}

function spread(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return high > low ? [low, high] : [low - 0.5, high + 0.5];
}

/** The next of 1, 2, 5, 10, ... above a value, so that axes do not change with every reading. */
function niceMax(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((bound) => bound >= value);
}

/** A line through what is known, interrupted where a value is null. */
function pathOf(xs, ys, x, y) {
  let pen = "M";
  let path = "";
  ys.forEach((value, index) => {
    if (value !== null) path += `${pen}${x(xs[index]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = value === null ? "M" : "L";
  });
  return path || "M0 0";
}

function stepsOf(edges, shares, x, y) {
  return `M${shares.map((share, index) => `${x(edges[index]).toFixed(1)} ${y(share).toFixed(1)}H${x(edges[index + 1]).toFixed(1)}`).join("L")}`;
}

/** A mean with its interval on a line from -extent to extent, zero in its middle. */
export function intervalMark(label, low, value, high, extent) {
  const [width, height] = [160, 16];
  const x = scale(-extent, extent, 4, width - 4);
  const place = (number) => x(Math.max(-extent, Math.min(number, extent))).toFixed(1);
  const shade = low > 0 ? "pays" : "";
  return drawn("svg", { viewBox: `0 0 ${width} ${height}`, class: "interval", role: "img", "aria-label": label }, [
    drawn("path", { class: "axis", d: `M${width / 2} 0V${height}` }),
    drawn("path", { class: `whisker ${shade}`, d: `M${place(low)} 8H${place(high)}` }),
    drawn("circle", { class: `mean ${shade}`, cx: place(value), cy: 8, r: 4 }),
  ]);
}
