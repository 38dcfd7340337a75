// The tab that scores text: one or two texts in a form, and beside it what a model makes of them.

import { Problem } from "./api.js";
import { el } from "./dom.js";
import { Lines, Seed, Slider } from "./fields.js";
import { checkFields } from "./run.js";
import { ScoreOutput, explanation } from "./score_output.js";
import { Tab, given } from "./tab.js";

const KIND = "text";
const EXAMPLE = "And the LORD said unto Moses, Go.";

/** What the page knows of this tab; it is shown if a model of its kind is loaded. */
export const scoreTab = { id: "score", title: "Score", kind: KIND, build: (info) => new ScoreTab(info) };

class ScoreTab extends Tab {
  constructor(info) {
    super(info, { kind: KIND, path: "score", button: "Score", form: "Text to score", streamed: false });
    const { max_n: maxN, max_samples: most } = info.limits;
    this.results = el("div", { class: "results" });
    this.text = new Lines("text", "Text to score", { rows: 5, value: this.wordless ? "" : EXAMPLE });
    this.text.check = () => (this.text.value === "" ? "Write something to score." : this.#fault(this.text.value));
    this.other = new Lines("inputs", "Compare with", { rows: 3, placeholder: "no other text" });
    this.other.check = () => this.#fault(this.other.value);
    this.other.hidden = maxN < 2;
    this.numSamples = new Slider("num_samples", "Masked states", { min: 1, max: most, value: Math.min(64, most), log: true },
      "The score is a mean over so many, one denoiser call each; four times as many halve its error.");
    this.seed = new Seed();
    this.form.append(
      this.model.node, this.text.node, this.other.node, this.numSamples.node, this.seed.node, this.run.buttons);
    this.side.append(this.results);
    this.model.node.addEventListener("input", () => this.#arrange());
    this.#arrange();
  }

  /** Whether the model has no tokenizer, and so takes token ids in place of text. */
  get wordless() {
    return this.chosen.tokenizer === "none";
  }

  /** Take a text over from another tab, and score it. */
  async take({ text, model }) {
    await this.run.halt();
    this.model.input.value = model;
    this.#arrange();
    this.text.input.value = text;
    this.other.input.value = "";
    this.run.button.focus();
    this.run.start();
  }

  #arrange() {
    this.text.hint.hidden = !this.wordless;
    this.text.hint.textContent = "This model has no tokenizer: give token ids, with spaces between.";
  }

  #fault(text) {
    return this.wordless && !/^[0-9\s]*$/.test(text) ? "Must be token ids, with spaces between." : null;
  }

  #content(text) {
    return this.wordless ? text.split(/\s+/).filter((id) => id !== "").map(Number) : text;
  }

  /** All controls. */
  fields() {
    return [this.model, this.text, this.other, this.numSamples, this.seed];
  }

  /** Return the fields of the request that the form stands for; null if something is wrong, and shown. */
  request() {
    if (!checkFields(this.fields())) return null;
    const fields = { model: this.model.value };
    const content = this.#content(this.text.value);
    if (this.other.value !== "" && !this.other.hidden) fields.inputs = [content, this.#content(this.other.value)];
    else fields[this.wordless ? "token_ids" : "text"] = content;
    return { ...fields, ...given([this.numSamples, this.seed]), per_token: true };
  }

  /** Two texts are sent as `inputs`: say what is wrong with them of the one that it is about. */
  explain(error) {
    if (error.param === "token_ids") return new Problem(error.message, { ...error, param: "text" });
    const found = /^inputs(?:\[([01])\])?$/.exec(error.param);
    if (found === null) return error;
    const second = found[1] === undefined ? this.other.value.length > this.text.value.length : found[1] === "1";
    const name = second ? "The second text" : "The first text";
    const message = error.message.replace(/^Inputs( \(number [12]\))?/, name);
    return new Problem(message, { ...error, param: second ? "inputs" : "text" });
  }

  begin({ model }) {
    this.vocabSize = this.models.find(({ name }) => name === model).limits.vocab_size;
  }

  finish(answer) {
    const names = answer.scores.length > 1 ? ["First text", "Second text"] : [null];
    const useSeed = (seed) => {
      this.seed.set(seed);
      this.seed.input.focus();
    };
    const outputs = answer.scores.map(
      (score, number) => new ScoreOutput(names[number], score, this.vocabSize, number === 0 ? useSeed : null),
    );
    const words = el("p", { class: "hint", text: explanation(answer.scores[0]) });
    this.results.replaceChildren(el("div", { class: "scores" }, outputs.map((output) => output.node)), words);
  }
}
