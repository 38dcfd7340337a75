// What a model makes of one text: the bound and its units, the coded loss beside it, and where the nats are.

import { el } from "./dom.js";
import { HeatMap } from "./heat_map.js";

const BOUND = "The bound estimates an upper bound of −log p, with the error beside it: the lower, the likelier is the text.";
const CODED = "The coded loss is what such models are trained on; for more than one digit a token it can be less than −log p.";
const SAME = "With one digit a token the coded loss is the same.";

/** Return in words what the figures of a score are. */
export function explanation(score) {
  return `${BOUND} ${score.coded_loss.is_bound ? SAME : CODED}`;
}

function fact(name, value, { note = null, badge = null, kind = null } = {}) {
  return el("div", { class: kind },
    el("dt", {}, name, badge === null ? null : el("span", { class: "badge warning", text: badge })),
    el("dd", {}, value, note === null ? null : el("span", { class: "error", text: note })));
}

function nats(estimate) {
  return `${estimate.nats.toFixed(2)} nats`;
}

/** Return how far an estimate may be off. */
function errorOf({ standard_error: error }) {
  return error === null ? "one state: error not known" : `± ${error.toFixed(2)} standard error`;
}

/** A card with one score. */
export class ScoreOutput {
  /**
   * @param {string|null} name of the text, if there are several.
   * @param {object} score of the answer.
   * @param {number} vocabSize of the model.
   * @param {((seed: string) => void)|null} useSeed takes a seed over into the form; null where it gives another score.
   */
  constructor(name, score, vocabSize, useSeed) {
    const { nelbo, coded_loss: coded } = score;
    const units = [
      nelbo.bits_per_byte === null ? null : fact("Bits per byte", nelbo.bits_per_byte.toFixed(3)),
      fact("Bits per token", nelbo.bits_per_token.toFixed(3)),
      fact("Perplexity per token", nelbo.ppl.toFixed(2)),
    ];
    this.node = el("article", { class: "output score", "aria-label": name ?? "Score" },
      name === null ? null : el("h3", { text: name }),
      el("dl", { class: "facts" },
        fact("Likelihood bound", nats(nelbo), { note: errorOf(nelbo), kind: "bound" }), units),
      el("dl", { class: "facts" },
        fact("Coded loss", nats(coded), { note: errorOf(coded), badge: coded.is_bound ? null : "not a bound", kind: "coded" })),
      new HeatMap(score.per_token, vocabSize).node,
      this.#meta(score, useSeed));
  }

  #meta(score, useSeed) {
    const bytes = score.num_bytes === null ? "" : `${score.num_bytes} bytes, `;
    const meta = el("p", { class: "meta" }, `${score.num_tokens} tokens, ${bytes}${score.nfe} calls`);
    if (useSeed !== null) {
      meta.append(", seed ", el("button", {
        type: "button", class: "link", text: score.seed, onclick: () => useSeed(score.seed),
        title: "With the same texts and settings this seed gives this score again",
      }));
    }
    return meta;
  }
}
