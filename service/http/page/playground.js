// The playground: a prompt, completions side by side, and what the service says of each.

import { CompletionCard } from "./completion.js";
import { Conversation } from "./conversation.js";
import { element } from "./elements.js";
import { EXAMPLES } from "./examples.js";
import { PairsPanel } from "./pairs_panel.js";
import { addressOf, hasKey, sendPatiently } from "./service.js";
import { curlOf, pythonOf } from "./snippets.js";

const MAX_COMPLETIONS = 8;
const LETTERS = "ABCDEFGH";

export class Playground {
  constructor(root) {
    this.cards = [];
    this.scoring = 0;
    this.message = element("p", { class: "error", role: "alert" });
    this.grid = element("div", { class: "completions" });
    this.snippets = { curl: element("pre", { tabindex: "0" }), python: element("pre", { tabindex: "0" }) };
    const form = element("form", { class: "stack", submit: (event) => this.submit(event) });
    const prompt = element("fieldset", { class: "card" }, element("legend", {}, "Prompt"));
    this.conversation = new Conversation(prompt, () => this.changed());
    form.append(exampleButtons(this), prompt, this.grid, this.actions(), this.message);
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
  take({ prompt, honest, hacked }) {
    this.conversation.ask(prompt);
    while (this.cards.length > 2) this.remove(this.cards[this.cards.length - 1]);
    while (this.cards.length < 2) this.add();
    this.cards[0].write(honest);
    this.cards[1].write(hacked);
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
    this.button.disabled = true;
    try {
      const [answer, { spans }] = await Promise.all([sendPatiently(...this.request()), sendPatiently("v1/style", { texts })]);
      if (number === this.scoring) showAll(cards, texts, answer, spans);
    } catch (problem) {
      this.message.textContent = problem.message;
    } finally {
      if (number === this.scoring) this.button.disabled = false;
    }
    this.changed();
  }

  changed() {
    if (!this.cards.length) return;
    const [path, body] = this.request();
    this.snippets.curl.textContent = curlOf(addressOf(path), body, hasKey());
    const completions = this.cards.map((card) => card.value);
    this.snippets.python.textContent = pythonOf(addressOf("."), this.conversation.prompt, completions);
  }

  /** The route and the body for what the fields show. */
  request() {
    const { prompt } = this.conversation;
    const completions = this.cards.map((card) => card.value);
    if (completions.length > 1) return ["v1/compare", { prompt, completions, diagnostics: "full" }];
    return ["v1/score", { items: [{ prompt, completion: completions[0] }], diagnostics: "full" }];
  }

  submit(event) {
    event.preventDefault();
    this.score();
  }

  actions() {
    this.button = element("button", { type: "submit", class: "main" }, "Score");
    const add = element("button", { type: "button", click: () => this.add() }, "Add completion");
    return element("div", { class: "buttons" }, this.button, add, element("span", { class: "note" }, "Ctrl+Enter scores"));
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

function exampleButtons(playground) {
  return element(
    "div",
    { class: "buttons examples", role: "group", "aria-label": "Examples of reward hacking" },
    element("span", { class: "note" }, "Examples:"),
    EXAMPLES.map((example) => {
      const click = () => {
        playground.take(example);
        playground.score();
      };
      return element("button", { type: "button", class: "quiet", click }, example.name);
    }),
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
