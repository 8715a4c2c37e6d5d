// One image: its views, its hints with their answers, its details and decisions.

import { api } from "./api.js";
import { Answers } from "./answers.js";
import { decodeImage, loadAlpha, loadSource } from "./bitmaps.js";
import { lastDecided } from "./decisions.js";
import { STATUS_LABELS, baseName, byId, create, formatPercent, formatQuality, setText } from "./dom.js";
import { openDraft } from "./drafts.js";
import { Editor } from "./editor.js";
import { clearError, notify, reportError } from "./messages.js";
import { store } from "./store.js";
import { Strip } from "./strip.js";
import { Viewer } from "./viewer.js";

/** Settings of the colours of views. */
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

  /** `open(id)` opens another image. */
  constructor(open) {
    this.open = open;
    this.viewer = new Viewer(() => {
      this.editor?.draw();
      setText(byId("zoom"), `${Math.round(100 * this.viewer.zoom)} %`);
    });
    this.editor = new Editor(this.viewer, (isDragging) => this.answer(isDragging));
    this.strip = new Strip(open);
    const describe = (text) => setText(byId("answer-state"), text);
    this.answers = new Answers((...answer) => this.showAnswer(...answer), describe);
    byId("colour").addEventListener("input", ({ target }) => this.setColour(target.value));
    byId("compare-position").addEventListener("input", ({ target }) => this.editor.setDivision(target.value / 100));
    store.on("items", (changed) => this.handleItems(changed));
    this.setView(store.settings.view);
  }

  /** Show an image. The image before stays visible until this one is loaded. */
  async load(id) {
    this.leave();
    this.id = id;
    for (const topic of ["image", "answer"]) clearError(topic);
    this.showItem();
    this.setBusy(true);
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
      this.viewer.set({ image: null });
      reportError(`${item.name}: ${error.message}`, { topic: "image" });
    }
    this.setBusy(false);
  }

  /** Load what has changed on the server; the hints that are not saved stay. */
  async reload() {
    const { id } = this;
    const item = store.items.get(id);
    this.revision = item.revision;
    try {
      const [details, alpha] = await Promise.all([api.details(id), loadAlpha(item)]);
      const draft = await openDraft(details);
      if (this.id !== id) return;
      if (this.version !== item.version) this.viewer.setAlpha("before", alpha);
      this.version = item.version;
      await this.showDetails(details, draft);
    } catch (error) {
      reportError(`${item.name}: ${error.message}`, { topic: "image" });
    }
  }

  /** Return to the overview. */
  close() {
    this.leave();
    this.viewer.set({ image: null });
    this.strip.clear();
  }
  leave() {
    this.answers.cancel();
    this.id = this.details = this.draft = null;
    this.editor.setDraft(null);
  }

  async showDetails(details, draft) {
    Object.assign(this, { details, draft, revision: details.revision });
    this.editor.setDraft(draft);
    this.showItem();
    if (!draft.isDirty) this.viewer.setAlpha("after", null);
    else if (draft.answer?.shapes === draft.shapes) this.viewer.setAlpha("after", await decodeImage(draft.answer.blob));
    else this.answers.ask(draft);
  }

  handleItems(changed) {
    if (!changed.has(this.id)) return;
    this.showItem();
    const isNewer = store.items.get(this.id).revision > this.revision;
    if (this.details !== null && isNewer && !store.pending.has(this.id)) this.reload();
  }

  loadAhead() {
    const next = store.items.get(this.ids[this.ids.indexOf(this.id) + 1]);
    if (next === undefined) return;
    for (const promise of [loadSource(next), loadAlpha(next)]) promise.catch(() => {}); // reported when it is opened
  }

  setBusy(isBusy) {
    byId("loading").hidden = !isBusy;
    byId("single").setAttribute("aria-busy", isBusy);
  }

  /** Return the id of the next image that is not reviewed, from here to the end and then from the start. */
  nextOpen() {
    const at = this.ids.indexOf(this.id);
    const isOpen = (id) => store.items.get(id).status === "open" && !store.pending.has(id);
    return [...this.ids.slice(at + 1), ...this.ids.slice(0, at)].find(isOpen);
  }
  /** Open an image before or after this one in a list. */
  step(step, ids = this.ids) {
    const target = ids[ids.indexOf(this.id) + step];
    if (target !== undefined) this.open(target);
    else notify(step > 0 ? "This is the last image." : "This is the first image.");
  }
  stepInShot(step) {
    this.step(step, this.details?.shot ?? this.ids);
  }

  /** Show the alpha of the hints, after they have changed. */
  answer(isDragging = false) {
    this.editor.draw();
    this.showItem();
    if (!this.draft.isDirty) {
      this.answers.cancel();
      this.viewer.setAlpha("after", null);
    } else if (isDragging) this.answers.askWhileDragging(this.draft);
    else this.answers.ask(this.draft);
  }
  async showAnswer(draft, shapes, blob, isRefined, signal) {
    const bitmap = await decodeImage(blob);
    if (signal.aborted || draft !== this.draft) return;
    if (draft.answer?.shapes === shapes && !isRefined) return; // the refined one was faster
    if (isRefined) draft.answer = { shapes, blob };
    this.viewer.setAlpha("after", bitmap);
  }
  undoHint() {
    if (this.draft?.undo()) this.answer();
  }
  redoHint() {
    if (this.draft?.redo()) this.answer();
  }
  /** Replace all hints: by none, or by the saved ones. */
  replaceHints(shapes) {
    this.draft.change(shapes);
    this.answer();
  }

  setView(view) {
    if (view !== store.settings.view) store.setSetting("view", view);
    for (const button of byId("views").children) button.setAttribute("aria-pressed", button.dataset.view === view);
    const setting = COLOUR_SETTINGS[view];
    byId("colour").hidden = setting === undefined;
    if (setting !== undefined) byId("colour").value = store.settings[setting];
    this.viewer.set({ view, background: store.settings.background, tint: store.settings.tint });
  }
  setColour(colour) {
    store.setSetting(COLOUR_SETTINGS[this.viewer.view], colour);
    this.setView(this.viewer.view);
  }
  toggleCompare() {
    this.viewer.set({ isComparing: !this.viewer.isComparing });
    byId("compare-position").hidden = !this.viewer.isComparing;
    pressButton("compare", this.viewer.isComparing);
  }
  toggleMarks() {
    this.editor.isVisible = !this.editor.isVisible;
    this.editor.draw();
    pressButton("marks", this.editor.isVisible);
  }

  /** Show what is known about the image: in the panel, the strip and the buttons. */
  showItem() {
    const item = store.items.get(this.id);
    const { details, draft } = this;
    const isSaving = store.pending.has(item.id);
    const change = item.change > 0 ? `, changed by ${formatPercent(item.change)} by recompute` : "";
    document.title = `${baseName(item.name)} – icm review`;
    setText(byId("image-name"), baseName(item.name));
    byId("image-name").title = item.name;
    byId("image-status").dataset.status = item.status;
    const status = isSaving ? "saving …" : STATUS_LABELS[item.status];
    setText(byId("image-status"), status + change + (item.has_alpha ? "" : ", no alpha"));
    byId("image-quality").hidden = item.quality === null;
    byId("quality").value = item.quality ?? 0;
    setText(byId("quality-value"), `quality ${formatQuality(item.quality)}`);
    byId("image-reasons").replaceChildren(...item.reasons.map((reason) => create("li", {}, reason)));
    setText(byId("hints-state"), draft === null ? "" : describeHints(draft));
    setText(byId("taught-state"), item.taught === null ? "" : `Used as a ${item.taught}.`);
    this.enableButtons(item, details !== null && !isSaving);
    this.showStrip();
    if (details === null) return;
    const size = `${details.width} × ${details.height}`;
    const rows = { Size: size, Folder: item.folder || "(top folder)", Source: details.source, Alpha: details.output };
    const cells = Object.entries(rows).flatMap(([name, value]) => [create("dt", {}, name), create("dd", {}, value)]);
    byId("image-details").replaceChildren(...cells);
  }

  showStrip() {
    const shot = this.details?.shot;
    setText(byId("position"), `${this.ids.indexOf(this.id) + 1} of ${this.ids.length}`);
    if (shot) this.strip.show(shot, this.id, `Frames of the shot: ${shot.indexOf(this.id) + 1} of ${shot.length} · list:`);
    else if (!store.run?.is_shot) this.strip.show(this.ids, this.id, "Images of the list:");
  }

  enableButtons(item, isReady) {
    const { details, draft } = this;
    const canAccept = isReady && (item.has_alpha || draft.isDirty);
    const isEnabled = {
      accept: canAccept,
      "accept-stay": canAccept,
      reject: isReady,
      undo: isReady && (details.can_undo || lastDecided() !== undefined),
      reference: canAccept && item.taught !== "reference",
      negative: isReady && item.taught !== "negative",
      "undo-hint": isReady && draft.past.length > 0,
      "redo-hint": isReady && draft.future.length > 0,
      "clear-hints": isReady && draft.shapes.length > 0,
      "discard-hints": isReady && draft.isDirty,
    };
    for (const [action, value] of Object.entries(isEnabled)) findButton(action).disabled = !value;
    findButton("forget").hidden = item.taught === null;
  }
}

/** Return the button of an action. */
export const findButton = (action) => document.querySelector(`#single [data-action="${action}"]`);
const pressButton = (action, isPressed) => findButton(action).setAttribute("aria-pressed", isPressed);

function describeHints({ shapes, isDirty }) {
  const number = shapes.length === 1 ? "1 hint" : `${shapes.length || "No"} hints`;
  return number + (isDirty ? ", not saved. Accept saves them." : shapes.length > 0 ? ", saved." : ".");
}
