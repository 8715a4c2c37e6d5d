// Helpers for the page's elements. Text always becomes text nodes, never HTML.

export const byId = (id) => document.getElementById(id);

/** Create an element from properties and children. */
export function create(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
/** Clone a template of index.html. Returns its element as `root`, and its parts by their data-part. */
export function clone(id) {
  const root = byId(id).content.firstElementChild.cloneNode(true);
  const parts = [...root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]);
  return { root, ...Object.fromEntries(parts) };
}
/** Write a text into an element, only if it differs: equal text is not announced again. */
export function setText(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}
/** Add handlers of events by their names. */
export function listen(element, handlers, options) {
  for (const [name, handle] of Object.entries(handlers)) element.addEventListener(name, handle, options);
}
/** Show the button of a group as pressed whose attribute data-`name` has a value, and the others as not. */
export function pressButton(group, name, value) {
  for (const button of byId(group).children) button.ariaPressed = button.dataset[name] === value;
}

export const formatQuality = (quality) => (quality === null ? "–" : quality.toFixed(2));
export const formatPercent = (fraction) => `${(100 * fraction).toFixed(fraction < 0.1 ? 1 : 0)} %`;
/** Return whether the last recompute has changed an alpha that nobody has decided on. */
export const isChanged = ({ change, status }) => change > 0 && status === "open";
export const baseName = (path) => path.slice(path.lastIndexOf("/") + 1);
export const STATUS_LABELS = { open: "not reviewed", accepted: "accepted", rejected: "rejected" };
