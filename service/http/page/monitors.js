// Draws an answer of /v1/monitor: distributions, how they move while they are looked at, drift, all readings.

import { figure, histogram, lines, points } from "./charts.js";
import { driftNodes } from "./drift.js";
import { element, table } from "./elements.js";
import { count, fixed, isNumber, percent } from "./numbers.js";

const MAX_READINGS = 100;
const SHOWN = ["reward_length_corr", "reward_length_r2", "ood_rate", "top1_ood_rate", "mean_surprise", "ood_reward_gap", "reward_drift", "log_tokens_drift", "style_r2", "tie_rate", "truncation_rate", "output_mean", "output_length_corr"];

export class MonitorPanel {
  constructor() {
    this.history = [];
    this.run = undefined;
    this.message = element("p", { class: "note", role: "status" });
    this.charts = element("div", { class: "charts" });
    this.drift = element("div", { class: "parts" });
    this.readings = element("div", {});
    this.root = element("div", { class: "stack" }, this.message, this.charts, this.drift, this.readings);
  }

  forget() {
    [this.run, this.history] = [undefined, []];
    for (const part of [this.message, this.charts, this.drift, this.readings]) part.replaceChildren();
  }

  show(answer) {
    const { window, run } = answer;
    if (run !== this.run) [this.run, this.history] = [run, []];
    this.message.textContent =
      `The latest ${count(window.items)} items, of ${count(window.prompts)} prompts` +
      (answer.calibrated ? "." : ". Without a calibration there are no p-values and no drift.") +
      (answer.incomplete ? " Some replica did not answer." : "");
    this.history = [...this.history, momentOf(answer)].slice(-MAX_READINGS);
    this.charts.replaceChildren(...distributionCharts(answer), ...trendCharts(this.history, answer));
    this.drift.replaceChildren(...driftNodes(answer));
    const isOpen = this.readings.querySelector("details[open]") !== null;
    this.readings.replaceChildren(readingTable(answer.monitors, isOpen));
  }
}

function readingOf({ monitors }, name, scope = null) {
  return monitors.find((entry) => entry.name === name && (entry.scope ?? null) === scope);
}

/** What the trends show of an answer; times in seconds of the browser's clock. */
function momentOf(answer) {
  const value = (name, scope) => readingOf(answer, name, scope)?.value ?? null;
  return {
    at: performance.now() / 1000,
    flagged: value("ood_rate"),
    correlation: value("reward_length_corr", "within"),
    reward: value("reward_drift"),
    length: value("log_tokens_drift"),
  };
}

function distributionCharts(answer) {
  const { reward, p_value: pValues, points: items } = answer.distributions;
  const pValueChart = figure(
    "p-values",
    pValueSentence(pValues),
    histogram("Histogram of the p-values", pValues.edges, sharesOf(pValues.counts), pValues.reference, (value) => fixed(value, 1)),
    [["window", "bar"], ["expected", "expected"]],
  );
  return [rewardChart(reward), scatterChart(answer, items), ...(answer.calibrated ? [pValueChart] : [])];
}

function pValueSentence({ edges, counts, reference }) {
  if (!counts.some((value) => value > 0)) return "No item has a p-value; they come with diagnostics at level full.";
  const found = `${percent(sharesOf(counts)[0])} of the p-values are at most ${edges[1]}; ${percent(reference[0])} are expected.`;
  return `${found} A peak there: items unlike the calibration.`;
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
  const [within, pooled] = ["within", "pooled"].map((scope) => readingOf(answer, "reward_length_corr", scope));
  const squared = readingOf(answer, "reward_length_r2", "within");
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

/** How the window's readings move while the page looks at them. */
function trendCharts(history, answer) {
  const now = history[history.length - 1].at;
  const seconds = history.map(({ at }) => at - now);
  const series = (name) => history.map((moment) => moment[name]);
  const chart = (title, sentence, shown, format) =>
    figure(title, sentence, lines(title, seconds, shown.map(([, values, shade]) => [values, shade]), format), shown.map(([name, , shade]) => [name, shade]));
  const threshold = readingOf(answer, "reward_length_corr", "within").threshold;
  return [
    ...(answer.calibrated
      ? [
          chart(
            "Unusual items",
            `Share of flagged items. Expected: ${percent(readingOf(answer, "ood_rate").reference, 1)}.`,
            [["flagged", series("flagged"), "one"]],
            (value) => `${+(100 * value).toPrecision(2)} %`,
          ),
          chart(
            "Reward and length",
            "Distance of the window's means from the calibration's, in its standard deviations.",
            [["reward", series("reward"), "one"], ["length", series("length"), "two"]],
            (value) => fixed(value, 1),
          ),
        ]
      : []),
    chart(
      "Correlation with length",
      `r of reward and length within prompts; warns surely above ${threshold}.`,
      [["r", series("correlation"), "one"]],
      (value) => fixed(value, 1),
    ),
  ];
}

function intervalOf({ interval }) {
  return interval ? ` (${fixed(interval[0], 2)} to ${fixed(interval[1], 2)})` : "";
}

function sharesOf(counts) {
  const sum = counts.reduce((one, other) => one + other, 0);
  return counts.map((value) => (sum ? value / sum : 0));
}

function readingTable(monitors, open) {
  return element(
    "details",
    { open },
    element("summary", {}, "All readings"),
    table(
      "Readings of the window",
      ["monitor", "value", "95 % interval", "calibration", "threshold", "n", "state"],
      monitors.filter(({ name }) => SHOWN.includes(name)).map(readingRow),
    ),
  );
}

function readingRow(reading) {
  const asShare = reading.metric === "share";
  const show = (value) => (asShare ? percent(value, 2) : fixed(value, 3));
  const name = [reading.name, reading.feature, reading.scope].filter(Boolean).join(", ");
  const interval = reading.interval ? `${show(reading.interval[0])} to ${show(reading.interval[1])}` : "\u2013";
  return [name, show(reading.value), interval, show(reading.reference), show(reading.threshold), count(reading.n), reading.state];
}
