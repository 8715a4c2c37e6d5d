// State of the page: the run, its images as the server knows them, filters, and settings of the browser.
import { api } from "./api.js";
import { clearError, reportError } from "./dom.js";
import { isDraft } from "./drafts.js";

export const POLL_MS = 2000;
const NOT_CONNECTED = "not connected"; // state of the model while the server does not answer
const SETTINGS_KEY = "icm-review";
/** `overlay` and `colour` are the colours of these views. */
const DEFAULTS = {
  view: "overlay", overlay: "#ff3030", colour: "#808080", brush: 24,
  thumbnailView: "cutout", thumbnailSize: 176,
};
const collator = new Intl.Collator("en", { numeric: true });
/** Lowest quality first; images without an alpha, such as those beyond --frames, last. */
const rank = ({ quality, has_alpha: hasAlpha }) => (hasAlpha ? (quality ?? -1) : 2);
const ORDERS = {
  quality: (a, b) => rank(a) - rank(b) || a.id - b.id,
  name: (a, b) => collator.compare(a.name, b.name) || a.id - b.id,
  change: (a, b) => (b.change ?? -1) - (a.change ?? -1) || a.id - b.id,
};

class Store extends EventTarget {
  run = null;
  items = new Map(); // images by id, as the server sent them
  /** Revisions of the decisions and of the files that are known: {since, files}; {} before the first list. */
  known = {};
  recompute = { state: "idle", done: 0, total: 0, message: "", changed: [] };
  filter = { text: "", status: "all", folder: "/", reasons: [], sort: "quality" };
  settings = { ...DEFAULTS, ...JSON.parse(localStorage.getItem(SETTINGS_KEY) ?? "{}") };
  pending = new Map(); // promises of the changes that are being saved, by id
  /** Dispatch an event: "run", "items" (detail: Set of changed ids), "filter", "settings", "recompute", ... */
  emit(name, detail = null) { this.dispatchEvent(new CustomEvent(name, { detail })); }
  on(name, handle) { this.addEventListener(name, (event) => handle(event.detail)); }
  /** Ask the server for changes now and every few seconds. */
  async start() { await this.poll(); setTimeout(() => this.start(), POLL_MS); }
  /** Ask the server for changes of the run, the images and the recomputation. */
  async poll() {
    try {
      const requests = [api.run(), api.images(this.known), api.recomputeState()];
      const [run, { revision, files, images }, recompute] = await Promise.all(requests);
      const { run: before } = this;
      Object.assign(this, { run, known: { since: revision, files } });
      if (JSON.stringify(run) !== JSON.stringify(before)) this.emit("run");
      this.update(images);
      this.setRecompute(recompute);
      clearError("connection");
      if (before?.model_state === NOT_CONNECTED) this.emit("reconnected");
    } catch (error) {
      reportError(`The page is not up to date: ${error.message}.${error.advice ?? ""}`, { topic: "connection" });
      if (this.run === null || this.run.model_state === NOT_CONNECTED) return;
      this.run = { ...this.run, model_state: NOT_CONNECTED };
      this.emit("run");
    }
  }
  setRecompute(state) { this.recompute = state; this.emit("recompute"); }
  /** Store images that the server sent; older revisions than the known ones are ignored. */
  update(images) {
    const newer = images.filter(({ id, revision }) => revision >= (this.items.get(id)?.revision ?? 0));
    const isForeign = ({ id, decision }) => // a decision of somebody else
      this.items.has(id) && !this.pending.has(id) && decision !== this.items.get(id).decision;
    const foreign = newer.filter(isForeign);
    for (const item of newer) this.items.set(item.id, item);
    if (newer.length > 0) this.emit("items", new Set(newer.map((item) => item.id)));
    for (const { id } of foreign) this.emit("decided-elsewhere", id);
  }
  /** Store an image after a conflict, and load it again where it is shown: its source may have changed too. */
  updateStale(item) { this.update([item]); this.emit("stale", item.id); }
  /** Store the promise of a change of an image; null: it has ended. */
  setPending(id, saving) {
    if (saving === null) this.pending.delete(id);
    else this.pending.set(id, saving);
    this.emit("items", new Set([id]));
  }
  setFilter(values) { this.emit("filter", Object.assign(this.filter, values)); }
  setSettings(values) {
    Object.assign(this.settings, values);
    localStorage.setItem(SETTINGS_KEY, JSON.stringify(this.settings));
    this.emit("settings");
  }
  /** Return the ids that match the filters, in the order of the list. */
  select() {
    const items = [...this.items.values()].filter((item) => this.matches(item));
    return items.sort(ORDERS[this.filter.sort]).map((item) => item.id);
  }
  /** Return whether an image matches all filters except the one with the name `without`. */
  matches(item, without = null) {
    const { text, status, folder, reasons } = this.filter;
    if (!item.name.toLowerCase().includes(text.trim().toLowerCase())) return false;
    if (folder !== "/" && item.folder !== folder) return false;
    if (without !== "status" && !this.hasStatus(item, status)) return false;
    return without === "reasons" || reasons.length === 0 || item.reasons.some((reason) => reasons.includes(reason));
  }
  /** Return whether an image belongs to an entry of the status filter. */
  hasStatus(item, status) {
    if (status === "open") return item.status === "open" && item.has_alpha;
    if (status === "below") return item.status === "open" && rank(item) < this.run.review_below;
    if (status === "missing") return !item.has_alpha;
    if (status === "changed") return item.change > 0;
    if (status === "unsaved") return isDraft(item.id);
    if (status === "taught") return item.taught !== null;
    return status === "all" || item.status === status;
  }
}

export const store = new Store();
