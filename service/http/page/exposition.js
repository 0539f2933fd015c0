// Reads metrics in Prometheus' text format. Pure: no document, no service.

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** The samples of an exposition, by name: lists of {labels, value}. */
export function parseExposition(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line);
    if (!found) continue;
    const [, name, labels, value] = found;
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels: labelsOf(labels ?? ""), value: numberOf(value) });
  }
  return samples;
}

/** The sum of the samples of a name whose labels are accepted, over all replicas; 0 where there are none. */
export function total(samples, name, accepts = () => true) {
  const chosen = (samples.get(name) ?? []).filter(({ labels }) => accepts(labels));
  return chosen.reduce((sum, { value }) => sum + value, 0);
}

/** The buckets of a histogram, over all replicas and labels that are accepted: [upper bound, cumulative count], rising. */
export function buckets(samples, name, accepts = () => true) {
  const counts = new Map();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    if (accepts(labels)) counts.set(numberOf(labels.le), (counts.get(numberOf(labels.le)) ?? 0) + value);
  }
  return [...counts].sort(([one], [other]) => one - other);
}

/**
 * A quantile of what has been observed between two readings of a histogram, linear within its bucket as in PromQL; null
 * where nothing was observed.
 */
export function quantile(share, before, after) {
  const old = new Map(before);
  const grown = after.map(([bound, value]) => [bound, value - (old.get(bound) ?? 0)]);
  const observed = grown.length ? grown[grown.length - 1][1] : 0;
  if (!(observed > 0)) return null;
  const rank = share * observed;
  let [lower, below] = [0, 0];
  for (const [bound, value] of grown) {
    if (value >= rank) return Number.isFinite(bound) ? lower + ((bound - lower) * (rank - below)) / (value - below) : lower;
    [lower, below] = [bound, value];
  }
  return lower;
}

function labelsOf(text) {
  return Object.fromEntries([...text.matchAll(LABEL)].map(([, name, value]) => [name, value]));
}

function numberOf(text) {
  return text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text);
}
