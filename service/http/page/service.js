// Asks the service that has served this page. The API key is in this variable alone: it is stored nowhere.

/** The run that what is scored here belongs to. */
export const RUN = "playground";
const MAX_WAITS = 5;

let key = "";

/** Use this API key from now on; an empty one is no key. */
export function useKey(value) {
  key = value.trim();
}

export function hasKey() {
  return key !== "";
}

/** What the service has refused, or that it does not answer (status 0). */
export class Problem extends Error {
  constructor(status, code, detail, retryAfterS = null) {
    super(detail);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

/** The JSON that a route answers. */
export async function readJson(path, headers = {}) {
  return (await ask(path, { headers })).json();
}

/** The text that a route answers. */
export async function readText(path) {
  return (await ask(path, {})).text();
}

/** The answer to a JSON body. Scored items are monitored as a run of their own. */
export async function send(path, body) {
  const headers = { "Content-Type": "application/json", "X-Run-Id": RUN };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

/** As `send`; where the service is full, or the quota is used up, once more after the time that it names. */
export async function sendPatiently(path, body, wait = pause) {
  for (let waits = 0; ; waits += 1) {
    try {
      return await send(path, body);
    } catch (problem) {
      if (problem.retryAfterS === null || waits === MAX_WAITS) throw problem;
      await wait(problem.retryAfterS);
    }
  }
}

/** The address of a route, for other programs. */
export function addressOf(path) {
  return new URL(path, document.baseURI).href;
}

async function ask(path, options) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let request;
  try {
    // Without credentials no browser shows a dialog of its own where a key is missing.
    request = new Request(addressOf(path), { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch {
    throw new Problem(0, "invalid_header", "A key or a name of a run has characters that a header cannot have.");
  }
  let answer;
  try {
    answer = await fetch(request);
  } catch {
    throw new Problem(0, "unreachable", "The service does not answer.");
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

async function problemOf(answer) {
  const retryAfter = Number.parseFloat(answer.headers.get("Retry-After") ?? "");
  const known = await answer.json().catch(() => ({}));
  const detail = known.detail ?? `The service answered with status ${answer.status}.`;
  return new Problem(answer.status, known.code ?? "unknown", detail, Number.isFinite(retryAfter) ? retryAfter : null);
}

function pause(seconds) {
  return new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
}
