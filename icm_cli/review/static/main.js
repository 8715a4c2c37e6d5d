// Start of the page: connects the parts, the buttons and the keys. The address says which image is open.

import * as decisions from "./decisions.js";
import { byId, setText } from "./dom.js";
import { hasDirtyDraft } from "./drafts.js";
import { Filters } from "./filters.js";
import { Grid } from "./grid.js";
import { connectKeys } from "./keys.js";
import { clearError, notify, reportError } from "./messages.js";
import { Single } from "./single.js";
import { store } from "./store.js";
import { TeachDialog } from "./teach.js";

const HASH = /^#image-(\d+)$/;
const BRUSH_STEP = 1.25;
const ZOOM_STEP = 1.5;

const open = (id) => {
  location.hash = `image-${id}`;
};
const filters = new Filters();
const grid = new Grid(open);
const single = new Single(open);
const teachDialog = new TeachDialog(open);
const { editor, viewer } = single;
decisions.setOpener(open);

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

/** Show the images that match the filters. */
function refreshList() {
  if (!byId("overview").hidden) grid.setIds(store.select());
  const count = grid.ids.length;
  setText(byId("list-title"), `${count} of ${store.items.size} images`);
}

/** The image that a decision is about: the one that is open, or the active one of the overview. */
const target = () => single.id ?? grid.active;

/** Decide on the target; with `isNext`, go to the next one without waiting. */
function decide(decision, isNext) {
  const id = target();
  if (id === null) return;
  const button = document.querySelector(`#panel [data-action="${decision.name}"]`);
  if (single.id !== null && button.disabled) return;
  decision(id);
  if (!isNext) return;
  if (single.id === null) grid.activate(grid.ids[grid.ids.indexOf(id) + 1]);
  else {
    const next = single.nextOpen();
    if (next !== undefined) open(next);
    else {
      notify("All images of this list are reviewed.");
      location.hash = "";
    }
  }
}

function undoDecision() {
  const canUndo = single.details?.can_undo || store.pending.has(single.id);
  const id = canUndo ? single.id : decisions.lastDecided();
  if (id === undefined) notify("There is no decision to take back.");
  else decisions.undo(id);
}

function teach(kind) {
  if (single.details !== null) decisions.teach(single.id, kind, kind === "reference" ? "alpha" : byId("negative-area").value);
}

const setTool = (tool) => editor.setTool(tool);
const showHelp = () => byId("help").showModal();
const backToOverview = () => (location.hash = "");

/** What the buttons do, by their attribute data-action. */
const ACTIONS = {
  "open-help": showHelp,
  "close-help": () => byId("help").close(),
  "open-teach": () => teachDialog.show(),
  "close-teach": () => teachDialog.close(),
  recompute: () => teachDialog.start(),
  "stop-recompute": () => teachDialog.stop(),
  "copy-command": () => teachDialog.copyCommand(),
  "reset-filters": () => filters.reset(),
  overview: backToOverview,
  previous: () => single.step(-1),
  next: () => single.step(1),
  compare: () => single.toggleCompare(),
  marks: () => single.toggleMarks(),
  "zoom-in": () => viewer.zoomTo(viewer.zoom * ZOOM_STEP),
  "zoom-out": () => viewer.zoomTo(viewer.zoom / ZOOM_STEP),
  "zoom-100": () => viewer.zoomTo(1),
  fit: () => viewer.fit(),
  "undo-hint": () => single.undoHint(),
  "redo-hint": () => single.redoHint(),
  "clear-hints": () => single.clearHints(),
  "discard-hints": () => single.revertHints(),
  accept: () => decide(decisions.accept, true),
  "accept-stay": () => decide(decisions.accept, false),
  reject: () => decide(decisions.reject, true),
  undo: undoDecision,
  reference: () => teach("reference"),
  negative: () => teach("negative"),
  forget: () => decisions.forget(single.id),
};

const crosshair = (x, y) => [
  [`Shift+Arrow${arrowName(x, y)}`, () => editor.moveCrosshair(x, y)],
  [`Ctrl+Shift+Arrow${arrowName(x, y)}`, () => editor.moveCrosshair(x, y, 1)],
];
const arrowName = (x, y) => (x === 0 ? (y < 0 ? "Up" : "Down") : x < 0 ? "Left" : "Right");

