// One image: its views, its hints with their answers, its details and decisions.

import { api } from "./api.js";
import { Answers } from "./answers.js";
import { decodeImage, loadAlpha, loadSource } from "./bitmaps.js";
import { lastDecided } from "./decisions.js";
import { baseName, byId, create, formatPercent, formatQuality, setText } from "./dom.js";
import { openDraft } from "./drafts.js";
import { Editor } from "./editor.js";
import { STATUS_LABELS } from "./grid.js";
import { clearError, notify, reportError } from "./messages.js";
import { store } from "./store.js";
import { Strip } from "./strip.js";
import { Viewer } from "./viewer.js";

/** Colours of the views that have one, by the name of their setting. */
const COLOUR_SETTINGS = { overlay: "tint", colour: "background" };

export class Single {
  id = null;
  /** The list that previous and next follow, as it was when the overview was left. */
  ids = [];
  details = null;
  draft = null;
  /** Alpha and revision that are shown. */
  version = null;
  revision = null;

  constructor(open) {
    this.open = open;
    this.viewer = new Viewer(() => this.showZoom());
    this.editor = new Editor(this.viewer, (isDragging) => this.answer(isDragging));
    this.viewer.drawn = () => {
      this.editor.draw();
      this.showZoom();
    };
    this.answers = new Answers(
      (...answer) => this.showAnswer(...answer),
      (text) => setText(byId("answer-state"), text),
    );
    this.strip = new Strip(open);
    byId("colour").addEventListener("input", (event) => this.setColour(event.target.value));
    byId("compare-position").addEventListener("input", (event) => this.editor.setDivision(event.target.value / 100));
    store.on("items", (changed) => this.handleItems(changed));
    this.setView(store.settings.view);
  }

  // ---- loading

  /** Show an image. The image before stays visible until this one is loaded. */
  async load(id) {
    this.answers.cancel();
    this.id = id;
    this.details = this.draft = null;
    this.editor.setDraft(null);
    clearError("image");
    clearError("answer");
    this.showItem();
    this.showStrip();
    byId("loading").hidden = false;
    byId("single").setAttribute("aria-busy", "true");
    const item = store.items.get(id);
    try {
      const [details, source, alpha] = await Promise.all([api.details(id), loadSource(item), loadAlpha(item)]);
      const draft = await openDraft(details);
      if (this.id !== id) return; // the user has moved on
      this.viewer.setImage({ ...details, source, before: alpha });
      this.version = item.version;
      await this.showDetails(details, draft);
      if (this.version !== details.version) await this.reload();
      this.loadAhead();
    } catch (error) {
      if (this.id !== id) return;
      this.viewer.clear();
      reportError(`${store.items.get(id).name}: ${error.message}`, { topic: "image" });
    }
    byId("loading").hidden = true;
    byId("single").setAttribute("aria-busy", "false");
  }

  /** Leave the page of single images. */
  close() {
    this.answers.cancel();
    this.id = this.draft = this.details = null;
    this.editor.setDraft(null);
    this.viewer.clear();
    this.strip.clear();
  }

  async showDetails(details, draft) {
    this.details = details;
    this.revision = details.revision;
    this.draft = draft;
    this.editor.setDraft(draft);
    this.showItem();
    this.showStrip();
    if (!draft.isDirty) this.viewer.setAfter(null);
    else if (draft.answer?.shapes === draft.shapes) this.viewer.setAfter(await decodeImage(draft.answer.blob));
    else this.answers.ask(draft);
  }

  /** Load what has changed on the server; the user's own hints stay. */
  async reload() {
    const { id } = this;
    const item = store.items.get(id);
    this.revision = item.revision;
    try {
      const [details, alpha] = await Promise.all([api.details(id), loadAlpha(item)]);
      const draft = await openDraft(details);
      if (this.id !== id) return;
      if (this.version !== item.version) this.viewer.setBefore(alpha);
      this.version = item.version;
      await this.showDetails(details, draft);
    } catch (error) {
      reportError(`${item.name}: ${error.message}`, { topic: "image" });
    }
  }

  handleItems(changed) {
    if (this.id === null || !changed.has(this.id)) return;
    this.showItem();
    const { revision } = store.items.get(this.id);
    if (this.details !== null && revision > this.revision && !store.pending.has(this.id)) this.reload();
  }

  loadAhead() {
    const next = store.items.get(this.neighbour(1));
    if (next === undefined) return;
    for (const promise of [loadSource(next), loadAlpha(next)]) promise.catch(() => {}); // reported when it is opened
  }

  // ---- neighbours

  /** Return the id of an image before or after this one in the list; undefined at its ends. */
  neighbour(step, ids = this.ids) {
    return ids[ids.indexOf(this.id) + step];
  }

  /** Return the id of the next image that is not reviewed, from here to the end and then from the start. */
  nextOpen() {
    const at = this.ids.indexOf(this.id);
    const isOpen = (id) => id !== this.id && store.items.get(id).status === "open" && !store.pending.has(id);
    return [...this.ids.slice(at + 1), ...this.ids.slice(0, Math.max(0, at))].find(isOpen);
  }

  /** Open the image before or after this one: in the list, or in its shot. */
  step(step, isInShot = false) {
    const target = this.neighbour(step, isInShot ? (this.details?.shot ?? this.ids) : this.ids);
    if (target === undefined) notify(step > 0 ? "This is the last image." : "This is the first image.");
    else this.open(target);
  }

