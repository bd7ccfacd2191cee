// One player for all sounds of the page: starting one stops the other. Nothing is fetched before it is played.

import { say } from "./words.js";

const audio = new Audio();
audio.preload = "none";
let playing = null; // the row of the results that sounds, and its entry

/** Play the sound of a row, or pause it where it is the one that plays. */
export function toggle(row, entry) {
  if (playing?.row === row && !audio.paused) return audio.pause();
  if (playing?.row !== row) {
    stop();
    playing = { row, entry };
    audio.src = `/files/${entry.number}`;
    audio.currentTime = entry.start_s;
  }
  audio.play().catch(() => {}); // an error is told by its own event
}

/** End what plays, as when its row goes. */
export function stop() {
  audio.pause();
  if (playing) show(false);
  playing = null;
}

/** Go to a part (0 to 1) of the sound of a row; one that does not play yet, begins there. */
export function seek(row, entry, part) {
  if (playing?.row !== row) toggle(row, entry);
  audio.currentTime = entry.start_s + part * length(entry);
}

function length(entry) {
  return entry.duration_s || (Number.isFinite(audio.duration) ? audio.duration : 0);
}

function show(isPlaying) {
  const { row, entry } = playing;
  const button = row.querySelector(".open");
  row.classList.toggle("playing", isPlaying);
  button.setAttribute("aria-pressed", isPlaying);
  button.querySelector("use").setAttribute("href", isPlaying ? "#pause" : "#play");
  const seconds = audio.currentTime - entry.start_s;
  row.querySelector(".time").textContent = clock(seconds > 0 ? seconds : entry.duration_s);
}

audio.addEventListener("play", () => playing && show(true));
for (const name of ["pause", "ended"]) audio.addEventListener(name, () => playing && show(false));
audio.addEventListener("timeupdate", () => {
  if (!playing) return;
  const { row, entry } = playing;
  const part = Math.min(1, Math.max(0, audio.currentTime - entry.start_s) / (length(entry) || 1));
  row.querySelector(".bars").style.setProperty("--played", `${100 * part}%`);
  row.querySelector(".position").value = 1000 * part;
  row.querySelector(".position").setAttribute("aria-valuetext", clock(audio.currentTime - entry.start_s));
  show(!audio.paused);
  const isStretch = audio.duration > entry.start_s + length(entry) + 0.5;
  if (isStretch && part === 1 && !audio.paused) audio.pause();
});
audio.addEventListener("error", () => {
  if (!playing) return;
  const trouble = playing.row.querySelector(".trouble");
  trouble.replaceChildren(say("cannotPlay"), " ", saving(playing.entry));
  trouble.hidden = false;
  show(false);
});

/** A link that saves the file of an entry. */
export function saving(entry) {
  const link = document.createElement("a");
  link.href = `/files/${entry.number}?save=1`;
  link.textContent = say("saveIt");
  return link;
}

/** Seconds as minutes and seconds, rounded up: nothing lasts no time. */
export function clock(seconds) {
  const whole = Math.ceil(seconds - 0.05);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

