// The console: asks for the key, then shows scans, jobs and the champion. Data is set as text, never as HTML.

import { elements } from "./card.js";
import { ask, follower, key, pause, read, Refused } from "./client.js";
import * as scans from "./scans.js";

const JOBS_SECONDS = 2;
const CHAMPION_SECONDS = 15;
const CHAMPION_PARTS = ["version", "f1", "f1-interval", "recall", "recall-interval", "since", "why", "reasons", "drift"];
const KINDS = { train: "Training", predict: "Prediction", predict_batch: "Batch", ingest: "Dataset check" };
const TONES = { succeeded: "good", partially_succeeded: "unsure", failed: "bad", running: "busy", queued: "none" };

const at = (id) => document.getElementById(id);
const time = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
const day = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric" });

// --- the key ---

let session = 0; // each key starts a session with polling loops of its own; late responses of earlier ones are dropped

// Returns a function that says whether the current session is still active.
function owner() {
  const mine = session;
  return () => mine === session;
}

at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("key-error").textContent = "";
  session += 1;
  const still = owner();
  key.set(at("key").value.trim());
  try {
    await read("/v1/jobs?limit=1");
    if (!still()) return;
    at("key").value = "";
    open();
    at("main").focus();
  } catch (error) {
    if (still()) shut(error.message);
  }
});
at("forget-key").addEventListener("click", () => shut(""));
document.addEventListener("key-refused", () => shut("This key is unknown or was revoked. Enter another one."));

function open() {
  at("gate").hidden = true;
  at("desk").hidden = at("forget-key").hidden = false;
  session += 1;
  every(JOBS_SECONDS, pollJobs());
  every(CHAMPION_SECONDS, pollChampion);
}

function shut(why) {
  session += 1;
  key.forget();
  empty();
  at("desk").hidden = at("forget-key").hidden = true;
  at("gate").hidden = false;
  at("key-error").textContent = why;
  at("key").focus();
}

// Removes all data from the page: the next person at this screen could read what is only hidden.
function empty() {
  scans.clear();
  showJobs([], "Loading …");
  live("waiting", "Connecting");
  hideChampion("Loading …");
  at("card").close();
  at("card-text").replaceChildren();
}

// Polls while the page is visible.
async function every(seconds, poll) {
  const still = owner();
  while (still()) {
    if (!document.hidden) await poll(still);
    await pause(seconds);
  }
}

// --- scans ---

at("choose").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", () => {
  scans.add(at("files").files);
  at("files").value = "";
});
at("clear").addEventListener("click", scans.clear);
const drop = at("drop");
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, () => drop.classList.add("over"));
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => scans.add(event.dataTransfer.files));
// A file dropped outside the zone must not replace the page.
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());

// --- jobs ---

function pollJobs() {
  const follow = follower();
  return async (still) => {
    try {
      const page = await follow("/v1/jobs?limit=20");
      if (!still()) return;
      if (page) showJobs(page.data);
      live("live", "Live");
    } catch (error) {
      if (still()) live("lost", lost(error));
      if (!(error instanceof Refused)) throw error;
    }
  };
}

function lost(error) {
  if (!(error instanceof Refused)) return "This page has failed: reload it";
  return error.status ? "Refused" : "Not connected";
}

function live(state, text) {
  if (at("live").textContent === text) return;
  at("live").dataset.state = state;
  at("live").textContent = text;
}

function showJobs(jobs, none = "No jobs yet. Drop a scan, or train a model.") {
  at("jobs-none").hidden = jobs.length > 0;
  at("jobs-none").textContent = none;
  const known = new Map([...at("jobs").children].map((row) => [row.dataset.id, row]));
  // Rows are reused, so that a focused button keeps its focus.
  jobs.forEach((job, place) => {
    const row = known.get(job.id) ?? newRow(job);
    known.delete(job.id);
    showJob(row, job);
    if (at("jobs").children[place] !== row) at("jobs").insertBefore(row, at("jobs").children[place] ?? null);
  });
  known.forEach((row) => row.remove());
}

function newRow(job) {
  const row = at("job-template").content.firstElementChild.cloneNode(true);
  row.dataset.id = job.id;
  row.title = `Job ${job.id}`;
  row.querySelector("time").dateTime = job.created_at;
  row.querySelector("time").title = time.format(new Date(job.created_at));
  row.querySelector(".cancel").addEventListener("click", () => cancel(row, job));
  row.querySelector(".delete").addEventListener("click", () => remove(row, job));
  return row;
}

