// Thumbnails: requested in batches while an <img> wants them, in the order of asking; the last ones are kept.
import { api } from "./api.js";

/** Few: the server answers in a moment with what is ready, and the next request has the newest wishes. */
const MAX_REQUESTS = 2;
const MAX_BATCH = 24;
const MAX_KEPT = 2000;
const loaded = new Map(); // thumbnails as data URLs by key, the oldest first
const wishes = new Map(); // wishes by their <img>: {key, id, view, isRequested}
const keys = new WeakMap(); // the key of the thumbnail that an <img> shows or waits for
let running = 0;

/** Show the thumbnail of an item in an <img>. */
export function showThumbnail(image, { id, version }, view) {
  const key = `${id} ${view} ${version}`;
  const before = keys.get(image);
  if (before === key) return;
  releaseThumbnail(image);
  keys.set(image, key);
  if (!before?.startsWith(`${id} `) || loaded.has(key)) setImage(image, loaded.get(key));
  if (loaded.has(key)) return;
  wishes.set(image, { key, id, view, isRequested: false });
  queueMicrotask(requestBatch);
}
/** Stop waiting for the thumbnail of an <img>. */
export const releaseThumbnail = (image) => [wishes, keys].forEach((map) => map.delete(image));

async function requestBatch() {
  if (running === MAX_REQUESTS) return;
  const waiting = [...wishes].filter(([, { isRequested }]) => !isRequested);
  if (waiting.length === 0) return;
  const { view } = waiting[0][1];
  const batch = waiting.filter(([, wish]) => wish.view === view).slice(0, MAX_BATCH);
  for (const [, wish] of batch) wish.isRequested = true;
  running += 1;
  const answer = await api.thumbnails(batch.map(([, { id }]) => id), view).catch(() => null);
  running -= 1;
  for (const [image, wish] of batch) receiveThumbnail(image, wish, answer);
  while (loaded.size > MAX_KEPT) loaded.delete(loaded.keys().next().value);
  requestBatch();
}
/** Fulfil a wish. One that is not in the answer waits for the next request. `answer`: null after an error. */
function receiveThumbnail(image, wish, answer) {
  const jpeg = answer?.jpegs[wish.id];
  wish.isRequested = false;
  if (jpeg !== undefined) loaded.set(wish.key, `data:image/jpeg;base64,${jpeg}`);
  else if (answer !== null && !(wish.id in answer.errors)) return;
  if (wishes.get(image) !== wish) return; // the <img> shows another image by now
  wishes.delete(image);
  if (jpeg !== undefined) setImage(image, loaded.get(wish.key));
  else image.parentElement.classList.add("failed");
}

function setImage(image, url) {
  image.parentElement.classList.toggle("loaded", url !== undefined);
  image.parentElement.classList.remove("failed");
  if (url === undefined) image.removeAttribute("src");
  else image.src = url;
}
