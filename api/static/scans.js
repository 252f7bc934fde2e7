// Scans: sent without their names, followed to their end, shown with label, confidence, disposition and heatmap.

import { ask, follower, pause, read, Refused } from "./client.js";

const AT_ONCE = 3; // a browser opens six connections to one host, and the jobs want one
const WAIT_SECONDS = 30;
const LOOK_SECONDS = 1;
const SLOWEST = 50_000; // bytes a second: what sends a scan more slowly is taken for a connection that is gone
const TONES = { normal: "good", tumor: "bad", indeterminate: "unsure", rejected: "unsure" };

const list = document.getElementById("results");
const waiting = [];
const urls = new Set(); // what the pictures of the list hold in memory
let working = 0;
let round = new AbortController(); // ends with the list: what was sent before it was cleared is shown no more

export function add(files) {
  for (const file of files) {
    const card = makeCard(file.name);
    list.prepend(card);
    preview(card, file);
    waiting.push({ card, file, signal: round.signal });
  }
  document.getElementById("clear").hidden = !list.children.length;
  work();
}

export function clear() {
  round.abort();
  round = new AbortController();
  waiting.length = 0;
  list.replaceChildren();
  urls.forEach(URL.revokeObjectURL);
  urls.clear();
  tell("");
  document.getElementById("clear").hidden = true;
}

function work() {
  while (working < AT_ONCE && waiting.length) {
    working += 1;
    take(waiting.shift()).finally(() => {
      working -= 1;
      work();
    });
  }
}

async function take({ card, file, signal }) {
  try {
    const job = await classify(card, file, signal);
    const [result] = (await patiently(card, signal, () => read(job.links.results, { signal }))).data;
    if (!result || result.state !== "succeeded") {
      throw new Refused(0, result?.error?.detail ?? job.error?.detail ?? "The job was cancelled.");
    }
    show(card, result);
    tell(`${file.name}: ${said(result)}`);
    if (result.explanation) await overlay(card, result.explanation, signal);
  } catch (error) {
    if (signal.aborted) return; // nobody looks at the card any more
    fail(card, error instanceof Refused ? error.message : "This page has failed. Reload it, and try again.");
    tell(`${file.name}: failed. ${error.message}`);
    if (!(error instanceof Refused)) throw error;
  }
}

async function classify(card, file, signal) {
  const body = new FormData();
  body.append("file", file, "scan"); // names of files are often those of patients
  body.append("explain", "true");
  say(card, "Sending and classifying …");
  const headers = { Prefer: `wait=${WAIT_SECONDS}` };
  const seconds = 1.5 * WAIT_SECONDS + file.size / SLOWEST;
  let job = await read("/jobs/predict", { method: "POST", body, headers, signal, seconds });
  const follow = follower();
  while (!job.terminal) {
    say(card, job.queue_position ? `Waiting behind ${job.queue_position} other jobs …` : "Classifying …");
    await pause(LOOK_SECONDS);
    job = (await patiently(card, signal, () => follow(job.links.self, { signal }))) ?? job;
  }
  return job;
}

// Asks until there is an answer: that none comes just now says nothing of the job, which goes on.
async function patiently(card, signal, asked) {
  while (true) {
    signal.throwIfAborted();
    try {
      return await asked();
    } catch (error) {
      if (!(error instanceof Refused) || !passing(error.status)) throw error;
      say(card, "The server does not answer just now. Looking again …");
    }
    await pause(LOOK_SECONDS);
  }
}

const passing = (status) => status === 0 || status === 429 || status >= 500;

// --- a card ---

function makeCard(name) {
  const card = document.getElementById("scan-template").content.firstElementChild.cloneNode(true);
  const title = card.querySelector(".file-name");
  title.textContent = title.title = name;
  const button = card.querySelector(".enlarge");
  button.addEventListener("click", () => button.setAttribute("aria-pressed", card.classList.toggle("large")));
  return card;
}

