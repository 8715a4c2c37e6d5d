// Requests to the server. Every failure becomes an ApiError with a sentence for the user.

/** A failed request. Its message is a sentence; `image` is the newest state after a conflict (409). */
export class ApiError extends Error {
  constructor(message, status, image = null) { super(message); Object.assign(this, { status, image }); }
}
export const isAborted = (error) => error.name === "AbortError";

/** Any text that differs between browser tabs: the server drops superseded answers of the same tab. */
const tab = crypto.getRandomValues(new Uint32Array(2)).join("-");

async function call(method, path, { body = {}, signal } = {}) {
  const content = { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { method, signal, ...(method === "GET" ? {} : content) });
  } catch (error) {
    if (isAborted(error)) throw error;
    throw new ApiError("The server does not answer. Start `icm review` again, if it has ended.", 0);
  }
  if (response.ok) return response;
  const { error, image } = await response.json().catch(() => ({})); // a proxy may answer without JSON
  throw new ApiError(error ?? `The server answered with status ${response.status}.`, response.status, image);
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
  source: (id) => blob("GET", part(id, "source")),
  alpha: (id, v) => blob("GET", part(id, "alpha", { v })),
  answer: (id, hints, refined, signal) =>
    blob("POST", part(id, "answer"), { body: { hints, refined, tab }, signal }),
  accept: (id, revision, hints) => change(id, "accept", { revision, hints }),
  reject: (id, revision) => change(id, "reject", { revision }),
  undo: (id, revision) => change(id, "undo", { revision }),
  teach: (id, kind, area) => json("POST", "/api/references", { body: { id, kind, area } }),
  forget: (id) => json("DELETE", `/api/references/${id}`),
  recomputeState: () => json("GET", "/api/recompute"),
  recompute: () => json("POST", "/api/recompute"),
  stopRecompute: () => json("POST", "/api/recompute/stop"),
};
