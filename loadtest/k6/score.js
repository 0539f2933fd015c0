// A second opinion on the figures of reward-loadtest, by k6, a generator that is not ours:
//
//     k6 run -e URL=http://127.0.0.1:8000 -e RATE=20 -e DURATION=15s loadtest/k6/score.js
//
// Requests start at equal distances whatever the server does. k6 counts a request's time from when it is sent, so the
// figures are those of the whole load only while no iteration is dropped; a threshold says so. Not for overload: k6
// counts the intended 503 answers as failed.
import http from "k6/http";
import { check } from "k6";
import exec from "k6/execution";

const url = __ENV.URL || "http://127.0.0.1:8000";
const itemsPerRequest = Number(__ENV.ITEMS || 1);
const itemBytes = Number(__ENV.BYTES || 320);
const limitMs = Number(__ENV.P99_MS || 1000);
const headers = { "Content-Type": "application/json" };
if (__ENV.REWARD_API_KEY) {
  headers.Authorization = `Bearer ${__ENV.REWARD_API_KEY}`;
}

export const options = {
  discardResponseBodies: false,
  summaryTrendStats: ["min", "med", "p(90)", "p(95)", "p(99)", "p(99.9)", "max"],
  scenarios: {
    open: {
      executor: "constant-arrival-rate",
      rate: Number(__ENV.RATE || 10),
      timeUnit: "1s",
      duration: __ENV.DURATION || "15s",
      preAllocatedVUs: Number(__ENV.VUS || 200),
    },
  },
  thresholds: {
    http_req_failed: ["rate==0"],
    http_req_duration: [`p(99)<${limitMs}`],
    checks: ["rate==1"],
    dropped_iterations: ["count==0"],
  },
};

function items() {
  const number = exec.scenario.iterationInTest;
  return Array.from({ length: itemsPerRequest }, (_, index) => ({
    prompt: `question ${number} `,
    completion: `answer ${index} `.padEnd(itemBytes - 20, "x"),
    id: `${number}-${index}`,
  }));
}

export default function () {
  const sent = items();
  const answer = http.post(`${url}/v1/score`, JSON.stringify({ items: sent }), { headers });
  check(answer, {
    "status 200": (one) => one.status === 200,
    "a finite reward for each item, in order": (one) =>
      one.status === 200 &&
      one.json("results").length === sent.length &&
      one.json("results").every((result, index) => result.id === sent[index].id && Number.isFinite(result.reward)),
  });
}
