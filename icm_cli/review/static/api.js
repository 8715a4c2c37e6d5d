// Requests to the server. Every failure becomes an ApiError with a sentence for the user.

/** A failed request. `image`: the newest state after a conflict (409). `topic`: "connection", or undefined. */
export class ApiError extends Error {
  constructor(message, status, image = null) {
    super(message);
    Object.assign(this, { status, image, topic: status === 0 || status === 403 ? "connection" : undefined });
  }
}
export const isAborted = (error) => error.name === "AbortError";

/** Any text that differs between browser tabs: the server drops superseded answers of the same tab. */
const tab = crypto.getRandomValues(new Uint32Array(2)).join("-");

const RECONNECT = `start icm review again with --port ${location.port}, and open its link in another tab. \
Then go on in this tab, which keeps hints that are not saved`;

async function call(method, path, { body = {}, signal } = {}) {
  const content = { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { method, signal, ...(method === "GET" ? {} : content) });
  } catch (error) {
    if (isAborted(error)) throw error;
    throw new ApiError(`The server does not answer. If it has ended, ${RECONNECT}`, 0);
  }
  if (response.ok) return response;
  if (response.status === 403) throw new ApiError(`The server was started again: ${RECONNECT}`, 403);
  const { error, image } = await response.json().catch(() => ({})); // a proxy may answer without JSON
  throw new ApiError(error ?? `The server answered with status ${response.status}`, response.status, image);
}

const json = async (...request) => (await call(...request)).json();
const blob = async (...request) => (await call(...request)).blob();
const change = (id, action, body) => json("POST", part(id, action), { body });
const part = (id, name, query = {}) => `/api/images/${id}/${name}?${new URLSearchParams(query)}`;

export const api = {
  run: () => json("GET", "/api/run"),
  images: (since) => json("GET", `/api/images?${new URLSearchParams(since)}`),
  details: (id) => json("GET", `/api/images/${id}`),
  thumbnails: (ids, view) => json("GET", `/api/thumbnails?${new URLSearchParams({ view, ids })}`),
  /** Return a blob; its `version` is that of the files of the source. */
  source: async (id) => {
    const response = await call("GET", part(id, "source"));
    return Object.assign(await response.blob(), { version: response.headers.get("Source-Version") });
  },
  alpha: (id, v) => blob("GET", part(id, "alpha", { v })),
  answer: (id, source, hints, refined, signal) =>
    blob("POST", part(id, "answer"), { body: { source, hints, refined, tab }, signal }),
  accept: (id, source, revision, hints) => change(id, "accept", { source, revision, hints }),
  reject: (id, revision) => change(id, "reject", { revision }),
  undo: (id, revision) => change(id, "undo", { revision }),
  teach: (id, kind, area) => json("POST", "/api/references", { body: { id, kind, area } }),
  forget: (id) => json("DELETE", `/api/references/${id}`),
  recomputeState: () => json("GET", "/api/recompute"),
  recompute: () => json("POST", "/api/recompute"),
  stopRecompute: () => json("POST", "/api/recompute/stop"),
};
