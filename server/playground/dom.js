// Making elements, and telling people who do not see the page what happens on it.

/**
 * Make an element. Attributes that are null or false are left out; `text` is its text, and on... are listeners, added
 * as such: the page's policy forbids inline handlers and style attributes.
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Say something to a screen reader. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

let counter = 0;

/** Return an id that no other element has. */
export function freshId(name) {
  counter += 1;
  return `${name}-${counter}`;
}

/** Put text on the clipboard; returns whether that worked. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // no permission, or a page that was not loaded over HTTPS or from this machine: the old way
    const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Make a button that copies what `text()` gives, and says so for a moment. */
export function copyButton(label, text) {
  const button = el("button", { type: "button", class: "quiet", text: label });
  button.addEventListener("click", async () => {
    const given = text();
    if (given === null) return;
    const done = await copyText(given);
    button.textContent = done ? "Copied" : "Cannot copy";
    announce(button.textContent);
    setTimeout(() => {
      button.textContent = label;
    }, 1500);
  });
  return button;
}

/** Seconds for people: 0.42 s, 12 s, 3 min 05 s. */
export function seconds(value) {
  if (value < 10) return `${value.toFixed(value < 1 ? 2 : 1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  const whole = Math.round(value);
  return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
}
