// Start of the page: connects the parts, the buttons and the keys. The address says which image is open.
import { api } from "./api.js";
import * as decisions from "./decisions.js";
import { byId, clearError, notify, openImage, reportError, setText } from "./dom.js";
import { hasDirtyDraft } from "./drafts.js";
import { editor } from "./editor.js";
import * as filters from "./filters.js";
import * as grid from "./grid.js";
import { findButton, single } from "./single.js";
import { store } from "./store.js";
import * as teachDialog from "./teach.js";
import { viewer } from "./viewer.js";

/** Show the page that the address names. */
function route() {
  const id = Number(location.hash.slice("#image-".length) || NaN);
  const isSingle = store.items.has(id);
  byId("overview").hidden = isSingle;
  byId("single").hidden = !isSingle;
  (isSingle ? showSingle : showOverview)(id);
}
function showSingle(id) {
  const isFromOverview = single.id === null;
  if (isFromOverview) single.ids = store.select();
  if (!single.ids.includes(id)) single.ids = [...single.ids, id];
  grid.clear();
  viewer.resize();
  if (single.id !== id) single.load(id);
  if (isFromOverview) byId("marks").focus({ preventScroll: true });
}
function showOverview() {
  const last = single.id;
  if (last !== null) single.close();
  document.title = "icm review";
  refreshList();
  if (last !== null) grid.activate(last);
  byId("grid").focus({ preventScroll: true });
}
function refreshList() {
  if (byId("overview").hidden) return;
  grid.setIds(store.select());
  setText(byId("list-title"), `${grid.ids.length} of ${store.items.size} images`);
}
/** Decide on the open image, or the active one of the overview. `isNext`: show the next one at once. */
function decide(decision, isNext) {
  const id = single.id ?? grid.active;
  if (id === null) return;
  if (single.id !== null && findButton(decision.name).disabled) {
    const report = () => notify(single.refusal || "It can be accepted now. Press A again."); // its source was restored
    if (decision === decisions.accept && single.refusal) single.refresh(viewer.image === null).then(report);
    return;
  }
  decision(id);
  if (!isNext) return;
  const next = single.nextUnreviewed();
  if (single.id === null) grid.activate(grid.ids[grid.ids.indexOf(id) + 1]);
  else if (next !== undefined) openImage(next);
  else { notify("All alphas of this list are reviewed."); location.hash = ""; }
}
function undoDecision() {
  const id = decisions.lastDecided(single.id);
  if (id === undefined) notify("No decision of this window can be taken back. Open an image to take back its decision.");
  else decisions.undo(id);
}
/** What elements (data-action: "name argument ...") and keys (data-run) do. The last argument: the id of an image. */
const ACTIONS = {
  open: (id) => { byId("teach").close(); openImage(id); },
  "open-help": () => byId("help").showModal(),
  "open-teach": () => teachDialog.show(),
  close: (dialog) => byId(dialog).close(),
  "reload-model": reloadModel,
  recompute: () => teachDialog.send(api.recompute),
  "stop-recompute": () => teachDialog.send(api.stopRecompute),
  "copy-command": () => teachDialog.copyCommand(),
  search: () => byId("filter-text").focus(),
  "reset-filters": () => filters.reset(),
  overview: () => { if (!editor.cancelDrag()) location.hash = ""; },
  step: (offset) => single.step(Number(offset)),
  "step-in-shot": (offset) => single.step(Number(offset), single.shot ?? single.ids),
  view: (view) => single.setView(view),
  compare: () => single.toggleCompare(),
  marks: () => single.toggleMarks(),
  zoom: (factor) => viewer.zoomTo(viewer.zoom * factor, ...editor.findCrosshair()),
  "zoom-100": () => viewer.zoomTo(1),
  fit: () => viewer.fit(),
  hold: () => (editor.isSpaceDown = true),
  tool: (tool) => editor.setTool(tool),
  move: (x, y, step) => editor.moveCrosshair(x, y, step),
  press: (kind) => editor.pressCrosshair(kind === "negative"),
  brush: (factor, added) => editor.setBrush(store.settings.brush * factor + Number(added)),
  "undo-hint": () => single.takeStep("undo"),
  "redo-hint": () => single.takeStep("redo"),
  "clear-hints": () => single.replaceHints([]),
  "discard-hints": () => single.replaceHints(single.draft.saved ?? []),
  accept: () => decide(decisions.accept, true),
  "accept-stay": () => decide(decisions.accept, false),
  reject: () => decide(decisions.reject, true),
  undo: undoDecision,
  "undo-recompute": () => decisions.undo(single.id, "recompute"),
  reference: () => single.details && decisions.teach(single.id, "reference", "alpha"),
  negative: () => single.details && decisions.teach(single.id, "negative", byId("negative-area").value),
  forget: () => decisions.forget(single.id),
  "forget-row": (id) => decisions.forget(id),
  "undo-row": (id) => decisions.undo(id, "recompute", false),
};
function run(action, id) {
  const [name, ...values] = action.split(" ");
  ACTIONS[name](...values, id);
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
function showRun() {
  const { folder, model, model_state: state, model_error: message, warnings } = store.run;
  setText(byId("folder"), folder.split("/").slice(-3).join("/"));
  byId("folder").title = folder;
  setText(byId("model-state"), `model: ${state}`);
  byId("model-state").dataset.state = state;
  byId("model-state").title = message || model;
  byId("reload-model").hidden = state !== "failed";
  if (state !== "failed") clearError("model");
  else reportError(`The model cannot be loaded: ${message}. Correct this, and press Try again at the top.`, { topic: "model" });
  for (const text of warnings) reportError(`${text[0].toUpperCase()}${text.slice(1)}.`);
}
async function reloadModel() {
  await api.reloadModel().catch(() => {}); // poll() reports it
  await store.poll();
  showRun();
  if (single.draft?.isDirty) single.answer(); // asks again for the alpha of the hints
}

document.addEventListener("click", ({ target }) => {
  const source = target.closest("[data-action]");
  if (source !== null) run(source.dataset.action, Number(source.closest("[data-id]")?.dataset.id));
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") !== null || isUsedByControl(event)) return;
  const page = single.id === null ? "overview" : "single";
  const key = `[data-keys~="${CSS.escape(keyName(event))}"]`; // the help says what a key does on which page
  const source = byId("help").querySelector(`:is([data-page="${page}"], [data-page="any"])${key}`);
  if (source === null) return;
  event.preventDefault();
  run(source.dataset.run);
});
document.addEventListener("keyup", ({ key }) => { if (key === " ") editor.isSpaceDown = false; });
window.addEventListener("hashchange", route);
window.addEventListener("beforeunload", (event) => {
  if (hasDirtyDraft() || store.pending.size > 0) event.preventDefault();
});
for (const name of ["filter", "items"]) store.on(name, refreshList);
store.on("run", showRun);
await store.start();
route();
