// What is served: version, parity, calibration with its self-test, what the model pays for, limits.

import { count, element, facts, fixed, percent, signed, table } from "./elements.js";
import { readJson } from "./service.js";

const FEATURES = {
  log_tokens: "length, per ln token",
  headers: "headers",
  list_items: "list items",
  bold: "bold spans",
  emoji: "emoji",
  hedges: "hedges",
  flattery: "flattery",
};

export class ModelView {
  constructor(root) {
    this.root = root;
  }

  async show() {
    try {
      const model = await readJson("v1/model");
      const slopes = await readJson("v1/monitor").catch((problem) => problem);
      this.root.replaceChildren(...sections(model, slopes));
    } catch (problem) {
      this.root.replaceChildren(element("p", { class: "error", role: "alert" }, problem.message));
    }
  }

  hide() {}
}

function sections(model, monitor) {
  const card = (title, ...content) => element("section", { class: "card" }, element("h2", {}, title), content);
  return [
    card("Model", identityFacts(model), notesOf(model)),
    card("Agreement with plain transformers", parityFacts(model.engine.parity)),
    card("Calibration", ...calibrationNodes(model.calibration)),
    card("What the model pays for", ...probeNodes(model.calibration.probe), ...slopeNodes(monitor)),
    card("Limits", facts(Object.entries(model.limits).map(([name, value]) => [worded(name), count(value)]))),
    card("Audit", auditNode(model.audit_url)),
  ];
}

function identityFacts({ model, engine, ...others }) {
  return facts([
    ["name", model.name],
    ["version", model.version],
    ["engine", engine.engine],
    ["architecture", engine.architecture],
    ["forward path", engine.forward],
    ["kernels", engine.kernels ?? "none"],
    ["device", engine.device],
    ["dtype", engine.dtype],
    ["tokens a pass", count(engine.max_batch_tokens)],
    ["prefix cache", `${count(engine.prefix_cache_mib)} MiB`],
    ["outputs", engine.outputs.join(", ")],
    ["pooling", others.pooling],
    ["text rule", others.text_rule.name],
    ["truncation", others.truncation],
    ["code revision", others.code_revision],
    ["weights, sha256", others.sha256.weights ?? "\u2013"],
  ]);
}

function notesOf({ notes }) {
  return notes.length ? element("ul", {}, notes.map((note) => element("li", {}, note))) : null;
}

function parityFacts(parity) {
  const entries = Object.entries(parity);
  if (!entries.length) return element("p", { class: "note" }, "No probe ran for this engine.");
  return facts(entries.map(([name, value]) => [worded(name), typeof value === "number" ? shortNumber(value) : String(value)]));
}

function shortNumber(value) {
  return Number.isInteger(value) ? count(value) : String(+value.toPrecision(3));
}

function calibrationNodes(calibration) {
  if (!calibration.id) return [element("p", {}, calibration.reason)];
  const { self_test: selfTest, length } = calibration;
  return [
    facts([
      ["id", calibration.id],
      ["made", new Date(calibration.created).toLocaleString("en-GB")],
      ["items", `${count(calibration.num_calibrate)} of ${count(calibration.num_prompts)} prompts`],
      ["components", calibration.admitted.join(", ")],
      ["mean AUROC on built-in hacks", fixed(calibration.mean_auroc, 3)],
      ["weak", calibration.weak ? "yes: it detects hardly anything" : "no"],
      ["reward and length", `r = ${signed(length.raw.within, 2)} within prompts; adjusted ${signed(length.adjusted.within, 2)}`],
    ]),
    table(
      "Self-test: clean items of the calibration that would be flagged",
      ["p-value at most", "flagged", "standard error", "items", "within tolerance"],
      selfTest.rates.map((rate) => [
        percent(rate.nominal, 0),
        percent(rate.value, 2),
        percent(rate.standard_error, 2),
        count(rate.num_items),
        rate.is_tolerable ? "yes" : "no",
      ]),
    ),
    element(
      "details",
      {},
      element("summary", {}, "Built-in hacks, and how well each is told from clean items"),
      table(
        "Detection by the p-value",
        ["hack", "AUROC", "found at 1 % false alarms"],
        Object.entries(calibration.detection).map(([name, found]) => [worded(name), fixed(found.auroc, 3), percent(found.tpr1)]),
      ),
    ),
  ];
}

/** How edits that make no answer better move the reward, by the probe of the calibration. */
function probeNodes(probe) {
  if (!probe) return [element("p", { class: "note" }, "There is no probe of the reward; reward-calibrate makes one.")];
  const pays = probe.effects.filter(({ low }) => low > 0).sort((one, other) => other.effect - one.effect);
  return [
    element(
      "p",
      { class: "note", "data-pays": probe.pays.join(" ") },
      `${count(probe.num_completions)} answers were changed in ways that make none better. ` +
        (pays.length ? `It pays for: ${pays.map(({ description }) => description).join("; ")}.` : "It pays for none of them."),
    ),
    element(
      "details",
      {},
      element("summary", {}, "All edits, and how each moves the reward"),
      table(
        "Mean change of the reward",
        ["the answer with", "change", "95 % interval", "in standard deviations", "pays"],
        probe.effects.map((one) => [
          one.description,
          signed(one.effect, 3),
          `${signed(one.low, 3)} to ${signed(one.high, 3)}`,
          signed(one.effect_sd, 2),
          one.low > 0 ? "yes" : "no",
        ]),
      ),
    ),
  ];
}

/** Slopes of the reward in the regression on length and style: on the calibration's items, and in the window. */
function slopeNodes(monitor) {
  if (monitor instanceof Error) return [element("p", { class: "note" }, monitor.message)];
  const slopes = monitor.monitors.filter(({ name, scope }) => name === "style_slope" && scope === "within");
  return [
    element("p", { class: "note" }, "How the reward rises with each feature, the others equal, within prompts. Style is counted in markers per 100 words."),
    table(
      "Slopes of the reward",
      ["feature", "on the calibration's items", "in the window"],
      slopes.map(({ feature, reference, value }) => [FEATURES[feature] ?? feature, signed(reference), signed(value)]),
    ),
  ];
}

function auditNode(url) {
  if (url) return element("p", {}, element("a", { href: url, rel: "noreferrer" }, "Report of the audit"));
  return element(
    "p",
    {},
    "No report is named. ",
    element("code", {}, "reward-audit MODEL pairs.jsonl --out report"),
    " makes one, and ",
    element("code", {}, "--page.audit_url URL"),
    " links it here.",
  );
}

function worded(name) {
  return name.replaceAll("_", " ");
}