  showStrip() {
    const shot = this.details?.shot;
    if (shot) this.strip.show(shot, this.id, `Frames of the shot: ${shot.indexOf(this.id) + 1} of ${shot.length} ·`);
    else if (!store.run?.is_shot) this.strip.show(this.ids, this.id, "Images of the list:");
  }

  // ---- hints

  answer(isDragging) {
    this.showItem();
    if (!this.draft.isDirty) {
      this.answers.cancel();
      this.viewer.setAfter(null);
    } else if (isDragging) this.answers.askWhileDragging(this.draft);
    else this.answers.ask(this.draft);
  }

  async showAnswer(draft, shapes, blob, isRefined, signal) {
    const bitmap = await decodeImage(blob);
    if (signal.aborted || draft !== this.draft) return;
    if (draft.answer?.shapes === shapes && !isRefined) return; // the refined one was faster
    if (isRefined) draft.answer = { shapes, blob };
    this.viewer.setAfter(bitmap);
  }

  undoHint() {
    if (this.draft?.undo()) this.hintsReplaced();
  }

  redoHint() {
    if (this.draft?.redo()) this.hintsReplaced();
  }

  clearHints() {
    if (this.draft === null || this.draft.shapes.length === 0) return;
    this.draft.change([]);
    this.hintsReplaced();
  }

  revertHints() {
    if (!this.draft?.isDirty) return;
    this.draft.change(this.draft.saved);
    this.hintsReplaced();
  }

  hintsReplaced() {
    this.editor.draw();
    this.answer(false);
  }

  // ---- views

  setView(view) {
    store.setSetting("view", view);
    for (const button of byId("views").children) button.setAttribute("aria-pressed", button.dataset.view === view);
    const setting = COLOUR_SETTINGS[view];
    byId("colour").hidden = setting === undefined;
    if (setting !== undefined) byId("colour").value = store.settings[setting];
    this.viewer.set({ view, background: store.settings.background, tint: store.settings.tint });
  }

  setColour(colour) {
    store.setSetting(COLOUR_SETTINGS[store.settings.view], colour);
    this.setView(store.settings.view);
  }

  toggleCompare() {
    const isComparing = !this.viewer.isComparing;
    this.viewer.set({ isComparing });
    byId("compare-position").hidden = !isComparing;
    pressButton("compare", isComparing);
  }

  toggleMarks() {
    this.editor.isVisible = !this.editor.isVisible;
    this.editor.draw();
    pressButton("marks", this.editor.isVisible);
  }

  showZoom() {
    setText(byId("zoom"), `${Math.round(100 * this.viewer.zoom)} %`);
  }

  // ---- panel

  showItem() {
    const item = store.items.get(this.id);
    const { details, draft } = this;
    document.title = `${baseName(item.name)} – icm review`;
    const at = this.ids.indexOf(this.id);
    setText(byId("position"), at < 0 ? "" : `${at + 1} of ${this.ids.length}`);
    setText(byId("image-name"), baseName(item.name));
    byId("image-name").title = item.name;
    byId("image-status").dataset.status = item.status;
    const change = item.change > 0 ? `, changed by ${formatPercent(item.change)} by recompute` : "";
    const status = store.pending.has(item.id) ? "saving …" : STATUS_LABELS[item.status];
    setText(byId("image-status"), status + change + (item.has_alpha ? "" : ", no alpha"));
    byId("image-quality").hidden = item.quality === null;
    byId("quality").value = item.quality ?? 0;
    setText(byId("quality-value"), `quality ${formatQuality(item.quality)}`);
    byId("image-reasons").replaceChildren(...item.reasons.map((reason) => create("li", {}, reason)));
    setText(byId("hints-state"), describeHints(draft));
    setText(byId("taught-state"), item.taught === null ? "" : `Used as a ${item.taught}.`);
    this.enableButtons(item);
    if (details === null) return;
    const rows = { Folder: item.folder || "(top folder)", Source: details.source, Alpha: details.output };
    const size = { Size: `${details.width} × ${details.height}` };
    byId("image-details").replaceChildren(
      ...Object.entries({ ...size, ...rows }).flatMap(([name, value]) => [create("dt", {}, name), create("dd", {}, value)]),
    );
  }

  enableButtons(item) {
    const { details, draft } = this;
    const isReady = details !== null && !store.pending.has(item.id);
    const isEnabled = {
      accept: isReady && (item.has_alpha || draft.isDirty),
      "accept-stay": isReady && (item.has_alpha || draft.isDirty),
      reject: isReady,
      undo: isReady && (details.can_undo || lastDecided() !== undefined),
      reference: isReady && item.taught !== "reference" && (item.has_alpha || draft.isDirty),
      negative: isReady && item.taught !== "negative",
      "undo-hint": isReady && draft.past.length > 0,
      "redo-hint": isReady && draft.future.length > 0,
      "clear-hints": isReady && draft.shapes.length > 0,
      "discard-hints": isReady && draft.isDirty,
    };
    for (const [action, value] of Object.entries(isEnabled)) {
      document.querySelector(`#panel [data-action="${action}"]`).disabled = !value;
    }
    document.querySelector('[data-action="forget"]').hidden = item.taught === null;
  }
}

function describeHints(draft) {
  if (draft === null) return "";
  const count = draft.shapes.length;
  const number = count === 1 ? "1 hint" : `${count || "No"} hints`;
  return number + (draft.isDirty ? ", not saved. Accept saves them." : count > 0 ? ", saved." : ".");
}

function pressButton(action, isPressed) {
  document.querySelector(`#toolbar [data-action="${action}"]`).setAttribute("aria-pressed", isPressed);
}
