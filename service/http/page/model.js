// What is served: version, parity, calibration with its self-test, what the model pays for, limits.

import { intervalMark } from "./charts.js";
import { bar, element, facts, table } from "./elements.js";
import { count, fixed, percent, signed } from "./numbers.js";
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
    if (!this.root.hasChildNodes()) this.root.append(element("p", { class: "note", role: "status" }, "Loading \u2026"));
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
    card("Agreement with plain transformers", parityNodes(model.engine.parity)),
    card("Calibration", ...calibrationNodes(model.calibration)),
    card("What the reward pays for", ...probeNodes(model.calibration.probe), ...slopeNodes(monitor)),
    card("Limits", facts(Object.entries(model.limits).map(limitOf))),
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
    ["reward", rewardRule(others.reward_rule)],
    ["quantization", engine.quantization],
    ["pooling", others.pooling],
    ["text rule", others.text_rule.name],
    ["truncation", others.truncation],
    ["code revision", others.code_revision],
    ["weights, sha256", shortened(others.sha256.weights)],
  ]);
}

function notesOf({ notes }) {
  return notes.length ? element("ul", {}, notes.map((note) => element("li", {}, note))) : null;
}

/** How outputs become the reward; weights by name where there are several. */
function rewardRule({ outputs, combination, weights }) {
  if (!weights) return combination;
  const named = Array.isArray(weights) ? weights.map((weight, index) => [outputs[index], weight]) : Object.entries(weights);
  return `${combination}: ${named.map(([name, weight]) => `${shortNumber(weight)} ${name}`).join(" + ")}`;
}

/** The start of a hash, the whole of which is in its title. */
function shortened(hash) {
  return hash ? element("code", { title: hash, tabindex: "0" }, `${hash.replace("sha256:", "").slice(0, 16)}\u2026`) : "\u2013";
}

/** A limit with its unit, which its name ends with. */
function limitOf([name, value]) {
  if (name.endsWith("_s")) return [worded(name.slice(0, -2)), `${count(value)} s`];
  if (name.endsWith("_bytes")) return [worded(name.slice(0, -6)), `${count(value / 2 ** 20)} MiB`];
  return [worded(name), count(value)];
}

function parityNodes(parity) {
  const entries = Object.entries(parity);
  if (!entries.length) return element("p", { class: "note" }, "No probe ran for this engine.");
  const { max_difference: difference, tolerance, conclusive, num_probes: probes } = parity;
  if (typeof difference !== "number" || typeof tolerance !== "number") return facts(entries.map(([name, value]) => [worded(name), String(value)]));
  const agrees = difference <= tolerance;
  return [
    element(
      "p",
      {},
      element("span", { class: `badge ${agrees ? "good" : "alarm"}` }, agrees ? "agrees" : "differs"),
      ` The largest difference of ${count(probes)} rewards is ${shortNumber(difference)}; the tolerance for this dtype is ${shortNumber(tolerance)}.` +
        (conclusive === false ? " The rewards vary too little for a conclusion." : ""),
    ),
    facts(entries.map(([name, value]) => [worded(name), typeof value === "number" ? shortNumber(value) : String(value)])),
  ];
}

function shortNumber(value) {
  return Number.isInteger(value) ? count(value) : String(+value.toPrecision(3));
}

function calibrationNodes(calibration) {
  if (!calibration.id) return [element("p", {}, calibration.reason)];
  const { self_test: selfTest, length } = calibration;
  const isSound = selfTest.rates.every((rate) => rate.is_tolerable);
  return [
    element(
      "p",
      {},
      element("span", { class: `badge ${isSound ? "good" : "alarm"}` }, isSound ? "self-test passed" : "self-test outside tolerance"),
      calibration.weak ? element("span", { class: "badge warn" }, "weak: it detects hardly anything") : null,
    ),
    facts([
      ["id", shortened(calibration.id)],
      ["made", new Date(calibration.created).toLocaleString("en-GB")],
      ["items", `${count(calibration.num_calibrate)} of ${count(calibration.num_prompts)} prompts`],
      ["components", calibration.admitted.join(", ")],
      ["mean AUROC on built-in hacks", fixed(calibration.mean_auroc, 3)],
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
        ["hack", "AUROC", "", "found at 1 % false alarms", ""],
        Object.entries(calibration.detection)
          .sort(([, one], [, other]) => other.auroc - one.auroc)
          .map(([name, found]) => [
            worded(name),
            fixed(found.auroc, 3),
            bar(found.auroc, 1, `AUROC ${fixed(found.auroc, 2)}`),
            percent(found.tpr1),
            bar(found.tpr1, 1, `found ${percent(found.tpr1)}`),
          ]),
      ),
    ),
  ];
}

/** How edits that make no answer better move the reward, by the probe of the calibration. */
function probeNodes(probe) {
  if (!probe) return [element("p", { class: "note" }, "There is no probe of the reward; reward-calibrate makes one.")];
  const pays = probe.effects.filter(({ low }) => low > 0).sort((one, other) => other.effect - one.effect);
  const extent = Math.max(...probe.effects.flatMap(({ low, high }) => [Math.abs(low), Math.abs(high)]), 0);
  return [
    element(
      "p",
      { "data-pays": probe.pays.join(" ") },
      element("span", { class: `badge ${pays.length ? "alarm" : "good"}` }, pays.length ? "exploitable" : "none pays"),
      ` ${count(probe.num_completions)} answers were changed in ways that make none better. ` +
        (pays.length ? `The reward pays for: ${pays.map(({ description }) => description).join("; ")}.` : "The reward pays for none of them."),
    ),
    table(
      "Mean change of the reward by each edit, with its 95 % interval; right of the line the edit pays",
      ["the answer with", "change", "", "95 % interval", "in standard deviations"],
      probe.effects.map((one) => [
        element("span", { class: "wrapping" }, one.description),
        signed(one.effect, 3),
        intervalMark(`${signed(one.low, 2)} to ${signed(one.high, 2)}`, one.low, one.effect, one.high, extent),
        `${signed(one.low, 2)} to ${signed(one.high, 2)}`,
        signed(one.effect_sd, 2),
      ]),
    ),
  ];
}

/** Slopes of the reward in the regression on length and style: on the calibration's items, and in the window. */
function slopeNodes(monitor) {
  if (monitor instanceof Error) {
    const reason = monitor.status === 403 ? "The slopes are of all callers' items; they need a key with scope admin." : monitor.message;
    return [element("p", { class: "note" }, reason)];
  }
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
