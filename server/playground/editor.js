// Drawing part of a picture again: in-painting, or keeping the leading digits of pixels and sampling the others.

import { el } from "./dom.js";
import { Choice } from "./fields.js";
import { Painter } from "./painter.js";
import { addressOf, keepable, knownOf, readPicture } from "./pixels.js";

/** The part of the images' tab where a picture is painted on. */
export class Editor {
  /**
   * @param {object} model of /info.
   * @param {() => void} redraw sends the request with what is kept.
   */
  constructor(model, redraw) {
    this.model = model;
    const digits = keepable(model);
    this.keep = new Choice(
      "known", "Painted pixels",
      Array.from({ length: digits + 1 }, (_, kept) => ({
        value: String(kept),
        text: kept === 0 ? "are drawn entirely anew" : `keep ${kept} leading digit${kept === 1 ? "" : "s"} of ${digits + 1}`,
      })),
    );
    this.painter = new Painter(() => this.#enable());
    this.button = el("button", { type: "button", class: "primary", text: "Draw the painted part", onclick: redraw });
    this.close = el("button", { type: "button", text: "Close", onclick: () => this.hide() });
    this.problem = el("p", { class: "problem", role: "alert", hidden: true });
    this.file = el("input", { type: "file", accept: "image/png", id: "upload" });
    this.file.addEventListener("change", () => this.#upload());
    this.canvasPart = el("div", { hidden: true, class: "canvas" },
      this.painter.node, el("div", {}, this.keep.node, el("div", { class: "buttons" }, this.button, this.close)));
    const [height, width] = model.picture_shape;
    this.node = el(
      "section", { class: "editor", "aria-label": "Draw part of a picture again" },
      el("h2", { text: "Draw part of a picture again" }),
      el("p", { class: "hint", text: "Choose one of the results" }, ", or ",
        el("label", { for: "upload", text: `a PNG of ${width} × ${height} pixels` }), ": ", this.file),
      this.problem, this.canvasPart,
    );
  }

  /**
   * Open a picture.
   *
   * @param {string} address starts with data:.
   * @param {number|null} label what it shows, if that is known: it will be drawn as the same, unless the form says other.
   */
  async open(address, label = null) {
    try {
      this.picture = await readPicture(address, this.model);
    } catch (error) {
      this.#say(error.message);
      return;
    }
    this.#say(null);
    this.label = this.model.labels === "class" ? label : null;
    const name = this.label === null ? null : (this.model.label_names[this.label] ?? `label ${this.label}`);
    this.keep.hint.hidden = name === null;
    this.keep.hint.textContent = `It is drawn as what it is, ${name}, unless a label is chosen in the form.`;
    this.canvasPart.hidden = false;
    this.painter.open(this.picture);
    this.painter.canvas.focus({ preventScroll: true });
    this.node.scrollIntoView({ block: "nearest" });
  }

  hide() {
    this.picture = null;
    this.canvasPart.hidden = true;
  }

  /** Return the field `known`. */
  known() {
    return knownOf(this.picture, this.painter.painted, Number(this.keep.value), this.model);
  }

  async #upload() {
    const [file] = this.file.files;
    if (!file) return;
    try {
      await this.open(await addressOf(file));
    } catch (error) {
      this.#say(error.message);
    }
  }

  #say(text) {
    this.problem.textContent = text ?? "";
    this.problem.hidden = text === null;
  }

  #enable() {
    this.button.disabled = this.painter.empty;
  }
}
