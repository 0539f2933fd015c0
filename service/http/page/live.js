// Live figures. They are asked for only while they are looked at: in this view, in a tab that is in front.

import { AlarmPanel } from "./alarms.js";
import { figure, lines } from "./charts.js";
import { element } from "./elements.js";
import { buckets, parseExposition, quantile, total } from "./exposition.js";
import { MonitorPanel } from "./monitors.js";
import { count, fixed, percent } from "./numbers.js";
import { readJson, readText, RUN } from "./service.js";

const INTERVAL_MS = 5000;
const MAX_READINGS = 100;
const WATCHING = new Set(["/", "/livez", "/readyz", "/metrics", "/v1/model", "/v1/monitor", "/openapi.json", "other"]);

const isScoring = ({ route }) => !WATCHING.has(route);

export class Live {
  constructor(root) {
    this.history = [];
    this.timer = null;
    this.number = 0;
    this.tiles = element("dl", { class: "tiles" });
    this.charts = element("div", { class: "charts four" });
    this.traffic = element("p", { class: "note", role: "status" });
    this.run = element("select", { "aria-label": "Training run" }, element("option", { value: "" }, "all items"));
    this.run.addEventListener("change", () => this.readMonitors());
    this.named = element("input", { type: "text", "aria-label": "Name of a run", placeholder: "name of a run", size: "16" });
    this.named.addEventListener("change", () => this.choose(this.named.value.trim()));
    this.alarms = new AlarmPanel();
    this.monitors = new MonitorPanel();
    const card = (title, ...content) => element("section", { class: "card" }, element("h2", {}, title), content);
    const runs = element("div", { class: "buttons" }, element("label", {}, "Run ", this.run), "or", this.named);
    this.notice = element("p", { class: "note", role: "status" });
    this.measured = card("Rewards, lengths and p-values", this.monitors.root);
    this.measured.hidden = true;
    root.append(
      card("Alarms", runs, this.notice, this.alarms.root),
      this.measured,
      card("Traffic", this.traffic, this.tiles, this.charts),
    );
    document.addEventListener("visibilitychange", () => this.restart());
  }

  show() {
    this.isShown = true;
    this.isForbidden = false; // the key may be another one
    this.restart();
  }

  hide() {
    this.isShown = false;
    this.restart();
  }

  restart() {
    clearTimeout(this.timer);
    this.number += 1;
    if (this.isShown && !document.hidden) this.follow(this.number);
  }

  /** Read again and again, each time an interval after the last answer, until another follower takes its place. */
  async follow(number) {
    await this.read();
    if (number === this.number) this.timer = setTimeout(() => this.follow(number), INTERVAL_MS);
  }

  async read() {
    await Promise.all([this.readTraffic(), this.readMonitors()]);
  }

  async readTraffic() {
    if (this.isForbidden) return;
    try {
      this.note(readingOf(parseExposition(await readText("metrics")), performance.now() / 1000));
      this.traffic.textContent = "";
    } catch (problem) {
      this.isForbidden = problem.status === 403;
      this.traffic.textContent = this.isForbidden
        ? "These figures are of all callers; they need a key with scope admin."
        : problem.message;
    }
  }

  async readMonitors() {
    const run = this.run.value;
    try {
      const answer = await readJson("v1/monitor", run ? { "X-Run-Id": run } : {});
      if (run !== this.run.value) return; // another run was chosen meanwhile
      this.offer(answer.runs);
      this.notice.textContent = "";
      this.measured.hidden = false;
      this.alarms.show(answer);
      this.monitors.show(answer);
    } catch (problem) {
      if (run === this.run.value) this.refuse(problem);
    }
  }

  /** Say why there are no monitors. */
  refuse(problem) {
    const isForbidden = problem.status === 403;
    if (isForbidden) this.offer([RUN]);
    this.notice.textContent = isForbidden
      ? `All runs together need a key with scope admin. With this key choose one run, or name it; what is scored in the playground is the run \u201c${RUN}\u201d.`
      : problem.message;
    this.measured.hidden = true;
    this.alarms.forget();
    this.monitors.forget();
  }

  choose(run) {
    if (run) this.offer([run]);
    this.run.value = run;
    this.readMonitors();
  }

  /** Offer runs to select, the chosen one and those named by hand included. */
  offer(runs) {
    const offered = new Set([...this.run.options].map((option) => option.value));
    for (const run of runs) if (!offered.has(run)) this.run.append(element("option", { value: run }, run));
  }

