// A file of preference pairs, scored by the service: accuracy, correlation with length, and a table to sort.

import { element, facts } from "./elements.js";
import { count, fixed, isNumber, pValue, percent, signed } from "./numbers.js";
import { figuresOf, parsePairs } from "./pairs.js";
import { sendPatiently } from "./service.js";

const MAX_PAIRS = 2000;
const PAIRS_PER_REQUEST = 16;
const MAX_ROWS = 200;
const MAX_ERRORS = 5;
const PLACEHOLDER = '{"prompt": "2+2?", "chosen": "4", "rejected": "5"}';

/** Of a model with several outputs, of which no weights are known. */
const NO_REWARD = { detail: "there is no reward, as the model has several outputs without weights." };

const COLUMNS = [
  ["line", (pair) => pair.line, count],
  ["margin", (pair) => pair.chosen.reward - pair.rejected.reward, signed],
  ["chosen", (pair) => pair.chosen.reward, fixed],
  ["rejected", (pair) => pair.rejected.reward, fixed],
  ["tokens chosen", (pair) => pair.chosen.tokens, count],
  ["tokens rejected", (pair) => pair.rejected.tokens, count],
  ["p chosen", (pair) => pair.chosen.p, pValue],
  ["p rejected", (pair) => pair.rejected.p, pValue],
];

export class PairsPanel {
  constructor(root) {
    this.scored = [];
    this.sort = { column: 1, falling: false };
    this.text = element("textarea", { rows: "5", "aria-label": "Pairs as JSON lines", placeholder: PLACEHOLDER, spellcheck: "false" });
    this.file = element("input", { type: "file", accept: ".jsonl,.ndjson,.txt", "aria-label": "File of pairs" });
    this.file.addEventListener("change", () => this.read());
    this.button = element("button", { type: "button", class: "main", click: () => this.run() }, "Score the pairs");
    this.status = element("p", { role: "status", class: "note" });
    this.result = element("div", {});
    root.append(
      element(
        "details",
        { class: "card pairs" },
        element("summary", {}, "Preference pairs: accuracy and length correlation"),
        element("p", { class: "note" }, "One JSON object a line with prompt, chosen and rejected. Nothing is stored."),
        this.text,
        element("div", { class: "buttons" }, this.button, this.file),
        this.status,
        this.result,
      ),
    );
  }

  async read() {
    const [file] = this.file.files;
    if (file) this.text.value = await file.text();
  }

  async run() {
    const { pairs, errors } = parsePairs(this.text.value);
    const problems = errors.slice(0, MAX_ERRORS).map(({ line, reason }) => `Line ${line} ${reason}.`);
    if (!pairs.length || pairs.length > MAX_PAIRS) {
      const limit = pairs.length ? `These are ${pairs.length} pairs; the page scores at most ${MAX_PAIRS}.` : "There is no pair.";
      this.status.textContent = [limit, ...problems].join(" ");
      return;
    }
    this.button.disabled = true;
    this.result.replaceChildren();
    try {
      const failed = await this.score(pairs, problems);
      this.status.textContent = [`${this.scored.length} pairs scored.`, ...failed, ...problems].join(" ");
    } catch (problem) {
      this.status.textContent = [problem.message, `${this.scored.length} pairs were scored before.`].join(" ");
    } finally {
      this.button.disabled = false;
      if (this.scored.length) this.show();
    }
  }

  /** Score all pairs, a few a request; returns a sentence for each pair without two rewards, a few of them. */
  async score(pairs) {
    this.scored = [];
    const failed = [];
    for (let begin = 0; begin < pairs.length; begin += PAIRS_PER_REQUEST) {
      this.status.textContent = `Scoring pair ${begin + 1} of ${pairs.length}.`;
      const some = pairs.slice(begin, begin + PAIRS_PER_REQUEST);
      const items = some.flatMap(({ prompt, chosen, rejected }) => [
        { prompt, completion: chosen },
        { prompt, completion: rejected },
      ]);
      const { results } = await sendPatiently("v1/score", { items, diagnostics: "full" });
      some.forEach(({ line }, index) => {
        const [chosen, rejected] = results.slice(2 * index, 2 * index + 2);
        const hasRewards = isNumber(chosen.reward) && isNumber(rejected.reward);
        const error = chosen.error ?? rejected.error ?? (hasRewards ? null : NO_REWARD);
        if (error) failed.push(`Line ${line}: ${error.detail}`);
        else this.scored.push({ line, chosen: numbersOf(chosen), rejected: numbersOf(rejected) });
      });
    }
    const more = failed.length - MAX_ERRORS;
    return [...failed.slice(0, MAX_ERRORS), ...(more > 0 ? [`${more} more lines have no rewards.`] : [])];
  }

  show() {
    const found = figuresOf(this.scored);
    this.result.replaceChildren(
      facts([
        ["accuracy", `${percent(found.accuracy, 1)} \u00b1 ${percent(found.standardError, 1)} of ${count(found.pairs)} pairs`],
        ["ties", count(found.ties)],
        ["longer one is chosen", percent(found.longerChosen, 1)],
        ["correlation with length", `${signed(found.within, 2)} within pairs, ${signed(found.pooled, 2)} pooled`],
      ]),
      this.table(),
    );
  }

  table() {
    const { column, falling } = this.sort;
    const [, valueOf] = COLUMNS[column];
    const rows = [...this.scored].sort((one, other) => (valueOf(one) - valueOf(other)) * (falling ? -1 : 1));
    const caption =
      rows.length > MAX_ROWS ? `The first ${MAX_ROWS} of ${rows.length} pairs in this order` : `${rows.length} pairs`;
    return element(
      "div",
      { class: "scrolling", tabindex: "0", role: "region", "aria-label": "Scored pairs" },
      element(
        "table",
        {},
        element("caption", {}, caption),
        element("thead", {}, element("tr", {}, COLUMNS.map(([name], index) => this.heading(name, index)))),
        element("tbody", {}, rows.slice(0, MAX_ROWS).map(rowOf)),
      ),
    );
  }

  heading(name, index) {
    const isSorted = index === this.sort.column;
    const order = this.sort.falling ? "descending" : "ascending";
    const click = () => {
      this.sort = { column: index, falling: isSorted && !this.sort.falling };
      this.show();
      this.result.querySelectorAll("th button")[index].focus();
    };
    const arrow = isSorted ? (this.sort.falling ? " \u2193" : " \u2191") : "";
    return element(
      "th",
      { scope: "col", "aria-sort": isSorted ? order : null },
      element("button", { type: "button", click }, `${name}${arrow}`),
    );
  }
}

function rowOf(pair) {
  return element("tr", {}, COLUMNS.map(([, valueOf, format]) => element("td", {}, format(valueOf(pair)))));
}

function numbersOf(result) {
  return { reward: result.reward, tokens: result.length?.completion_tokens, p: result.ood?.p_value };
}
