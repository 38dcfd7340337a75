// A picture with a brush: what is painted will be drawn again by the model. Works by mouse, touch and keys.

import { announce, el, freshId } from "./dom.js";

const TINT = [226, 88, 34];
const CURSOR = [0, 120, 255];

/** A canvas that paints a mask over a picture. */
export class Painter {
  /** @param {() => void} changed is called after the mask has changed. */
  constructor(changed) {
    this.changed = changed;
    this.erase = false;
    this.cursor = null;
    const hint = el("p", {
      class: "hint", id: freshId("painter"),
      text: "Paint what to draw again. With keys: arrows move, Space paints or wipes.",
    });
    this.canvas = el("canvas", {
      class: "pixels paper", tabindex: 0, role: "application", "aria-label": "Picture to paint on", "aria-describedby": hint.id,
    });
    this.size = el("input", { type: "range", min: 1, max: 9, value: 3, id: freshId("brush") });
    this.wipe = el("input", { type: "checkbox", id: freshId("wipe") });
    const button = (text, action) => el("button", { type: "button", class: "quiet", text, onclick: action });
    this.node = el(
      "div", { class: "painter" }, this.canvas, hint,
      el("div", { class: "tools" },
        el("label", { for: this.size.id, text: "Brush" }), this.size,
        el("span", { class: "tick" }, this.wipe, el("label", { for: this.wipe.id, text: "wipe out" })),
        button("Paint all", () => this.fill(true)), button("Wipe all", () => this.fill(false)),
        button("Swap", () => this.#each((was) => !was))),
    );
    this.#listen();
  }

  /** Begin with a picture and nothing painted. */
  open(picture) {
    this.picture = picture;
    this.painted = new Array(picture.height * picture.width).fill(false);
    this.canvas.width = picture.width;
    this.canvas.height = picture.height;
    this.cursor = null;
    this.#draw();
    this.changed();
  }

  get empty() {
    return !this.painted.includes(true);
  }

  fill(value) {
    this.#each(() => value);
  }

  #each(next) {
    this.painted = this.painted.map(next);
    this.#draw();
    this.changed();
  }

  #listen() {
    const { canvas } = this;
    let from = null;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      from = this.#pixelAt(event);
      this.#stroke(from, from);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (from === null) return;
      const to = this.#pixelAt(event);
      this.#stroke(from, to);
      from = to;
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => {
        from = null;
      });
    }
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => {
      this.cursor = null;
      this.#draw();
    });
  }

  #pixelAt(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: Math.floor(((event.clientX - box.left) / box.width) * this.picture.width),
      y: Math.floor(((event.clientY - box.top) / box.height) * this.picture.height),
    };
  }

  // Pointer events are further apart than pixels, so the brush goes along the line between two of them.
  #stroke(from, to) {
    const steps = Math.max(1, Math.abs(to.x - from.x), Math.abs(to.y - from.y));
    for (let step = 0; step <= steps; step += 1) {
      const x = Math.round(from.x + ((to.x - from.x) * step) / steps);
      const y = Math.round(from.y + ((to.y - from.y) * step) / steps);
      this.#dab(x, y, !this.wipe.checked);
    }
    this.#draw();
    this.changed();
  }

  #dab(x, y, value) {
    const { width, height } = this.picture;
    const size = this.size.valueAsNumber;
    const first = -Math.floor((size - 1) / 2);
    for (let dy = first; dy < first + size; dy += 1) {
      for (let dx = first; dx < first + size; dx += 1) {
        const inside = x + dx >= 0 && x + dx < width && y + dy >= 0 && y + dy < height;
        if (inside) this.painted[(y + dy) * width + x + dx] = value;
      }
    }
  }

  #key(event) {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    const { width, height } = this.picture;
    this.cursor ??= { x: Math.floor(width / 2), y: Math.floor(height / 2) };
    if (move) {
      this.cursor.x = Math.min(width - 1, Math.max(0, this.cursor.x + move[0]));
      this.cursor.y = Math.min(height - 1, Math.max(0, this.cursor.y + move[1]));
    } else {
      const { x, y } = this.cursor;
      this.#dab(x, y, !this.painted[y * width + x]);
      this.changed();
    }
    const painted = this.painted[this.cursor.y * width + this.cursor.x];
    announce(`Row ${this.cursor.y + 1}, column ${this.cursor.x + 1}, ${painted ? "painted" : "kept"}`);
    this.#draw();
  }

  #draw() {
    if (!this.picture) return;
    const { width, height, channels, values } = this.picture;
    const data = new ImageData(width, height);
    for (let pixel = 0; pixel < width * height; pixel += 1) {
      const at = [0, 1, 2].map((channel) => values[channels * pixel + (channels === 3 ? channel : 0)]);
      const mixed = this.painted[pixel] ? at.map((value, k) => 0.35 * value + 0.65 * TINT[k]) : at;
      data.data.set([...mixed, 255], 4 * pixel);
    }
    if (this.cursor) data.data.set([...CURSOR, 255], 4 * (this.cursor.y * width + this.cursor.x));
    this.canvas.getContext("2d").putImageData(data, 0, 0);
  }
}
