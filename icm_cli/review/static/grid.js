// Overview: a virtual grid. Only the cells near the visible part exist; they are reused while scrolling.

import { baseName, byId, create, formatPercent, formatQuality, setText } from "./dom.js";
import { store } from "./store.js";
import { releaseThumbnail, showThumbnail } from "./thumbnails.js";

const GAP_PX = 10;
const CAPTION_PX = 62;
/** Rows beyond the visible ones whose cells exist. */
const EXTRA_ROWS = 2;
const MAX_REASONS = 2;
export const STATUS_LABELS = { open: "not reviewed", accepted: "accepted", rejected: "rejected" };

export class Grid {
  ids = [];
  active = null;
  cells = new Map();
  spare = [];
  columns = 1;

  /** `open(id)` is called when the user opens an image. */
  constructor(open) {
    this.open = open;
    this.box = byId("grid");
    this.content = create("div", { className: "grid-content", role: "presentation" });
    this.box.append(this.content);
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    this.box.addEventListener("keydown", (event) => this.handleKey(event));
    this.box.addEventListener("click", (event) => {
      const cell = event.target.closest(".cell");
      if (cell !== null) this.open(Number(cell.dataset.id));
    });
    new ResizeObserver(() => this.layOut()).observe(this.box);
    store.on("settings", () => this.layOut());
    store.on("items", (changed) => this.redraw(changed));
  }

  /** Show a list of ids. The active cell stays the same image if the list still contains it. */
  setIds(ids) {
    const index = Math.max(0, this.ids.indexOf(this.active));
    this.ids = ids;
    if (!ids.includes(this.active)) this.active = ids[Math.min(index, ids.length - 1)] ?? null;
    byId("grid-empty").hidden = ids.length > 0;
    this.layOut();
  }

  /** Make a cell the active one, and scroll so that it is visible. */
  activate(id) {
    const index = this.ids.indexOf(id);
    if (index < 0) return;
    this.active = id;
    const top = Math.floor(index / this.columns) * this.rowPx;
    const { scrollTop, clientHeight } = this.box;
    if (top < scrollTop) this.box.scrollTop = top;
    else if (top + this.rowPx > scrollTop + clientHeight) this.box.scrollTop = top + this.rowPx - clientHeight;
    this.draw();
  }

  layOut() {
    const width = this.box.clientWidth;
    if (width === 0) return; // the overview is hidden
    const side = store.settings.thumbnailSize;
    this.columns = Math.max(1, Math.floor((width - GAP_PX) / (side + GAP_PX)));
    this.cellPx = Math.floor((width - GAP_PX) / this.columns) - GAP_PX;
    this.rowPx = side + CAPTION_PX + GAP_PX;
    this.content.style.height = `${Math.ceil(this.ids.length / this.columns) * this.rowPx + GAP_PX}px`;
    this.draw();
  }

  /** Place the cells of the visible rows; cells of other rows are reused and their requests aborted. */
  draw() {
    if (!this.rowPx || this.box.clientWidth === 0) return;
    const { scrollTop, clientHeight } = this.box;
    const visible = [Math.floor(scrollTop / this.rowPx), Math.ceil((scrollTop + clientHeight) / this.rowPx)];
    const first = Math.max(0, visible[0] - EXTRA_ROWS) * this.columns;
    const last = Math.min(this.ids.length, (visible[1] + EXTRA_ROWS) * this.columns);
    const shown = new Set(this.ids.slice(first, last));
    if (this.active !== null) shown.add(this.active); // the focus needs its element
    for (const [id, cell] of this.cells) if (!shown.has(id)) this.free(id, cell);
    const rank = (index) => (index >= visible[0] * this.columns && index < visible[1] * this.columns ? 0 : 1);
    const indexes = Array.from({ length: Math.max(0, last - first) }, (_, at) => first + at);
    for (const index of indexes.sort((a, b) => rank(a) - rank(b) || a - b)) this.place(index);
    const activeIndex = this.ids.indexOf(this.active);
    if (activeIndex >= 0 && (activeIndex < first || activeIndex >= last)) this.place(activeIndex);
    if (this.active === null) this.box.removeAttribute("aria-activedescendant");
    else this.box.setAttribute("aria-activedescendant", `cell-${this.active}`);
  }

