// Helpers for the page's elements, and its messages. Text always becomes text nodes, never HTML.

const NOTICE_MS = 6000;
const BIDI = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g; // they change the order of the text around them
let timer = 0; // of the notice that is shown

export const byId = (id) => document.getElementById(id);
export const create = (tag, properties) => Object.assign(document.createElement(tag), properties);

/** Clone a template of index.html. Returns its element as `root`, and its parts by their data-part. */
export function clone(id) {
  const root = byId(id).content.firstElementChild.cloneNode(true);
  const parts = [...root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]);
  return { root, ...Object.fromEntries(parts) };
}
/** Write a text into an element, only if it differs: equal text is not announced again. */
export function setText(element, text) {
  const escaped = String(text).replace(BIDI, (character) => `\\u{${character.charCodeAt(0).toString(16)}}`);
  if (element.textContent !== escaped) element.textContent = escaped;
}
/** Show the button of a group as pressed whose attribute data-`name` has a value, and the others as not. */
export function pressButton(group, name, value) {
  for (const button of byId(group).children) button.ariaPressed = button.dataset[name] === value;
}
/** Show a notice for some seconds. `action`: {label, run} of a button next to it. */
export function notify(text, action = null) {
  clearTimeout(timer);
  const clear = () => byId("status").replaceChildren();
  byId("status").replaceChildren(text, ...createButtons(action, clear));
  timer = setTimeout(clear, NOTICE_MS);
}
/** Show an error until it is closed. An error of the same `topic` replaces the one before. */
export function reportError(text, { action = null, topic = text } = {}) {
  clearError(topic);
  const { root, text: span, close } = clone("alert-template");
  root.dataset.topic = topic;
  setText(span, text);
  span.after(...createButtons(action, () => root.remove()));
  close.onclick = () => root.remove();
  byId("alerts").append(root);
}

export function clearError(topic) {
  for (const alert of [...byId("alerts").children]) if (alert.dataset.topic === topic) alert.remove();
}

function createButtons(action, close) {
  if (action === null) return [];
  const run = () => { close(); action.run(); };
  return [create("button", { type: "button", textContent: action.label, onclick: run })];
}
/** Show the image with an id: the address says which one is open. */
export const openImage = (id) => (location.hash = `image-${id}`);

export const formatQuality = (quality) => (quality === null ? "–" : quality.toFixed(2));
export const formatPercent = (fraction) => `${(100 * fraction).toFixed(fraction < 0.1 ? 1 : 0)} %`;
/** Return whether the last recompute has changed an alpha that nobody has decided on. */
export const isChanged = ({ change, status }) => change > 0 && status === "open";
export const baseName = (path) => path.slice(path.lastIndexOf("/") + 1);
export const STATUS_LABELS = { open: "not reviewed", accepted: "accepted", rejected: "rejected" };
