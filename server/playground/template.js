// A text with gaps, written as text: [[12]] stands for a gap of 12 tokens.

const GAP = /\[\[([0-9]+)\]\]/;
// Tokens of English are about this long; only a first guess, which people change.
const CHARS_PER_TOKEN = 4;

/** Return the parts of a template: text, and {gap: tokens}. */
export function templateParts(text) {
  // every other piece of the split is the number in a mark
  const pieces = text.split(new RegExp(GAP, "g"));
  return pieces.map((piece, index) => (index % 2 ? { gap: Number(piece) } : piece)).filter((part) => part !== "");
}

/** Return what is wrong with a template, or null. */
export function templateProblem(text, { context, maxParts }) {
  const parts = templateParts(text);
  const gaps = parts.filter((part) => typeof part !== "string");
  if (gaps.length === 0) return "There is no gap in this text. Write [[12]] where 12 tokens are to be made.";
  const wrong = gaps.find(({ gap }) => gap < 1 || gap > context);
  if (wrong) return `A gap has 1 to ${context} tokens, not ${wrong.gap}.`;
  if (parts.length > maxParts) return `A text has at most ${maxParts} parts, gaps and what is between them.`;
  return null;
}

/** Turn what is selected in a text area into a gap of about its length. */
export function makeGap(area) {
  const { selectionStart: start, selectionEnd: end, value } = area;
  const chosen = value.slice(start, end);
  // the space before a word belongs to its token, so a gap takes it along
  const lead = chosen === "" && start > 0 && value[start - 1] === " " ? 1 : 0;
  const tokens = chosen.trim() === "" ? 8 : Math.max(1, Math.round(chosen.length / CHARS_PER_TOKEN));
  area.setRangeText(`[[${tokens}]]`, start - lead, end, "end");
  area.dispatchEvent(new Event("input", { bubbles: true }));
  area.focus();
}
