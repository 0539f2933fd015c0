// The playground: a prompt, completions side by side, and what the service says of each.

import { CompletionCard } from "./completion.js";
import { Conversation } from "./conversation.js";
import { element } from "./elements.js";
import { EXAMPLES } from "./examples.js";
import { PairsPanel } from "./pairs_panel.js";
import { addressOf, hasKey, sendPatiently } from "./service.js";
import { curlOf, pythonOf } from "./snippets.js";
import { verdictOf } from "./verdict.js";

const MAX_COMPLETIONS = 8;
const LETTERS = "ABCDEFGH";

export class Playground {
  constructor(root) {
    this.cards = [];
    this.exampleButtons = [];
    this.scoring = 0;
    this.compares = true;
    this.example = null;
    this.exampleNote = element("div", { class: "example", role: "status" });
    this.message = element("p", { class: "error", role: "alert" });
    this.grid = element("div", { class: "completions" });
    this.snippets = { curl: element("pre", { tabindex: "0" }), python: element("pre", { tabindex: "0" }) };
    const form = element("form", { class: "stack", submit: (event) => this.submit(event) });
    const prompt = element("fieldset", { class: "card" }, element("legend", {}, "Prompt"));
    this.conversation = new Conversation(prompt, () => this.changed());
    form.append(exampleButtons(this), this.exampleNote, prompt, this.grid, this.actions(), this.message);
    root.append(form, this.requestPanel());
    this.pairs = new PairsPanel(root);
    this.add();
    this.add();
    this.take(EXAMPLES[0]);
    root.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.contains(event.target)) this.score();
    });
  }

  show() {}

  hide() {}

  /** Show an example; it is scored when asked for. */
  take(example) {
    const { prompt, honest, hacked } = example;
    this.conversation.ask(prompt);
    while (this.cards.length > 2) this.remove(this.cards[this.cards.length - 1]);
    while (this.cards.length < 2) this.add();
    this.cards[0].write(honest);
    this.cards[1].write(hacked);
    this.example = example;
    this.changed();
  }

  add() {
    if (this.cards.length === MAX_COMPLETIONS) return;
    const letter = [...LETTERS].find((free) => !this.cards.some((card) => card.letter === free));
    const card = new CompletionCard(letter, this);
    this.cards.push(card);
    this.grid.append(card.root);
    this.changed();
  }

  remove(card) {
    if (this.cards.length === 1) return;
    this.cards = this.cards.filter((other) => other !== card);
    card.root.remove();
    this.changed();
  }

  /** Score all completions and show the results; an answer that a later one has overtaken is not shown. */
  async score() {
    this.scoring += 1;
    const number = this.scoring;
    const texts = this.cards.map((card) => card.value);
    const cards = [...this.cards];
    this.message.textContent = "";
    this.wait(true);
    try {
      // Without its marks a text still has its reward.
      const marks = sendPatiently("v1/style", { texts }).catch(({ message }) => ({ spans: texts.map(() => []), message }));
      const [answer, { spans, message }] = await Promise.all([this.ask(), marks]);
      if (number === this.scoring) {
        showAll(cards, texts, answer, spans);
        if (message) this.message.textContent = `The marks are not shown. ${message}`;
        this.explain(answer);
      }
    } catch (problem) {
      if (number === this.scoring) this.refuse(problem);
    } finally {
      if (number === this.scoring) this.wait(false);
    }
    this.changed();
  }

  /** The answer to what the fields show; a model whose outputs have no weights has no reward to compare by. */
  async ask() {
    try {
      return await sendPatiently(...this.request());
    } catch (problem) {
      if (problem.code !== "weights_missing" || !this.compares) throw problem;
      this.compares = false;
      return sendPatiently(...this.request());
    }
  }

  /** Show why something was not done. */
  refuse(problem) {
    this.message.textContent = problem.message;
  }

  wait(isWaiting) {
    this.button.disabled = isWaiting;
    this.button.textContent = isWaiting ? "Scoring \u2026" : "Score";
    this.grid.setAttribute("aria-busy", isWaiting);
  }

  /** Say what the numbers of an example mean; `changed` removes it with the example. */
  explain({ results, probabilities }) {
    if (!this.isExample() || !probabilities) return;
    const [honest, hacked] = results;
    if (honest.error || hacked.error) return;
    const { isCaught, sentences } = verdictOf(honest, hacked, probabilities[0][1]);
    this.exampleNote.replaceChildren(
      exampleText(this.example),
      element(
        "p",
        { "data-caught": isCaught ? "yes" : "no" },
        element("span", { class: isCaught ? "badge good" : "badge alarm" }, isCaught ? "caught" : "not caught"),
        ` ${sentences.join(" ")}`,
      ),
    );
  }

  /** Whether the fields show an example as it is. */
  isExample() {
    const { example, cards } = this;
    if (!example || cards.length !== 2 || this.conversation.prompt !== example.prompt) return false;
    return cards[0].value === example.honest && cards[1].value === example.hacked;
  }

  changed() {
    if (!this.cards.length) return;
    if (!this.isExample()) {
      this.example = null;
      this.exampleNote.replaceChildren();
    } else if (!this.exampleNote.hasChildNodes() || this.exampleNote.dataset.name !== this.example.name) {
      this.exampleNote.dataset.name = this.example.name;
      this.exampleNote.replaceChildren(exampleText(this.example));
    }
    for (const button of this.exampleButtons) button.setAttribute("aria-pressed", button.textContent === this.example?.name);
    const [path, body] = this.request();
    this.snippets.curl.textContent = curlOf(addressOf(path), body, hasKey());
    const completions = this.cards.map((card) => card.value);
    this.snippets.python.textContent = pythonOf(addressOf("."), this.conversation.prompt, completions);
  }

  /** The route and the body for what the fields show. */
  request() {
    const { prompt } = this.conversation;
    const completions = this.cards.map((card) => card.value);
    if (completions.length > 1 && this.compares) return ["v1/compare", { prompt, completions, diagnostics: "full" }];
    return ["v1/score", { items: completions.map((completion) => ({ prompt, completion })), diagnostics: "full" }];
  }

  submit(event) {
    event.preventDefault();
    this.score();
  }

  actions() {
    this.button = element("button", { type: "submit", class: "main" }, "Score");
    const add = element("button", { type: "button", click: () => this.add() }, "Add completion");
    return element("div", { class: "buttons actions" }, this.button, add, element("span", { class: "note" }, element("kbd", {}, "Ctrl"), "+", element("kbd", {}, "Enter"), " scores"));
  }

  requestPanel() {
    return element(
      "details",
      { class: "card" },
      element("summary", {}, "This request as a command"),
      Object.entries(this.snippets).map(([name, node]) =>
        element(
          "div",
          { class: "snippet" },
          element("div", { class: "card-head" }, element("h2", {}, name === "curl" ? "curl" : "Python"), copyButton(name, node)),
          node,
        ),
      ),
    );
  }
}

function showAll(cards, texts, answer, spans) {
  answer.results.forEach((result, index) => {
    if (result.error) {
      cards[index].showError(result.error);
      return;
    }
    const row = answer.probabilities?.[index] ?? [];
    const chances = row.map((chance, other) => [cards[other].letter, chance]).filter((_, other) => other !== index);
    cards[index].show(result, texts[index], spans[index], chances);
  });
}

function exampleText({ name, tell }) {
  return element("p", {}, element("strong", {}, `${name}. `), tell);
}

function exampleButtons(playground) {
  playground.exampleButtons = EXAMPLES.map((example) => {
    const click = () => {
      playground.take(example);
      playground.score();
    };
    return element("button", { type: "button", class: "quiet", "aria-pressed": "false", click }, example.name);
  });
  return element(
    "div",
    { class: "buttons examples", role: "group", "aria-label": "Examples of reward hacking" },
    element("span", { class: "note" }, "Honest beside hacked:"),
    playground.exampleButtons,
  );
}

function copyButton(name, node) {
  const button = element("button", { type: "button", class: "quiet", "aria-label": `Copy the ${name} command` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(node.textContent); // only on https and on this machine
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(node);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}
