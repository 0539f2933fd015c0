// Numbers as text. Pure: no document, no service.

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
