// What the tabs have in common: a choice among the models of a kind, a form, and beside it the run of what it asks for.

import { el } from "./dom.js";
import { Choice } from "./fields.js";
import { Run, runOnKeys } from "./run.js";

/** A form and its run. */
export class Tab {
  /**
   * @param {object} info of the server.
   * @param {object} about
   * @param {string} about.kind of the models that it is for.
   * @param {string} about.path of the route.
   * @param {string} about.button what the button says.
   * @param {string} about.form what the form is called for those who do not see it.
   * @param {boolean} [about.streamed] false for a route without a stream.
   */
  constructor(info, { kind, path, button, form, streamed = true }) {
    this.info = info;
    this.models = info.models.filter((model) => model.kind === kind);
    this.model = new Choice("model", "Model", this.models.map(({ name }) => ({ value: name, text: name })));
    this.model.hidden = this.models.length < 2;
    this.run = new Run(path, this, button, { streamed });
    this.form = el("form", { class: "controls", novalidate: true, "aria-label": form });
    this.side = el("div", { class: "side" }, this.run.node);
    this.node = el("div", { class: "columns" }, this.form, this.side);
    runOnKeys(this.form, this.node, this.run);
  }

  get chosen() {
    return this.models.find(({ name }) => name === this.model.value);
  }

  /** Take notice that there will be no answer. */
  halted() {}
}

/** A tab that makes outputs, which are shown on their way. */
export class SamplingTab extends Tab {
  /**
   * @param {object} info of the server.
   * @param {object} about see `Tab`.
   * @param {string} about.results class of the place for the outputs.
   */
  constructor(info, about) {
    super(info, about);
    this.outputs = [];
    this.results = el("div", { class: about.results });
  }

  /** Make room for outputs; `make` makes one of its number. */
  show(count, make) {
    this.outputs = Array.from({ length: count }, (_, number) => make(number));
    this.results.replaceChildren(...this.outputs.map((output) => output.node));
  }

  /** Take a seed over into the form. */
  useSeed(seed) {
    this.seed.set(seed);
    this.n.set(1); // alone, the seed gives this output again
    this.seed.input.focus();
  }

  frame(frame) {
    this.outputs[frame.output].frame(frame);
  }

  /** Take the finished outputs of an answer. */
  finishAll(finished) {
    finished.forEach((output, number) => this.outputs[number].finish(output));
  }

  halted() {
    for (const output of this.outputs) output.halt();
  }
}

/** Return what controls say, as fields of a request; those that say nothing are left out. */
export function given(controls) {
  return Object.fromEntries(controls.filter(({ value }) => value !== undefined).map(({ param, value }) => [param, value]));
}
