// Requests to the server. Every failure becomes an ApiError with a sentence for the user.

/** A request that failed: its message is a sentence; `image` is the newest state of the image after a conflict (409). */
export class ApiError extends Error {
  constructor(message, status, image = null) {
    super(message);
    this.status = status;
    this.image = image;
  }
}

/** Any text that differs between browser tabs: the server drops superseded answers of the same tab. */
const tab = crypto.getRandomValues(new Uint32Array(2)).join("-");

async function call(method, path, { body, signal } = {}) {
  const options = { method, signal };
  if (method !== "GET") {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body ?? {});
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Start `icm review` again, if it has ended.", 0);
  }
  if (response.ok) return response;
  let content = {};
  try {
    content = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error; // other errors: the body is no JSON
  }
  const expired = "This page has expired, because the server was started again. Open the URL that it printed.";
  const fallback = response.status === 403 ? expired : `The server answered with status ${response.status}.`;
  throw new ApiError(content.error ?? fallback, response.status, content.image);
}

const json = async (...request) => (await call(...request)).json();
const blob = async (...request) => (await call(...request)).blob();
const image = (id) => `/api/images/${id}`;

export const api = {
  run: () => json("GET", "/api/run"),
  images: (since) => json("GET", since === null ? "/api/images" : `/api/images?since=${since}`),
  details: (id, signal) => json("GET", image(id), { signal }),
  thumbnail: (id, view, version, signal) =>
    blob("GET", `${image(id)}/thumbnail?view=${view}&v=${encodeURIComponent(version)}`, { signal }),
  source: (id, signal) => blob("GET", `${image(id)}/source`, { signal }),
  alpha: (id, version, signal) => blob("GET", `${image(id)}/alpha?v=${encodeURIComponent(version)}`, { signal }),
  answer: (id, hints, refined, signal) => blob("POST", `${image(id)}/answer`, { body: { hints, refined, tab }, signal }),
  accept: (id, revision, hints) => json("POST", `${image(id)}/accept`, { body: { revision, hints } }),
  reject: (id, revision) => json("POST", `${image(id)}/reject`, { body: { revision } }),
  undo: (id, revision) => json("POST", `${image(id)}/undo`, { body: { revision } }),
  teach: (id, kind, area) => json("POST", "/api/references", { body: { id, kind, area } }),
  forget: (id) => json("DELETE", `/api/references/${id}`),
  recomputeState: () => json("GET", "/api/recompute"),
  recompute: () => json("POST", "/api/recompute"),
  stopRecompute: () => json("POST", "/api/recompute/stop"),
};

/** Return whether an error only says that a request was aborted. */
export const isAborted = (error) => error.name === "AbortError";
