// Words for what a p-value is based on: the values of `ood.reason`. Pure: no document, no service.

const COMPONENTS = {
  oe: "likeness to known reward hacks",
  feature: "text and hidden states",
  feature_mid: "hidden states of a middle layer",
  feature_last: "hidden states of the last tap",
  group: "difference from the other completions",
  nonfinite: "a number that is not finite",
};

const STATISTICS = {
  bi: "pairs of tokens",
  bi_peak: "least likely pairs of tokens",
  uni: "tokens",
  uni_peak: "least likely tokens",
  zratio: "compressed size",
  rep4: "repeated phrases",
  top4: "the most frequent phrase",
  ttr: "distinct tokens",
  nonascii: "characters outside ASCII",
  punct: "punctuation",
  wlen: "length of words",
  md: "markdown",
  emoji: "emoji",
  hedge: "hedges",
  flattery: "flattery",
  overlap: "words of the prompt",
  logtok: "length",
  chars_tok: "characters a token",
  upper: "capitals",
  copy3: "text copied from the prompt",
  modal: "modal verbs",
  praise: "words of praise",
  listed: "list lines",
  roles: "names of speakers",
  markup: "markup",
};

const SURPRISAL = new Set(["bi", "bi_peak", "uni", "uni_peak"]);

/** A reason in words; one that is not known here as it is. */
export function reasonWords(reason) {
  const found = /^text:(\w+)([+-])$/.exec(reason);
  if (!found) return COMPONENTS[reason] ?? reason;
  const [, name, sign] = found;
  if (!(name in STATISTICS)) return reason;
  const degree = SURPRISAL.has(name) ? (sign === "+" ? "unlikely" : "predictable") : sign === "+" ? "high" : "low";
  return `${STATISTICS[name]}: ${degree}`;
}
