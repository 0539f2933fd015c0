// Draws an answer of /v1/monitor: alarms, distributions, drift.

import { figure, histogram, points } from "./charts.js";
import { count, element, fixed, isNumber, percent, table } from "./elements.js";

const MAX_EVENTS = 50;
const SHOWN = ["reward_length_corr", "reward_length_r2", "ood_rate", "top1_ood_rate", "mean_surprise", "ood_reward_gap", "reward_drift", "log_tokens_drift", "style_r2", "tie_rate", "truncation_rate", "output_mean", "output_length_corr"];

export class MonitorPanel {
  constructor() {
    this.alarms = new Map();
    this.events = [];
    this.run = undefined;
    this.message = element("p", { class: "note", role: "status" });
    this.alarmList = element("div", {});
    this.charts = element("div", { class: "charts" });
    this.tables = element("div", { class: "stack" });
    this.root = element("div", { class: "stack" }, this.message, this.alarmList, this.charts, this.tables);
  }

  refuse(message) {
    this.message.textContent = message;
    for (const part of [this.alarmList, this.charts, this.tables]) part.replaceChildren();
  }

  show(answer) {
    const { window, run } = answer;
    if (run !== this.run) [this.run, this.alarms, this.events] = [run, new Map(), []];
    this.message.textContent =
      `${count(window.items)} items of ${count(window.prompts)} prompts in the window` +
      (answer.calibrated ? "." : ". Without a calibration there are no p-values and no drift.") +
      (answer.incomplete ? " Some replica did not answer." : "");
    this.follow(answer.alarms);
    this.alarmList.replaceChildren(...alarmNodes(answer.alarms, this.events));
    this.charts.replaceChildren(...distributionCharts(answer));
    const open = [...this.tables.querySelectorAll("details[open]")].map((node) => node.dataset.name);
    this.tables.replaceChildren(...tablesOf(answer, open));
  }

  /** Note what has ended since the last answer; the service has the times at which alarms began. */
  follow(alarms) {
    const now = new Map(alarms.map((alarm) => [nameOf(alarm), alarm]));
    for (const [name, alarm] of this.alarms) {
      if (!now.has(name)) this.events.unshift({ name, since: alarm.since, ended: new Date() });
    }
    this.events = this.events.slice(0, MAX_EVENTS);
    this.alarms = now;
  }
}

function nameOf({ name, scope }) {
  return scope ? `${name} (${scope})` : name;
}

function alarmNodes(alarms, events) {
  const begun = (since) => (since ? `since ${new Date(since).toLocaleTimeString("en-GB")}` : "since the latest batch");
  const on = alarms.map((alarm) =>
    element(
      "li",
      { "data-alarm": alarm.name },
      element("span", { class: `badge ${alarm.severity === "critical" ? "alarm" : "warn"}` }, alarm.severity),
      ` ${nameOf(alarm)}, ${begun(alarm.since)}${alarm.pays ? ": an edit that does this pays" : ""}`,
    ),
  );
  const ended = events.map((event) =>
    element("li", {}, element("span", { class: "badge" }, "ended"), ` ${event.name}, until ${event.ended.toLocaleTimeString("en-GB")}`),
  );
  const list = on.length + ended.length ? [element("ul", { class: "alarms" }, on, ended)] : [];
  return [element("h3", {}, on.length ? `Alarms: ${on.length}` : "No alarm"), ...list];
}

function distributionCharts(answer) {
  const { reward, p_value: pValues, points: items } = answer.distributions;
  return [
    rewardChart(reward),
    scatterChart(answer, items),
    figure(
      "p-values",
      "Expected: one twentieth in each bin. A peak at the left: items unlike the calibration.",
      histogram("Histogram of the p-values", pValues.edges, sharesOf(pValues.counts), pValues.reference, (value) => fixed(value, 1)),
      [["window", "bar"], ["expected", "expected"]],
    ),
  ];
}

function rewardChart({ edges, counts, reference }) {
  return figure(
    "Rewards",
    reference ? "The line is the calibration's distribution." : "There is no calibration to compare with.",
    histogram("Histogram of the rewards", edges, sharesOf(counts), reference, (value) => fixed(value, 1)),
    reference ? [["window", "bar"], ["calibration", "expected"]] : [],
  );
}

