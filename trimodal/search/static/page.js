// The search page: what is asked, and the answer to the newest question.
//
// A query is { text }, { like: NUMBER }, { file, kind, name, preview } or {}, which shows some of the index. Those of
// words and of entries stand in the address, so that they can be kept and shared; files live as long as the page.

import * as recorder from "./recorder.js";
import * as results from "./results.js";
import { label, language, say, translate } from "./words.js";

const $ = (id) => document.getElementById(id);
const WAIT_MS = 250; // after a key, before what stands in the box is searched
const BUSY_MS = 150; // an answer that comes sooner shows no sign of waiting

let about = null; // what /api/index tells
let newest = null; // the request whose answer counts
let asked = {}; // the query that is shown
let recording = null;
const files = []; // queries by file; history holds their places in here

// ---- asking ----

/** Ask the server and show its answer, unless another query has been asked by then. `step` is "push" for a new place
 * in the history, "replace" for the same, "" where it is there already. */
async function ask(query, step) {
  newest?.abort();
  const mine = (newest = new AbortController());
  asked = query;
  if (step) remember(query, step);
  showQuery(query);
  tell("");
  const busy = setTimeout(() => {
    $("results").setAttribute("aria-busy", "true");
    tell(say("searching"), "heard");
  }, BUSY_MS);
  try {
    const response = await fetch(addressOf(query), { signal: mine.signal, ...(query.file && { method: "POST", body: query.file }) });
    const answer = response.ok ? await response.json() : await response.text();
    if (mine !== newest) return;
    if (response.ok) return showAnswer(query, answer);
    showFailure(reasonOf(response.status, answer.trim()));
  } catch (error) {
    if (mine === newest) showFailure(say("gone"));
  } finally {
    clearTimeout(busy);
    if (mine === newest) $("results").setAttribute("aria-busy", "false");
  }
}

function addressOf(query) {
  if (query.file) return `/api/search?kind=${query.kind}`;
  return `/api/search${searchOf(query)}`;
}

function searchOf(query) {
  if (query.text !== undefined) return `?${new URLSearchParams({ text: query.text })}`;
  return query.like === undefined ? "" : `?like=${query.like}`;
}

function showAnswer(query, answer) {
  results.show(answer);
  if (query.isFromResult) results.focusFirst(); // what had the focus is gone
  if (query.like !== undefined) showLiked(answer.like);
  const isQuery = Boolean(searchOf(query) || query.file);
  tell(isQuery ? say("found", results.best()) : "", isQuery ? "heard" : "");
  document.title = say("tab", query.text || query.name || about.name);
  if (isQuery && scrollY > 200) scrollTo({ top: 0 });
}

function showFailure(reason) {
  results.clear(); // they would be taken for the answer
  asked = {}; // so that the same may be asked again
  $("query").hidden = true;
  tell(reason, "trouble");
}

function reasonOf(status, line) {
  if (status === 413) return /long/.test(line) ? say("tooLong", about.max_upload_s) : say("tooLarge", about.max_upload_bytes >> 20);
  if (status === 422) return say("unreadable", line);
  if (status === 503) return say("busy");
  return say("failed", line);
}

/** One line below the box. `how`: "trouble", "heard" (by screen readers only: the results themselves are seen) or "". */
function tell(text, how = "") {
  $("status").className = how;
  $("status").textContent = text;
}

// ---- the query and the history ----

function showQuery(query) {
  const isMedium = query.file || query.like !== undefined;
  $("query").hidden = !isMedium;
  if (query.text === undefined && document.activeElement !== $("text")) $("text").value = "";
  if (query.text !== undefined && $("text").value.trim() !== query.text) $("text").value = query.text;
  if (query.file) showMedium(say("byFile", query.name), query.kind === "image" && !query.isVideo, query.kind === "audio", query.preview);
  $("other-half").hidden = !query.isVideo;
  if (query.isVideo) $("other-half").textContent = say(query.kind === "image" ? "bySound" : "byPicture");
}

