// Decoded sources and alphas of the last few images, and of the next one, which is loaded ahead.

import { api } from "./api.js";

const MAX_KEPT = 4;

class BitmapCache {
  /** key -> {promise, controller} */
  entries = new Map();

  constructor(load) {
    this.load = load;
  }

  /** Return the promise of a bitmap. `values`: what identifies it, passed on to the request. */
  get(...values) {
    const key = values.join(" ");
    const known = this.entries.get(key);
    if (known !== undefined) {
      this.entries.delete(key);
      this.entries.set(key, known); // now the newest
      return known.promise;
    }
    const controller = new AbortController();
    const promise = this.load(...values, controller.signal).then(decodeImage);
    promise.catch(() => this.entries.delete(key)); // asked for again the next time
    this.entries.set(key, { promise, controller });
    if (this.entries.size > MAX_KEPT) {
      const [oldest, { controller: superseded }] = this.entries.entries().next().value;
      superseded.abort();
      this.entries.delete(oldest);
    }
    return promise;
  }
}

/** Decode an image without a conversion of its values. */
export const decodeImage = (blob) => createImageBitmap(blob, { colorSpaceConversion: "none" });

const sources = new BitmapCache((id, signal) => api.source(id, signal));
const alphas = new BitmapCache((id, version, signal) => api.alpha(id, version, signal));

/** Return the promise of the source of an image. */
export const loadSource = (item) => sources.get(item.id);

/** Return the promise of the alpha of an image; null if it has none. */
export const loadAlpha = (item) => (item.has_alpha ? alphas.get(item.id, item.version) : Promise.resolve(null));
