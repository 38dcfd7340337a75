// One picture on its way: what the stream shows of it, then the finished file.

import { el } from "./dom.js";

/** A figure with one picture. */
export class ImageOutput {
  /**
   * @param {number} number from 0.
   * @param {number[]} shape height and width of the pictures.
   * @param {(address: string, label: number|null) => void} edit opens the picture for painting.
   * @param {(seed: string) => void} useSeed takes a seed over into the form.
   */
  constructor(number, shape, edit, useSeed) {
    this.number = number;
    this.useSeed = useSeed;
    const [height, width] = shape;
    this.image = el("img", { class: "pixels", width, height, alt: `Picture ${number + 1}, not begun` });
    this.open = el("button", { type: "button", class: "frame", disabled: true, "aria-label": `Paint on picture ${number + 1}` }, this.image);
    this.open.addEventListener("click", () => edit(this.image.src, this.label));
    this.caption = el("figcaption", { text: "waiting" });
    this.node = el("figure", { class: "picture waiting" }, this.open, this.caption);
  }

  /** Take a frame of the stream; not each has a picture. */
  frame(frame) {
    this.caption.textContent = `${frame.nfe} calls`;
    if (frame.b64_json === null) return;
    this.#show(frame.b64_json);
    this.image.alt = `Picture ${this.number + 1}, half finished`;
    this.node.className = "picture forming";
  }

  /** Take the finished picture. */
  finish(output) {
    this.#show(output.b64_json);
    this.label = output.label;
    const name = output.label_name ?? (output.label === null ? null : `label ${output.label}`);
    this.image.alt = `Picture ${this.number + 1}${name === null ? "" : `: ${name}`}`;
    this.open.disabled = false;
    this.open.title = "Paint on it, and draw the painted part again";
    this.node.className = "picture done";
    const seed = el("button", {
      type: "button", class: "link", text: "seed", title: `Use its seed, ${output.seed}`, "data-seed": output.seed,
      "aria-label": `Use the seed of picture ${this.number + 1}`, onclick: () => this.useSeed(output.seed),
    });
    const save = el("a", {
      href: this.image.src, download: `picture-${output.seed}.png`, text: "PNG",
      "aria-label": `Download picture ${this.number + 1} as PNG`,
    });
    this.caption.replaceChildren(
      el("span", { class: "name", text: name ?? `${output.nfe} calls` }), el("span", { class: "links" }, save, seed),
    );
    this.caption.title = `${output.nfe} calls, ${output.steps_skipped} steps skipped`;
  }

  /** Take notice that it will not be finished. */
  halt() {
    this.node.classList.add("halted");
  }

  #show(b64) {
    this.image.src = `data:image/png;base64,${b64}`;
  }
}
