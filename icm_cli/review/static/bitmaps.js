// Decoded sources and alphas of the last few images, and of the next one, which is loaded ahead.
import { api } from "./api.js";

const MAX_KEPT = 3;

/** Decode an image without a conversion of its values. */
export const decodeImage = (blob) => createImageBitmap(blob, { colorSpaceConversion: "none" });

/** Return a function that loads and decodes an image, and that keeps the last few results. */
function createCache(load) {
  const promises = new Map();
  return (...values) => {
    const key = values.join(" ");
    const promise = promises.get(key) ?? load(...values).then(decodeImage);
    promise.catch(() => promises.delete(key)); // asked for again the next time
    promises.delete(key);
    promises.set(key, promise); // now the newest
    if (promises.size > MAX_KEPT) promises.delete(promises.keys().next().value);
    return promise;
  };
}

const loadSourceById = createCache(api.source);
const loadAlphaByVersion = createCache(api.alpha);

export const loadSource = (item) => loadSourceById(item.id);
/** Return the promise of the alpha of an image; null if it has none. */
export const loadAlpha = async (item) => (item.has_alpha ? loadAlphaByVersion(item.id, item.version) : null);