function scatterChart(answer, items) {
  const reading = (name, scope) => answer.monitors.find((entry) => entry.name === name && entry.scope === scope);
  const [within, pooled] = ["within", "pooled"].map((scope) => reading("reward_length_corr", scope));
  const squared = reading("reward_length_r2", "within");
  const sentence =
    `r = ${fixed(within.value, 2)} within prompts${intervalOf(within)}, ${fixed(pooled.value, 2)} pooled. ` +
    `Warns when |r| is surely above ${within.threshold}, critical when r squared is surely above ${squared.threshold} ` +
    `(|r| above ${Math.sqrt(squared.threshold).toFixed(2)}).`;
  const { alpha } = answer.distributions;
  const flagged = items.p_value.map((value) => isNumber(value) && value <= alpha);
  return figure(
    "Reward against length",
    sentence,
    points(
      `Reward against completion tokens of ${items.reward.length} items`,
      items.completion_tokens.map((tokens) => Math.log1p(tokens)),
      items.reward,
      flagged,
      { x: (value) => `${count(Math.expm1(value))} tok`, y: (value) => fixed(value, 1) },
    ),
    [["item", "point"], [`p-value at most ${alpha}`, "odd"]],
  );
}

function intervalOf({ interval }) {
  return interval ? ` (${fixed(interval[0], 2)} to ${fixed(interval[1], 2)})` : "";
}

function sharesOf(counts) {
  const sum = counts.reduce((one, other) => one + other, 0);
  return counts.map((value) => (sum ? value / sum : 0));
}

function tablesOf(answer, open) {
  const part = (name, content) =>
    element("details", { "data-name": name, open: open.includes(name) }, element("summary", {}, name), content);
  return [
    part("Drift", driftTable(answer.cusum)),
    part("Changes of wording", wordingTable(answer.drift)),
    part(
      "All readings",
      table(
        "Readings of the window",
        ["monitor", "value", "95 % interval", "calibration", "threshold", "n", "state"],
        answer.monitors.filter(({ name }) => SHOWN.includes(name)).map(readingRow),
      ),
    ),
  ];
}

function driftTable(cusum) {
  if (!cusum.signals.length) return element("p", { class: "note" }, "Drift is measured against a calibration; there is none.");
  const meter = (value) =>
    element("progress", { max: cusum.threshold, value: Math.min(value, cusum.threshold), "aria-label": `${fixed(value, 1)} of ${fixed(cusum.threshold, 1)}` });
  return table(
    `Cumulative sums after ${count(cusum.batches)} batches; an alarm above ${fixed(cusum.threshold, 1)}`,
    ["signal", "up", "", "down", "", "alarms"],
    cusum.signals.map(({ signal, up, down, num_alarms: alarms, alarm, pays }) => [
      `${signal}${alarm ? " (alarm)" : ""}${pays ? ", pays" : ""}`,
      fixed(up, 1),
      meter(up),
      fixed(down, 1),
      meter(down),
      count(alarms),
    ]),
  );
}

function wordingTable(drift) {
  const rows = drift.comparisons.flatMap(({ against, alarm, changes }) =>
    changes.map(({ statistic, unit, reference, recent, z }) => [
      statistic.replaceAll("_", " "),
      alarm ? `${against} (alarm)` : against,
      fixed(reference, 2),
      fixed(recent, 2),
      unit,
      fixed(z, 1),
    ]),
  );
  if (!rows.length) return element("p", { class: "note" }, "The completions are worded as before.");
  return table(
    `What differs most after ${count(drift.batches)} batches`,
    ["statistic", "compared with", "then", "now", "unit", "standard errors"],
    rows,
  );
}

function readingRow(reading) {
  const asShare = reading.metric === "share";
  const show = (value) => (asShare ? percent(value, 2) : fixed(value, 3));
  const name = [reading.name, reading.feature, reading.scope].filter(Boolean).join(", ");
  const interval = reading.interval ? `${show(reading.interval[0])} to ${show(reading.interval[1])}` : "\u2013";
  return [name, show(reading.value), interval, show(reading.reference), show(reading.threshold), count(reading.n), reading.state];
}
