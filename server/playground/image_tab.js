// The tab that makes pictures: a form, a grid of results, and the editor.

import { el } from "./dom.js";
import { Editor } from "./editor.js";
import { Choice, Seed, Slider } from "./fields.js";
import { ImageOutput } from "./image_output.js";
import { checkFields } from "./run.js";
import { SamplingTab, given } from "./tab.js";

const KIND = "images";

/** What the page knows of this tab; it is shown if a model of its kind is loaded. */
export const imageTab = { id: "images", title: "Images", kind: KIND, build: (info) => new ImageTab(info) };

class ImageTab extends SamplingTab {
  constructor(info) {
    super(info, { kind: KIND, path: "images", button: "Draw", form: "Pictures to make", results: "grid" });
    this.#build();
    this.model.node.addEventListener("input", () => this.#build());
  }

  #build() {
    const { max_n: maxN, max_steps: maxSteps, max_temperature: hottest } = this.info.limits;
    this.label = this.#labels();
    this.n = new Slider("n", "Pictures", { min: 1, max: maxN, log: true, value: Math.min(8, maxN) });
    this.steps = new Slider("steps", "Steps", {
      min: 1, max: maxSteps, value: Math.min(32, maxSteps), log: true, toggle: { label: "exact", value: "exact" },
    }, "Few are fast and grainy, many are faithful; exact uncovers one digit at a time.");
    this.temperature = new Slider("temperature", "Temperature", { min: 0, max: hottest, usual: 2, step: 0.05, value: 0.9 });
    this.topP = new Slider("top_p", "Top p", { min: 0.01, max: 1, step: 0.01, value: 1 });
    this.preset = this.#presets();
    this.#correctors();
    this.seed = new Seed();
    this.every = new Slider("preview_every", "Show every … calls (0: only the end)", {
      min: 0, max: maxSteps, usual: Math.min(64, maxSteps), value: Math.min(2, maxSteps),
    });
    this.editor = new Editor(this.chosen, () => this.run.start({ known: true }));
    this.form.replaceChildren(
      this.model.node, this.label.node, this.n.node, this.steps.node, this.temperature.node,
      el("details", {}, el("summary", { text: "More settings" }), this.topP.node, this.preset.node,
        this.corrector.node, this.scale.node, this.power.node, this.lastPower.node, this.every.node),
      this.seed.node, this.run.buttons,
    );
    this.results.replaceChildren();
    this.side.replaceChildren(this.run.node, this.results, this.editor.node);
    this.#arrange();
  }

  #labels() {
    const { num_labels: numLabels, label_names: names } = this.chosen;
    const options = Array.from({ length: numLabels }, (_, number) => ({ value: String(number), text: names[number] ?? `${number}` }));
    const field = new Choice("label", "Label", [{ value: "", text: "drawn for every picture" }, ...options]);
    field.hidden = numLabels === 0;
    return field;
  }

  #presets() {
    const names = Object.keys(this.chosen.presets);
    const field = new Choice("preset", "Preset", [{ value: "", text: "none" }, ...names.map((name) => ({ value: name, text: name }))]);
    field.node.addEventListener("input", () => this.#takePreset());
    return field;
  }

  // What a preset sets is left out of the request, so that the preset decides, until somebody touches the control.
  #takePreset() {
    const preset = this.chosen.presets[this.preset.value];
    const own = [this.steps, this.temperature];
    if (preset) {
      this.steps.inherit(Math.min(preset.steps, this.info.limits.max_steps));
      this.temperature.inherit(null);
      this.corrector.input.value = "preset";
    } else {
      for (const field of own) field.own();
      this.corrector.input.value = "none";
    }
    const fid = preset?.published_fid;
    this.preset.hint.hidden = !preset;
    this.preset.hint.textContent = preset ? `${preset.note}${fid ? ` Published FID: ${fid}.` : ""}` : "";
    this.#arrange();
  }

  #correctors() {
    const { max_corrector_scale: most, max_corrector_power: steepest } = this.info.limits;
    this.corrector = new Choice("corrector", "Corrector", [
      { value: "none", text: "none" },
      { value: "corrected", text: "corrected: keeps to the schedule" },
      { value: "published", text: "published" },
      { value: "preset", text: "from the preset" },
    ], "Masks digits again on the way, so that they get a second chance.");
    const power = { min: 0, max: steepest, usual: 5, step: 0.05 };
    this.scale = new Slider("corrector.scale", "Corrector strength", { min: 0, max: most, usual: 20, step: 0.5, value: 4 });
    this.power = new Slider("corrector.power", "Power of 1 - t", { ...power, value: 2 });
    this.lastPower = new Slider("corrector.final_power", "Power of t", { ...power, value: 1 });
    this.corrector.node.addEventListener("input", () => this.#arrange());
  }

  #arrange() {
    const kind = this.corrector.value;
    const on = kind === "corrected" || kind === "published";
    this.scale.hidden = !on;
    this.power.hidden = !on;
    this.lastPower.hidden = kind !== "corrected";
    this.corrector.input.querySelector("[value=preset]").hidden = this.preset.value === "";
  }

  /** All controls. */
  fields() {
    return [
      this.model, this.label, this.n, this.steps, this.temperature, this.topP, this.preset, this.corrector, this.scale,
      this.power, this.lastPower, this.every, this.seed, this.editor.keep,
    ];
  }

  /** Return the fields of the request that the form stands for; null if something is wrong, and shown. */
  request({ known = false } = {}) {
    if (!checkFields(this.fields())) return null;
    const fields = { model: this.model.value };
    if (this.label.value !== "") fields.label = Number(this.label.value);
    if (this.preset.value !== "") fields.preset = this.preset.value;
    Object.assign(fields, given([this.n, this.steps, this.temperature, this.topP, this.seed, this.every]));
    const kind = this.corrector.value;
    if (kind === "none") fields.corrector = null;
    else if (kind !== "preset") {
      fields.corrector = { kind, scale: this.scale.value, power: this.power.value };
      if (kind === "corrected") fields.corrector.final_power = this.lastPower.value;
    }
    if (known) {
      fields.known = this.editor.known();
      if (this.label.value === "" && this.editor.label !== null) fields.label = this.editor.label;
    }
    return fields;
  }

  begin(fields) {
    const edit = (address, label) => this.editor.open(address, label);
    const useSeed = (seed) => this.useSeed(seed);
    this.show(fields.n, (number) => new ImageOutput(number, this.chosen.picture_shape, edit, useSeed));
  }

  finish(answer) {
    this.finishAll(answer.images);
  }
}
