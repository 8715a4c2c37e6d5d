// Overview: a virtual grid. Only the cells near the visible part exist.
import { STATUS_LABELS, byId, clone, formatPercent, formatQuality, isChanged, openImage, setText } from "./dom.js";
import { isDraft } from "./drafts.js";
import { store } from "./store.js";
import { fillThumbnail, releaseThumbnail, showThumbnail } from "./thumbnails.js";

const GAP_PX = 10;
const CAPTION_PX = 62;
const EXTRA_ROWS = 2; // rows beyond the visible ones whose cells exist
const MAX_REASONS = 2;
const box = byId("grid");
const cells = new Map(); // cells in use by id
let [columns, cellPx, rowPx] = [1, 0, 0];
export let ids = [];
export let active = null; // the id of the active cell; null: there is none

box.addEventListener("scroll", draw, { passive: true });
box.addEventListener("keydown", handleKey);
new ResizeObserver(layOut).observe(box);
store.on("settings", layOut);
store.on("items", (changed) => {
  for (const id of changed) if (cells.has(id)) fill(cells.get(id), id);
});

/** Show a list of ids. The active cell stays the same image if the list still contains it. */
export function setIds(newIds) {
  const index = Math.max(0, ids.indexOf(active));
  ids = newIds;
  if (!ids.includes(active)) active = ids[Math.min(index, ids.length - 1)] ?? null;
  byId("grid-empty").hidden = ids.length > 0;
  layOut();
}
/** Make a cell the active one, and scroll so that it is visible. */
export function activate(id) {
  if (!ids.includes(id)) return;
  active = id;
  draw();
  cells.get(id).root.scrollIntoView({ block: "nearest" });
}
/** Free all cells, and abort their requests: the overview is hidden. */
export const clear = () => [...cells.keys()].forEach(free);

function layOut() {
  const width = box.clientWidth - GAP_PX;
  if (width <= 0) return; // the overview is hidden
  const side = store.settings.thumbnailSize;
  columns = Math.max(1, Math.floor(width / (side + GAP_PX)));
  cellPx = Math.floor(width / columns) - GAP_PX;
  rowPx = side + CAPTION_PX + GAP_PX;
  byId("grid-content").style.height = `${Math.ceil(ids.length / columns) * rowPx + GAP_PX}px`;
  draw();
}
/** Place the cells of the visible rows first, then those around; cells of other rows are freed. */
function draw() {
  const { scrollTop, clientHeight, clientWidth } = box;
  if (rowPx === 0 || clientWidth === 0) return;
  const start = Math.floor(scrollTop / rowPx) * columns;
  const end = Math.ceil((scrollTop + clientHeight) / rowPx) * columns;
  const extra = EXTRA_ROWS * columns;
  const indexes = new Set([...range(start, end), ...range(start - extra, end + extra)]);
  indexes.add(ids.indexOf(active)); // the focus needs its element
  const shown = [...indexes].filter((index) => index >= 0 && index < ids.length);
  const shownIds = new Set(shown.map((index) => ids[index]));
  for (const id of cells.keys()) if (!shownIds.has(id)) free(id);
  shown.forEach(place);
  box.setAttribute("aria-activedescendant", `cell-${active}`);
}
function free(id) {
  const { root, image } = cells.get(id);
  releaseThumbnail(image);
  root.remove();
  cells.delete(id);
}
function place(index) {
  const id = ids[index];
  const cell = cells.get(id) ?? clone("cell-template");
  const { root, image } = cell;
  if (!cells.has(id)) {
    cells.set(id, cell);
    root.id = `cell-${id}`;
    byId("grid-content").append(root);
    fill(cell, id);
  }
  const left = GAP_PX + (index % columns) * (cellPx + GAP_PX);
  const top = GAP_PX + Math.floor(index / columns) * rowPx;
  const size = { width: `${cellPx}px`, height: `${rowPx - GAP_PX}px` };
  Object.assign(root.style, { transform: `translate(${left}px, ${top}px)`, ...size });
  Object.assign(root, { ariaPosInSet: index + 1, ariaSetSize: ids.length, ariaSelected: id === active });
  showThumbnail(image, store.items.get(id), store.settings.thumbnailView);
}
function fill(cell, id) {
  const item = store.items.get(id);
  const more = item.reasons.length - MAX_REASONS;
  const marks = describeMarks(item);
  fillThumbnail(cell, item, [...item.reasons, ...marks]);
  setText(cell.quality, formatQuality(item.quality));
  setText(cell.reasons, item.reasons.slice(0, MAX_REASONS).join(", ") + (more > 0 ? ` +${more}` : ""));
  setText(cell.badge, marks.join(" · "));
  cell.root.title = [item.name, ...item.reasons].join("\n");
}
function handleKey(event) {
  const page = Math.max(1, Math.floor(box.clientHeight / rowPx)) * columns;
  const vertical = { ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page };
  const steps = { ArrowLeft: -1, ArrowRight: 1, ...vertical, Home: -Infinity, End: Infinity };
  const index = ids.indexOf(active);
  if (event.ctrlKey || event.metaKey || event.altKey || index < 0) return;
  if (event.key === "Enter") openImage(active);
  else if (event.key in steps) activate(ids[Math.min(ids.length - 1, Math.max(0, index + steps[event.key]))]);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

const range = (start, end) => Array.from({ length: end - start }, (_, offset) => start + offset);
/** Return what the badge of an image says: its status, and what else is special. */
function describeMarks(item) {
  const status = item.status !== "open" && STATUS_LABELS[item.status];
  const saving = store.pending.has(item.id) ? "saving" : status;
  const draft = isDraft(item.id) && "hints not saved";
  const change = isChanged(item) && `changed ${formatPercent(item.change)}`;
  return [saving, !item.has_alpha && "no alpha", draft, item.taught, change].filter(Boolean);
}
