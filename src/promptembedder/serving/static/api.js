// The server's API, the only thing that this page asks. Errors hold a sentence for people.

const KEY = "promptembedder-key";

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Storage may be forbidden; the key is then kept by its field alone.
export function storedKey() {
  try { return sessionStorage.getItem(KEY) || ""; } catch { return ""; }
}

export function storeKey(key) {
  try { sessionStorage.setItem(KEY, key); } catch { /* see above */ }
}

async function ask(path, key, signal, body) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, signal, credentials: "same-origin", cache: "no-store" });
    if (answer.ok) return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached, or its answer broke off. Is it still running?");
  }
  throw new ApiError(await inWords(answer, key), answer.status);
}

async function inWords(answer, key) {
  let message = "";
  try {
    message = (await answer.json()).error.message;
  } catch { /* a proxy between may answer with anything */ }
  if (answer.status === 401) return key ? "The server does not know this API key." : "This server needs an API key.";
  if (answer.status === 429) {
    const seconds = Number(answer.headers.get("Retry-After")) || 1;
    return `The server is busy. Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}. (${message})`;
  }
  if (!message) return `The server answered with status ${answer.status}.`;
  // The API counts from 0, the page from 1.
  const named = message.replace(/input\[(\d+)\]/g, (_, n) => `text ${Number(n) + 1}`)
    .replace(/^instruction ([01]):/, (_, n) => `Instruction ${"AB"[n]}:`);
  return `${named[0].toUpperCase()}${named.slice(1)}${/[.!?]$/.test(named) ? "" : "."}`;
}

// Names of models that take any instruction; `MODEL:NAME` has one of its own.
export async function models(key, signal) {
  const { data } = await ask("v1/models", key, signal);
  const names = data.map((one) => one.id);
  return data.filter((one) => !names.some((other) => one.id.startsWith(`${other}:`)))
    .map((one) => ({
      ...one,
      instructions: data.filter((other) => other.id === one.id || other.id.startsWith(`${one.id}:`))
        .map((other) => other.instruction),
    }));
}

// Vectors of every text under each of the instructions, and the texts that were cut.
export async function embeddings(model, texts, instructions, key, signal) {
  const body = { model, input: texts, instruction: instructions, encoding_format: "base64" };
  const { data, usage } = await ask("v1/embeddings", key, signal, body);
  const vectors = instructions.map((_, i) => data.slice(i * texts.length, (i + 1) * texts.length)
    .map((one) => floats(one.embedding)));
  return { vectors, truncated: usage.truncated };
}

function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return [...Array(bytes.length / 4).keys()].map((i) => view.getFloat32(4 * i, true));
}

// Soft tokens of an instruction: for each its words with their weights.
export async function explain(model, instruction, key, signal) {
  return (await ask("v1/explain", key, signal, { model, instruction, top: 5 })).soft_tokens;
}
