// The controls of a form. Each has a `param` (the field of the request), a `node`, a `value` to send (undefined: leave
// it out), `check()` for what is wrong with it (null: nothing), and `problem` to show what is.

import { el, freshId } from "./dom.js";
import { isSeed } from "./json.js";

/** What all controls share: a label, a hint, and a place for what is wrong. */
class Field {
  constructor(param, hint) {
    this.param = param;
    this.id = freshId(param);
    this.hint = el("p", { class: "hint", id: `${this.id}-hint`, text: hint ?? "", hidden: !hint });
    this.fault = el("p", { class: "problem", id: `${this.id}-problem`, hidden: true });
    this.node = el("div", { class: "field", "data-param": param });
  }

  /** Finish the field around its main control, which gets the focus. */
  build(input, ...rows) {
    this.input = input;
    input.id = this.id;
    input.setAttribute("aria-describedby", `${this.hint.id} ${this.fault.id}`);
    this.node.append(...rows, this.hint, this.fault);
    this.node.addEventListener("input", () => {
      this.problem = null;
    });
  }

  set problem(text) {
    this.fault.textContent = text ?? "";
    this.fault.hidden = text === null;
    this.node.classList.toggle("wrong", text !== null);
    if (text === null) this.input.removeAttribute("aria-invalid");
    else this.input.setAttribute("aria-invalid", "true");
  }

  set hidden(value) {
    this.node.hidden = value;
  }

  get hidden() {
    return this.node.hidden;
  }

  check() {
    return null;
  }
}

/** A number with a slider for its usual range, and a box that takes all of what the server takes. */
export class Slider extends Field {
  /**
   * @param {string} param
   * @param {string} label
   * @param {object} range
   * @param {number} range.min smallest number. @param {number} range.max largest.
   * @param {number} range.value at first. @param {number} [range.step] of the box; 1 unless told.
   * @param {number} [range.usual] end of the slider, where it is not max.
   * @param {boolean} [range.log] the slider moves by factors.
   * @param {{label: string, value: any}} [range.toggle] a box to tick for a value that is no number.
   * @param {string} [hint]
   */
  constructor(param, label, range, hint) {
    super(param, hint);
    this.range = { step: 1, usual: range.max, log: false, ...range };
    const { min, max, step, toggle } = this.range;
    const number = el("input", { type: "number", min, max, step, inputmode: step < 1 ? "decimal" : "numeric" });
    this.slider = el("input", { type: "range", min: 0, max: this.#ticks(), step: 1, "aria-label": `${label}, slider` });
    this.tick = toggle ? el("input", { type: "checkbox", id: `${this.id}-toggle` }) : null;
    this.inherited = false;
    this.badge = el("span", { class: "badge", text: "from the preset", hidden: true });
    this.build(
      number,
      el(
        "div",
        { class: "head" },
        el("label", { for: this.id, text: label }),
        this.badge,
        toggle
          ? el("span", { class: "tick" }, this.tick, el("label", { for: this.tick.id, text: toggle.label }))
          : null,
      ),
      el("div", { class: "slide" }, this.slider, number),
    );
    number.addEventListener("input", () => this.#touched(this.slider, this.#position(number.valueAsNumber)));
    this.slider.addEventListener("input", () => this.#touched(number, this.#valueAt(this.slider.valueAsNumber)));
    this.tick?.addEventListener("input", () => this.#enable());
    this.set(this.range.value);
  }

  /** Show a number. */
  set(value) {
    this.input.value = String(value);
    this.slider.value = String(this.#position(value));
    this.#speak();
  }

  /** Leave the number to a preset, until somebody touches it; `value` is shown, null if it is not known. */
  inherit(value) {
    this.inherited = true;
    this.badge.hidden = false;
    if (value !== null) this.set(value);
    this.node.classList.add("inherited");
  }

  /** End `inherit`. */
  own() {
    this.inherited = false;
    this.badge.hidden = true;
    this.node.classList.remove("inherited");
  }

  get value() {
    if (this.tick?.checked) return this.range.toggle.value;
    return this.inherited ? undefined : this.input.valueAsNumber;
  }

  check() {
    const value = this.value;
    if (value === undefined || this.tick?.checked) return null;
    const { min, max, step } = this.range;
    const whole = step < 1 || Number.isInteger(value);
    return value >= min && value <= max && whole
      ? null
      : `Must be a ${step < 1 ? "number" : "whole number"} from ${min} to ${max}.`;
  }

  #touched(other, value) {
    this.own();
    if (Number.isFinite(value)) other.value = String(value);
    this.#speak();
  }

  #enable() {
    this.input.disabled = this.tick.checked;
    this.slider.disabled = this.tick.checked;
  }

  #speak() {
    this.slider.setAttribute("aria-valuetext", this.input.value);
  }

  #ticks() {
    const { min, usual, step, log } = this.range;
    return log ? 400 : Math.round((usual - min) / step);
  }

  // A slider that moves by factors starts at 1; a smallest value of 0 sits one tick before it.
  #position(value) {
    const { min, usual, step, log } = this.range;
    if (!log) return Math.round((value - min) / step);
    if (value < 1) return 0;
    return Math.max(min === 0 ? 1 : 0, Math.round((400 * Math.log(value)) / Math.log(Math.max(usual, 2))));
  }

  #valueAt(position) {
    const { min, usual, step, log } = this.range;
    if (log) return position === 0 ? min : Math.min(usual, Math.round(Math.max(usual, 2) ** (position / 400)));
    return Number((min + position * step).toFixed(6));
  }
}

/** A choice. */
export class Choice extends Field {
  /**
   * @param {string} param
   * @param {string} label
   * @param {{value: string, text: string}[]} options
   * @param {string} [hint]
   */
  constructor(param, label, options, hint) {
    super(param, hint);
    const select = el("select", {}, options.map(({ value, text }) => el("option", { value, text })));
    this.build(select, el("div", { class: "head" }, el("label", { for: this.id, text: label })), select);
  }

  get value() {
    return this.input.value;
  }
}

/** Text of several lines. */
export class Lines extends Field {
  constructor(param, label, { rows = 3, value = "", placeholder = "", hint = "" } = {}) {
    super(param, hint);
    const area = el("textarea", { rows, placeholder, spellcheck: "false" });
    area.value = value;
    this.build(area, el("div", { class: "head" }, el("label", { for: this.id, text: label })), area);
  }

  get value() {
    return this.input.value;
  }
}

/** A seed: digits, kept as text; empty for one that the server draws. */
export class Seed extends Field {
  constructor() {
    super("seed", "");
    const input = el("input", {
      type: "text",
      inputmode: "numeric",
      autocomplete: "off",
      maxlength: 20,
      placeholder: "drawn by the server",
    });
    const clear = el("button", { type: "button", class: "quiet", text: "Clear", "aria-label": "Clear the seed" });
    clear.addEventListener("click", () => this.set(""));
    this.build(
      input,
      el("div", { class: "head" }, el("label", { for: this.id, text: "Seed" })),
      el("div", { class: "slide" }, input, clear),
    );
  }

  set(digits) {
    this.input.value = digits;
    this.problem = null;
  }

  get value() {
    const text = this.input.value.trim();
    return text === "" ? undefined : text;
  }

  check() {
    return this.value === undefined || isSeed(this.value) ? null : "Must be a whole number from 0 to 2^64 - 1.";
  }
}
