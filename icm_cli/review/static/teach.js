// Dialog of teaching: the taught images, the recompute with its progress, and the command of the run.
import { api } from "./api.js";
import { forget } from "./decisions.js";
import { byId, clone, formatPercent, setText } from "./dom.js";
import { notify, reportError } from "./messages.js";
import { store } from "./store.js";
import { showThumbnail } from "./thumbnails.js";

const MAX_LISTED = 200;
const STATES = { idle: "", done: "Done", failed: "Failed" };

export class TeachDialog {
  constructor(open) {
    this.open = open;
    this.dialog = byId("teach");
    this.dialog.addEventListener("click", (event) => this.handleClick(event));
    this.dialog.addEventListener("close", () => document.body.append(byId("messages")));
    for (const name of ["items", "recompute", "run"]) store.on(name, () => this.draw());
  }
  show() {
    this.dialog.append(byId("messages")); // above the page
    this.dialog.showModal();
    this.draw();
    store.poll(); // the command is that of now
  }
  /** Start or stop the recomputation. */
  async send(request) {
    try {
      store.setRecompute(await request());
    } catch (error) { reportError(`Recompute: ${error.message}.`, { topic: "recompute" }); }
  }
  copyCommand() {
    getSelection().selectAllChildren(byId("command"));
    document.execCommand("copy"); // navigator.clipboard needs HTTPS
    notify("The command is copied.");
  }
  handleClick({ target }) {
    const id = Number(target.closest("[data-id]")?.dataset.id);
    if (target.dataset.action === "forget-row") forget(id);
    else if (target.closest(".row-open") !== null) { this.dialog.close(); this.open(id); }
  }
  draw() {
    this.drawHeader();
    if (!this.dialog.open) return;
    const { state, done, total, message, changed } = store.recompute;
    setText(byId("recompute-state"), [describeProgress(), message].filter(Boolean).join("; "));
    Object.assign(byId("recompute-bar"), { max: total || 1, value: state === "done" ? total || 1 : done });
    this.dialog.querySelector('[data-action="recompute"]').disabled = state === "running";
    this.dialog.querySelector('[data-action="stop-recompute"]').disabled = state !== "running";
    const taught = [...store.items.values()].filter((item) => item.taught !== null);
    drawRows("taught-list", taught.map((item) => [item, item.taught]), true);
    byId("taught-empty").hidden = taught.length > 0;
    const rows = changed.slice(0, MAX_LISTED).filter(({ id }) => store.items.has(id));
    const changes = rows.map(({ id, difference }) => [store.items.get(id), formatPercent(difference)]);
    drawRows("changed-list", changes, false);
    byId("changed").hidden = rows.length === 0;
    setText(byId("command"), store.run?.command ?? "");
  }
  drawHeader() {
    const isRunning = store.recompute.state === "running";
    setText(byId("open-teach"), isRunning ? describeProgress() : "Teach and recompute");
    if (store.run === null) return;
    setText(byId("model-state"), `model: ${store.run.model_state}`);
    byId("model-state").dataset.state = store.run.model_state;
    byId("model-state").title = store.run.model_error || store.run.model;
  }
}
/** Return what the recompute does. */
function describeProgress() {
  const { state, done, total } = store.recompute;
  const count = `${done} of ${total} images`;
  if (state === "running") return done > 0 ? `Recomputing: ${count}` : "Preparing references";
  return state === "stopped" ? `Stopped: ${count}` : STATES[state];
}
/** Draw rows [item, text] into a list, if they have changed. */
function drawRows(id, rows, canForget) {
  const key = JSON.stringify(rows.map(([item, text]) => [item.id, item.version, text]));
  if (byId(id).dataset.key === key) return;
  byId(id).dataset.key = key;
  byId(id).replaceChildren(...rows.map(([item, text]) => createRow(item, text, canForget)));
}
function createRow(item, description, canForget) {
  const { root, image, name, text, remove } = clone("row-template");
  root.dataset.id = item.id;
  setText(name, item.name);
  setText(text, description);
  remove.hidden = !canForget;
  remove.setAttribute("aria-label", `Remove ${item.name}`);
  showThumbnail(image, item, "cutout");
  return root;
}
