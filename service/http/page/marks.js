// Shows a text with its style markers, as the service has found them.

import { element } from "./elements.js";

export const KINDS = {
  hedges: "hedge",
  flattery: "flattery",
  headers: "header",
  list_items: "list item",
  bold: "bold",
  emoji: "emoji",
  repetition: "repeated phrase",
};

/**
 * The text with a mark around each part that belongs to spans; where spans overlap, a part has several kinds.
 *
 * @param {string} text
 * @param {{kind: string, start: number, end: number}[]} spans positions in Unicode code points
 * @param {string} label what the part of the page is called
 */
export function markedText(text, spans, label) {
  const characters = Array.from(text);
  const borders = [...new Set([0, characters.length, ...spans.flatMap(({ start, end }) => [start, end])])];
  borders.sort((one, other) => one - other);
  const parts = borders.slice(1).map((end, index) => {
    const start = borders[index];
    const part = characters.slice(start, end).join("");
    const kinds = spans.filter((span) => span.start <= start && end <= span.end).map((span) => span.kind);
    return kinds.length ? mark(part, [...new Set(kinds)]) : part;
  });
  return element("div", { class: "marked", tabindex: "0", role: "region", "aria-label": label }, parts);
}

function mark(part, kinds) {
  const names = kinds.map((kind) => KINDS[kind] ?? kind).join(", ");
  return element("mark", { class: kinds.map((kind) => `mark-${kind}`).join(" "), title: names }, part);
}

/** The kinds that a text has, each with its count in the style block, or its share. */
export function legend(style) {
  const counts = Object.keys(KINDS)
    .filter((kind) => style[kind] > 0)
    .map((kind) => [kind, `${KINDS[kind]} \u00d7 ${style[kind]}`]);
  if (style.repeat4 > 0) counts.push(["repetition", `repeated phrases ${(100 * style.repeat4).toFixed(0)}\u00a0%`]);
  if (!counts.length) return element("p", { class: "note" }, "No style tells found.");
  return element(
    "ul",
    { class: "legend", "aria-label": "Style tells" },
    counts.map(([kind, words]) => element("li", {}, element("mark", { class: `mark-${kind}` }, words))),
  );
}
