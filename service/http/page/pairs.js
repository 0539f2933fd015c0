// Preference pairs as JSON lines, and the figures of their rewards. Pure: no document, no service.

/**
 * Read one pair a line: prompt, chosen and rejected as texts or messages; or two conversations that differ in their
 * last message.
 *
 * @returns {{pairs: {line: number, prompt: any, chosen: any, rejected: any}[], errors: {line: number, reason: string}[]}}
 */
export function parsePairs(text) {
  const pairs = [];
  const errors = [];
  text.split(/\r?\n/).forEach((content, index) => {
    if (!content.trim()) return;
    const line = index + 1;
    const pair = pairOf(content);
    if (typeof pair === "string") errors.push({ line, reason: pair });
    else pairs.push({ line, ...pair });
  });
  return { pairs, errors };
}

function pairOf(content) {
  let row;
  try {
    row = JSON.parse(content);
  } catch {
    return "is not JSON";
  }
  if (row === null || typeof row !== "object") return "is not an object";
  const { prompt, chosen, rejected } = row;
  if (isText(prompt) && isText(chosen) && isText(rejected)) return { prompt, chosen, rejected };
  if (prompt === undefined && Array.isArray(chosen) && Array.isArray(rejected)) return implicitPair(chosen, rejected);
  return "needs prompt, chosen and rejected as texts or messages";
}

function isText(value) {
  return typeof value === "string" || (Array.isArray(value) && value.length > 0);
}

function implicitPair(chosen, rejected) {
  const prompt = chosen.slice(0, -1);
  if (!prompt.length || JSON.stringify(prompt) !== JSON.stringify(rejected.slice(0, -1))) {
    return "has conversations that differ before their last message";
  }
  return { prompt, chosen: chosen.slice(-1), rejected: rejected.slice(-1) };
}

/**
 * The figures of scored pairs, each {chosen: {reward, tokens}, rejected: {reward, tokens}}.
 *
 * accuracy: share of pairs whose chosen completion has the higher reward, with its standard error; a tie is none.
 * pooled, within: correlation of reward and ln(1 + completion tokens), over all completions and about the means of the
 * pairs; null where something does not vary.
 */
export function figuresOf(scored) {
  const margins = scored.map((pair) => pair.chosen.reward - pair.rejected.reward);
  const accuracy = margins.filter((margin) => margin > 0).length / margins.length;
  const items = scored.flatMap((pair) => [pair.chosen, pair.rejected]);
  const logs = items.map((item) => Math.log1p(item.tokens));
  const rewards = items.map((item) => item.reward);
  const logDifferences = scored.map((pair) => Math.log1p(pair.chosen.tokens) - Math.log1p(pair.rejected.tokens));
  return {
    pairs: scored.length,
    accuracy,
    standardError: Math.sqrt((accuracy * (1 - accuracy)) / margins.length),
    ties: margins.filter((margin) => margin === 0).length,
    longerChosen: logDifferences.filter((difference) => difference > 0).length / margins.length,
    pooled: cosine(centred(rewards), centred(logs)),
    // About the mean of two, each value is half their difference, up or down.
    within: cosine(margins, logDifferences),
  };
}

function centred(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return values.map((value) => value - mean);
}

function cosine(one, other) {
  const product = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  const scale = Math.sqrt(product(one, one) * product(other, other));
  return scale > 0 ? product(one, other) / scale : null;
}
