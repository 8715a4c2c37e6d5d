// Start of the page: connects the parts, the buttons and the keys. The address says which image is open.
import { api } from "./api.js";
import * as decisions from "./decisions.js";
import { byId, setText } from "./dom.js";
import { hasDirtyDraft } from "./drafts.js";
import { Filters } from "./filters.js";
import { Grid } from "./grid.js";
import { connectKeys } from "./keys.js";
import { clearError, notify, reportError } from "./messages.js";
import { Single, findButton } from "./single.js";
import { store } from "./store.js";
import { TeachDialog } from "./teach.js";

const HASH = /^#image-(\d+)$/;
const BRUSH_STEP = 1.25;
const ZOOM_STEP = 1.5;

const open = (id) => (location.hash = `image-${id}`);
const filters = new Filters();
const grid = new Grid(open);
const single = new Single(open);
const teachDialog = new TeachDialog(open);
const { editor, viewer } = single;

/** Show the page that the address names. */
function route() {
  const id = Number(HASH.exec(location.hash)?.[1] ?? NaN);
  const isSingle = store.items.has(id);
  byId("overview").hidden = isSingle;
  byId("single").hidden = !isSingle;
  if (isSingle) showSingle(id);
  else showOverview();
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
    if (!store.items.get(id).has_alpha) notify("There is no alpha to accept.");
    return;
  }
  decision(id);
  if (!isNext) return;
  const next = single.nextOpen();
  if (single.id === null) grid.activate(grid.ids[grid.ids.indexOf(id) + 1]);
  else if (next !== undefined) open(next);
  else { notify("All alphas of this list are reviewed."); location.hash = ""; }
}
function undoDecision() {
  const canUndo = single.details?.can_undo || store.pending.has(single.id);
  const id = canUndo ? single.id : decisions.lastDecided();
  if (id === undefined) notify("There is no decision to take back.");
  else decisions.undo(id);
}
/** What buttons (by their attribute data-action) and keys (by the help in index.html) do. */
const ACTIONS = {
  "open-help": () => byId("help").showModal(), "close-help": () => byId("help").close(),
  "open-teach": () => teachDialog.show(), "close-teach": () => byId("teach").close(),
  recompute: () => teachDialog.send(api.recompute),
  "stop-recompute": () => teachDialog.send(api.stopRecompute),
  "copy-command": () => teachDialog.copyCommand(),
  search: () => byId("filter-text").focus(), "reset-filters": () => filters.reset(),
  overview: () => (location.hash = ""), previous: () => single.step(-1), next: () => single.step(1),
  "previous-frame": () => single.stepInShot(-1), "next-frame": () => single.stepInShot(1),
  compare: () => single.toggleCompare(), marks: () => single.toggleMarks(),
  "zoom-in": () => viewer.zoomTo(viewer.zoom * ZOOM_STEP),
  "zoom-out": () => viewer.zoomTo(viewer.zoom / ZOOM_STEP),
  "zoom-100": () => viewer.zoomTo(1), fit: () => viewer.fit(), hold: () => (editor.isSpaceDown = true),
  press: () => editor.pressCrosshair(false), "press-negative": () => editor.pressCrosshair(true),
  "brush-smaller": () => editor.setBrush(store.settings.brush / BRUSH_STEP),
  "brush-larger": () => editor.setBrush(store.settings.brush * BRUSH_STEP + 1),
  "undo-hint": () => single.undoHint(), "redo-hint": () => single.redoHint(),
  "clear-hints": () => single.replaceHints([]),
  "discard-hints": () => single.replaceHints(single.draft.saved ?? []),
  accept: () => decide(decisions.accept, true), "accept-stay": () => decide(decisions.accept, false),
  reject: () => decide(decisions.reject, true), undo: undoDecision,
  reference: () => single.details && decisions.teach(single.id, "reference", "alpha"),
  negative: () => single.details && decisions.teach(single.id, "negative", byId("negative-area").value),
  forget: () => decisions.forget(single.id),
};
const datasets = (id) => [...byId(id).children].map(({ dataset }) => dataset);
for (const { view } of datasets("views")) ACTIONS[`view-${view}`] = () => single.setView(view);
for (const { tool } of datasets("tools")) ACTIONS[`tool-${tool}`] = () => editor.setTool(tool);
for (const [name, x, y] of [["Left", -1, 0], ["Right", 1, 0], ["Up", 0, -1], ["Down", 0, 1]]) {
  ACTIONS[`move-${name}`] = () => editor.moveCrosshair(x, y);
  ACTIONS[`move-one-${name}`] = () => editor.moveCrosshair(x, y, 1);
}
function connect() {
  document.addEventListener("click", ({ target }) => ACTIONS[target.closest("button")?.dataset.action]?.());
  connectKeys(ACTIONS, () => (single.id === null ? "overview" : "single"));
  document.addEventListener("keyup", ({ key }) => { if (key === " ") editor.isSpaceDown = false; });
  window.addEventListener("hashchange", route);
  window.addEventListener("beforeunload", (event) => {
    if (hasDirtyDraft() || store.pending.size > 0) event.preventDefault();
  });
  decisions.setOpener(open);
  for (const name of ["filter", "items"]) store.on(name, refreshList);
  store.on("run", showRun);
}
function showRun() {
  const { folder, model_state: state, model_error: message } = store.run;
  setText(byId("folder"), folder.split("/").slice(-3).join("/"));
  byId("folder").title = folder;
  if (state === "failed") reportError(`The model cannot be loaded: ${message}`, { topic: "model" });
  else clearError("model");
}

connect();
await store.start();
route();
