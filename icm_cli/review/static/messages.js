// Messages to the user: short notices that disappear, and errors that stay until they are closed.

import { byId, create } from "./dom.js";

const NOTICE_MS = 6000;
const MAX_ALERTS = 4;
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
  const alert = create("div", { className: "alert" }, create("span", {}, text));
  const close = create("button", { type: "button", "aria-label": "Close this message" }, "×");
  close.addEventListener("click", () => alert.remove());
  alert.dataset.topic = topic;
  alert.append(...createButtons(action, () => alert.remove()), close);
  byId("alerts").append(alert);
  if (byId("alerts").children.length > MAX_ALERTS) byId("alerts").firstChild.remove();
}

/** Remove the error of a topic. */
export function clearError(topic) {
  for (const alert of [...byId("alerts").children]) if (alert.dataset.topic === topic) alert.remove();
}

function createButtons(action, close) {
  if (action === null) return [];
  const button = create("button", { type: "button" }, action.label);
  button.addEventListener("click", () => {
    close();
    action.run();
  });
  return [button];
}
