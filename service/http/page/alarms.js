// The alarms of an answer of /v1/monitor, in words, with the time at which each began and ended.

import { element } from "./elements.js";

const MAX_ENDED = 20;

export const SIGNALS = {
  reward: "rewards",
  log_tokens: "length",
  surprise: "how unusual items are",
  oe_surprise: "likeness to known hacks",
  prompt_overlap: "words of the prompt",
  flag: "share of unusual items",
  markdown: "markdown",
  emoji: "emoji",
  hedges: "hedges",
  flattery: "flattery",
  repeat4: "repeated phrases",
  reward_length_corr: "correlation of reward and length",
};

const READINGS = {
  reward_length_corr: "the reward follows length",
  reward_length_r2: "length explains the reward",
  ood_rate: "many items are unusual",
  top1_ood_rate: "the best completion of a prompt is often unusual",
  drift_start: "completions are worded otherwise than at the start",
  drift_calibration: "completions are worded otherwise than the calibration's",
  output_length_corr: "an output follows length",
};

/** Shows what is in alarm and what was since the page looked. */
export class AlarmPanel {
  constructor() {
    this.root = element("div", { class: "stack" });
    this.forget();
  }

  forget() {
    [this.current, this.ended, this.run] = [new Map(), [], undefined];
    this.root.replaceChildren();
  }

  show(answer) {
    if (answer.run !== this.run) {
      this.forget();
      this.run = answer.run;
    }
    this.follow(answer.alarms);
    this.root.replaceChildren(...nodesOf(answer, this.ended));
  }

  /** Note what has ended since the last answer; the service has the times at which alarms began. */
  follow(alarms) {
    const now = new Map(alarms.map((alarm) => [nameOf(alarm), alarm]));
    for (const [name, alarm] of this.current) {
      if (!now.has(name)) this.ended.unshift({ alarm, at: new Date() });
    }
    this.ended = this.ended.slice(0, MAX_ENDED);
    this.current = now;
  }
}

/** An alarm's name, with its scope. */
export function nameOf({ name, scope }) {
  return scope ? `${name} (${scope})` : name;
}

/** What an alarm means; `cusum` says in which direction a signal drifts. */
export function meaningOf({ name, scope }, cusum) {
  if (!name.startsWith("cusum_")) return [READINGS[name] ?? name, scope === "within" ? ", within prompts" : ""].join("");
  const signal = name.slice("cusum_".length);
  const found = cusum.signals.find((entry) => entry.signal === signal);
  const direction = found && found.down > found.up ? "fall" : "rise";
  return `${SIGNALS[signal] ?? signal}: a ${direction} against the calibration`;
}

function nodesOf({ alarms, cusum, window }, ended) {
  const heading = alarms.length
    ? element("p", { class: "state alarm" }, `${alarms.length} alarm${alarms.length > 1 ? "s" : ""}`)
    : element("p", { class: window.items ? "state good" : "state" }, window.items ? "No alarm" : "No items yet");
  const on = alarms.map((alarm) =>
    element(
      "li",
      { "data-alarm": alarm.name },
      element("span", { class: `badge ${alarm.severity === "critical" ? "alarm" : "warn"}` }, alarm.severity),
      element("strong", {}, meaningOf(alarm, cusum)),
      element("span", { class: "note" }, begun(alarm.since)),
      element("code", {}, nameOf(alarm)),
      alarm.pays ? element("span", { class: "badge alarm" }, "pays: an edit that does this raises the reward") : null,
    ),
  );
  const over = ended.map(({ alarm, at }) =>
    element(
      "li",
      { class: "note" },
      element("span", { class: "badge" }, "ended"),
      `${meaningOf(alarm, cusum)}, until ${timeOf(at)}`,
    ),
  );
  return [heading, ...(on.length + over.length ? [element("ul", { class: "alarms" }, on, over)] : [])];
}

function begun(since) {
  return since ? `since ${timeOf(new Date(since))}` : "since the latest batch";
}

function timeOf(moment) {
  const isToday = moment.toDateString() === new Date().toDateString();
  return isToday ? moment.toLocaleTimeString("en-GB") : moment.toLocaleString("en-GB");
}
