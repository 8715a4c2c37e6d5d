// Requests to the server, and images that it sent. Every failure becomes an error with a sentence for the user.

const MAX_KEPT = 3; // sources, and alphas: of the last images, and of the next one, which is loaded ahead
export const isAborted = (error) => error.name === "AbortError";
/** Any text that differs between browser tabs: the server drops superseded answers of the same tab. */
const tab = crypto.getRandomValues(new Uint32Array(2)).join("-");
const CONTINUE = "Open its new link in another tab. Then continue in this tab, which keeps hints that are not saved.";
let run = {}; // what the server says about the run; its `list` identifies the list of images

async function call(method, path, { body, signal } = {}) {
  const headers = { "Content-Type": "application/json", ...(run.list && { "Image-List": run.list }) };
  let response;
  try {
    response = await fetch(path, { method, signal, headers, body: body && JSON.stringify(body) });
  } catch (error) {
    if (isAborted(error)) throw error;
    const advice = ` If it has ended, start icm review again with --port ${run.port}. ${CONTINUE}`;
    throw Object.assign(new Error("the server does not answer"), { status: 0, topic: "connection", advice });
  }
  if (response.ok) return response;
  const { status } = response;
  const { error = `the server answered with status ${status}`, image } = await response.json().catch(() => ({}));
  const topic = [403, 410].includes(status) ? "connection" : undefined; // of its message
  throw Object.assign(new Error(error), { status, image, topic }); // `image`: newest state after a conflict (409)
}

const json = async (...request) => (await call(...request)).json();
/** Return a blob: a source with the `version` of its files, or a refined answer with `outdated`, a text or "". */
async function blob(...request) {
  const response = await call(...request);
  const [version, outdated] = ["Source-Version", "Outdated-Alpha"].map((name) => response.headers.get(name));
  return Object.assign(await response.blob(), { version, outdated });
}
const change = (id, action, body) => json("POST", part(id, action), { body });
const part = (id, name, query = {}) => `/api/images/${id}/${name}?${new URLSearchParams(query)}`;

export const api = {
  run: async () => (run = await json("GET", "/api/run")),
  images: (since) => json("GET", `/api/images?${new URLSearchParams(since)}`),
  details: (id) => json("GET", `/api/images/${id}`),
  thumbnails: (ids, view) => json("GET", `/api/thumbnails?${new URLSearchParams({ view, ids })}`),
  source: (id) => blob("GET", part(id, "source")),
  alpha: (id, v) => blob("GET", part(id, "alpha", { v })),
  answer: (id, source, hints, refined, signal) =>
    blob("POST", part(id, "answer"), { body: { source, hints, refined, tab }, signal }),
  accept: (id, source, revision, hints) => change(id, "accept", { source, revision, hints }),
  reject: (id, source, revision) => change(id, "reject", { source, revision }),
  undo: (id, revision) => change(id, "undo", { revision }),
  teach: (id, kind, area) => json("POST", "/api/references", { body: { id, kind, area } }),
  forget: (id) => json("DELETE", `/api/references/${id}`),
  reloadModel: () => json("POST", "/api/model", { body: {} }),
  recomputeState: () => json("GET", "/api/recompute"),
  recompute: () => json("POST", "/api/recompute", { body: {} }),
  stopRecompute: () => json("POST", "/api/recompute/stop", { body: {} }),
};
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
