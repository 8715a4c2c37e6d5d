// Dialog of teaching: the taught images, the recompute with its progress, and the command of the run.
import { api } from "./api.js";
import { byId, clearError, clone, formatPercent, notify, reportError, setText } from "./dom.js";
import { store } from "./store.js";
import { showThumbnail } from "./thumbnails.js";

const MAX_LISTED = 200;
const dialog = byId("teach");

dialog.addEventListener("close", () => document.body.append(byId("messages")));
for (const name of ["items", "recompute", "run"]) store.on(name, draw);

export function show() {
  dialog.append(byId("messages")); // above the page
  dialog.showModal();
  draw();
  store.poll(); // to show the current command
}
/** Start or stop the recompute. */
export async function send(request) {
  try {
    store.setRecompute(await request());
    clearError("recompute");
  } catch (error) { reportError(`Recompute: ${error.message}.`, { topic: "recompute" }); }
}

export function copyCommand() {
  const copy = (event) => { event.clipboardData.setData("text/plain", store.run.command); event.preventDefault(); };
  document.addEventListener("copy", copy, { once: true }); // the page shows some characters as escapes
  getSelection().selectAllChildren(byId("command"));
  document.execCommand("copy"); // navigator.clipboard needs HTTPS
  notify("The command is copied.");
}

function draw() {
  const isRunning = store.recompute.state === "running";
  setText(byId("open-teach"), isRunning ? describeProgress() : "Teach and recompute");
  if (!dialog.open) return;
  const { state, done, total, message, changed } = store.recompute;
  setText(byId("recompute-state"), [describeProgress(), message].filter(Boolean).join("; "));
  Object.assign(byId("recompute-bar"), { max: total || 1, value: state === "done" ? total || 1 : done });
  dialog.querySelector('[data-action="recompute"]').disabled = isRunning;
  dialog.querySelector('[data-action="stop-recompute"]').disabled = !isRunning;
  const items = [...store.items.values()];
  const replaced = items.filter((item) => item.has_alpha && item.status !== "accepted").length;
  setText(byId("recompute-plan"), `at most ${replaced} of ${items.length} alphas are replaced`);
  const taught = items.filter((item) => item.taught !== null);
  drawRows("taught-list", taught.map((item) => [item, item.taught]), "Remove", "forget-row");
  byId("taught-empty").hidden = taught.length > 0;
  const rows = changed.slice(0, MAX_LISTED).filter(({ id }) => store.items.get(id)?.change);
  const changes = rows.map(({ id, difference }) => [store.items.get(id), formatPercent(difference)]);
  drawRows("changed-list", changes, "Undo", "undo-row");
  byId("changed").hidden = rows.length === 0;
  setText(byId("command"), store.run?.command ?? "");
}
/** Return what the recompute does. */
function describeProgress() {
  const { state, done, total } = store.recompute;
  const count = `${done} of ${total} images`;
  const running = done > 0 ? `Recomputing: ${count}` : "Preparing references";
  return { idle: "", running, stopped: `Stopped: ${count}`, done: "Done", failed: "Failed" }[state];
}
/** Draw rows [item, text] into a list, if they have changed, with a button that has a label and an action. */
function drawRows(id, rows, ...button) {
  const key = JSON.stringify(rows.map(([item, text]) => [item.id, item.version, item.undo, text]));
  if (byId(id).dataset.key === key) return;
  byId(id).dataset.key = key;
  byId(id).replaceChildren(...rows.map(([item, text]) => createRow(item, text, ...button)));
}

function createRow(item, description, label, action) {
  const { root, image, name, text, button } = clone("row-template");
  root.dataset.id = item.id;
  setText(name, item.name);
  setText(text, description);
  setText(button, label);
  button.dataset.action = action;
  button.ariaLabel = `${label} ${item.name}`;
  button.hidden = action === "undo-row" && item.undo !== "recompute";
  showThumbnail(image, item, "cutout");
  return root;
}
