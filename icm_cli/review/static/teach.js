// Dialog of teaching: the taught images, the recomputation with its progress, and the command that reproduces the run.

import { api } from "./api.js";
import { forget } from "./decisions.js";
import { byId, create, formatPercent, setText } from "./dom.js";
import { notify, reportError } from "./messages.js";
import { store } from "./store.js";
import { showThumbnail } from "./thumbnails.js";

const MAX_LISTED = 200;
const STATES = { idle: "", running: "Running", done: "Done", stopped: "Stopped", failed: "Failed" };

export class TeachDialog {
  /** `open(id)` opens an image. */
  constructor(open) {
    this.open = open;
    this.dialog = byId("teach");
    byId("changed-list").addEventListener("click", (event) => this.handleClick(event));
    byId("taught-list").addEventListener("click", (event) => this.handleClick(event));
    for (const name of ["items", "recompute", "run"]) store.on(name, () => this.draw());
  }

  show() {
    this.dialog.showModal();
    this.draw();
  }

  close() {
    this.dialog.close();
  }

  async start() {
    await this.send(api.recompute);
  }

  async stop() {
    await this.send(api.stopRecompute);
  }

  async copyCommand() {
    try {
      await navigator.clipboard.writeText(store.run.command);
      notify("The command is copied.");
    } catch (error) {
      getSelection().selectAllChildren(byId("command")); // the browser refuses the clipboard to pages without HTTPS
      notify("The command is selected. Copy it with Ctrl+C.");
    }
  }

  async send(request) {
    try {
      store.setRecompute(await request());
    } catch (error) {
      reportError(`Recompute: ${error.message}`, { topic: "recompute" });
    }
  }

  handleClick(event) {
    const row = event.target.closest("[data-id]");
    if (row === null) return;
    const id = Number(row.dataset.id);
    if (event.target.dataset.action === "forget-row") forget(id);
    else if (event.target.closest("button") !== null) {
      this.close();
      this.open(id);
    }
  }

  draw() {
    this.drawHeader();
    if (!this.dialog.open) return;
    const { state, done, total, message, changed } = store.recompute;
    const progress = state === "running" || state === "stopped" ? `: ${done} of ${total} images` : "";
    setText(byId("recompute-state"), [STATES[state] + progress, message].filter(Boolean).join(". "));
    byId("recompute-bar").max = Math.max(1, total);
    byId("recompute-bar").value = state === "done" ? Math.max(1, total) : done;
    document.querySelector('[data-action="recompute"]').disabled = state === "running";
    document.querySelector('[data-action="stop-recompute"]').disabled = state !== "running";
    const taught = [...store.items.values()].filter((item) => item.taught !== null);
    this.drawList("taught-list", taught, (item) => item.taught, true);
    if (taught.length === 0) byId("taught-list").append(create("li", { className: "empty" }, "None yet."));
    const rows = changed.slice(0, MAX_LISTED).filter(({ id }) => store.items.has(id));
    const differences = new Map(rows.map(({ id, difference }) => [id, difference]));
    byId("changed").hidden = rows.length === 0;
    this.drawList("changed-list", rows.map(({ id }) => store.items.get(id)), ({ id }) => formatPercent(differences.get(id)));
    setText(byId("command"), store.run?.command ?? "");
  }

  drawHeader() {
    const { state, done, total } = store.recompute;
    setText(byId("open-teach"), state === "running" ? `Recomputing ${done} of ${total}` : "Teach and recompute");
    const model = store.run?.model_state;
    const texts = { loading: "model is loading", ready: "model is ready", failed: "model failed" };
    setText(byId("model-state"), texts[model] ?? "");
    byId("model-state").dataset.state = model;
    byId("model-state").title = store.run?.model_error || store.run?.model || "";
  }

  /** Draw rows of images into a list, if they have changed. */
  drawList(name, items, describe, canForget = false) {
    const list = byId(name);
    const key = JSON.stringify(items.map((item) => [item.id, item.version, describe(item)]));
    if (list.dataset.key === key) return;
    list.dataset.key = key;
    list.replaceChildren(...items.map((item) => createRow(item, describe(item), canForget)));
  }
}

function createRow(item, text, canForget) {
  const image = create("img", { alt: "", draggable: false });
  const open = create("button", { type: "button", className: "row-open" });
  open.append(create("span", { className: "thumbnail" }, image), create("span", { className: "row-name" }, item.name), text);
  showThumbnail(image, item, "cutout");
  const row = create("li", {}, open);
  row.dataset.id = item.id;
  if (canForget) {
    const button = create("button", { type: "button", "aria-label": `Do not use ${item.name} any more` }, "Remove");
    button.dataset.action = "forget-row";
    row.append(button);
  }
  return row;
}
