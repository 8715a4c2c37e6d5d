// Keys. The help in index.html says which key runs which action on which page.
import { byId } from "./dom.js";

/** Handle the keys of the help. `actions`: functions by name; `page()`: "overview" or "single". */
export function connectKeys(actions, page) {
  const names = new Map();
  for (const { dataset } of byId("help").querySelectorAll("[data-keys]")) {
    for (const key of dataset.keys.split(" ")) names.set(`${dataset.page} ${key}`, dataset.run);
  }
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") !== null || isUsedByControl(event)) return;
    const key = keyName(event);
    const action = actions[names.get(`${page()} ${key}`) ?? names.get(`any ${key}`)];
    if (action === undefined) return;
    event.preventDefault();
    action();
  });
}
/** Return the name of a key, such as "Ctrl+Shift+z". Shift is not named for characters like "?". */
function keyName(event) {
  const isLetter = /^[a-z]$/i.test(event.key);
  const key = event.key === " " ? "Space" : isLetter ? event.key.toLowerCase() : event.key;
  const shift = event.shiftKey && (isLetter || key.length > 1) ? "Shift+" : "";
  return (event.ctrlKey || event.metaKey ? "Ctrl+" : "") + (event.altKey ? "Alt+" : "") + shift + key;
}
/** Return whether the control with the focus uses a key itself. */
function isUsedByControl({ target, key }) {
  if (target.matches('input[type="search"], select')) return key !== "Escape";
  if (!target.matches("button, summary, input")) return false;
  return key === "Enter" || key === " " || (target.matches("input") && /^(Arrow|Home|End|Page)/.test(key));
}
