// Thumbnails: requested only while somebody wants them, few at a time, aborted when nobody does; the last ones are kept.

import { api, isAborted } from "./api.js";

/** Browsers open 6 connections to a server; the others are for the image, its answers and the state. */
const MAX_REQUESTS = 3;
const MAX_KEPT = 800;

/** URLs of loaded thumbnails by key, the oldest first. */
const loaded = new Map();
/** Requests that run or wait by key, in the order of loading: {load, images, controller}. */
const wanted = new Map();
/** The key of the thumbnail that an image element shows or waits for. */
const keys = new WeakMap();
let running = 0;

/** Show the thumbnail of an item in an <img>. */
export function showThumbnail(image, item, view) {
  const key = `${item.id} ${view} ${item.version}`;
  const before = keys.get(image);
  if (before === key) return;
  releaseThumbnail(image);
  keys.set(image, key);
  if (loaded.has(key)) setImage(image, loaded.get(key));
  else {
    if (!before?.startsWith(`${item.id} `)) setImage(image, null);
    const load = (signal) => api.thumbnail(item.id, view, item.version, signal);
    if (!wanted.has(key)) wanted.set(key, { load, images: new Set(), controller: null });
    wanted.get(key).images.add(image);
    queueMicrotask(loadNext);
  }
}

/** Stop waiting for the thumbnail of an <img>; a request that nobody waits for is aborted. */
export function releaseThumbnail(image) {
  const key = keys.get(image);
  const request = wanted.get(key);
  keys.delete(image);
  request?.images.delete(image);
  if (request?.images.size === 0) {
    request.controller?.abort();
    wanted.delete(key);
  }
}

function loadNext() {
  for (const [key, request] of wanted) {
    if (running >= MAX_REQUESTS) return;
    if (request.controller === null) load(key, request);
  }
}

async function load(key, request) {
  running += 1;
  request.controller = new AbortController();
  try {
    const url = URL.createObjectURL(await request.load(request.controller.signal));
    remember(key, url);
    for (const image of request.images) setImage(image, url);
  } catch (error) {
    if (!isAborted(error)) for (const image of request.images) image.parentElement.classList.add("failed");
  }
  running -= 1;
  if (wanted.get(key) === request) wanted.delete(key);
  loadNext();
}

function remember(key, url) {
  loaded.set(key, url);
  if (loaded.size <= MAX_KEPT) return;
  const [oldest, oldestUrl] = loaded.entries().next().value;
  loaded.delete(oldest);
  URL.revokeObjectURL(oldestUrl);
}

function setImage(image, url) {
  image.parentElement.classList.toggle("loaded", url !== null);
  image.parentElement.classList.remove("failed");
  if (url === null) image.removeAttribute("src");
  else image.src = url;
}
