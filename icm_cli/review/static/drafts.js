// Hints that are being drawn. They stay in memory while the user visits other images, until they are saved.
import { encodeShapes, readShapes } from "./shapes.js";
import { store } from "./store.js";

const drafts = new Map();
const keyOf = ({ label, shape_type: type, points, mask = null }) => JSON.stringify([label, type, points, mask]);
const isEqual = (shapes, others) => String(shapes?.map(keyOf)) === String(others?.map(keyOf));

/** The hints of one image, with the steps to undo and redo. A list of shapes is replaced, never changed. */
class Draft {
  past = [];
  future = [];
  earlierFuture = []; // `future` before the last step
  answer = null; // the last refined answer: {shapes, blob}
  constructor({ id }, shapes) { Object.assign(this, { id, shapes, saved: shapes }); }
  /** Whether the shapes differ from those that the server has. */
  get isDirty() { return this.shapes !== this.saved; }
  /** Set new shapes. `isStep`: whether undo returns to the shapes before. */
  change(shapes, isStep = true) {
    if (isStep) Object.assign(this, { past: [...this.past, this.shapes], earlierFuture: this.future });
    this.future = [];
    this.set(shapes, this.saved);
  }
  /** Take back the last step. Returns whether there was one. Redo calls it with the two lists exchanged. */
  undo(from = this.past, to = this.future) {
    if (from.length === 0) return false;
    to.push(this.shapes);
    this.set(from.pop(), this.saved);
    return true;
  }
  redo() { return this.undo(this.future, this.past); }
  /** Take back the last step as if it had never been made. */
  cancel() { this.undo(); this.future = this.earlierFuture; }
  set(changed, saved) {
    const isSaved = changed.length === saved?.length && changed.every((shape, index) => shape === saved[index]);
    const shapes = isSaved ? saved : changed;
    const wasDirty = this.isDirty;
    Object.assign(this, { shapes, saved });
    if (wasDirty !== this.isDirty) store.emit("items", new Set([this.id]));
  }
  /** Store which shapes the server has; null: others than the shapes of this draft, which it keeps. */
  markSaved(saved) { this.set(this.shapes, saved); }
  /** Take the shapes that the server sent, unless there are others here that are not saved. */
  receive(received) {
    const shapes = isEqual(this.saved, received) ? this.saved : received; // the same objects, which undo may return to
    if (this.isDirty && !isEqual(this.shapes, shapes)) return this.markSaved(shapes);
    if (shapes !== this.saved) [this.past, this.future, this.answer] = [[], [], null];
    this.set(shapes, shapes);
  }
  /** Return the promise of the hints as the server takes them. */
  encode() { return encodeShapes(this.shapes, this.width, this.height); }
}
/** Return the draft of an image whose details the server sent. */
export async function openDraft(details) {
  const shapes = await readShapes(details.hints);
  const draft = drafts.get(details.id) ?? new Draft(details, shapes);
  drafts.set(details.id, draft);
  const { width, height, version, source_version: source } = details;
  if (source !== draft.source || version !== draft.version) draft.answer = null; // made for earlier files
  Object.assign(draft, { width, height, version, source });
  draft.receive(shapes);
  return draft;
}
/** Return the draft of an image, or undefined if it was never open. */
export const findDraft = (id) => drafts.get(id);
/** Return whether an image has hints that are not saved. */
export const isDraft = (id) => drafts.get(id)?.isDirty ?? false;
export const hasDirtyDraft = () => [...drafts.values()].some((draft) => draft.isDirty);
