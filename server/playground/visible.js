// Signs that do not show, made to show: spaces, ends of lines, and whatever else has no ink of its own.

import { el } from "./dom.js";

const UNSEEN = /([\p{C}\p{Z}])/u;
const SIGNS = { " ": "·", "\n": "↵", "\t": "→" };
const SPOKEN = { " ": "space", "\n": "new line", "\t": "tab" };

function code(sign) {
  return `U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** Return nodes of a text in which everything shows, on one line; their text is still that text. */
export function visible(text) {
  return text.split(UNSEEN).map((part, index) => {
    if (index % 2 === 0) return part; // every other part is what UNSEEN caught
    if (part === " ") return el("span", { class: "sign space", "data-sign": SIGNS[part], text: part });
    return el("span", { class: "sign", "data-sign": SIGNS[part] ?? code(part) }, el("span", { hidden: true, text: part }));
  });
}

/** Return a text as it is read out. */
export function spoken(text) {
  return text
    .split(UNSEEN)
    .map((part, index) => (index % 2 === 0 ? part : (SPOKEN[part] ?? code(part))))
    .filter((part) => part !== "")
    .join(" ");
}