  redraw(changed) {
    for (const id of changed) if (this.cells.has(id) && this.box.clientWidth > 0) this.fill(this.cells.get(id), id);
  }

  /** Free all cells, and abort their requests: the overview is hidden. */
  clear() {
    for (const [id, cell] of this.cells) this.free(id, cell);
  }

  free(id, cell) {
    releaseThumbnail(cell.image);
    cell.root.hidden = true;
    cell.root.removeAttribute("id");
    this.cells.delete(id);
    this.spare.push(cell);
  }

  place(index) {
    const id = this.ids[index];
    let cell = this.cells.get(id);
    if (cell === undefined) {
      cell = this.spare.pop() ?? this.createCell();
      this.cells.set(id, cell);
      cell.root.hidden = false;
      cell.root.id = `cell-${id}`;
      cell.root.dataset.id = id;
      this.fill(cell, id);
    }
    const left = GAP_PX + (index % this.columns) * (this.cellPx + GAP_PX);
    const top = GAP_PX + Math.floor(index / this.columns) * this.rowPx;
    const { style } = cell.root;
    style.transform = `translate(${left}px, ${top}px)`;
    style.width = `${this.cellPx}px`;
    style.height = `${this.rowPx - GAP_PX}px`;
    cell.root.setAttribute("aria-posinset", index + 1);
    cell.root.setAttribute("aria-setsize", this.ids.length);
    cell.root.setAttribute("aria-selected", id === this.active);
    showThumbnail(cell.image, store.items.get(id), store.settings.thumbnailView);
  }

  createCell() {
    const image = create("img", { alt: "", draggable: false, decoding: "async" });
    const name = create("span", { className: "cell-name" });
    const quality = create("span", { className: "cell-quality" });
    const reasons = create("span", { className: "cell-reasons" });
    const badge = create("span", { className: "badge" });
    const root = create("div", { className: "cell", role: "option" });
    root.append(create("span", { className: "thumbnail" }, image), badge, name, quality, reasons);
    this.content.append(root);
    return { root, image, name, quality, reasons, badge };
  }

  fill(cell, id) {
    const item = store.items.get(id);
    const more = item.reasons.length - MAX_REASONS;
    const reasons = item.reasons.slice(0, MAX_REASONS).join(", ") + (more > 0 ? ` +${more}` : "");
    const marks = describeMarks(item);
    setText(cell.name, baseName(item.name));
    setText(cell.quality, formatQuality(item.quality));
    setText(cell.reasons, reasons);
    setText(cell.badge, marks.join(" · "));
    cell.root.dataset.status = item.status;
    cell.root.dataset.marked = marks.length > 0;
    cell.root.title = [item.name, ...item.reasons].join("\n");
    const quality = `quality ${formatQuality(item.quality)}`;
    cell.root.setAttribute("aria-label", [item.name, quality, ...item.reasons, ...marks].join(", "));
    showThumbnail(cell.image, item, store.settings.thumbnailView);
  }

  handleKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.rowPx)) * this.columns;
    const steps = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -this.columns,
      ArrowDown: this.columns,
      PageUp: -page,
      PageDown: page,
      Home: -Infinity,
      End: Infinity,
    };
    const index = this.ids.indexOf(this.active);
    if (event.key in steps) {
      const target = Math.min(this.ids.length - 1, Math.max(0, index + steps[event.key]));
      this.activate(this.ids[target]);
    } else if (event.key === "Enter" && index >= 0) this.open(this.active);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

/** Return what the badge of an image says: its status, and what else is special. */
function describeMarks(item) {
  const marks = [];
  if (store.pending.has(item.id)) marks.push("saving");
  else if (item.status !== "open") marks.push(STATUS_LABELS[item.status]);
  if (!item.has_alpha) marks.push("no alpha");
  if (store.isDraft(item.id)) marks.push("hints not saved");
  if (item.taught !== null) marks.push(item.taught);
  if (item.change > 0) marks.push(`changed ${formatPercent(item.change)}`);
  return marks;
}
