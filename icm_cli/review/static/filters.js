// Filters of the overview, and the counters of the header.

import { byId, create, setText } from "./dom.js";
import { store } from "./store.js";

const STATUSES = {
  all: "All",
  open: "Not reviewed",
  below: "Needs review",
  accepted: "Accepted",
  rejected: "Rejected",
  changed: "Changed by recompute",
  taught: "Taught",
  unsaved: "Hints not saved",
};

export class Filters {
  statusRows = new Map();
  reasonRows = new Map();

  constructor() {
    this.connect("filter-text", "input", (input) => store.setFilter({ text: input.value.trim() }));
    this.connect("sort", "change", (input) => store.setFilter({ sort: input.value }));
    this.connect("filter-folder", "change", (input) => store.setFilter({ folder: input.value }));
    this.connect("thumbnail-view", "change", (input) => store.setSetting("thumbnailView", input.value));
    this.connect("thumbnail-size", "input", (input) => store.setSetting("thumbnailSize", Number(input.value)));
    byId("thumbnail-view").value = store.settings.thumbnailView;
    byId("thumbnail-size").value = store.settings.thumbnailSize;
    for (const [status, label] of Object.entries(STATUSES)) {
      const row = createRow("radio", "status", status, label);
      row.input.checked = status === store.filter.status;
      row.input.addEventListener("change", () => store.setFilter({ status }));
      byId("filter-status").append(row.root);
      this.statusRows.set(status, row);
    }
    store.on("items", () => this.draw());
    store.on("filter", () => this.draw());
    store.on("run", () => this.draw());
  }

  connect(id, event, handle) {
    byId(id).addEventListener(event, (each) => handle(each.target));
  }

  /** Remove all filters; the order stays. */
  reset() {
    byId("filter-text").value = "";
    byId("filter-folder").value = "";
    this.statusRows.get("all").input.checked = true;
    for (const { input } of this.reasonRows.values()) input.checked = false;
    store.setFilter({ text: "", status: "all", folder: "", reasons: new Set() });
  }

  draw() {
    this.drawHeader();
    this.drawStatuses();
    this.drawReasons();
    this.drawFolders();
  }

  drawHeader() {
    const counts = { open: 0, accepted: 0, rejected: 0 };
    for (const item of store.items.values()) counts[item.status] += 1;
    const reviewed = counts.accepted + counts.rejected;
    byId("reviewed-bar").max = Math.max(1, store.items.size);
    byId("reviewed-bar").value = reviewed;
    const text = `${reviewed} of ${store.items.size} reviewed · ${counts.accepted} accepted · ${counts.rejected} rejected`;
    setText(byId("counts"), text);
  }

  drawStatuses() {
    const matching = [...store.items.values()].filter((item) => store.matches(item, ["status"]));
    for (const [status, { root, count }] of this.statusRows) {
      const number = matching.filter((item) => store.hasStatus(item, status)).length;
      setText(count, number);
      root.hidden = number === 0 && ["changed", "taught", "unsaved"].includes(status) && store.filter.status !== status;
    }
  }

  drawReasons() {
    const counts = new Map();
    for (const item of store.items.values()) {
      const number = Number(store.matches(item, ["reasons"]));
      for (const reason of item.reasons) counts.set(reason, (counts.get(reason) ?? 0) + number);
    }
    for (const reason of counts.keys()) if (!this.reasonRows.has(reason)) this.addReason(reason);
    for (const [reason, { root, count }] of this.reasonRows) {
      setText(count, counts.get(reason) ?? 0);
      root.hidden = !counts.has(reason) && !store.filter.reasons.has(reason);
    }
    byId("filter-reasons").hidden = this.reasonRows.size === 0;
  }

  addReason(reason) {
    const row = createRow("checkbox", "reason", reason, reason);
    row.input.addEventListener("change", () => {
      const reasons = new Set(store.filter.reasons);
      if (row.input.checked) reasons.add(reason);
      else reasons.delete(reason);
      store.setFilter({ reasons });
    });
    this.reasonRows.set(reason, row);
    const sorted = [...this.reasonRows.keys()].sort();
    const next = this.reasonRows.get(sorted[sorted.indexOf(reason) + 1]);
    byId("filter-reasons").insertBefore(row.root, next?.root ?? null);
  }

  drawFolders() {
    const folders = [...new Set([...store.items.values()].map((item) => item.folder))].sort();
    const select = byId("filter-folder");
    if (select.options.length === folders.length + 1) return; // folders of a run never change
    select.replaceChildren(create("option", { value: "" }, "all folders"));
    for (const folder of folders) select.append(create("option", { value: folder }, folder || "(top folder)"));
  }
}

function createRow(type, name, value, label) {
  const input = create("input", { type, name, value });
  const count = create("span", { className: "count" });
  const root = create("label", { className: "choice" }, input, create("span", {}, label), count);
  return { root, input, count };
}
