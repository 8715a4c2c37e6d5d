// Thumbnails: requested only while an <img> wants them, few at a time, aborted when it does not; the last ones are kept.
import { api, isAborted } from "./api.js";

/** Few, because the server makes the thumbnail of a request also if it is aborted. */
const MAX_REQUESTS = 5;
const MAX_KEPT = 800;

/** URLs of loaded thumbnails by key, the oldest first. */
const loaded = new Map();
/** Requests that run or wait by their <img>, in the order of loading: {key, load, controller}. */
const requests = new Map();
/** The key of the thumbnail that an <img> shows or waits for. */
const keys = new WeakMap();
let running = 0;

/** Show the thumbnail of an item in an <img>. */
export function showThumbnail(image, item, view) {
  const key = `${item.id} ${view} ${item.version}`;
  const before = keys.get(image);
  if (before === key) return;
  releaseThumbnail(image);
  keys.set(image, key);
  if (!before?.startsWith(`${item.id} `) || loaded.has(key)) setImage(image, loaded.get(key));
  if (loaded.has(key)) return;
  requests.set(image, { key, load: (signal) => api.thumbnail(item.id, view, item.version, signal), controller: null });
  queueMicrotask(loadNext);
}
/** Stop waiting for the thumbnail of an <img>. */
export function releaseThumbnail(image) {
  requests.get(image)?.controller?.abort();
  requests.delete(image);
  keys.delete(image);
}

function loadNext() {
  for (const [image, request] of requests) {
    if (running < MAX_REQUESTS && request.controller === null) loadThumbnail(image, request);
  }
}

async function loadThumbnail(image, request) {
  running += 1;
  request.controller = new AbortController();
  try {
    const url = URL.createObjectURL(await request.load(request.controller.signal));
    loaded.set(request.key, url);
    if (keys.get(image) === request.key) setImage(image, url);
  } catch (error) { if (!isAborted(error)) image.parentElement.classList.add("failed"); }
  running -= 1;
  if (requests.get(image) === request) requests.delete(image);
  if (loaded.size > MAX_KEPT) {
    const [oldest, url] = loaded.entries().next().value;
    loaded.delete(oldest);
    URL.revokeObjectURL(url);
  }
  loadNext();
}

function setImage(image, url) {
  image.parentElement.classList.toggle("loaded", url !== undefined);
  image.parentElement.classList.remove("failed");
  if (url === undefined) image.removeAttribute("src");
  else image.src = url;
}
