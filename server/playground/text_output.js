// One text on its way from masked to known: a span for every token, which gets sharper with every digit.

import { copyButton, el } from "./dom.js";

const MASKED = "·";

/** Return what is known of a token's digits as text: one sign a digit. */
function digitsText(digits, base) {
  return digits.map((digit) => (digit === null ? MASKED : base <= 36 ? digit.toString(36) : "▪")).join("");
}

/** A card with one output. */
export class TextOutput {
  /**
   * @param {number} number of the output, from 0. @param {number} count of outputs.
   * @param {(string|null)[]} parts the layout: fixed text, and null for every gap.
   * @param {{base: number, target_length: number}} codec of the model.
   * @param {object} actions
   * @param {(seed: string) => void} actions.useSeed takes a seed over into the form.
   * @param {(text: string) => void} actions.score has the finished text scored.
   */
  constructor(number, count, parts, codec, { useSeed, score }) {
    this.parts = parts;
    this.codec = codec;
    this.useSeed = useSeed;
    this.tokens = new Map(); // position in the row: span
    this.gaps = [];
    this.whole = null;
    this.text = el("p", { class: "written" });
    this.meta = el("p", { class: "meta" });
    const name = count === 1 ? "Output" : `Output ${number + 1}`;
    this.score = el("button", {
      type: "button", class: "quiet", text: "Score", hidden: true, "aria-label": `Score ${name.toLowerCase()}`,
      title: "How likely this text is under the model", onclick: () => score(this.whole),
    });
    const copy = copyButton("Copy text", () => this.whole ?? this.text.textContent);
    this.node = el(
      "article",
      { class: "output", "aria-label": name },
      count === 1 ? null : el("h3", { text: name }),
      this.text,
      el("div", { class: "under" }, this.meta, el("div", { class: "buttons" }, this.score, copy)),
    );
    this.#layOut(parts.filter((part) => part === null).map(() => [0, 0]));
  }

  /** Take a frame of the stream. */
  frame(frame) {
    if (frame.gaps) this.#layOut(frame.gaps);
    frame.positions.forEach((position, index) => {
      const span = this.tokens.get(position);
      if (span) this.#show(span, frame.digits[index], frame.pieces[index], frame.revealed[index]);
    });
    this.meta.textContent = `step ${frame.step + 1}, ${frame.nfe} calls`;
  }

  /** Take the finished output: its text is what counts, should decoding token by token have differed. */
  finish(output) {
    this.whole = output.text ?? output.token_ids.join(" ");
    this.gaps.forEach((gap, index) => {
      const text = output.text === null ? "" : output.gaps[index];
      if (gap.textContent !== text) gap.replaceChildren(el("span", { class: "token known", text }));
    });
    if (output.text === null) this.text.replaceChildren(el("span", { class: "token known", text: this.whole }));
    const end = output.finish_reason === "stop" ? "ended by itself" : "filled its length";
    const seed = el("button", {
      type: "button",
      class: "link",
      title: "With one output and the same settings this seed gives this text again",
      text: output.seed,
    });
    seed.addEventListener("click", () => this.useSeed(output.seed));
    const cost = `${output.nfe} calls, ${output.steps_skipped} steps skipped, ${end}, seed `;
    this.meta.replaceChildren(cost, seed);
    this.score.hidden = false;
    this.node.classList.add("done");
  }

  /** Take notice that it will not be finished. */
  halt() {
    this.node.classList.add("halted");
  }

  #layOut(places) {
    this.tokens.clear();
    this.gaps = [];
    const masked = new Array(this.codec.target_length).fill(null);
    const nodes = this.parts.map((part) => {
      if (part !== null) return el("span", { class: "fixed", text: part });
      const [start, stop] = places[this.gaps.length];
      const gap = el("span", { class: "gap" });
      for (let position = start; position < stop; position += 1) {
        const span = el("span", { class: "token" });
        this.#show(span, masked, null, 0);
        this.tokens.set(position, span);
        gap.append(span);
      }
      this.gaps.push(gap);
      return gap;
    });
    this.text.replaceChildren(...nodes);
  }

  #show(span, digits, piece, share) {
    const known = share === 1;
    span.className = `token ${known ? "known" : share > 0 ? "partly" : "masked"}`;
    span.style.setProperty("--revealed", String(share));
    span.textContent = known ? (piece ?? "▪") : digitsText(digits, this.codec.base);
  }
}
