// One completion: its text, the buttons that change it, and what the service says of it.

import { EDITS } from "./edits.js";
import { count, element, facts, fixed, isNumber, percent, pValue, signed } from "./elements.js";
import { legend, markedText } from "./marks.js";

/** A completion named by a letter; `owner` has `changed`, `score` and `remove`. */
export class CompletionCard {
  constructor(letter, owner) {
    this.letter = letter;
    this.owner = owner;
    this.latest = null;
    this.latestText = "";
    this.edited = "";
    this.text = element("textarea", { rows: "6", "aria-label": `Completion ${letter}`, spellcheck: "false" });
    this.answer = element("div", { class: "answer" });
    this.text.addEventListener("input", () => {
      this.edited = "";
      owner.changed();
    });
    this.root = element(
      "article",
      { class: "card completion", "aria-label": `Completion ${letter}` },
      element("div", { class: "card-head" }, element("h2", {}, `Completion ${letter}`), this.removeButton()),
      this.text,
      element("div", { class: "buttons", role: "group", "aria-label": `Change completion ${letter}` }, this.editButtons()),
      this.answer,
    );
  }

  get value() {
    return this.text.value;
  }

  /** Show another text, of which nothing is known yet. */
  write(text) {
    this.text.value = text;
    this.forget();
  }

  /** Forget what was said of an earlier text. */
  forget() {
    this.latest = null;
    this.edited = "";
    this.answer.replaceChildren();
  }

  /**
   * Show the result of the text.
   *
   * @param {object} result of the service
   * @param {string} text that was scored
   * @param {object[]} spans of its style markers
   * @param {[string, number][]} chances other completions, and the probability to be preferred to each
   */
  show(result, text, spans, chances) {
    const movement = this.latest && text !== this.latestText ? [this.movement(this.latest, result)] : [];
    [this.latest, this.latestText, this.edited] = [result, text, ""];
    this.answer.dataset.reward = result.reward ?? "";
    this.answer.dataset.pValue = result.ood?.p_value ?? "";
    this.answer.replaceChildren(
      this.headline(result),
      ...movement,
      facts([
        ...chances.map(([other, chance]) => [`preferred to ${other}`, percent(chance)]),
        ...oodFacts(result),
        ...lengthFacts(result),
        ...outputFacts(result),
      ]),
      ...(result.style ? [legend(result.style)] : []),
      markedText(text, spans, `Completion ${this.letter} with its marks`),
    );
  }

  showError(error) {
    this.forget();
    this.answer.replaceChildren(element("p", { class: "error" }, `${error.title}: ${error.detail}`));
  }

  headline(result) {
    const flagged = result.ood?.flag;
    return element(
      "p",
      { class: "headline", role: "status" },
      element("span", { class: "reward" }, fixed(result.reward)),
      " reward",
      result.length?.truncated ? element("span", { class: "badge warn" }, "truncated") : null,
      flagged ? element("span", { class: "badge alarm" }, "unusual") : null,
    );
  }

  /** How the reward and the p-value moved since the text was scored before. */
  movement(before, now) {
    const [oldP, newP] = [before.ood?.p_value, now.ood?.p_value];
    const pMoved = isNumber(oldP) && isNumber(newP) ? `; p-value ${pValue(oldP)} \u2192 ${pValue(newP)}` : "";
    const change = this.edited ? `\u201c${this.edited}\u201d` : "your change";
    const moved = `${fixed(before.reward)} \u2192 ${fixed(now.reward)} (${signed(now.reward - before.reward)})`;
    return element("p", { class: "movement" }, `After ${change}: reward ${moved}${pMoved}`);
  }

  editButtons() {
    return Object.entries(EDITS).map(([name, edit]) =>
      element("button", { type: "button", class: "quiet", click: () => this.apply(name, edit) }, name),
    );
  }

  async apply(name, edit) {
    if (!this.latest || this.latestText !== this.value) await this.owner.score();
    this.text.value = edit(this.text.value);
    this.edited = name;
    await this.owner.score();
  }

  removeButton() {
    const label = `Remove completion ${this.letter}`;
    return element("button", { type: "button", class: "quiet", "aria-label": label, click: () => this.owner.remove(this) }, "Remove");
  }
}

function oodFacts({ ood, calibration }) {
  if (ood) {
    const reason = ood.flag ? `${pValue(ood.p_value)}, unusual by ${ood.reason}` : `${pValue(ood.p_value)} (${ood.reason})`;
    return [["p-value", reason]];
  }
  return [["p-value", calibration === "missing" ? "unknown: no calibration" : "unknown: not applicable to this text"]];
}

function lengthFacts(result) {
  const { length } = result;
  if (!length) return [];
  const rank = isNumber(length.length_percentile) ? `, longer than ${percent(length.length_percentile)}` : "";
  return [
    ["length", `${count(length.completion_tokens)} tokens, ${count(length.completion_chars)} characters${rank}`],
    ["read", `${count(length.scored_tokens)} tokens${length.truncated ? ", prompt truncated" : ", whole"}`],
    ["reward without length", fixed(result.reward_length_adjusted)],
    ["reward percentile", percent(result.reward_percentile)],
  ];
}

function outputFacts({ rewards, reward_std: std }) {
  const outputs = Object.entries(rewards ?? {}).map(([name, value]) => [name, fixed(value)]);
  return isNumber(std) ? [...outputs, ["spread of members", fixed(std)]] : outputs;
}
