// Talks to the service: one function per route that the page needs. Knows nothing of what is on the page.

const BASE = new URL("v1/", document.baseURI);
const LONGEST_WAIT_MS = 30_000;
const STORED_KEY = "fewshot-key";

// The service answered, and said no.
export class Problem extends Error {
  constructor(status, { code = "", detail = "", index = null }) {
    super(detail || `The service answered ${status}.`);
    Object.assign(this, { status, code, index });
  }
}

// The service did not answer, or asks to come back later.
export class Away extends Error {
  constructor(text, seconds) {
    super(text);
    this.seconds = seconds;
  }
}

// Asks the person for a key and resolves to it, or to null; the page puts its dialog here.
export const keys = { ask: async () => null };
let asking = null;

export function key() {
  return sessionStorage.getItem(STORED_KEY);
}

async function newKey(refused) {
  if (refused !== key()) return true; // another request has asked meanwhile
  asking ??= keys.ask(refused !== null).finally(() => (asking = null));
  const given = await asking;
  if (given) sessionStorage.setItem(STORED_KEY, given);
  return Boolean(given);
}

async function call(method, path, { body, headers = {}, mayAsk = true } = {}) {
  for (;;) {
    const used = key();
    const sent = used ? { ...headers, Authorization: `Bearer ${used}` } : headers;
    let response;
    try {
      const signal = AbortSignal.timeout(LONGEST_WAIT_MS);
      response = await fetch(new URL(path, BASE), { method, body, headers: sent, signal, cache: "no-store" });
    } catch {
      throw new Away("The service does not answer.", 0);
    }
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({}));
    if (response.status === 401 && mayAsk && (await newKey(used))) continue;
    if ([429, 502, 503, 504].includes(response.status)) {
      throw new Away(problem.detail || "The service is busy.", Number(response.headers.get("Retry-After")) || 0);
    }
    throw new Problem(response.status, problem);
  }
}

// The name of a field is the label. Written by hand, since FormData would turn a quote in a label into %22.
function form(photos) {
  const boundary = `photos-${Math.random().toString(36).slice(2)}`;
  const parts = photos.flatMap(({ label, blob }) => [
    `--${boundary}\r\nContent-Disposition: form-data; name="${field(label)}"; filename="photo"\r\n`,
    `Content-Type: ${blob.type}\r\n\r\n`,
    blob,
    "\r\n",
  ]);
  return {
    body: new Blob([...parts, `--${boundary}--\r\n`]),
    headers: { "Content-Type": `multipart/form-data; boundary=${boundary}` },
  };
}

function field(label) {
  const reserved = ["unlabelled", "unlabeled", "query", "queries"].includes(label.toLowerCase()) || label.startsWith("label:");
  return (reserved ? `label:${label}` : label).replace(/["\\]/g, "\\$&");
}

// Within an address these are folders, however they are written: a request would go elsewhere.
export const isFolder = (name) => [".", ".."].includes(name);

function at(task, ...rest) {
  const folder = [task, ...rest].find(isFolder);
  if (folder) throw new Problem(0, { detail: `A browser cannot send a request about "${folder}".` });
  return ["tasks", task, ...rest].map(encodeURIComponent).join("/");
}

const json = async (response) => (await response).json();

export function create(task, photos, { retain }) {
  const { body, headers } = form(photos);
  const query = retain ? "?retain=images" : "";
  return json(call("PUT", at(task) + query, { body, headers: { ...headers, "If-None-Match": "*" } }));
}
export const add = (task, photos) => json(call("POST", at(task, "examples"), form(photos)));
export const get = (task) => json(call("GET", at(task)));
// Nobody is asked for a key to be shown what there is.
export const tasks = (after = "") => json(call("GET", `tasks?cursor=${encodeURIComponent(after)}`, { mayAsk: false }));
export const versions = (task) => json(call("GET", at(task, "versions")));
export const forget = (task) => call("DELETE", at(task));
export const removeExample = (task, id) => json(call("DELETE", at(task, "examples", id)));
export const removeClass = (task, label) => json(call("DELETE", at(task, "classes", label)));
export const rollback = (task, version) => json(call("POST", `${at(task, "rollback")}?version=${version}`));
export const image = async (task, id) => (await call("GET", at(task, "examples", id, "image"))).blob();
export const exported = async (task) => (await call("GET", `${at(task, "export")}?format=onnx`)).blob();
export const exportAddress = (task) => new URL(`${at(task, "export")}?format=onnx`, BASE).href;
export const address = (task, what) => new URL(at(task, what), BASE).href;
export const artifact = () => json(call("GET", "artifact"));

export async function classify(task, blob, { explain }) {
  const headers = { "Content-Type": blob.type };
  const query = explain ? "?explain=true" : ""; // without a query the service answers on its fastest path
  const { predictions } = await json(call("POST", at(task, "classify") + query, { body: blob, headers }));
  if (predictions[0].error) throw new Problem(422, predictions[0].error);
  return predictions[0];
}