function showJob(row, job) {
  const batch = job.kind === "predict_batch" ? ` of ${job.counts.total}` : "";
  const name = job.name ? `: ${job.name}` : "";
  row.dataset.terminal = job.terminal;
  row.querySelector(".job-kind").textContent = `${KINDS[job.kind] ?? job.kind}${batch}${name}`;
  const chip = row.querySelector(".job-state");
  chip.textContent = job.cancel_requested && !job.terminal ? "stopping" : job.state.replaceAll("_", " ");
  chip.dataset.tone = TONES[job.state] ?? "none";
  row.querySelector(".job-stage").textContent = stage(job);
  row.querySelector("time").textContent = when(new Date(job.created_at));
  row.querySelector("progress").value = job.progress;
  row.querySelector("progress").setAttribute("aria-label", "Progress");
  const button = row.querySelector(".cancel");
  button.hidden = job.terminal || job.cancel_requested;
  button.setAttribute("aria-label", `Cancel ${row.querySelector(".job-kind").textContent}`);
  const remover = row.querySelector(".delete");
  remover.hidden = !job.terminal;
  remover.setAttribute("aria-label", `Delete ${row.querySelector(".job-kind").textContent}`);
}

function stage(job) {
  if (job.terminal) return job.error?.detail ?? (job.model_version ? `model version ${job.model_version}` : "");
  const parts = [job.stage?.replaceAll("_", " "), job.state === "running" ? `${Math.floor(job.progress * 100)} %` : null];
  if (job.queue_position) parts.push(`behind ${job.queue_position}`);
  if (job.eta_seconds !== null) parts.push(`about ${duration(job.eta_seconds)} left`);
  return parts.filter(Boolean).join(" · ");
}

function when(moment) {
  const today = moment.toDateString() === new Date().toDateString();
  return today ? clock.format(moment) : `${day.format(moment)}, ${clock.format(moment)}`;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

async function cancel(row, job) {
  const still = owner();
  const button = row.querySelector(".cancel");
  button.disabled = true;
  try {
    const cancelled = await read(job.links.cancel, { method: "POST" });
    if (still()) showJob(row, cancelled);
  } catch (error) {
    row.querySelector(".job-stage").textContent = error.message;
  }
  button.disabled = false;
}

async function remove(row, job) {
  if (!confirm("Delete this job with its results, and its scans that nothing else needs? It cannot be undone.")) return;
  const button = row.querySelector(".delete");
  button.disabled = true;
  try {
    await read(job.links.self, { method: "DELETE" });
    row.remove();
  } catch (error) {
    row.querySelector(".job-stage").textContent = error.message;
  }
  button.disabled = false;
}

// --- the champion ---

async function pollChampion(still) {
  try {
    const model = await read("/v1/models/champion");
    if (still()) showChampion(model);
  } catch (error) {
    if (still()) hideChampion(error.message);
    if (!(error instanceof Refused)) throw error;
  }
}

function hideChampion(why) {
  at("champion").hidden = true;
  at("champion-none").hidden = false;
  at("champion-none").textContent = why;
  for (const part of CHAMPION_PARTS) at(`champion-${part}`).replaceChildren();
  at("champion-since").removeAttribute("datetime");
}

function showChampion(model) {
  at("champion").hidden = false;
  at("champion-none").hidden = true;
  at("champion-version").textContent = `version ${model.version}`;
  figure("f1", model.metrics);
  figure("recall", model.metrics);
  at("champion-warning").hidden = model.metrics.patients_known !== false;
  const reported = model.gate?.reported;
  const selected = reported?.choices > 1 && typeof reported.value === "number";
  at("champion-choices").hidden = !selected;
  at("champion-choices").textContent = selected ? `Its test scans were used for ${reported.choices} such choices. Without the luck of selection, F1 is ${reported.value.toFixed(3)}.` : "";
  showDrift(model);
  const since = at("champion-since");
  since.dateTime = model.promoted_at ?? "";
  since.textContent = model.promoted_at ? time.format(new Date(model.promoted_at)) : "an unknown time";
  // A champion by force or rollback may not have passed the gate.
  at("champion-why").textContent = model.gate?.promoted ? "Why the gate promoted it" : "Why the gate did not promote it";
  at("champion-reasons").replaceChildren(...(model.gate?.reasons ?? []).map(reason));
}

function showDrift(model) {
  const warning = at("champion-drift");
  warning.hidden = !model.drift;
  if (!model.drift) return;
  const figures = model.drift.figures.join(", ").replaceAll("_", " ");
  warning.textContent = `Drift: the scans of ${model.drift.day} differ from its test scans (${figures}). Its figures may not hold for them.`;
}

function figure(name, metrics) {
  const value = metrics[name];
  const interval = metrics.intervals?.[name];
  at(`champion-${name}`).textContent = typeof value === "number" ? value.toFixed(3) : "–";
  at(`champion-${name}-interval`).textContent = interval ? `95 %: ${interval[0].toFixed(3)} to ${interval[1].toFixed(3)}` : "";
}

function reason(text) {
  const item = document.createElement("li");
  item.textContent = text;
  return item;
}

at("show-card").addEventListener("click", async () => {
  const still = owner();
  at("card-text").textContent = "Loading …";
  at("card").showModal();
  try {
    const headers = { Accept: "text/markdown" };
    const card = elements(await ask("/v1/models/champion/card", (answer) => answer.text(), { headers }));
    if (still()) at("card-text").replaceChildren(...card);
  } catch (error) {
    if (still()) at("card-text").textContent = error.message;
  }
});
at("close-card").addEventListener("click", () => at("card").close());

if (key.get()) open();
else at("gate").hidden = false;