  note(reading) {
    const before = this.history[this.history.length - 1]?.reading;
    const rates = before ? ratesOf(before, reading) : null;
    this.history = [...this.history, { reading, rates }].slice(-MAX_READINGS);
    this.tiles.replaceChildren(...tilesOf(reading, rates));
    this.charts.replaceChildren(...chartsOf(this.history));
  }
}

/** What is read of the metrics at one time; times in seconds of the browser's clock. */
function readingOf(samples, at) {
  const tokens = (kind) => total(samples, "rm_tokens_total", (labels) => labels.kind === kind);
  return {
    at,
    requests: total(samples, "rm_requests_total", isScoring),
    items: total(samples, "rm_items_total", ({ outcome }) => outcome === "ok" || outcome === "truncated"),
    tokens: tokens("real"),
    shared: tokens("shared"),
    cached: tokens("cached"),
    batches: total(samples, "rm_batch_items_count"),
    batchItems: total(samples, "rm_batch_items_sum"),
    queueItems: total(samples, "rm_queue_items"),
    queueTokens: total(samples, "rm_queue_tokens"),
    latency: buckets(samples, "rm_request_duration_seconds", isScoring),
  };
}

/** What has happened between two readings; null after a restart, when counters begin anew. */
function ratesOf(before, now) {
  const seconds = now.at - before.at;
  const grown = (name) => now[name] - before[name];
  if (!(seconds > 0) || grown("requests") < 0 || grown("tokens") < 0) return null;
  const share = (name) => (grown("tokens") > 0 ? grown(name) / grown("tokens") : null);
  return {
    requests: grown("requests") / seconds,
    items: grown("items") / seconds,
    tokens: grown("tokens") / seconds,
    shared: share("shared"),
    cached: share("cached"),
    batchItems: grown("batches") > 0 ? grown("batchItems") / grown("batches") : null,
    p50: quantile(0.5, before.latency, now.latency),
    p95: quantile(0.95, before.latency, now.latency),
  };
}

function tilesOf(reading, rates) {
  const milliseconds = (seconds) => (seconds === null || seconds === undefined ? "\u2013" : `${fixed(1000 * seconds, 0)} ms`);
  const entries = [
    ["requests/s", fixed(rates?.requests, 1), "requests"],
    ["items/s", fixed(rates?.items, 1), "items"],
    ["tokens/s", count(rates?.tokens, true), "tokens"],
    ["items a batch", fixed(rates?.batchItems, 1), "batch"],
    ["tokens shared", percent(rates?.shared), "shared"],
    ["tokens cached", percent(rates?.cached), "cached"],
    ["waiting items", count(reading.queueItems), "queue-items"],
    ["waiting tokens", count(reading.queueTokens, true), "queue-tokens"],
    ["latency p50", milliseconds(rates?.p50), "p50"],
    ["latency p95", milliseconds(rates?.p95), "p95"],
  ];
  return entries.map(([name, value, id]) =>
    element("div", {}, element("dt", {}, name), element("dd", { "data-tile": id }, value)),
  );
}

function chartsOf(history) {
  const now = history[history.length - 1].reading.at;
  const seconds = history.map(({ reading }) => reading.at - now);
  const rate = (name) => history.map(({ rates }) => rates?.[name] ?? null);
  const state = (name) => history.map(({ reading }) => reading[name]);
  const short = (value) => count(value, true);
  const seen = `${Math.round(-seconds[0])} s`;
  const chart = (title, series, format, sentence) =>
    figure(
      title,
      sentence,
      lines(`${title}, last ${seen}`, seconds, series.map(([, values, shade]) => [values, shade]), format),
      series.length > 1 ? series.map(([name, , shade]) => [name, shade]) : [],
    );
  return [
    chart("Requests a second", [["requests", rate("requests"), "one"]], short, "Answers of scoring routes."),
    chart("Tokens a second", [["tokens", rate("tokens"), "one"]], short, "Real tokens of batches, shared ones included."),
    chart("Waiting tokens", [["tokens", state("queueTokens"), "one"]], short, "Tokens that wait for the engine."),
    chart(
      "Latency",
      [["p50", rate("p50"), "one"], ["p95", rate("p95"), "two"]],
      (value) => (value >= 1 ? `${fixed(value, 1)} s` : `${count(1000 * value)} ms`),
      "From the arrival of a request to its answer.",
    ),
  ];
}
