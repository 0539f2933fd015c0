// Makes DOM nodes and formats numbers. Text becomes a text node, never markup.

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
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number with so many digits behind the point, with a minus sign that screen readers know; a dash where unknown. */
export function fixed(value, digits = 3) {
  return isNumber(value) ? value.toFixed(digits).replace("-", "\u2212") : "\u2013";
}

/** As `fixed`, with a plus sign in front of what is not negative. */
export function signed(value, digits = 3) {
  return isNumber(value) && value >= 0 ? `+${fixed(value, digits)}` : fixed(value, digits);
}

/** A share from 0 to 1 in percent. */
export function percent(value, digits = 0) {
  return isNumber(value) ? `${fixed(100 * value, digits)}\u00a0%` : "\u2013";
}

/** A p-value: small ones with their digits, as the smallest of a calibration is far below a thousandth. */
export function pValue(value) {
  if (!isNumber(value)) return "\u2013";
  return value < 0.01 ? value.toPrecision(2) : value.toFixed(3);
}

/** A count with separators, or a short one such as 12.3k. */
export function count(value, short = false) {
  if (!isNumber(value)) return "\u2013";
  return new Intl.NumberFormat("en", {
    notation: short ? "compact" : "standard",
    maximumFractionDigits: short ? 1 : 0,
  }).format(value);
}

export function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
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