/** Groups of [keys, description, page, action]; without an action, the entry only explains. */
const KEYS = [
  ["Review", [
    [["a"], "accept, and open the next image that is not reviewed", "any", ACTIONS.accept],
    [["Shift+a"], "accept, and stay", "any", ACTIONS["accept-stay"]],
    [["r"], "reject, and open the next image that is not reviewed", "any", ACTIONS.reject],
    [["u"], "take back the last accept or reject", "any", undoDecision],
    [["ArrowLeft"], "previous image", "single", ACTIONS.previous],
    [["ArrowRight"], "next image", "single", ACTIONS.next],
    [[","], "previous frame of the shot", "single", () => single.step(-1, true)],
    [["."], "next frame of the shot", "single", () => single.step(1, true)],
    [["Escape"], "back to the overview", "single", backToOverview],
  ]],
  ["Overview", [
    [["Arrows"], "move between images", "overview", null],
    [["Enter"], "open the image", "overview", null],
    [["/"], "search", "overview", () => byId("filter-text").focus()],
    [["?"], "this help", "any", showHelp],
  ]],
  ["View", [
    ...["source", "alpha", "overlay", "checker", "colour"].map((view, at) => [
      [String(at + 1)], view === "checker" ? "checkerboard" : view, "single", () => single.setView(view),
    ]),
    [["w"], "before and after", "single", ACTIONS.compare],
    [["m"], "show or hide the hints", "single", ACTIONS.marks],
    [["f"], "fit the image", "single", ACTIONS.fit],
    [["0"], "100 %", "single", ACTIONS["zoom-100"]],
    [["+", "="], "zoom in (or wheel)", "single", ACTIONS["zoom-in"]],
    [["-"], "zoom out (or wheel)", "single", ACTIONS["zoom-out"]],
    [["Space"], "hold, and drag: move the image (or middle button)", "single", () => (editor.isSpaceDown = true)],
  ]],
  ["Fix", [
    [["p"], "click: object; right-click or Alt-click: not the object", "single", () => setTool("point")],
    [["x"], "box around the object", "single", () => setTool("box")],
    [["k"], "brush: keep, alpha 1", "single", () => setTool("keep")],
    [["d"], "brush: drop, alpha 0", "single", () => setTool("drop")],
    [["e"], "brush: erase paint", "single", () => setTool("erase")],
    [["h"], "move the image", "single", () => setTool("pan")],
    [["["], "smaller brush", "single", () => editor.setBrush(store.settings.brush / BRUSH_STEP)],
    [["]"], "larger brush", "single", () => editor.setBrush(store.settings.brush * BRUSH_STEP + 1)],
    [["Ctrl+z"], "undo the last hint", "single", ACTIONS["undo-hint"]],
    [["Ctrl+Shift+z", "Ctrl+y"], "redo", "single", ACTIONS["redo-hint"]],
    [["t"], "use as reference", "single", ACTIONS.reference],
    [["Shift+t"], "use as negative", "single", ACTIONS.negative],
  ]],
  ["Without a mouse", [
    [["Shift+Arrows"], "move the pointer; with Ctrl: by one pixel", "single", null],
    [["Enter"], "use the tool at the pointer", "single", () => editor.pressCrosshair(false)],
    [["Alt+Enter"], "not the object", "single", () => editor.pressCrosshair(true)],
  ]],
];

function connect() {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button === null) return;
    const { action, view, tool } = button.dataset;
    if (action in ACTIONS) ACTIONS[action]();
    if (view !== undefined) single.setView(view);
    if (tool !== undefined) setTool(tool);
  });
  const arrows = [[0, -1], [0, 1], [-1, 0], [1, 0]].flatMap(([x, y]) => crosshair(x, y));
  connectKeys(KEYS, () => (single.id === null ? "overview" : "single"), new Map(arrows));
  document.addEventListener("keyup", (event) => {
    if (event.key === " ") editor.isSpaceDown = false;
  });
  window.addEventListener("hashchange", route);
  window.addEventListener("beforeunload", (event) => {
    if (hasDirtyDraft() || store.pending.size > 0) event.preventDefault();
  });
  store.on("filter", refreshList);
  store.on("items", refreshList);
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
