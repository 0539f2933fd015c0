// One completion: its text, the buttons that change it, and what the service says of it.

import { bar, element, facts } from "./elements.js";
import { legend, markedText } from "./marks.js";
import { count, fixed, isNumber, percent, pValue, signed } from "./numbers.js";
import { reasonWords } from "./reasons.js";
import { send } from "./service.js";

/** Edits that `/v1/edit` knows, each with what it does. */
const EDITS = {
  pad: "add four sentences that say nothing",
  hedge: "hedge up to four sentences",
  praise: "praise the reader before and after the answer",
  bullets: "make each clause a list item with a bold word",
  shuffle: "put the words in random order",
};

/** A completion named by a letter; `owner` has `changed`, `score`, `refuse` and `remove`. */
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
      this.markStale();
      owner.changed();
    });
    this.root = element(
      "article",
      { class: "card completion", "aria-label": `Completion ${letter}` },
      element("div", { class: "card-head" }, element("h2", {}, `Completion ${letter}`), this.removeButton()),
      this.text,
      element("div", { class: "buttons", role: "group", "aria-label": `Change completion ${letter}` }, element("span", { class: "note" }, "Edit:"), this.editButtons()),
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
    this.markStale();
  }

  /** Show that the answer is of an earlier text while the text differs. */
  markStale() {
    this.answer.classList.toggle("stale", this.latest !== null && this.latestText !== this.value);
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
    this.markStale();
    this.answer.dataset.reward = result.reward ?? "";
    this.answer.dataset.pValue = result.ood?.p_value ?? "";
    this.answer.replaceChildren(
      this.headline(result),
      ...movement,
      facts([
        ...chances.map(([other, chance]) => chanceFact(other, chance)),
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
      result.length?.truncated ? element("span", { class: "badge warn" }, "prompt truncated") : null,
      flagged ? element("span", { class: "badge alarm" }, "unusual") : null,
    );
  }

  /** How the reward, or each output where there is none, and the p-value moved since the text was scored before. */
  movement(before, now) {
    const outputs = isNumber(now.reward)
      ? [["reward", before.reward, now.reward]]
      : Object.entries(now.rewards ?? {}).map(([name, value]) => [name, before.rewards?.[name], value]);
    const moved = outputs.map(([name, old, value]) => `${name} ${fixed(old)} \u2192 ${fixed(value)} (${signed(value - old)})`);
    const [oldP, newP] = [before.ood?.p_value, now.ood?.p_value];
    if (isNumber(oldP) && isNumber(newP)) moved.push(`p-value ${pValue(oldP)} \u2192 ${pValue(newP)}`);
    const change = this.edited ? `\u201c${this.edited}\u201d` : "your change";
    const direction = now.reward < before.reward ? "movement fall" : "movement";
    return element("p", { class: direction }, `After ${change}: ${moved.join("; ")}`);
  }

  editButtons() {
    return Object.entries(EDITS).map(([name, title]) =>
      element("button", { type: "button", class: "quiet", title, click: () => this.apply(name) }, name),
    );
  }

  /** Let the service edit the text, and score it; a text of which nothing is known is scored before too. */
  async apply(name) {
    try {
      if (!this.latest || this.latestText !== this.value) await this.owner.score();
      const original = this.value;
      const { completion } = await send("v1/edit", { edit: name, completion: original });
      if (this.value !== original) return; // it was changed meanwhile
      this.text.value = completion;
      this.edited = name;
      this.markStale();
      await this.owner.score();
    } catch (problem) {
      this.owner.refuse(problem);
    }
  }

  removeButton() {
    const label = `Remove completion ${this.letter}`;
    return element("button", { type: "button", class: "quiet", "aria-label": label, click: () => this.owner.remove(this) }, "Remove");
  }
}

function chanceFact(other, chance) {
  const words = percent(chance);
  return [`preferred to ${other}`, isNumber(chance) ? [bar(chance, 1, words), words] : words];
}

function oodFacts({ ood, calibration }) {
  if (ood) {
    const part = ood.valid_for_tail ? "" : ", of the part that was read";
    const reason = element("span", { class: "note", title: ood.reason }, ` by ${reasonWords(ood.reason)}${part}`);
    return [["p-value", [pValue(ood.p_value), reason]]];
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

function outputFacts({ rewards, reward_std: std, reward_disagreement: disagreement, group }) {
  return [
    ...(isNumber(disagreement) ? [["spread of resampled heads", fixed(disagreement)]] : []),
    ...(group?.n > 2 ? [["reward less the mean of all", signed(group.reward_centered)]] : []),
    ...Object.entries(rewards ?? {}).map(([name, value]) => [`output ${name}`, fixed(value)]),
    ...(isNumber(std) ? [["spread of members", fixed(std)]] : []),
  ];
}
