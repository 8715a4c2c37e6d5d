// Messages to the user: short notices that disappear, and errors that stay until they are closed.
import { byId, clone, create, setText } from "./dom.js";

const NOTICE_MS = 6000;
let timer = 0;

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
  const alert = clone("alert-template");
  const remove = () => alert.root.remove();
  alert.root.dataset.topic = topic;
  setText(alert.text, text);
  alert.text.after(...createButtons(action, remove));
  alert.close.addEventListener("click", remove);
  byId("alerts").append(alert.root);
}
export function clearError(topic) {
  for (const alert of [...byId("alerts").children]) if (alert.dataset.topic === topic) alert.remove();
}
function createButtons(action, close) {
  if (action === null) return [];
  const button = create("button", { type: "button" }, action.label);
  button.addEventListener("click", close);
  button.addEventListener("click", action.run);
  return [button];
}
