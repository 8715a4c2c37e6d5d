// Decoded sources and alphas of the last few images, and of the next one, which is loaded ahead.

import { api } from "./api.js";

const MAX_KEPT = 4;

/** Decode an image without a conversion of its values. */
export const decodeImage = (blob) => createImageBitmap(blob, { colorSpaceConversion: "none" });

/** Return a function that loads and decodes an image, and that keeps the last few results. */
function createCache(load) {
  const entries = new Map();
  return (...values) => {
    const key = values.join(" ");
    const entry = entries.get(key) ?? { controller: new AbortController() };
    entries.delete(key);
    entries.set(key, entry); // now the newest
    if (entry.promise === undefined) {
      entry.promise = load(...values, entry.controller.signal).then(decodeImage);
      entry.promise.catch(() => entries.delete(key)); // asked for again the next time
    }
    if (entries.size > MAX_KEPT) {
      const [oldest, { controller }] = entries.entries().next().value;
      controller.abort();
      entries.delete(oldest);
    }
    return entry.promise;
  };
}

const sources = createCache(api.source);
const alphas = createCache(api.alpha);

/** Return the promise of the source of an image. */
export const loadSource = (item) => sources(item.id);
/** Return the promise of the alpha of an image; null if it has none. */
export const loadAlpha = (item) => (item.has_alpha ? alphas(item.id, item.version) : Promise.resolve(null));
