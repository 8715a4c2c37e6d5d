// Alphas of hints that are being drawn: a coarse one at once, and a refined one after a pause.
import { api, isAborted } from "./api.js";
import { clearError, reportError } from "./messages.js";
import { store } from "./store.js";

const PAUSE_MS = 200;

export class Answers {
  controller = new AbortController();
  timer = 0;
  isBusy = false; // whether a coarse answer is being computed
  waiting = null; // the draft that waits for the model
  /** `show(draft, shapes, blob, isRefined, signal)` shows an answer, `describe(text)` what is being done. */
  constructor(show, describe) {
    Object.assign(this, { show, describe });
    store.on("run", () => {
      if (this.waiting !== null && store.run.model_state !== "loading") this.ask(this.waiting);
    });
  }
  cancel() {
    this.controller.abort();
    this.controller = new AbortController();
    clearTimeout(this.timer);
    this.isBusy = false;
    this.waiting = null;
    this.describe("");
  }
  /** Ask for the coarse answer, and for the refined one if the hints stay the same for a moment. */
  async ask(draft) {
    this.cancel();
    const { signal } = this.controller;
    await this.request(draft, false);
    if (!signal.aborted) this.timer = setTimeout(() => this.request(draft, true), PAUSE_MS);
  }
  /** Ask for a coarse answer, unless one is being computed: the next movement asks again. */
  askWhileDragging(draft) {
    if (this.isBusy) return;
    this.cancel();
    this.request(draft, false);
  }
  async request(draft, isRefined) {
    const { signal } = this.controller;
    const { shapes } = draft;
    this.isBusy = true;
    this.describe(isRefined ? "Refining edges …" : "Computing alpha …");
    try {
      const hints = await draft.encode();
      if (signal.aborted) return;
      const blob = await api.answer(draft.id, draft.source, hints, isRefined, signal);
      clearError("answer");
      await this.show(draft, shapes, blob, isRefined, signal);
      if (isRefined && !signal.aborted) this.describe("");
    } catch (error) { if (!isAborted(error) && !signal.aborted) this.handleFailure(draft, error); }
    if (!signal.aborted) this.isBusy = false;
  }
  handleFailure(draft, error) {
    if (error.status === 409 && !error.image) return; // superseded by a newer request
    this.cancel();
    if (error.image) store.updateStale(error.image);
    if (error.status === 503 && store.run.model_state === "loading") {
      this.waiting = draft;
      this.describe("The model is loading. The alpha follows.");
    } else {
      this.describe("No alpha for these hints");
      const isFailed = store.run.model_state === "failed";
      reportError(`${error.message}.`, { topic: error.topic ?? (error.image ? "image" : isFailed ? "model" : "answer") });
    }
  }
}