function showLiked(entry) {
  asked.name = results.baseName(entry);
  const isPicture = entry.kind === "image";
  const address = isPicture ? `/thumbnails/${entry.number}?v=${entry.digest}` : `/files/${entry.number}`;
  showMedium(say("byFile", asked.name), isPicture, !isPicture, address);
}

function showMedium(text, isPicture, isSound, address) {
  const [image, audio] = [$("query").querySelector("img"), $("query").querySelector("audio")];
  $("query").querySelector(".about").textContent = text;
  image.hidden = !isPicture;
  audio.hidden = !isSound;
  image.removeAttribute("src");
  audio.removeAttribute("src");
  if (isPicture || isSound) (isPicture ? image : audio).src = address;
}

function remember(query, step) {
  if (query.file && query.place === undefined) query.place = files.push(query) - 1;
  const state = { text: query.text, like: query.like, place: query.place };
  history[step === "push" ? "pushState" : "replaceState"](state, "", `/${query.file ? "" : searchOf(query)}`);
}

/** The query of a place in the history, or of the address. */
function remembered(state) {
  if (state?.place !== undefined && files[state.place]) return files[state.place];
  const given = new URLSearchParams(location.search);
  if (given.get("text")?.trim()) return { text: given.get("text").trim() };
  return /^\d+$/.test(given.get("like") ?? "") ? { like: Number(given.get("like")) } : {};
}

// ---- words ----

let typed = 0;

/** Search what stands in the box. What is typed on and on is one place in the history. */
function askTyped() {
  clearTimeout(typed);
  const text = $("text").value.trim();
  if (text === (asked.text ?? "") && !asked.file && asked.like === undefined) return;
  ask(text ? { text } : {}, text && asked.text ? "replace" : "push");
}

$("text").addEventListener("input", (event) => {
  clearTimeout(typed);
  if (!event.isComposing) typed = setTimeout(askTyped, WAIT_MS);
});
$("text").addEventListener("compositionend", () => { typed = setTimeout(askTyped, WAIT_MS); });
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  askTyped();
});

// ---- files ----

function askFile(file, name = file.name, kind = kindOf(file)) {
  if (!kind) return tell(say("wrongType", name), "trouble");
  if (file.size > about.max_upload_bytes) return tell(say("tooLarge", about.max_upload_bytes >> 20), "trouble");
  if (!about.modalities.includes(kind)) return tell(say("noModality"), "trouble");
  $("text").value = "";
  ask({ file, kind, name, isVideo: /^video\//.test(file.type), preview: URL.createObjectURL(file) }, "push");
}

function kindOf(file) {
  if (/^(image|video)\//.test(file.type)) return "image";
  return /^audio\//.test(file.type) ? "audio" : "";
}

$("query").querySelector("img").addEventListener("error", (event) => { event.target.hidden = true; }); // TIFF, say
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) askFile($("file").files[0]);
  $("file").value = "";
});
$("clear").addEventListener("click", () => {
  ask({}, "push");
  $("text").focus();
});
$("other-half").addEventListener("click", () => {
  const { file, name, kind } = asked;
  askFile(file, name, kind === "image" ? "audio" : "image");
});
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  askFile(event.clipboardData.files[0]);
});

let inside = 0; // how many elements a dragged file is over: dragenter of one comes before dragleave of the other
for (const [name, change] of [["dragenter", 1], ["dragleave", -1]]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    inside += change;
    $("drop").hidden = inside <= 0;
  });
}
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  $("drop").hidden = true;
  if (event.dataTransfer.files.length) askFile(event.dataTransfer.files[0]);
});

// ---- recording ----

async function startOrStop() {
  if (recording) return recording.stop();
  const obstacle = recorder.obstacle();
  if (obstacle) return tell(say(obstacle), "trouble");
  recording = { stop() {}, cancel() {} }; // while the browser asks for permission
  try {
    recording = await recorder.record(about.max_recording_s, (seconds) => { $("clock").textContent = `0:${String(Math.floor(seconds)).padStart(2, "0")}`; }, endRecording);
  } catch (error) {
    recording = null;
    return tell(say(recorder.reasonOf(error)), "trouble");
  }
  showRecording(true);
  tell(say("recording", about.max_recording_s));
}