function preview(card, file) {
  const image = card.querySelector(".scan-image");
  image.onload = () => {
    image.alt = "The scan";
    reveal(card, image);
  };
  image.onerror = () => {
    image.remove();
    card.querySelector(".blank").textContent = "Your browser cannot show this kind of file.";
  };
  image.src = held(file);
}

function reveal(card, image) {
  image.hidden = card.querySelector(".enlarge").hidden = false;
  card.querySelector(".blank").hidden = true;
}

function held(blob) {
  const url = URL.createObjectURL(blob);
  urls.add(url);
  return url;
}

function say(card, text) {
  card.querySelector(".status-text").textContent = text;
}

function fail(card, detail) {
  end(card, "failed");
  const chip = card.querySelector(".disposition");
  chip.hidden = false;
  chip.dataset.tone = "bad";
  chip.textContent = "Failed";
  const error = card.querySelector(".error");
  error.hidden = false;
  error.textContent = detail;
}

function show(card, result) {
  end(card, "done");
  const word = result.disposition ?? result.label;
  const chip = card.querySelector(".disposition");
  chip.hidden = false;
  chip.dataset.tone = TONES[word.toLowerCase()] ?? "none";
  chip.textContent = capital(word);
  const reason = card.querySelector(".reason");
  reason.hidden = !result.reason;
  reason.textContent = result.reason ?? "";
  const found = Object.entries(result.probabilities).sort((a, b) => b[1] - a[1]);
  // Of a scan that is rejected no class is the answer, however sure the network is.
  const answer = word === "rejected" ? null : result.label;
  card.querySelector(".classes").replaceChildren(...found.map(([name, share]) => bar(name, share, name === answer)));
  const note = card.querySelector(".note");
  note.hidden = !result.explanation_note;
  note.textContent = result.explanation_note ?? "";
  card.querySelector(".facts").textContent = facts(result);
}

function bar(name, share, found) {
  const row = document.getElementById("class-template").content.firstElementChild.cloneNode(true);
  const label = row.querySelector(".class-name");
  label.textContent = label.title = name;
  row.classList.toggle("found", found);
  row.querySelector("progress").value = share;
  row.querySelector("progress").setAttribute("aria-label", name);
  row.querySelector("output").textContent = percent(share);
  return row;
}

function facts(result) {
  const known = [`Model version ${result.model_version}`, result.engine, result.cached ? "seen before" : null];
  if (typeof result.ood_score === "number") known.push(`out-of-distribution score ${result.ood_score.toFixed(2)} (limit 1)`);
  return known.filter(Boolean).join(" · ");
}

async function overlay(card, path, signal) {
  const picture = await patiently(card, signal, () => ask(path, (answer) => answer.blob(), { signal }));
  const image = card.querySelector(".overlay-image");
  image.onload = () => {
    image.alt = "The scan with a heatmap: where the model saw what speaks for its answer";
    reveal(card, image);
  };
  image.src = held(picture);
  if (!card.querySelector(".scan-image")) return; // there is nothing to fade to
  const blend = card.querySelector(".blend");
  blend.hidden = false;
  blend.querySelector("input").addEventListener("input", (event) => {
    image.style.opacity = event.target.value / 100;
  });
}

function end(card, state) {
  card.dataset.state = state;
  card.querySelector(".status").hidden = true;
}

// --- words ---

function said(result) {
  const word = result.disposition && result.disposition !== result.label.toLowerCase() ? `${result.disposition}, ` : "";
  return `${word}${result.label}, ${percent(result.confidence)}. ${result.reason ?? ""}`;
}

function tell(text) {
  document.getElementById("told").textContent = text;
}

const capital = (word) => word.charAt(0).toUpperCase() + word.slice(1);

// Never "100 %": no network is certain.
function percent(share) {
  const shown = Math.min(Math.max(share * 100, 0), 100);
  if (shown > 99.9 && shown < 100.1) return "> 99.9 %";
  return shown < 0.1 ? "< 0.1 %" : `${shown.toFixed(1)} %`;
}
