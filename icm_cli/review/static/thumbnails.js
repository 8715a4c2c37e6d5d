// Thumbnails: requested in batches while an <img> wants them, in the order of asking; the last ones are kept.
import { api } from "./api.js";
import { baseName, formatQuality, setText } from "./dom.js";
import { POLL_MS, store } from "./store.js";

const MAX_REQUESTS = 2; // few: they are answered soon, and the next one asks for what is visible by then
const MAX_BATCH = 24;
const MAX_KEPT = 2000;
const loaded = new Map(); // thumbnails as data URLs by key, the oldest first
const waiting = new Map(); // <img> elements without their thumbnail: <img> -> {key, id, view, isRequested}
let running = 0;

/** Fill an element of a list with an item. `remarks`: what a screen reader says, after the name and the quality. */
export function fillThumbnail({ root, image, name, folder }, item, remarks) {
  Object.assign(root.dataset, { id: item.id, status: item.status });
  root.title = item.name;
  root.ariaLabel = [item.name, `quality ${formatQuality(item.quality)}`, ...remarks].join(", ");
  setText(name, baseName(item.name));
  setText(folder, item.folder);
  showThumbnail(image, item, store.settings.thumbnailView);
}
/** Show the thumbnail of an item in an <img>. */
export function showThumbnail(image, { id, version }, view) {
  const { key: before } = image.dataset;
  const key = `${id} ${view} ${version}`;
  if (before === key) return;
  image.dataset.key = key;
  waiting.delete(image);
  if (!before?.startsWith(`${id} `) || loaded.has(key)) setImage(image, loaded.get(key));
  if (loaded.has(key)) return;
  waiting.set(image, { key, id, view, isRequested: false });
  queueMicrotask(requestBatch);
}
/** Stop waiting for the thumbnail of an <img> that is not used any more. */
export const releaseThumbnail = (image) => waiting.delete(image);

async function requestBatch() {
  if (running === MAX_REQUESTS) return;
  const unrequested = [...waiting].filter(([, { isRequested }]) => !isRequested);
  if (unrequested.length === 0) return;
  const [[, { view }]] = unrequested;
  const batch = unrequested.filter(([, entry]) => entry.view === view).slice(0, MAX_BATCH);
  for (const [, entry] of batch) entry.isRequested = true;
  running += 1;
  const answer = await api.thumbnails(batch.map(([, { id }]) => id), view).catch(() => null);
  if (answer === null) await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  running -= 1;
  for (const [image, entry] of batch) receiveThumbnail(image, entry, answer);
  while (loaded.size > MAX_KEPT) loaded.delete(loaded.keys().next().value);
  requestBatch();
}
/** Show a thumbnail from an answer; if it is not there, request it again. `answer`: null after an error. */
function receiveThumbnail(image, entry, answer) {
  const jpeg = answer?.jpegs[entry.id];
  entry.isRequested = false;
  if (jpeg !== undefined) loaded.set(entry.key, `data:image/jpeg;base64,${jpeg}`);
  else if (!(entry.id in (answer?.errors ?? {}))) return;
  if (waiting.get(image) !== entry) return; // the <img> is used for another image now
  waiting.delete(image);
  setImage(image, loaded.get(entry.key));
  if (jpeg === undefined) image.parentElement.dataset.reason = answer.errors[entry.id];
}

function setImage(image, url) {
  image.parentElement.classList.toggle("loaded", url !== undefined);
  delete image.parentElement.dataset.reason;
  if (url === undefined) image.removeAttribute("src");
  else image.src = url;
}
