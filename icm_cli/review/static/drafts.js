// Hints that are being drawn. They stay in memory while the user visits other images, until they are saved.

import { encodeShapes, readShapes } from "./shapes.js";
import { store } from "./store.js";

const drafts = new Map();

/** The hints of one image, with the steps to undo and redo. A list of shapes is replaced, never changed. */
class Draft {
  past = [];
  future = [];
  /** The last refined answer: {shapes, blob}. */
  answer = null;
  encoded = null;

  constructor(id, width, height, shapes) {
    Object.assign(this, { id, width, height, shapes, saved: shapes });
  }

  /** Whether the shapes differ from those that the server has. */
  get isDirty() {
    return this.shapes !== this.saved;
  }

  /** Set new shapes. `isStep`: whether undo returns to the shapes before. */
  change(shapes, isStep = true) {
    if (isStep) this.past.push(this.shapes);
    this.future = [];
    this.set(shapes);
  }

  undo() {
    if (this.past.length === 0) return false;
    this.future.push(this.shapes);
    this.set(this.past.pop());
    return true;
  }

  redo() {
    if (this.future.length === 0) return false;
    this.past.push(this.shapes);
    this.set(this.future.pop());
    return true;
  }

  set(shapes) {
    const wasDirty = this.isDirty;
    this.shapes = shapes;
    if (wasDirty !== this.isDirty) store.emit("items", new Set([this.id]));
  }

  /** Set the shapes that the server has. Own shapes are kept if they were not saved. */
  setSaved(shapes) {
    if (this.isDirty && JSON.stringify(this.shapes) !== JSON.stringify(shapes)) {
      this.saved = shapes;
      return;
    }
    const isEqual = JSON.stringify(this.saved) === JSON.stringify(shapes);
    if (!isEqual) [this.past, this.future, this.answer] = [[], [], null];
    this.saved = this.shapes = isEqual ? this.saved : shapes;
  }

  /** Note that the server has saved these shapes. */
  markSaved(shapes) {
    this.saved = shapes;
    store.emit("items", new Set([this.id]));
  }

  /** Note that the server has taken the hints back; here they are kept. */
  markUnsaved() {
    this.saved = null;
    store.emit("items", new Set([this.id]));
  }

  /** Return the promise of the hints as the server takes them. */
  encode() {
    if (this.encoded?.shapes !== this.shapes) {
      this.encoded = { shapes: this.shapes, hints: encodeShapes(this.shapes, this.width, this.height) };
    }
    return this.encoded.hints;
  }
}

/** Return the draft of an image whose details the server sent. */
export async function openDraft({ id, width, height, hints }) {
  const shapes = await readShapes(hints);
  const draft = drafts.get(id);
  if (draft === undefined) drafts.set(id, new Draft(id, width, height, shapes));
  else draft.setSaved(shapes);
  return drafts.get(id);
}

/** Return the draft of an image, or undefined if it was never open. */
export const findDraft = (id) => drafts.get(id);

/** Return whether any image has hints that are not saved. */
export const hasDirtyDraft = () => [...drafts.values()].some((draft) => draft.isDirty);

store.isDraft = (id) => drafts.get(id)?.isDirty ?? false;
