// Scans: sent without their file names, followed to the end of the job, shown with label, confidence and heatmap.

import { ask, follower, pause, read, Refused } from "./client.js";

const CONCURRENT = 3; // a browser opens six connections to one host, and the list of jobs needs one
const WAIT_SECONDS = 30;
const POLL_SECONDS = 1;
const SLOWEST = 50_000; // bytes per second: a slower transfer counts as a lost connection
const TONES = { normal: "good", tumor: "bad", indeterminate: "unsure", rejected: "unsure" };

const list = document.getElementById("results");
const waiting = [];
const urls = new Set(); // object URLs of the images in the list
let working = 0;
let round = new AbortController(); // aborted when the list is cleared, so that late results are dropped

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
  announce("");
  document.getElementById("clear").hidden = true;
}

function work() {
  while (working < CONCURRENT && waiting.length) {
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
    const [result] = (await retrying(card, signal, () => read(job.links.results, { signal }))).data;
    if (!result || result.state !== "succeeded") {
      throw new Refused(0, result?.error?.detail ?? job.error?.detail ?? "The job was cancelled.");
    }
    show(card, result);
    announce(`${file.name}: ${spoken(result)}`);
    if (result.explanation) await overlay(card, result.explanation, signal);
  } catch (error) {
    if (signal.aborted) return; // the list was cleared
    fail(card, error instanceof Refused ? error.message : "This page has failed. Reload it, and try again.");
    announce(`${file.name}: failed. ${error.message}`);
    if (!(error instanceof Refused)) throw error;
  }
}

async function classify(card, file, signal) {
  const body = new FormData();
  body.append("file", file, "scan"); // file names often contain patients' names
  body.append("explain", "true");
  setStatus(card, "Sending and classifying …");
  const headers = { Prefer: `wait=${WAIT_SECONDS}` };
  const seconds = 1.5 * WAIT_SECONDS + file.size / SLOWEST;
  let job = await read("/v1/jobs/predict", { method: "POST", body, headers, signal, seconds });
  const follow = follower();
  while (!job.terminal) {
    setStatus(card, job.queue_position ? `Waiting behind ${job.queue_position} other jobs …` : "Classifying …");
    await pause(POLL_SECONDS);
    job = (await retrying(card, signal, () => follow(job.links.self, { signal }))) ?? job;
  }
  return job;
}

// Retries until there is a response: a failed request says nothing about the job, which goes on.
async function retrying(card, signal, asked) {
  while (true) {
    signal.throwIfAborted();
    try {
      return await asked();
    } catch (error) {
      if (!(error instanceof Refused) || !passing(error.status)) throw error;
      setStatus(card, "The server does not answer just now. Looking again …");
    }
    await pause(POLL_SECONDS);
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
  image.src = objectUrl(file);
}

function reveal(card, image) {
  image.hidden = card.querySelector(".enlarge").hidden = false;
  card.querySelector(".blank").hidden = true;
}

function objectUrl(blob) {
  const url = URL.createObjectURL(blob);
  urls.add(url);
  return url;
}

function setStatus(card, text) {
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
  // A rejected scan has no class, however confident the network is.
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
  const picture = await retrying(card, signal, () => ask(path, (answer) => answer.blob(), { signal }));
  const image = card.querySelector(".overlay-image");
  image.onload = () => {
    image.alt = "The scan with a heatmap: where the model saw what speaks for its answer";
    reveal(card, image);
  };
  image.src = objectUrl(picture);
  if (!card.querySelector(".scan-image")) return; // no image to blend with
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

function spoken(result) {
  const word = result.disposition && result.disposition !== result.label.toLowerCase() ? `${result.disposition}, ` : "";
  return `${word}${result.label}, ${percent(result.confidence)}. ${result.reason ?? ""}`;
}

function announce(text) {
  document.getElementById("announcement").textContent = text;
}

const capital = (word) => word.charAt(0).toUpperCase() + word.slice(1);

// Never "100 %": no network is certain.
function percent(share) {
  const shown = Math.min(Math.max(share * 100, 0), 100);
  if (shown > 99.9 && shown < 100.1) return "> 99.9 %";
  return shown < 0.1 ? "< 0.1 %" : `${shown.toFixed(1)} %`;
}
