// Decoded sources and alphas of the last few images, and of the next one, which is loaded ahead.
import { api } from "./api.js";

const MAX_KEPT = 3;

/** Decode an image without a conversion of its values. The version of the blob becomes that of the bitmap. */
export async function decodeImage(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  return Object.assign(bitmap, { version: blob.version });
}

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

/** Return the promise of a source. One that was loaded before its files changed is loaded again. */
export async function loadSource({ id, source_version: version }) {
  const bitmap = await loadSourceById(id);
  return version === undefined || version === bitmap.version ? bitmap : loadSourceById(id, version);
}
/** Return the promise of the alpha of an image; null if it has none. */
export const loadAlpha = async (item) => (item.has_alpha ? loadAlphaByVersion(item.id, item.version) : null);
