// Filters of the overview, and the counters of the header.
import { byId, clone, create, setText } from "./dom.js";
import { store } from "./store.js";

/** Entries of the status filter that are shown only if images have them. */
const RARE = ["changed", "taught", "unsaved", "missing"];

export class Filters {
  reasonRows = new Map(); // rows of the reasons: {root, input, count} by reason
  constructor() {
    const connect = (id, event, handle) =>
      byId(id).addEventListener(event, ({ target }) => handle(target.value, target));
    connect("filter-text", "input", (text) => store.setFilter({ text: text.trim() }));
    connect("sort", "change", (sort) => store.setFilter({ sort }));
    connect("filter-folder", "change", (folder) => store.setFilter({ folder }));
    connect("filter-status", "change", (status) => store.setFilter({ status }));
    connect("filter-reasons", "change", (reason, { checked }) => {
      const reasons = new Set(store.filter.reasons);
      reasons[checked ? "add" : "delete"](reason);
      store.setFilter({ reasons });
    });
    connect("thumbnail-view", "change", (view) => store.setSetting("thumbnailView", view));
    connect("thumbnail-size", "input", (size) => store.setSetting("thumbnailSize", Number(size)));
    byId("thumbnail-view").value = store.settings.thumbnailView;
    byId("thumbnail-size").value = store.settings.thumbnailSize;
    for (const name of ["items", "filter", "run"]) store.on(name, () => this.draw());
  }
  /** Remove all filters; the order stays. */
  reset() {
    byId("filter-text").value = byId("filter-folder").value = "";
    byId("filter-status").querySelector('[value="all"]').checked = true;
    for (const { input } of this.reasonRows.values()) input.checked = false;
    store.setFilter({ text: "", status: "all", folder: "", reasons: new Set() });
  }
  draw() {
    const items = [...store.items.values()];
    this.drawHeader(items);
    this.drawReasons(items);
    const matching = items.filter((item) => store.matches(item, "status"));
    for (const input of byId("filter-status").querySelectorAll("input")) {
      const number = matching.filter((item) => store.hasStatus(item, input.value)).length;
      setText(input.parentElement.querySelector(".count"), number);
      input.parentElement.hidden = number === 0 && RARE.includes(input.value) && !input.checked;
    }
    const folders = [...new Set(items.map((item) => item.folder))].sort();
    if (byId("filter-folder").options.length === folders.length + 1) return; // folders of a run never change
    const options = folders.map((value) => create("option", { value }, value || "(top folder)"));
    byId("filter-folder").replaceChildren(create("option", { value: "" }, "all folders"), ...options);
  }
  drawHeader(items) {
    const counts = { open: 0, accepted: 0, rejected: 0 };
    for (const item of items) counts[item.status] += 1;
    const { accepted, rejected } = counts;
    const total = items.filter((item) => item.has_alpha || item.status !== "open").length;
    Object.assign(byId("reviewed-bar"), { max: total || 1, value: accepted + rejected });
    const reviewed = `${accepted + rejected} of ${total} reviewed`;
    setText(byId("counts"), `${reviewed} · ${accepted} accepted · ${rejected} rejected`);
  }
  drawReasons(items) {
    const counts = new Map();
    for (const item of items) {
      const number = Number(store.matches(item, "reasons"));
      for (const reason of item.reasons) counts.set(reason, (counts.get(reason) ?? 0) + number);
    }
    for (const reason of [...counts.keys()].sort()) if (!this.reasonRows.has(reason)) this.addReason(reason);
    for (const [reason, { root, input, count }] of this.reasonRows) {
      setText(count, counts.get(reason) ?? 0);
      root.hidden = !counts.has(reason) && !input.checked;
    }
    byId("filter-reasons").hidden = this.reasonRows.size === 0;
  }
  addReason(reason) {
    const row = clone("reason-template");
    row.input.value = reason;
    setText(row.text, reason);
    this.reasonRows.set(reason, row);
    byId("filter-reasons").append(row.root);
  }
}
