// Talking to the server: keys, errors as people want to read them, and streams.

import { parseAnswer, requestText } from "./json.js";

const KEPT = "prime-key";

/** What went wrong, in words for people. */
export class Problem extends Error {
  /**
   * @param {string} message one or two sentences.
   * @param {{code?: string, param?: string|null, status?: number, retryAfterS?: number|null}} more
   */
  constructor(message, { code = "", param = null, status = 0, retryAfterS = null } = {}) {
    super(message);
    this.code = code;
    this.param = param;
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

const lost = () =>
  new Problem("The connection to the server was lost. Check that it is running, then try again.", {
    code: "connection_lost",
  });

// Where a message of the server is too terse for somebody at a page.
const WORDS = {
  queue_full: () => "The server is busy: its queue is full.",
  draining: () => "The server is shutting down and takes no new requests. Requests that it has taken will finish.",
  model_failed: () => "This model failed and is out of service. Choose another one, or restart the server.",
};

function problemOf(error, status = 0, retryAfterS = null) {
  const words = WORDS[error.code]?.() ?? `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
  return new Problem(words, { code: error.code, param: error.param, status, retryAfterS });
}

async function refused(response) {
  const header = response.headers.get("retry-after");
  const retryAfterS = header !== null && /^[0-9]+$/.test(header) ? Number(header) : null;
  try {
    return problemOf((await response.json()).error, response.status, retryAfterS);
  } catch {
    // a proxy in between has its own pages
    return new Problem(`The server answered with status ${response.status}.`, {
      status: response.status,
      retryAfterS,
    });
  }
}

/** Return whether a key is kept in this tab. */
export const hasKey = () => sessionStorage.getItem(KEPT) !== null;

let asking = null; // the question that is open; several requests may wait for one answer

function askForKey(refusedKey) {
  if (sessionStorage.getItem(KEPT) !== refusedKey) return Promise.resolve(true); // answered meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key");
    const form = document.getElementById("key-form");
    document.getElementById("key-problem").hidden = refusedKey === null;
    input.value = "";
    let given = false;
    form.onsubmit = () => {
      sessionStorage.setItem(KEPT, input.value.trim());
      given = true;
    };
    document.getElementById("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      input.value = "";
      asking = null;
      resolve(given);
    };
    dialog.showModal();
  });
  return asking;
}

async function call(path, init = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEPT);
    const headers = { ...init.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...init, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (key !== null && /[^\x21-\x7e]/.test(key)) {
        sessionStorage.removeItem(KEPT); // no header can hold it
        continue;
      }
      throw lost();
    }
    if (response.status !== 401 || !(await askForKey(key))) return response;
  }
}

/** Return the JSON of a route. */
export async function getJson(path) {
  const response = await call(path);
  if (!response.ok) throw await refused(response);
  return parseAnswer(await response.text());
}

/** Return what /ready says, or "lost" without an answer. Never asks for a key. */
export async function readiness() {
  try {
    const response = await fetch("ready", { cache: "no-store" });
    return (await response.json()).status ?? "ready";
  } catch {
    return "lost";
  }
}

function post(path, fields, signal) {
  return call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: requestText(fields),
    signal,
  });
}

/**
 * Send a request and yield the frames of its stream as {event, data}: first "taken", without data, once the server has
 * taken it; event is null for the answer.
 *
 * @throws {Problem} if it is refused, fails, or the connection breaks; an AbortError if it is stopped.
 */
export async function* stream(path, fields, signal) {
  const response = await post(path, { ...fields, stream: true }, signal);
  if (!response.ok) throw await refused(response);
  yield { event: "taken", data: null };
  for await (const frame of framesOf(response.body)) {
    if (frame.data === "[DONE]") return;
    const data = parseAnswer(frame.data);
    if (frame.event === "error") throw problemOf(data.error);
    yield { event: frame.event, data };
  }
  throw lost(); // it ended before its end
}

/** Send a request to a route without a stream, and yield what `stream` would: "taken", then the answer, both at the end. */
export async function* whole(path, fields, signal) {
  const response = await post(path, fields, signal);
  if (!response.ok) throw await refused(response);
  let text;
  try {
    text = await response.text();
  } catch (error) {
    throw error.name === "AbortError" ? error : lost();
  }
  yield { event: "taken", data: null };
  yield { event: null, data: parseAnswer(text) };
}

async function* framesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield frameOf(part);
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : lost();
  } finally {
    reader.cancel().catch(() => {});
  }
}

function frameOf(text) {
  const frame = { event: null, data: "" };
  for (const line of text.split("\n")) {
    if (line.startsWith("event: ")) frame.event = line.slice(7);
    else if (line.startsWith("data: ")) frame.data += line.slice(6);
  }
  return frame;
}
