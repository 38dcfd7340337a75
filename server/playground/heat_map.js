// A text as a map of what its tokens cost: the ground of a token and the bar under it say how many nats of the bound.

import { el } from "./dom.js";
import { spoken, visible } from "./visible.js";

const STEPS = 4; // of the legend

/** One text, token by token; the arrow keys go through it. */
export class HeatMap {
  /**
   * @param {object} costs `per_token` of a score.
   * @param {number} vocabSize a token that is guessed blindly costs its logarithm: the end of the scale, for all texts.
   */
  constructor(costs, vocabSize) {
    this.costs = costs;
    this.top = Math.log(vocabSize);
    this.vocabSize = vocabSize;
    this.tokens = costs.token_ids.map((_, index) => this.#token(index));
    this.tokens[0].tabIndex = 0;
    this.map = el("p", { class: "written heat", role: "group", "aria-label": "What each token costs; arrow keys go through" },
      this.#words());
    this.reading = el("p", { class: "reading", "aria-hidden": "true" }); // a token's own label says the same
    this.node = el("div", {}, this.map, this.reading, this.#legend());
    this.#follow();
    this.#read(-1);
  }

  #token(index) {
    const { token_ids: ids, pieces, nelbo } = this.costs;
    const piece = pieces === null ? String(ids[index]) : pieces[index];
    const cost = `${nelbo[index].toFixed(2)} nats`;
    const token = el("span", {
      class: pieces === null ? "cost number" : "cost", role: "img", tabindex: -1,
      "aria-label": `${spoken(piece) || "part of a character"}: ${cost}`, title: cost,
    }, piece === "" ? el("span", { class: "sign", "data-sign": "▪" }) : visible(piece));
    token.style.setProperty("--share", String(Math.min(1, nelbo[index] / this.top)));
    return token;
  }

  // Lines end between words, and where the text has an end of line.
  #words() {
    const nodes = [];
    let word = null;
    for (const token of this.tokens) {
      const text = token.textContent;
      if (word === null || this.costs.pieces === null || /^\s/.test(text)) {
        word = el("span", { class: "word" });
        nodes.push(word);
      }
      word.append(token);
      const ends = Array.from(text.matchAll("\n"), () => el("br"));
      if (ends.length === 0) continue;
      nodes.push(...ends);
      word = null;
    }
    return nodes;
  }

  // What the mouse is on, else what has the focus.
  #follow() {
    const indexOf = (node) => this.tokens.indexOf(node?.closest?.(".cost"));
    this.map.addEventListener("mouseover", (event) => this.#read(indexOf(event.target)));
    this.map.addEventListener("mouseleave", () => this.#read(indexOf(document.activeElement)));
    this.map.addEventListener("focusin", (event) => {
      const here = indexOf(event.target);
      for (const token of this.tokens) token.tabIndex = -1;
      this.tokens[here].tabIndex = 0;
      this.#read(here);
    });
    this.map.addEventListener("focusout", () => this.#read(-1));
    this.map.addEventListener("keydown", (event) => {
      const here = indexOf(event.target);
      const last = this.tokens.length - 1;
      const there = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: last }[event.key];
      if (there === undefined) return;
      event.preventDefault();
      this.tokens[Math.max(0, Math.min(last, there))].focus();
    });
  }

  #read(index) {
    if (index < 0) {
      this.reading.textContent = "Point at a token, or go through them with the arrow keys.";
      return;
    }
    const { nelbo, coded_loss: coded } = this.costs;
    const piece = this.tokens[index].cloneNode(true);
    this.reading.replaceChildren(
      el("span", { class: "piece" }, ...piece.childNodes),
      ` token ${index + 1} of ${this.tokens.length}: ${nelbo[index].toFixed(2)} nats, coded loss ${coded[index].toFixed(2)}`,
    );
  }

  #legend() {
    const swatches = Array.from({ length: STEPS + 1 }, (_, step) => {
      const nats = ((this.top * step) / STEPS).toFixed(1);
      const swatch = el("span", { class: "cost", text: step === STEPS ? `${nats} or more` : nats });
      swatch.style.setProperty("--share", String(step / STEPS));
      return swatch;
    });
    const guess = `A blind guess among ${this.vocabSize.toLocaleString("en")} tokens costs ${this.top.toFixed(1)}.`;
    return el("div", { class: "legend" }, el("span", { text: "Nats" }), swatches, el("span", { text: guess }));
  }
}
