// Filters of the overview, and the counters of the header.
import { byId, clone, create, setText } from "./dom.js";
import { store } from "./store.js";

const form = byId("filters"); // without the order and the look of the list, so that a reset keeps them
const reasonRows = new Map(); // rows of the reasons: {root, input, count} by reason

byId("thumbnail-view").value = store.settings.thumbnailView;
byId("thumbnail-size").value = store.settings.thumbnailSize;
form.addEventListener("input", apply);
form.addEventListener("submit", () => byId("grid").focus()); // Enter in the search
for (const name of ["items", "filter", "run"]) store.on(name, draw);

export const reset = () => { form.reset(); apply(); };

function apply() {
  const data = new FormData(form);
  store.setFilter({ ...Object.fromEntries(data), reasons: data.getAll("reason"), sort: byId("sort").value });
  const size = byId("thumbnail-size").valueAsNumber;
  store.setSettings({ thumbnailView: byId("thumbnail-view").value, thumbnailSize: size });
}

function draw() {
  const items = [...store.items.values()];
  drawHeader(items);
  drawReasons(items);
  const matching = items.filter((item) => store.matches(item, "status"));
  for (const row of byId("filter-status").querySelectorAll(".choice")) {
    const [input] = row.children;
    const number = matching.filter((item) => store.hasStatus(item, input.value)).length;
    setText(row.querySelector(".count"), number);
    row.hidden = number === 0 && row.classList.contains("rare") && !input.checked;
  }
  const known = new Set([...byId("filter-folder").options].slice(1).map(({ value }) => value));
  const folders = [...new Set(items.map((item) => item.folder))].filter((folder) => !known.has(folder)).sort();
  const options = folders.map((value) => create("option", { value, textContent: value || "(top folder)" }));
  byId("filter-folder").append(...options);
}

function drawHeader(items) {
  const count = (status) => items.filter((item) => item.status === status).length;
  const [accepted, rejected] = [count("accepted"), count("rejected")];
  const total = items.filter((item) => item.has_alpha || item.status !== "open").length;
  Object.assign(byId("reviewed-bar"), { max: total || 1, value: accepted + rejected });
  setText(byId("counts"), `${accepted + rejected} of ${total} reviewed · ${accepted} accepted · ${rejected} rejected`);
}

function drawReasons(items) {
  const counts = new Map();
  for (const item of items) {
    const number = Number(store.matches(item, "reasons"));
    for (const reason of item.reasons) counts.set(reason, (counts.get(reason) ?? 0) + number);
  }
  for (const reason of [...counts.keys()].sort()) if (!reasonRows.has(reason)) addReason(reason);
  for (const [reason, { root, input, count }] of reasonRows) {
    setText(count, counts.get(reason) ?? 0);
    root.hidden = !counts.has(reason) && !input.checked;
  }
  byId("filter-reasons").hidden = reasonRows.size === 0;
}

function addReason(reason) {
  const row = clone("reason-template");
  row.input.value = reason;
  setText(row.text, reason);
  reasonRows.set(reason, row);
  byId("filter-reasons").append(row.root);
}
