// Draws the drift of a stream against its calibration: cumulative sums of signals, and changes of the wording.

import { SIGNALS } from "./alarms.js";
import { bar, element, table } from "./elements.js";
import { count, fixed } from "./numbers.js";

/** Nodes for an answer of /v1/monitor. */
export function driftNodes({ cusum, drift }) {
  return [signalPart(cusum), wordingPart(drift)];
}

function signalPart(cusum) {
  const title = element("h3", {}, "Drift from the calibration");
  if (!cusum.signals.length) {
    return part(title, element("p", { class: "note" }, "Drift is measured against a calibration; there is none."));
  }
  const rows = cusum.signals.map(({ signal, up, down, num_alarms: alarms, alarm, pays }) => {
    const isRise = up >= down;
    const value = isRise ? up : down;
    return [
      element("span", { class: "wrapping", title: signal }, SIGNALS[signal] ?? signal, pays ? element("span", { class: "badge warn" }, "pays") : null),
      meter(value, cusum.threshold, alarm),
      value > 0 ? (isRise ? "rise" : "fall") : "\u2013",
      count(alarms),
    ];
  });
  const caption = `Cumulative sums after ${count(cusum.batches)} batches; a full bar, ${fixed(cusum.threshold, 1)}, is an alarm`;
  return part(title, table(caption, ["signal", "sum", "direction", "alarms"], rows));
}

function wordingPart(drift) {
  const title = element("h3", {}, "Changes of the wording");
  const evidence = drift.comparisons.map(({ against, evidence: value, alarm, num_alarms: alarms }) => [
    element("span", { class: "wrapping" }, `against the ${against === "start" ? "start of the stream" : against}`),
    meter(value, drift.threshold, alarm),
    count(alarms),
  ]);
  const rows = drift.comparisons.flatMap(({ against, changes }) =>
    changes.map(({ statistic, unit, reference, recent, z }) => [
      element("span", { class: "wrapping" }, statistic.replaceAll("_", " "), element("span", { class: "note" }, ` ${unit}`)),
      against,
      `${fixed(reference, 2)} \u2192 ${fixed(recent, 2)}`,
      fixed(z, 1),
    ]),
  );
  const caption = `Evidence after ${count(drift.batches)} batches; a full bar, ${fixed(drift.threshold, 1)}, is an alarm`;
  return part(
    title,
    evidence.length ? table(caption, ["compared", "evidence", "alarms"], evidence) : null,
    rows.length
      ? table("What differs most", ["statistic", "compared with", "then \u2192 now", "standard errors"], rows)
      : element("p", { class: "note" }, "The completions are worded as before."),
  );
}

/** A value as a bar that is full at the threshold, and as a number. */
function meter(value, threshold, isAlarm) {
  const words = `${fixed(value, 1)} of ${fixed(threshold, 1)}`;
  return [
    isAlarm ? element("span", { class: "badge alarm" }, "alarm") : null,
    " ",
    bar(value, threshold, words, isAlarm ? "alarm" : ""),
    element("span", { class: "figure" }, fixed(value, 1)),
  ];
}

function part(...content) {
  return element("section", { class: "part" }, content);
}