function endRecording(file) {
  recording = null;
  showRecording(false);
  tell("");
  if (file && !file.size) tell(say("emptyRecording"), "trouble");
  else if (file) askFile(file, say("recorded"), "audio");
}

function showRecording(isOn) {
  $("record").setAttribute("aria-pressed", isOn);
  label($("record"), say(isOn ? "stop" : "record"));
  $("record").querySelector("use").setAttribute("href", isOn ? "#stop" : "#microphone");
  if (!isOn) $("clock").textContent = "";
}

$("record").addEventListener("click", startOrStop);

// ---- the keyboard, dialogs ----

function askSimilar(entry) {
  $("viewer").close();
  $("text").value = "";
  ask({ like: entry.number, isFromResult: true }, "push");
}

const SHORTCUTS = {
  "/": () => { $("text").focus(); $("text").select(); },
  "?": () => $("keyboard").showModal(),
  u: () => $("choose").click(),
  r: startOrStop,
  m: () => { const entry = results.inView() ?? results.focused(); if (entry) askSimilar(entry); },
};

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
  const isWriting = event.target === $("text");
  if (event.key === "Escape") return escape();
  if (results.inView()) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && event.target.tagName !== "VIDEO") results.turn(step);
    else if (event.key === "m") SHORTCUTS.m();
    return;
  }
  if ($("keyboard").open) return;
  if (isWriting && event.key === "ArrowDown" && results.focusFirst()) event.preventDefault();
  if (isWriting || event.target.type === "range") return;
  if (/^(Arrow|Home|End)/.test(event.key)) {
    if (!event.target.closest?.("main")) return;
    const isMoved = results.focused() ? results.move(event.key) : event.key === "ArrowDown" && results.focusFirst();
    if (!isMoved && event.key === "ArrowUp") $("text").focus();
    event.preventDefault();
  } else if (SHORTCUTS[event.key]) {
    event.preventDefault();
    SHORTCUTS[event.key]();
  }
});

function escape() {
  if (recording) return recording.cancel();
  if (document.querySelector("dialog[open]")) return; // which closes itself
  if (asked.file || asked.like !== undefined) $("clear").click();
}

for (const name of ["viewer", "keyboard"]) {
  $(`${name}-close`).addEventListener("click", () => $(name).close());
  $(name).addEventListener("click", (event) => event.target === $(name) && $(name).close()); // beside it
}
$("help").addEventListener("click", () => $("keyboard").showModal());
$("viewer-similar").addEventListener("click", () => askSimilar(results.inView()));

// ---- beginning ----

function showKeys() {
  for (const [key, meaning] of say("keyList")) {
    const [term, description, shown] = ["dt", "dd", "kbd"].map((name) => document.createElement(name));
    shown.textContent = key;
    term.append(shown);
    description.textContent = meaning;
    $("keyboard").querySelector("dl").append(term, description);
  }
}

async function begin() {
  document.documentElement.lang = language;
  translate(document);
  showKeys();
  const narrow = matchMedia("(max-width: 760px)");
  const place = () => { $("text").placeholder = say(narrow.matches ? "placeholderShort" : "placeholder"); };
  narrow.addEventListener("change", place);
  place();
  if (matchMedia("(hover: hover)").matches) $("text").focus(); // on a phone the keyboard would cover the results
  try {
    about = await (await fetch("/api/index")).json();
  } catch (error) {
    return tell(say("gone"), "trouble");
  }
  $("about").textContent = say("about", about.name, about.counts.image, about.counts.audio);
  $("record").hidden = !about.modalities.includes("audio");
  results.begin(askSimilar, about.counts, about.modalities);
  addEventListener("popstate", (event) => ask(remembered(event.state), ""));
  ask(remembered(history.state), "replace");
}

begin();
