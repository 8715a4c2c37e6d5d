// Accept, reject, undo, teach. The page does not wait: the next image opens while the last one is saved.
import { api } from "./api.js";
import { baseName, clearError, notify, openImage, reportError } from "./dom.js";
import { findDraft, isDraft } from "./drafts.js";
import { store } from "./store.js";

const decided = new Set(); // ids of the images that were decided on in this page, the newest last
const FAILURES = {
  accept: "was not accepted", reject: "was not rejected", undo: "was not restored",
  teach: "is not used", forget: "is still used",
};
const UNSAVED = "is not used: its hints are not saved. Accept (A) or revert them first.";
/** Return the image whose decision undo takes back: `open`, or else the last one of this page; or undefined. */
export const lastDecided = (open) =>
  [...decided, open].findLast((id) => store.items.get(id)?.undo === "decision" || store.pending.has(id));
const nameOf = (id) => baseName(store.items.get(id).name);

/** Accept an image with its unsaved hints. */
export const accept = (id) =>
  decide(id, "accept", async ({ revision }) => {
    const draft = findDraft(id);
    const shapes = draft?.shapes;
    const item = await api.accept(id, draft?.source, revision, draft?.isDirty ? await draft.encode() : null);
    draft?.markSaved(shapes);
    return item;
  });

export const reject = (id) =>
  decide(id, "reject", ({ revision }) => api.reject(id, findDraft(id)?.source, revision));

/** Take back the last "decision" on an image, also one that is being saved, or its "recompute". Its hints stay. */
export async function undo(id, cause = "decision", opens = true) {
  await store.pending.get(id);
  if (store.items.get(id).undo !== cause) return notify(`${nameOf(id)}: its last change is not a ${cause} any more.`);
  const end = await send(id, "undo", ({ revision }) => api.undo(id, revision));
  if (end === null) return;
  decided.delete(id);
  findDraft(id)?.markSaved(null);
  notify(`${nameOf(id)}: ${cause === "recompute" ? "alpha before the recompute restored" : "decision taken back"}${end}`);
  if (opens) openImage(id);
}
/** Use the saved alpha of an image, or the whole image, as "reference" or "negative". `area`: "alpha" or "image". */
export async function teach(id, kind, area) {
  await store.pending.get(id);
  if (area === "alpha" && isDraft(id)) return reportDecision(id, `${nameOf(id)} ${UNSAVED}`, false);
  const end = await send(id, "teach", () => api.teach(id, kind, area));
  if (end !== null) notify(`${nameOf(id)} is used as a ${kind} when the rest is recomputed.`);
}
export const forget = (id) => send(id, "forget", () => api.forget(id));

async function decide(id, action, request) {
  if (store.pending.has(id)) return;
  decided.delete(id);
  decided.add(id); // as the newest, and at once, so that undo means this decision
  const end = await send(id, action, request);
  if (end === null) return;
  notify(`${nameOf(id)}: ${store.items.get(id).status}${end}`, { label: "Undo (U)", run: () => undo(id) });
}
/** Send a change of an image. Returns null after a failure; else the end of a notice: "" or that a use has ended. */
async function send(id, action, request) {
  const { taught } = store.items.get(id);
  const save = async () => store.update([await request(store.items.get(id))]);
  const saving = save().then(() => true, (error) => {
    if (error.image) store.updateStale(error.image);
    reportDecision(id, `${nameOf(id)} ${FAILURES[action]}: ${error.message}.`, error.status !== 410);
    return false;
  });
  store.setPending(id, saving);
  const isDone = await saving;
  if (isDone) clearError(`decision ${id}`);
  else if (action === "accept" || action === "reject") decided.delete(id);
  store.setPending(id, null);
  if (!isDone) return null;
  return taught !== null && store.items.get(id).taught === null ? `, and no longer a ${taught}` : "";
}

function reportDecision(id, text, isKept = true) {
  const kept = isKept && isDraft(id) ? " Your hints are kept." : "";
  const button = { label: "Open image", run: () => openImage(id) };
  reportError(text + kept, { topic: `decision ${id}`, action: button });
}

store.on("decided-elsewhere", (id) => {
  if (!isDraft(id)) clearError(`decision ${id}`);
  else reportDecision(id, `${nameOf(id)} was changed in another window. Check it, and decide again.`);
});
