// The prompt: one question, or the turns of a small conversation.

import { element } from "./elements.js";

const ROLES = ["user", "assistant", "system"];

/** The fields of a prompt in `root`; `changed` is called after every change. */
export class Conversation {
  constructor(root, changed) {
    this.list = element("div", { class: "turns" });
    this.changed = changed;
    this.turns = [];
    root.append(
      this.list,
      element("button", { type: "button", class: "quiet", click: () => this.addTurn() }, "Add turn"),
    );
    this.list.addEventListener("input", changed);
    this.addTurn();
  }

  /** Show one question in place of all turns. */
  ask(text) {
    this.turns = [];
    this.list.replaceChildren();
    this.addTurn(text);
  }

  /** A text where there is one turn of a user, else messages; as the service takes a prompt. */
  get prompt() {
    const turns = this.turns.map(({ role, text }) => ({ role: role.value, content: text.value }));
    return turns.length === 1 && turns[0].role === "user" ? turns[0].content : turns;
  }

  addTurn(content = "") {
    const number = this.turns.length + 1;
    const text = element("textarea", { rows: "2", "aria-label": `Prompt, turn ${number}`, spellcheck: "false" });
    text.value = content;
    const role = element(
      "select",
      { "aria-label": `Role of turn ${number}` },
      ROLES.map((name) => element("option", { value: name }, name)),
    );
    role.value = number % 2 ? "user" : "assistant";
    const row = element("div", { class: "turn" }, role, text);
    const turn = { role, text, row };
    if (number > 1) {
      const remove = () => this.removeTurn(turn);
      row.append(element("button", { type: "button", class: "quiet", click: remove, "aria-label": `Remove turn ${number}` }, "Remove"));
    }
    this.turns.push(turn);
    this.list.append(row);
    this.changed();
  }

  removeTurn(turn) {
    this.turns = this.turns.filter((other) => other !== turn);
    turn.row.remove();
    this.turns[this.turns.length - 1].text.focus();
    this.changed();
  }
}
