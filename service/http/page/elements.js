// Makes DOM nodes. Text becomes a text node, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; attributes that are functions listen to the event of their name, null and false ones are left out. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An SVG element, as `element`. */
export function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** A table with a caption, names of columns, and rows of cells; the first cell of a row is its heading. */
export function table(caption, columns, rows) {
  return element(
    "div",
    { class: "scrolling", tabindex: "0", role: "region", "aria-label": caption },
    element(
      "table",
      {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, columns.map((name) => element("th", { scope: "col" }, name)))),
      element(
        "tbody",
        {},
        rows.map(([first, ...others]) =>
          element("tr", {}, element("th", { scope: "row" }, first), others.map((cell) => element("td", {}, cell))),
        ),
      ),
    ),
  );
}

/** A list of names with their values; values may be nodes. */
export function facts(entries) {
  return element(
    "dl",
    { class: "facts" },
    entries.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value ?? "\u2013"))),
  );
}

/** A bar of a value between 0 and a maximum, with its text for screen readers. */
export function bar(value, max, label, shade = "") {
  return element("progress", { class: shade, max, value: Math.max(0, Math.min(value, max)), "aria-label": label });
}
