// The page: what is loaded decides which tabs there are; the dot tells whether the server answers.

import { getJson, readiness } from "./api.js";
import { announce, el } from "./dom.js";
import { imageTab } from "./image_tab.js";
import { scoreTab } from "./score_tab.js";
import { textTab } from "./text_tab.js";

const TABS = [textTab, imageTab, scoreTab];
const POLL_MS = 10_000;
const POLL_LOST_MS = 2_000;
// Where people say it in other words than /ready.
const WORDS = {
  draining: "shutting down",
  lost: "no connection",
};

function count(number) {
  for (const [unit, name] of [[1e9, "billion"], [1e6, "million"], [1e3, "thousand"]]) {
    if (number >= unit) return `${(number / unit).toFixed(1)} ${name}`;
  }
  return String(number);
}

/** Return one line about a model. */
function describe(model) {
  const { target_length: digits, base } = model.codec;
  const size = model.kind === "images" ? model.picture_shape.join(" × ") : `context of ${model.limits.context} tokens`;
  return [
    model.name,
    `${count(model.num_parameters)} parameters`,
    size,
    digits === 1 ? "1 digit a token" : `${digits} digits of base ${base} a token`,
    `${model.dtype} on ${model.device}`,
    ...(model.in_service ? [] : ["out of service"]),
  ].join(", ");
}

function showTab(chosen, { focus = false } = {}) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const selected = tab.id === `tab-${chosen}`;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !selected;
    if (selected && focus) tab.focus();
  }
  history.replaceState(null, "", `#${chosen}`);
}

/** Arrow keys, Home and End move between tabs. */
function moveOnKeys(event) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const here = tabs.indexOf(event.target);
  const there = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (here < 0 || there === undefined) return;
  event.preventDefault();
  showTab(tabs[(there + tabs.length) % tabs.length].id.slice(4), { focus: true });
}

/** Make the tabs. What a tab makes can be handed to another one, which then `take`s it. */
function build(info) {
  const shown = TABS.filter((tab) => info.models.some((model) => model.kind === tab.kind));
  const list = document.getElementById("tabs");
  list.addEventListener("keydown", moveOnKeys);
  const built = new Map();
  const hand = (id, given) => {
    showTab(id);
    built.get(id).take(given);
  };
  const panels = shown.map((tab) => {
    list.append(
      el("button", {
        type: "button", role: "tab", id: `tab-${tab.id}`, "aria-controls": `panel-${tab.id}`, text: tab.title,
        onclick: () => showTab(tab.id),
      }),
    );
    const models = info.models.filter((model) => model.kind === tab.kind);
    built.set(tab.id, tab.build(info, hand));
    return el(
      "section",
      { role: "tabpanel", id: `panel-${tab.id}`, "aria-labelledby": `tab-${tab.id}` },
      el("ul", { class: "models" }, models.map((model) => el("li", { text: describe(model) }))),
      built.get(tab.id).node,
    );
  });
  document.getElementById("panels").replaceChildren(...panels);
  document.getElementById("versions").textContent = `torch ${info.versions.torch}, Python ${info.versions.python}`;
  const asked = location.hash.slice(1);
  showTab(shown.some((tab) => tab.id === asked) ? asked : shown[0].id);
}

/** Look again and again whether the server takes requests, while somebody looks at the page; at once after a failure. */
async function watch() {
  const place = document.getElementById("state");
  let lookNow = () => {};
  document.addEventListener("trouble", () => lookNow());
  for (;;) {
    if (document.visibilityState === "visible") {
      const state = await readiness();
      const word = WORDS[state] ?? state;
      if (place.dataset.state !== state && state !== "ready") announce(`Server: ${word}`);
      place.dataset.state = state;
      document.getElementById("state-text").textContent = word;
    }
    const pause = place.dataset.state === "ready" ? POLL_MS : POLL_LOST_MS;
    await new Promise((resolve) => {
      lookNow = resolve;
      setTimeout(resolve, pause);
    });
  }
}

async function start() {
  const panels = document.getElementById("panels");
  try {
    build(await getJson("info"));
  } catch (error) {
    const again = el("button", { type: "button", text: "Try again", onclick: start });
    panels.replaceChildren(el("div", { class: "fault", role: "alert" }, el("p", { text: error.message }), again));
  }
}

start();
watch();
