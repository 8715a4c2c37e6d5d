// Helpers for the page's elements. Text always becomes text nodes, never HTML.

export const byId = (id) => document.getElementById(id);

/** Create an element from properties and children. Keys with a dash and `role` are attributes. */
export function create(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Write a text into an element, only if it differs: equal text is not announced again. */
export function setText(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

export const formatQuality = (quality) => (quality === null ? "–" : quality.toFixed(2));
export const formatPercent = (fraction) => `${(100 * fraction).toFixed(fraction < 0.1 ? 1 : 0)} %`;
/** Return the last part of a path. */
export const baseName = (path) => path.slice(path.lastIndexOf("/") + 1);
/** What the page calls the status of an image. */
export const STATUS_LABELS = { open: "not reviewed", accepted: "accepted", rejected: "rejected" };
