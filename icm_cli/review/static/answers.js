// Alphas of hints that are being drawn: a coarse one at once, and a refined one after a pause.
import { api, isAborted } from "./api.js";
import { byId, clearError, reportError, setText } from "./dom.js";
import { store } from "./store.js";

const PAUSE_MS = 200;
let controller = new AbortController();
let isBusy = false; // whether a coarse answer is being computed
const describe = (text) => setText(byId("answer-state"), text);

/** Forget the answers of earlier hints, and their error. */
export function cancel() {
  controller.abort();
  controller = new AbortController();
  isBusy = false;
  clearError("answer");
  describe("");
}
/** Ask for the coarse answer, and after a pause for the refined one. `show(draft, shapes, ...)` shows them. */
export async function ask(draft, show) {
  cancel();
  const { signal } = controller;
  await request(draft, show, false);
  await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  if (!signal.aborted) request(draft, show, true);
}
/** Ask for a coarse answer, unless one is being computed: the next movement asks again. */
export function askWhileDragging(draft, show) {
  if (isBusy) return;
  cancel();
  request(draft, show, false);
}

async function request(draft, show, isRefined) {
  const { signal } = controller;
  const { shapes } = draft;
  isBusy = true;
  const task = isRefined ? "Refining edges …" : "Computing alpha …";
  describe(store.run.model_state === "loading" ? "The model is loading. The alpha follows." : task);
  try {
    const hints = await draft.encode();
    if (signal.aborted) return;
    const blob = await api.answer(draft.id, draft.source, hints, isRefined, signal);
    await show(draft, shapes, blob, isRefined, signal);
    if (isRefined && !signal.aborted) describe("");
  } catch (error) {
    if (isAborted(error) || signal.aborted) return;
    if (error.status === 409 && !error.image) return request(draft, show, isRefined); // replaced by an earlier one
    handleFailure(error);
  }
  if (!signal.aborted) isBusy = false;
}

function handleFailure(error) {
  cancel();
  describe("No alpha for these hints");
  if (error.status === 503) return store.emit("run"); // the model could not be loaded
  if (error.image) store.updateStale(error.image);
  reportError(`${error.message}.`, { topic: error.topic ?? (error.image ? `decision ${error.image.id}` : "answer") });
}
