// The tab that makes text: a form, and the outputs beside it.

import { el, freshId } from "./dom.js";
import { Lines, Seed, Slider } from "./fields.js";
import { checkFields } from "./run.js";
import { SamplingTab, given } from "./tab.js";
import { makeGap, templateParts, templateProblem } from "./template.js";
import { TextOutput } from "./text_output.js";

const KIND = "text";

/** What the page knows of this tab; it is shown if a model of its kind is loaded. */
export const textTab = { id: "text", title: "Text", kind: KIND, build: (info, hand) => new TextTab(info, hand) };

class TextTab extends SamplingTab {
  constructor(info, hand) {
    super(info, { kind: KIND, path: "generate", button: "Write", form: "Text to make", results: "results" });
    this.hand = hand;
    this.side.append(this.results);
    this.#build();
    this.model.node.addEventListener("input", () => this.#build());
  }

  #build() {
    const { context, vocab_size: vocabSize } = this.chosen.limits;
    const { max_n: maxN, max_steps: maxSteps, max_temperature: hottest } = this.info.limits;
    const words = this.chosen.tokenizer === "none" ? "" : "And it came to pass,"; // without one no text fits
    this.prompt = new Lines("prompt", "Begins with", { rows: 3, value: words });
    this.suffix = new Lines("suffix", "Ends with", { rows: 2, placeholder: "nothing in particular" });
    this.template = new Lines("template", "Text with gaps", {
      rows: 5,
      value: "And the LORD said unto[[3]], Go[[16]].",
      hint: "[[12]] is a gap of 12 tokens; no space before it, a word brings its own. Or select some text and make it a gap.",
    });
    this.gapButton = el("button", {
      type: "button", class: "quiet", text: "Make a gap", onclick: () => makeGap(this.template.input),
    });
    this.template.check = () =>
      templateProblem(this.template.value, { context, maxParts: this.info.limits.max_template_parts });
    this.maxTokens = new Slider("max_tokens", "Tokens to write", {
      min: 1, max: context, value: Math.min(48, Math.ceil(context / 2)), toggle: { label: "fill the context", value: null },
    });
    this.steps = new Slider("steps", "Steps", {
      min: 1, max: maxSteps, value: Math.min(64, maxSteps), log: true, toggle: { label: "exact", value: "exact" },
    }, "Few are fast, many are faithful; exact uncovers one digit at a time.");
    this.temperature = new Slider("temperature", "Temperature", { min: 0, max: hottest, usual: 2, step: 0.05, value: 0.7 });
    this.topP = new Slider("top_p", "Top p", { min: 0.01, max: 1, step: 0.01, value: 1 });
    this.topK = new Slider("top_k", "Top k (0 is off)", { min: 0, max: vocabSize, log: true, value: 0 });
    this.n = new Slider("n", "Outputs", { min: 1, max: maxN, log: true, value: 1 });
    this.seed = new Seed();
    this.stop = new Lines("stop", "Stop at", { rows: 2, placeholder: "one string a line", hint: "Only where nothing follows the gap." });
    this.mode = this.#modes();
    this.form.replaceChildren(
      this.model.node, this.mode.node, this.prompt.node, this.suffix.node, this.template.node, this.gapButton,
      this.maxTokens.node, this.steps.node, this.temperature.node, this.n.node,
      el("details", {}, el("summary", { text: "More settings" }), this.topP.node, this.topK.node, this.stop.node),
      this.seed.node, this.run.buttons,
    );
    this.#arrange();
  }

  #modes() {
    const name = freshId("mode");
    const choice = (value, text, checked) => {
      const input = el("input", { type: "radio", name, value, checked, id: freshId("mode") });
      return [input, el("label", { for: input.id, text })];
    };
    const node = el("fieldset", { class: "segments" }, el("legend", { class: "unseen", text: "What is given" }),
      choice("ends", "Continue", true), choice("gaps", "Fill gaps", false));
    node.addEventListener("input", () => this.#arrange());
    return { node, get gaps() { return node.querySelector("input:checked").value === "gaps"; } };
  }

  #arrange() {
    const { gaps } = this.mode;
    for (const field of [this.prompt, this.suffix, this.maxTokens, this.stop]) field.hidden = gaps;
    this.template.hidden = !gaps;
    this.gapButton.hidden = !gaps;
  }

  /** All controls. */
  fields() {
    return [
      this.model, this.prompt, this.suffix, this.template, this.maxTokens, this.steps, this.temperature, this.n,
      this.topP, this.topK, this.stop, this.seed,
    ];
  }

  /** Return the fields of the request that the form stands for; null if something is wrong, and shown. */
  request() {
    if (!checkFields(this.fields())) return null;
    const fields = { model: this.model.value };
    if (this.mode.gaps) fields.template = templateParts(this.template.value);
    else {
      if (this.prompt.value !== "") fields.prompt = this.prompt.value;
      if (this.suffix.value !== "") fields.suffix = this.suffix.value;
      fields.max_tokens = this.maxTokens.value;
      const stop = this.stop.value.split("\n").filter((line) => line !== "");
      if (stop.length > 0) fields.stop = stop;
    }
    return { ...fields, ...given([this.n, this.steps, this.temperature, this.topP, this.topK, this.seed]) };
  }

  begin(fields) {
    const parts = fields.template
      ? fields.template.map((part) => (typeof part === "string" ? part : null))
      : [fields.prompt ?? "", null, fields.suffix ?? ""];
    const { codec } = this.chosen;
    const actions = {
      useSeed: (seed) => this.useSeed(seed),
      score: (text) => this.hand("score", { text, model: fields.model }),
    };
    this.show(fields.n, (number) => new TextOutput(number, fields.n, parts, codec, actions));
  }

  finish(answer) {
    this.finishAll(answer.outputs);
  }
}
