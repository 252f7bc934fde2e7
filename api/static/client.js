// Requests with the user's API key, which is kept in this tab only. Errors carry the server's own text.

const KEY = "renalq.key";
const SECONDS = 45; // timeout of a request: longer than the page asks the server to wait
const SENDABLE = /^[!-~]+$/; // allowed in a header; keys have no other characters

export class Refused extends Error {
  constructor(status, words) {
    super(words);
    this.status = status;
  }
}

let secret = stored(() => sessionStorage.getItem(KEY));

export const key = {
  get: () => secret,
  set(given) {
    secret = given;
    stored(() => sessionStorage.setItem(KEY, given));
  },
  forget() {
    secret = null;
    stored(() => sessionStorage.removeItem(KEY));
  },
};

// A browser may forbid storage: then the key is kept until the page is closed.
function stored(act) {
  try {
    return act();
  } catch {
    return null;
  }
}

// Sends a request and returns `take(response)`. Throws Refused unless the status is 2xx or 304; status 0: no response.
export async function ask(path, take, { headers = {}, signal, seconds = SECONDS, ...options } = {}) {
  const sent = key.get() ?? "";
  if (!SENDABLE.test(sent)) throw new Refused(401, "This is no key: keys begin with rq_, and have no spaces or accents.");
  const wanted = { ...options, headers: { ...headers, Authorization: `Bearer ${sent}` }, signal: ending(signal, seconds) };
  try {
    const answer = await fetch(path, { ...wanted, cache: "no-store", credentials: "omit" });
    if (answer.ok || answer.status === 304) return await take(answer);
    if (answer.status === 401 && sent === key.get()) document.dispatchEvent(new CustomEvent("key-refused"));
    throw new Refused(answer.status, await words(answer));
  } catch (error) {
    if (error instanceof Refused || error.name === "AbortError") throw error;
    throw new Refused(0, SILENT[error.name] ?? "The server cannot be reached, or the file cannot be read. Try again shortly.");
  }
}

const SILENT = {
  TimeoutError: "The server does not answer. Try again shortly.",
  SyntaxError: "What answers is not this server. Try again shortly.",
};

// Without a timeout, a silently dropped connection would be waited on for ever.
function ending(signal, seconds) {
  const late = AbortSignal.timeout(seconds * 1000);
  return signal ? AbortSignal.any([signal, late]) : late;
}

const json = (answer) => answer.json();

export const read = (path, options) => ask(path, json, options);

// Returns a polling function that sends the last ETag: its result is null if nothing has changed.
export function follower() {
  let tag = null;
  return (path, options) => {
    const take = async (answer) => {
      const found = answer.status === 304 ? null : await answer.json();
      tag = answer.headers.get("ETag"); // after the body: a truncated response must not count
      return found;
    };
    return ask(path, take, { ...options, headers: tag ? { "If-None-Match": tag } : {} });
  };
}

export const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

async function words(answer) {
  try {
    const problem = await answer.json();
    const fields = (problem.errors ?? []).map((field) => field.detail).filter((detail) => detail !== problem.detail);
    return [problem.detail, ...fields].join(" ");
  } catch {
    return `The server answered ${answer.status}. Try again shortly.`;
  }
}
