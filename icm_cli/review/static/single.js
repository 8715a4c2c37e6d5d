// One image: its views, its hints with their answers, its details and decisions.
import { api } from "./api.js";
import { Answers } from "./answers.js";
import { decodeImage, loadAlpha, loadSource } from "./bitmaps.js";
import { lastDecided } from "./decisions.js";
import {
  STATUS_LABELS, baseName, byId, create, formatPercent, formatQuality, isChanged, listen, pressButton, setText,
} from "./dom.js";
import { openDraft } from "./drafts.js";
import { Editor } from "./editor.js";
import { clearError, notify, reportError } from "./messages.js";
import { store } from "./store.js";
import { Strip } from "./strip.js";
import { Viewer } from "./viewer.js";

const COLOUR_SETTINGS = { overlay: "tint", colour: "background" }; // settings of the colours of views

export class Single {
  id = null;
  ids = []; // the list for previous and next: that of the overview when it was left
  shot = null; // the ids of the shot of the image, also while the next frame is loaded; null: it is in none
  details = null;
  draft = null;
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
    listen(byId("colour"), { input: ({ target }) => this.setColour(target.value) });
    listen(byId("compare-position"), { input: ({ target }) => this.editor.setDivision(target.value / 100) });
    store.on("items", (changed) => this.handleItems(changed));
    store.on("stale", (id) => { if (id === this.id) this.refresh(false); });
    this.setView(store.settings.view);
  }
  /** Show an image. The image before stays visible until this one is loaded. */
  async load(id) {
    this.leave();
    this.id = id;
    if (!this.shot?.includes(id)) this.shot = null;
    for (const topic of ["image", "answer"]) clearError(topic);
    this.showItem();
    this.setBusy(true);
    await this.refresh(true);
    if (this.id !== id) return; // the user has moved on
    this.setBusy(false);
    const next = store.items.get(this.ids[this.ids.indexOf(id) + 1]);
    if (next === undefined) return;
    for (const load of [loadSource, loadAlpha]) load(next).catch(() => {}); // reported when it is opened
  }
  /** Load and show what the server has; unsaved hints stay. `isNew`: another image was shown before. */
  async refresh(isNew) {
    const { id } = this;
    try {
      const details = await api.details(id);
      const draft = await openDraft(details);
      if (this.id !== id) return;
      Object.assign(this, { details, draft, shot: details.shot });
      this.showItem(); // decisions are possible even if the source cannot be read
      if (details.error) reportError(`${details.name}: ${details.error}`, { topic: "image" });
      const [source, before] = await Promise.all([loadSource(details), loadAlpha(details)]);
      if (this.id !== id) return;
      const isShown = !isNew && this.viewer.image?.source.levels[0] === source;
      if (!isShown) this.viewer.setImage({ ...details, source, before });
      else this.viewer.setAlpha("before", before);
      this.editor.setDraft(draft);
      this.showItem();
      const { answer, shapes } = draft;
      if (!draft.isDirty) this.viewer.setAlpha("after", null);
      else if (answer?.shapes === shapes) this.viewer.setAlpha("after", await decodeImage(answer.blob));
      else this.answers.ask(draft);
    } catch (error) {
      if (this.id !== id) return;
      if (isNew) this.viewer.set({ image: null });
      reportError(`${store.items.get(id).name}: ${error.message}.`, { topic: error.topic ?? "image" });
    }
  }
  close() { this.leave(); this.viewer.set({ image: null }); this.strip.clear(); }
  leave() {
    this.answers.cancel();
    this.id = this.details = this.draft = null;
    this.editor.setDraft(null);
  }
  handleItems(changed) {
    if (!changed.has(this.id)) return;
    this.showItem();
    if (this.details === null || store.pending.has(this.id)) return;
    const { revision, version } = store.items.get(this.id);
    if (revision > this.details.revision || version !== this.details.version) this.refresh(false);
  }
  setBusy(isBusy) { byId("loading").hidden = !isBusy; byId("single").ariaBusy = isBusy; }
  /** Return the id of the next image that is not reviewed, from here to the end and then from the start. */
  nextOpen() {
    const index = this.ids.indexOf(this.id);
    const others = [...this.ids.slice(index + 1), ...this.ids.slice(0, index)].map((id) => store.items.get(id));
    const isOpen = (item) => item.status === "open" && item.has_alpha && !store.pending.has(item.id);
    return others.find(isOpen)?.id;
  }
  /** Open an image before (offset -1) or after (1) this one in a list. */
  step(offset, ids = this.ids) {
    const target = ids[ids.indexOf(this.id) + offset];
    if (target !== undefined) this.open(target);
    else notify(offset > 0 ? "This is the last image." : "This is the first image.");
  }
  stepInShot(offset) { this.step(offset, this.shot ?? this.ids); }
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
  undoHint() { if (this.editor.draft?.undo()) this.answer(); }
  redoHint() { if (this.editor.draft?.redo()) this.answer(); }
  /** Replace all hints: by none, or by the saved ones. */
  replaceHints(shapes) { this.draft.change(shapes); this.answer(); }
  setView(view) {
    if (view !== store.settings.view) store.setSetting("view", view);
    pressButton("views", "view", view);
    const setting = COLOUR_SETTINGS[view];
    byId("colour").hidden = setting === undefined;
    if (setting !== undefined) byId("colour").value = store.settings[setting];
    this.viewer.set({ view, background: store.settings.background, tint: store.settings.tint });
  }
  setColour(colour) { store.setSetting(COLOUR_SETTINGS[this.viewer.view], colour); this.setView(this.viewer.view); }
  toggleCompare() {
    const isComparing = !this.viewer.isComparing;
    byId("compare-position").hidden = !isComparing;
    findButton("compare").setAttribute("aria-pressed", isComparing);
    this.viewer.set({ isComparing });
  }
  toggleMarks() {
    this.editor.isVisible = !this.editor.isVisible;
    findButton("marks").setAttribute("aria-pressed", this.editor.isVisible);
    this.editor.draw();
  }
  /** Show what is known about the image: in the panel, the strip and the buttons. */
  showItem() {
    const item = store.items.get(this.id);
    const { details, draft } = this;
    const isSaving = store.pending.has(item.id);
    const change = isChanged(item) ? `, changed ${formatPercent(item.change)}` : "";
    document.title = `${baseName(item.name)} – icm review`;
    setText(byId("image-name"), baseName(item.name));
    byId("image-name").title = item.name;
    const isWaiting = isSaving && store.run.model_state === "loading" && draft?.isDirty;
    const saving = isWaiting ? "waiting for the model …" : "saving …";
    const status = isSaving ? saving : STATUS_LABELS[item.status];
    byId("image-status").dataset.status = item.status;
    setText(byId("image-status"), status + change + (item.has_alpha ? "" : ", no alpha"));
    byId("quality").value = item.quality ?? 0;
    const label = draft?.isDirty ? "saved quality" : "quality"; // not that of the alpha that is shown
    setText(byId("quality-value"), `${label} ${formatQuality(item.quality)}`);
    byId("image-reasons").classList.toggle("outdated", draft?.isDirty);
    byId("image-reasons").replaceChildren(...item.reasons.map((reason) => create("li", {}, reason)));
    setText(byId("hints-state"), draft === null ? "" : describeHints(draft));
    setText(byId("taught-state"), item.taught === null ? "" : `Used as a ${item.taught}.`);
    this.enableButtons(item, details !== null && !isSaving);
    this.showStrip();
    if (details === null) return;
    const size = `${details.width} × ${details.height}`;
    const folder = item.folder || "(top folder)";
    const rows = { Size: size, Folder: folder, Source: details.source, Alpha: details.output };
    const createRow = ([name, value]) => [create("dt", {}, name), create("dd", {}, value)];
    byId("image-details").replaceChildren(...Object.entries(rows).flatMap(createRow));
  }
  showStrip() {
    const { ids, shot } = this;
    const describePosition = (list) => `${list.indexOf(this.id) + 1} of ${list.length}`;
    setText(byId("position"), describePosition(ids));
    const title = shot ? `Frames of the shot: ${describePosition(shot)} · list:` : "Images of the list:";
    this.strip.show(shot ?? ids, this.id, title);
  }
  enableButtons(item, isReady) {
    const { details, draft, editor: { draft: edited } } = this;
    const canAccept = isReady && (item.has_alpha || draft.isDirty);
    const isEnabled = {
      accept: canAccept, "accept-stay": canAccept, reject: isReady,
      undo: isReady && (details.can_undo || lastDecided() !== undefined),
      reference: canAccept && item.taught !== "reference", negative: isReady && item.taught !== "negative",
      "undo-hint": edited?.past.length > 0, "redo-hint": edited?.future.length > 0,
      "clear-hints": edited?.shapes.length > 0, "discard-hints": edited?.isDirty,
    };
    for (const [action, value] of Object.entries(isEnabled)) findButton(action).disabled = !value;
    findButton("forget").hidden = item.taught === null;
  }
}
export const findButton = (action) => document.querySelector(`#single [data-action="${action}"]`);

function describeHints({ shapes, isDirty }) {
  const count = shapes.filter(({ label }) => label !== "erase").length;
  if (count === 0) return isDirty ? "Hints removed, not saved" : "No hints";
  return `${count} ${count === 1 ? "hint" : "hints"}, ${isDirty ? "not saved" : "saved"}`;
}
