// One request from the button to its end: progress, what it costs, stopping it, and what went wrong.

import { Problem, hasKey, stream, whole } from "./api.js";
import { announce, copyButton, el, seconds } from "./dom.js";
import { curlCommand } from "./json.js";

/** The bar above the results of a tab, and the request that it tells of. */
export class Run {
  /**
   * @param {string} path of the route.
   * @param {object} tab what runs it.
   * @param {() => object|null} tab.request the fields to send; null if something is wrong with them, and shown.
   * @param {() => object[]} tab.fields the controls, to show what the server refuses at the right one.
   * @param {(fields: object) => void} tab.begin makes room for results: the server has taken the request.
   * @param {(frame: object) => void} tab.frame takes a frame of the stream.
   * @param {(answer: object) => void} tab.finish takes the answer.
   * @param {() => void} tab.halted takes notice that there will be no answer.
   * @param {(error: Problem) => Problem} [tab.explain] says an error of a field that the form does not have.
   * @param {string} label of the button.
   * @param {{streamed?: boolean}} [more] a route without a stream has no frames, and its progress is not known.
   */
  constructor(path, tab, label, { streamed = true } = {}) {
    this.path = path;
    this.tab = tab;
    this.streamed = streamed;
    this.ended = null;
    this.abort = null;
    this.button = el("button", { type: "submit", class: "primary", text: label });
    this.stop = el("button", { type: "button", class: "quiet", text: "Stop", hidden: true });
    this.stop.addEventListener("click", () => this.halt());
    this.bar = el("progress", { max: 1, value: 0, "aria-label": "Progress" });
    this.facts = el("dl", { class: "facts" });
    this.line = el("p", { class: "line", text: "Ctrl + Enter begins, Escape stops." });
    this.box = el("div", { class: "fault", role: "alert", hidden: true });
    this.curl = copyButton("Copy as curl", () => {
      const fields = this.tab.request();
      return fields === null ? null : curlCommand(this.path, fields, hasKey());
    });
    this.buttons = el("div", { class: "buttons" }, this.button, this.curl);
    const foot = el("div", { class: "under" }, this.line, this.stop);
    this.node = el("section", { class: "run", "aria-label": "Progress" }, this.box, this.bar, this.facts, foot);
  }

  /** Stop the request that is under way, if there is one; returns a promise of its end. */
  halt() {
    this.abort?.abort();
    return this.ended;
  }

  /** Send what the form says, unless a request is under way. */
  async start(extra = {}) {
    if (this.abort !== null || this.button.disabled) return;
    this.box.hidden = true; // it was about an earlier request
    const fields = this.tab.request(extra);
    if (fields === null) return;
    this.abort = new AbortController();
    this.ended = this.#send(fields);
    await this.ended;
  }

