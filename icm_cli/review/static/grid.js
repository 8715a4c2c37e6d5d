// Overview: a virtual grid. Only the cells near the visible part exist; they are reused while scrolling.
import {
  STATUS_LABELS, baseName, byId, clone, formatPercent, formatQuality, isChanged, setText,
} from "./dom.js";
import { store } from "./store.js";
import { releaseThumbnail, showThumbnail } from "./thumbnails.js";

const GAP_PX = 10;
const CAPTION_PX = 62;
const EXTRA_ROWS = 2; // rows beyond the visible ones whose cells exist
const MAX_REASONS = 2;

export class Grid {
  ids = [];
  active = null;
  cells = new Map(); // cells in use by id
  spare = []; // cells that wait to be used again
  columns = 1;
  constructor(open) {
    this.open = open;
    this.box = byId("grid");
    this.content = byId("grid-content");
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    this.box.addEventListener("keydown", (event) => this.handleKey(event));
    this.content.addEventListener("click", ({ target }) => {
      if (target !== this.content) open(Number(target.closest(".cell").dataset.id));
    });
    new ResizeObserver(() => this.layOut()).observe(this.box);
    store.on("settings", () => this.layOut());
    store.on("items", (changed) => {
      for (const id of changed) if (this.cells.has(id)) this.fill(this.cells.get(id), id);
    });
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
    this.box.scrollTop = Math.min(top, Math.max(scrollTop, top + this.rowPx - clientHeight));
    this.draw();
  }
  /** Free all cells, and abort their requests: the overview is hidden. */
  clear() { for (const id of this.cells.keys()) this.free(id); }
  layOut() {
    const width = this.box.clientWidth - GAP_PX;
    if (width <= 0) return; // the overview is hidden
    const side = store.settings.thumbnailSize;
    this.columns = Math.max(1, Math.floor(width / (side + GAP_PX)));
    this.cellPx = Math.floor(width / this.columns) - GAP_PX;
    this.rowPx = side + CAPTION_PX + GAP_PX;
    this.content.style.height = `${Math.ceil(this.ids.length / this.columns) * this.rowPx + GAP_PX}px`;
    this.draw();
  }
  /** Place the cells of the visible rows first, then those around; cells of other rows are freed. */
  draw() {
    const { scrollTop, clientHeight, clientWidth } = this.box;
    if (!this.rowPx || clientWidth === 0) return;
    const start = Math.floor(scrollTop / this.rowPx) * this.columns;
    const end = Math.ceil((scrollTop + clientHeight) / this.rowPx) * this.columns;
    const extra = EXTRA_ROWS * this.columns;
    const indexes = new Set([...range(start, end), ...range(start - extra, end + extra)]);
    indexes.add(this.ids.indexOf(this.active)); // the focus needs its element
    const shown = [...indexes].filter((index) => index >= 0 && index < this.ids.length);
    const shownIds = new Set(shown.map((index) => this.ids[index]));
    for (const id of this.cells.keys()) if (!shownIds.has(id)) this.free(id);
    for (const index of shown) this.place(index);
    this.box.setAttribute("aria-activedescendant", `cell-${this.active}`);
  }
  free(id) {
    const cell = this.cells.get(id);
    releaseThumbnail(cell.image);
    cell.root.remove();
    this.cells.delete(id);
    this.spare.push(cell);
  }
  place(index) {
    const id = this.ids[index];
    if (!this.cells.has(id)) {
      const cell = this.spare.pop() ?? clone("cell-template");
      this.cells.set(id, cell);
      cell.root.id = `cell-${id}`;
      cell.root.dataset.id = id;
      this.content.append(cell.root);
      this.fill(cell, id);
    }
    const { root, image } = this.cells.get(id);
    const left = GAP_PX + (index % this.columns) * (this.cellPx + GAP_PX);
    const top = GAP_PX + Math.floor(index / this.columns) * this.rowPx;
    const size = { width: `${this.cellPx}px`, height: `${this.rowPx - GAP_PX}px` };
    Object.assign(root.style, { transform: `translate(${left}px, ${top}px)`, ...size });
    const place = { ariaPosInSet: index + 1, ariaSetSize: this.ids.length };
    Object.assign(root, { ...place, ariaSelected: id === this.active });
    showThumbnail(image, store.items.get(id), store.settings.thumbnailView);
  }
  fill({ root, image, name, folder, quality, reasons, badge }, id) {
    const item = store.items.get(id);
    const more = item.reasons.length - MAX_REASONS;
    const marks = describeMarks(item);
    setText(name, baseName(item.name));
    setText(folder, item.folder);
    setText(quality, formatQuality(item.quality));
    setText(reasons, item.reasons.slice(0, MAX_REASONS).join(", ") + (more > 0 ? ` +${more}` : ""));
    setText(badge, marks.join(" · "));
    root.dataset.status = item.status;
    const label = [item.name, `quality ${formatQuality(item.quality)}`, ...item.reasons, ...marks];
    Object.assign(root, { title: [item.name, ...item.reasons].join("\n"), ariaLabel: label.join(", ") });
    showThumbnail(image, item, store.settings.thumbnailView);
  }
  handleKey(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.rowPx)) * this.columns;
    const vertical = { ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -page, PageDown: page };
    const steps = { ArrowLeft: -1, ArrowRight: 1, ...vertical, Home: -Infinity, End: Infinity };
    const index = this.ids.indexOf(this.active);
    if (event.ctrlKey || event.metaKey || event.altKey || index < 0) return;
    if (event.key === "Enter") this.open(this.active);
    else if (event.key in steps) {
      this.activate(this.ids[Math.min(this.ids.length - 1, Math.max(0, index + steps[event.key]))]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

const range = (start, end) => Array.from({ length: end - start }, (_, offset) => start + offset);

/** Return what the badge of an image says: its status, and what else is special. */
function describeMarks(item) {
  const status = item.status !== "open" && STATUS_LABELS[item.status];
  const saving = store.pending.has(item.id) ? "saving" : status;
  const draft = store.isDraft(item.id) && "hints not saved";
  const change = isChanged(item) && `changed ${formatPercent(item.change)}`;
  return [saving, !item.has_alpha && "no alpha", draft, item.taught, change].filter(Boolean);
}
