// Requests with the reader's key, which this tab alone remembers. What is refused says why in the server's own words.

const KEY = "renalq.key";

export class Refused extends Error {
  constructor(status, words) {
    super(words);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (secret) => sessionStorage.setItem(KEY, secret),
  forget: () => sessionStorage.removeItem(KEY),
};

// The answer to a request; Refused for whatever is no 2xx or 304.
export async function ask(path, { headers = {}, ...options } = {}) {
  const sent = { ...headers, Authorization: `Bearer ${key.get() ?? ""}` };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: sent, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached, or the file cannot be read. Try again shortly.");
  }
  if (answer.ok || answer.status === 304) return answer;
  if (answer.status === 401) document.dispatchEvent(new CustomEvent("key-refused"));
  throw new Refused(answer.status, await words(answer));
}

export async function read(path, options) {
  return (await ask(path, options)).json();
}

// Asks again and again with the tag that the server gave: null where nothing has changed since.
export function follower() {
  let tag = null;
  return async (path) => {
    const answer = await ask(path, { headers: tag ? { "If-None-Match": tag } : {} });
    tag = answer.headers.get("ETag");
    return answer.status === 304 ? null : answer.json();
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