  async #send(fields) {
    this.#begin(fields);
    const send = this.streamed ? stream : whole;
    try {
      for await (const { event, data } of send(this.path, fields, this.abort.signal)) {
        if (event === "taken") this.#room(fields);
        else if (event === "denoise") this.#advance(data);
        else if (event === null) this.#finish(data);
      }
    } catch (error) {
      this.#fail(error);
    } finally {
      this.abort = null;
      clearInterval(this.clock);
      this.stop.hidden = true;
      this.button.removeAttribute("aria-disabled");
      this.node.removeAttribute("aria-busy");
    }
  }

  #begin(fields) {
    clearInterval(this.countdown);
    this.box.hidden = true;
    for (const field of this.tab.fields()) field.problem = null;
    this.startedMs = performance.now();
    this.rows = new Map(); // the last frame of each output
    this.first = null;
    this.taken = false;
    this.spoken = 0;
    this.steps = fields.steps;
    if (this.streamed) this.bar.value = 0;
    else this.bar.removeAttribute("value");
    this.line.textContent = this.streamed ? "Waiting for its turn." : "Under way.";
    this.#show({});
    this.node.setAttribute("aria-busy", "true");
    this.button.setAttribute("aria-disabled", "true"); // not `disabled`, which would take the focus away
    this.stop.hidden = false;
    this.clock = setInterval(() => this.#tell(), 200);
    announce("Started. Escape stops it");
    // In one column the results are further down than most screens are high.
    if (this.node.getBoundingClientRect().top > 0.6 * innerHeight) this.node.scrollIntoView();
  }

  // Only now: what is refused leaves earlier results where they are.
  #room(fields) {
    this.taken = true;
    this.tab.begin(fields);
  }

  #advance(frame) {
    const now = performance.now();
    this.first ??= { ms: now, nfe: frame.nfe };
    this.last = { ms: now, ...frame };
    this.rows.set(frame.output, frame);
    this.bar.value = frame.progress;
    this.tab.frame(frame);
    const quarter = Math.floor(frame.progress * 4);
    if (quarter > this.spoken && quarter < 4) announce(`${25 * quarter} percent`);
    this.spoken = quarter;
    this.#tell();
  }

  #tell() {
    if (!this.streamed) this.line.textContent = `Under way for ${seconds((performance.now() - this.startedMs) / 1000)}.`;
    if (this.first === null) return;
    const { last, first } = this;
    const rows = [...this.rows.values()];
    const calls = rows.reduce((sum, row) => sum + row.nfe, 0);
    const all = rows.length === 1 ? ` of ${Math.round(last.nfe / last.progress)}` : "";
    const facts = { "Denoiser calls": `${calls}${all}` };
    if (this.steps !== "exact") {
      facts["Skipped steps"] = rows.reduce((sum, row) => sum + Math.max(0, row.step + 1 - row.nfe), 0);
    }
    if (last.nfe > first.nfe) {
      facts["Per step"] = `${((last.ms - first.ms) / (last.nfe - first.nfe)).toFixed(1)} ms`;
    }
    if (last.eta_s !== null) {
      const leftS = last.eta_s - (performance.now() - last.ms) / 1000;
      facts.Left = leftS > 0 ? seconds(leftS) : "more than foretold";
    }
    this.#show(facts);
    this.line.textContent = `${Math.floor(100 * last.progress)} %`;
  }

  #finish(answer) {
    clearInterval(this.clock); // the end of the stream may come later, and "Done." is the last word
    const { queue_s: queueS, total_s: totalS } = answer.timings;
    this.bar.value = 1;
    this.#show({
      "Denoiser calls": answer.usage.denoiser_calls,
      ...(this.streamed ? this.#stepFacts(answer) : {}),
      Waited: seconds(queueS),
      "All in all": seconds(totalS),
    });
    this.line.textContent = "Done.";
    announce(`Done after ${seconds(totalS)}`);
    this.tab.finish(answer);
  }

  #stepFacts(answer) {
    const outputs = answer.outputs ?? answer.images;
    const longest = Math.max(...outputs.map((output) => output.nfe));
    return {
      ...(this.steps === "exact"
        ? {}
        : { "Skipped steps": outputs.reduce((sum, output) => sum + output.steps_skipped, 0) }),
      ...(longest > 0 ? { "Per step": `${((1000 * answer.timings.run_s) / longest).toFixed(1)} ms` } : {}),
    };
  }

  #show(facts) {
    this.told = facts;
    this.facts.replaceChildren(
      ...Object.entries(facts).map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value }))),
    );
  }

  #fail(raised) {
    if (!this.streamed) this.bar.value = 0;
    if (this.taken) this.tab.halted();
    const { Left: _, ...kept } = this.told; // of a request that has ended, nothing is left
    this.#show(kept);
    const error = (raised instanceof Problem && this.tab.explain?.(raised)) || raised;
    if (error.name === "AbortError") {
      this.line.textContent = "Stopped.";
      announce("Stopped");
      return;
    }
    document.dispatchEvent(new Event("trouble")); // is it the server?
    if (!(error instanceof Problem)) throw error; // a fault of the page itself: the console shows where
    this.line.textContent = "";
    this.box.hidden = false;
    const message = inWordsOfTheForm(error.message, this.tab.fields());
    this.box.replaceChildren(el("p", { text: message }));
    const field = this.tab.fields().find((each) => each.param === error.param && !each.hidden);
    if (field) {
      field.problem = message;
      field.node.closest("details")?.setAttribute("open", "");
      field.input.focus();
    }
    if (error.retryAfterS !== null) this.#countDown(error.retryAfterS);
  }

  #countDown(waitS) {
    const text = el("p", { class: "countdown" });
    this.box.append(text);
    const endMs = performance.now() + 1000 * waitS;
    const tick = () => {
      const leftS = Math.ceil((endMs - performance.now()) / 1000);
      this.button.disabled = leftS > 0;
      text.textContent = leftS > 0 ? `You can try again in ${leftS} s.` : "You can try again now.";
      if (leftS <= 0) clearInterval(this.countdown);
    };
    this.countdown = setInterval(tick, 250);
    tick();
  }
}

/** Return a message of the server that names fields as requests do with the names that they have in the form. */
function inWordsOfTheForm(message, fields) {
  return fields.reduce((text, { param, node }) => {
    const label = node.querySelector("label").textContent;
    if (label.toLowerCase() === param) return text;
    // A name that is a word of English too is a name only where messages begin, or say what to change.
    const before = param.includes("_") ? "\\b" : "(?<=^|shorten |lower )";
    return text.replace(new RegExp(`${before}${param}\\b`, "gi"), `“${label}”`);
  }, message);
}

/** Show what is wrong with controls before anything is sent; returns whether all is well. */
export function checkFields(fields) {
  let first = null;
  for (const field of fields) {
    const fault = field.hidden ? null : field.check();
    field.problem = fault;
    if (fault !== null) first ??= field;
  }
  if (first === null) return true;
  first.node.closest("details")?.setAttribute("open", "");
  first.input.focus();
  announce("Something in the form is wrong");
  return false;
}

/** Make ctrl or command + enter anywhere in a form do what its button does, and escape in the whole tab stop it. */
export function runOnKeys(form, tab, run) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run.start();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    run.start();
  });
  tab.addEventListener("keydown", (event) => {
    if (event.key === "Escape") run.halt();
  });
}
