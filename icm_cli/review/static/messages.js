// Messages to the user: short notices that disappear, and errors that stay until they are closed.

import { byId, create, setText } from "./dom.js";

const NOTICE_MS = 6000;
const MAX_ALERTS = 4;
let timer = 0;

/** Show a notice for some seconds. `action`: {label, run} of a button next to it. */
export function notify(text, action = null) {
  clearTimeout(timer);
  byId("status").replaceChildren(text, ...actionButton(action, clearNotice));
  timer = setTimeout(clearNotice, NOTICE_MS);
}

/** Show an error until it is closed. An error of the same `topic` replaces the one before. */
export function reportError(text, { action = null, topic = text } = {}) {
  clearError(topic);
  const alert = create("div", { className: "alert" });
  alert.dataset.topic = topic;
  const close = create("button", { type: "button", "aria-label": "Close this message" }, "×");
  close.addEventListener("click", () => alert.remove());
  const remove = () => alert.remove();
  alert.append(create("span", {}, text), ...actionButton(action, remove), close);
  byId("alerts").append(alert);
  if (byId("alerts").children.length > MAX_ALERTS) byId("alerts").firstChild.remove();
}

/** Remove the error of a topic. */
export function clearError(topic) {
  for (const alert of [...byId("alerts").children]) if (alert.dataset.topic === topic) alert.remove();
}

function clearNotice() {
  setText(byId("status"), "");
}

function actionButton(action, done) {
  if (action === null) return [];
  const button = create("button", { type: "button" }, action.label);
  button.addEventListener("click", () => {
    done();
    action.run();
  });
  return [button];
}
