// One image: its views, its hints with their answers, its details and decisions.
import { api, decodeImage, loadAlpha, loadSource } from "./api.js";
import * as answers from "./answers.js";
import { lastDecided } from "./decisions.js";
import {
  STATUS_LABELS, baseName, byId, clearError, create, formatPercent, formatQuality, isChanged, notify, openImage,
  pressButton, reportError, setText,
} from "./dom.js";
import { openDraft } from "./drafts.js";
import { editor } from "./editor.js";
import { store } from "./store.js";
import * as strip from "./strip.js";
import { viewer } from "./viewer.js";

class Single {
  id = null;
  ids = []; // the list for previous and next: as the overview showed it when it was left
  shot = null; // the ids of the shot of the image, also while the next frame is loaded; null: it is in none
  details = null;
  isBusy = false; // whether the image is being loaded, and another one may still be visible
  refusal = ""; // why the image cannot be accepted
  draft = null;
  constructor() {
    viewer.onDraw = () => {
      editor.draw();
      setText(byId("zoom"), `${Math.round(100 * viewer.zoom)} %`);
    };
    editor.onChange = (isDragging) => this.answer(isDragging);
    byId("colour").oninput = ({ target: { value } }) => {
      store.setSettings({ [viewer.view]: value });
      viewer.set({ colour: value });
    };
    byId("compare-position").oninput = ({ target }) => editor.setDivision(target.value / 100);
    store.on("items", (changed) => this.handleItems(changed));
    store.on("reconnected", () => { if (this.id !== null) this.refresh(viewer.image === null); });
    store.on("stale", (id) => { if (id === this.id) this.refresh(false); });
    this.setView(store.settings.view);
  }
  /** Show an image. The image before stays visible until this one is loaded. */
  async load(id) {
    this.leave();
    this.id = id;
    if (!this.shot?.includes(id)) this.shot = null;
    await this.refresh(true);
    if (this.id !== id) return; // the user has moved on
    const next = store.items.get(this.ids[this.ids.indexOf(id) + 1]);
    if (next) for (const load of [loadSource, loadAlpha]) load(next).catch(() => {}); // reported when it is opened
  }
  /** Load and show what the server has; unsaved hints stay. `isNew`: another image was shown before. */
  async refresh(isNew) {
    const { id } = this;
    if (isNew) this.setBusy(true);
    try {
      const details = await api.details(id);
      const draft = await openDraft(details);
      if (this.id !== id) return;
      Object.assign(this, { details, draft, shot: details.shot });
      this.showItem();
      if (details.error) reportError(`${details.name}: ${details.error}`, { topic: "image" });
      else clearError("image");
      const [source, before] = await Promise.all([loadSource(details), loadAlpha(details)]);
      if (this.id !== id) return;
      if (isNew || viewer.image?.source[0] !== source) viewer.setImage({ ...details, source, before });
      else viewer.setAlpha("before", before);
      editor.setDraft(draft);
      this.showItem();
      const { answer, shapes } = draft;
      if (!draft.isDirty) this.showSaved();
      else if (answer?.shapes === shapes) viewer.setAlpha("after", await decodeImage(answer.blob));
      else answers.ask(draft, this.showAnswer);
    } catch (error) {
      if (this.id !== id) return;
      if (isNew) viewer.set({ image: null });
      reportError(`${store.items.get(id).name}: ${error.message}.`, { topic: error.topic ?? "image" });
    }
    if (isNew && this.id === id) this.setBusy(false); // decisions are possible even if the source cannot be read
  }
  close() { this.leave(); viewer.set({ image: null }); strip.show([], null, ""); }
  leave() {
    answers.cancel();
    clearError("image");
    this.id = this.details = this.draft = null;
    editor.setDraft(null);
  }
  handleItems(changed) {
    if (!changed.has(this.id)) return;
    this.showItem();
    if (this.details === null || store.pending.has(this.id)) return;
    const { revision, version } = store.items.get(this.id);
    if (revision > this.details.revision || version !== this.details.version) this.refresh(false);
  }
  setBusy(isBusy) {
    byId("loading").hidden = !isBusy;
    byId("single").ariaBusy = this.isBusy = isBusy;
    this.showItem();
  }
  /** Return the id of the next image that is not reviewed, from here to the end and then from the start. */
  nextUnreviewed() {
    const index = this.ids.indexOf(this.id);
    const others = [...this.ids.slice(index + 1), ...this.ids.slice(0, index)].map((id) => store.items.get(id));
    const isOpen = (item) => item.status === "open" && item.has_alpha && !store.pending.has(item.id);
    return others.find(isOpen)?.id;
  }
  /** Open an image before (offset -1) or after (1) this one in a list. */
  step(offset, ids = this.ids) {
    const target = ids[ids.indexOf(this.id) + offset];
    if (target !== undefined) openImage(target);
    else notify(offset > 0 ? "This is the last image." : "This is the first image.");
  }
  /** Show the alpha of the hints, after they have changed. */
  answer(isDragging = false) {
    editor.draw();
    this.showItem();
    const ask = isDragging ? answers.askWhileDragging : answers.ask;
    if (this.draft.isDirty) ask(this.draft, this.showAnswer);
    else this.showSaved();
  }
  /** Show only the saved alpha: there are no other hints. */
  showSaved() { answers.cancel(); viewer.setAlpha("after", null); }
  showAnswer = async (draft, shapes, blob, isRefined, signal) => {
    const bitmap = await decodeImage(blob);
    if (signal.aborted || draft !== this.draft) return;
    if (draft.answer?.shapes === shapes && !isRefined) return; // the refined one was faster
    if (isRefined) draft.answer = { shapes, blob };
    viewer.setAlpha("after", bitmap);
    this.showItem();
  };
  /** Take back the last step of the hints (name "undo"), or make it again ("redo"). */
  takeStep(name) { if (editor.draft?.[name]()) this.answer(); }
  /** Replace all hints: by none, or by the saved ones. */
  replaceHints(shapes) { this.draft.change(shapes); this.answer(); }
  setView(view) {
    const { [view]: colour } = store.settings; // undefined: the view has no colour
    store.setSettings({ view });
    pressButton("views", "view", view);
    byId("colour").hidden = colour === undefined;
    if (colour !== undefined) byId("colour").value = colour;
    viewer.set({ view, colour });
  }
  toggleCompare() {
    const isComparing = !viewer.isComparing;
    byId("compare-position").hidden = !isComparing;
    findButton("compare").setAttribute("aria-pressed", isComparing);
    viewer.set({ isComparing });
  }
  toggleMarks() {
    editor.isVisible = !editor.isVisible;
    findButton("marks").setAttribute("aria-pressed", editor.isVisible);
    editor.draw();
  }
  /** Show what is known about the image: in the panel, the strip and the buttons. */
  showItem() {
    const [item, { details, draft }] = [store.items.get(this.id), this];
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
    const label = draft?.isDirty ? "saved quality" : "quality"; // not of the alpha that is shown
    setText(byId("quality-value"), `${label} ${formatQuality(item.quality)}`);
    byId("image-reasons").classList.toggle("outdated", draft?.isDirty ?? false);
    byId("image-reasons").replaceChildren(...item.reasons.map((reason) => create("li", { textContent: reason })));
    setText(byId("hints-state"), draft === null ? "" : describeHints(draft));
    setText(byId("taught-state"), item.taught === null ? "" : `Used as a ${item.taught}.`);
    this.enableButtons(item, details !== null && !isSaving && !this.isBusy);
    this.showStrip();
    if (details === null) return;
    const [size, folder] = [`${details.width} × ${details.height}`, item.folder || "(top folder)"];
    const texts = { size, folder, source: details.source, alpha: details.output };
    for (const [name, text] of Object.entries(texts)) setText(byId(`detail-${name}`), text);
  }
  showStrip() {
    const describePosition = (list) => `${list.indexOf(this.id) + 1} of ${list.length}`;
    const title = this.shot ? `Frames of the shot: ${describePosition(this.shot)} · list:` : "Images of the list:";
    strip.show(this.shot ?? this.ids, this.id, `${title} ${describePosition(this.ids)}`);
  }
  enableButtons(item, isReady) {
    const { details, draft } = this;
    const hasAlpha = item.has_alpha || draft?.isDirty;
    const missing = details?.source_error && `It cannot be accepted: ${details.source_error}.`;
    this.refusal = missing || (hasAlpha ? "" : "There is no alpha to accept.");
    const canAccept = isReady && this.refusal === "";
    const isEnabled = {
      accept: canAccept, "accept-stay": canAccept, reject: isReady,
      undo: isReady && lastDecided(item.id) !== undefined,
      reference: isReady && item.taught !== "reference", negative: isReady && item.taught !== "negative",
      "undo-hint": editor.draft?.past.length > 0, "redo-hint": editor.draft?.future.length > 0,
      "undo-recompute": isReady, "clear-hints": editor.draft?.shapes.length > 0, "discard-hints": editor.draft?.isDirty,
    };
    for (const [action, value] of Object.entries(isEnabled)) findButton(action).disabled = !value;
    for (const each of document.querySelectorAll("[data-title]")) each.title = this.refusal || each.dataset.title;
    findButton("forget").hidden = item.taught === null;
    findButton("undo-recompute").hidden = item.undo !== "recompute";
    if (document.activeElement === document.body) byId("marks").focus({ preventScroll: true }); // a button was disabled
  }
}
export const single = new Single();
export const findButton = (action) => document.querySelector(`#single [data-action="${action}"]`);

function describeHints({ shapes, isDirty, answer }) {
  const count = shapes.filter(({ label }) => label !== "erase").length;
  const outdated = isDirty && answer?.blob.outdated;
  const rest = outdated ? `. The whole alpha may change: ${outdated}.` : "";
  if (count === 0) return isDirty ? `Hints removed, not saved${rest}` : "No hints";
  return `${count} ${count === 1 ? "hint" : "hints"}, ${isDirty ? "not saved" : "saved"}${rest}`;
}
