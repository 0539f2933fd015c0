// Joins the views: which one is shown, the API key, and what is served.

import { element } from "./elements.js";
import { Live } from "./live.js";
import { ModelView } from "./model.js";
import { Playground } from "./playground.js";
import { hasKey, readJson, useKey } from "./service.js";

const RETRY_MS = 2000;
const VIEWS = { playground: Playground, live: Live, model: ModelView };

const status = document.querySelector("#status");
const keyPanel = document.querySelector("#key-panel");
const views = {};
let shown = null;

/** Show the view that the address names; each is made when it is shown for the first time. */
function showNamed() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "playground";
  if (shown) views[shown].hide();
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== `view-${name}`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  views[name] ??= new VIEWS[name](document.querySelector(`#view-${name}`));
  shown = name;
  views[name].show();
}

/** Say in the head what is served; wait for a model that is loading. */
async function describe() {
  try {
    const { model, engine } = await readJson("v1/model");
    status.replaceChildren(
      element("strong", {}, model.name),
      ` ${model.version} \u00b7 ${engine.engine}, ${engine.forward}, ${engine.dtype} on ${engine.device}`,
    );
    status.dataset.ready = "yes";
    keyPanel.open = false;
  } catch (problem) {
    status.textContent = messageOf(problem);
    status.dataset.ready = "no";
    if (problem.status === 401) askForKey();
    else setTimeout(describe, RETRY_MS);
  }
}

function messageOf(problem) {
  if (problem.code === "not_ready") return "The model is loading \u2026";
  return problem.status === 401 && !hasKey() ? "This service needs an API key." : problem.message;
}

function askForKey() {
  keyPanel.open = true;
  document.querySelector("#key").focus();
}

document.querySelector("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(document.querySelector("#key").value);
  describe();
  views[shown].show();
});
addEventListener("hashchange", showNamed);
showNamed();
describe();
