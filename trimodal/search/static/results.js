// The two lists of results, how the keyboard moves in them, and the view of one picture.
// Names of files are only ever set as text.

import { clock, saving, seek, stop, toggle } from "./player.js";
import { label, number, say } from "./words.js";

const isNarrow = matchMedia("(max-width: 760px)");
const STEPS = { image: [24, 6], audio: [12, 6] }; // results shown at a time: wide and narrow
const $ = (selector, root = document) => root.querySelector(selector);

export const kinds = ["image", "audio"];
const lists = {}; // by kind: section, entries, how many are shown
let onSimilar = () => {};

/** Make both sections ready. `similar(entry)` is called for "more like this". */
export function begin(similar, counts, modalities) {
  onSimilar = similar;
  for (const kind of kinds) {
    const section = document.getElementById(kind);
    lists[kind] = { kind, section, entries: [], shown: 0, total: counts[kind] };
    $(".more", section).addEventListener("click", () => more(lists[kind], true));
    section.hidden = !counts[kind] && !modalities.includes(kind); // a model that knows no sounds can have none
  }
  const filled = kinds.filter((kind) => counts[kind]);
  $("main").classList.toggle("one", filled.length < 2);
}

/** Show an answer of the server in place of what is there. */
export function show(answer) {
  stop();
  for (const kind of kinds) {
    const list = lists[kind];
    list.entries = answer[kind];
    list.shown = 0;
    $("ol", list.section).replaceChildren();
    const nothing = $(".nothing", list.section);
    nothing.textContent = say(!list.total ? (kind === "image" ? "noPictures" : "noSounds") : "noOther");
    nothing.hidden = list.entries.length > 0;
    more(list, false);
  }
}

/** Show no results. */
export function clear() {
  show({ image: [], audio: [] });
  for (const { section } of Object.values(lists)) section.querySelector(".nothing").hidden = true;
}

/** The names of the best picture and sound, for the announcement. */
export function best() {
  return kinds.map((kind) => lists[kind].entries[0] && baseName(lists[kind].entries[0])).filter(Boolean);
}

function more(list, isAsked) {
  const { entries, kind, section, shown } = list;
  const next = entries.slice(shown, shown + STEPS[kind][isNarrow.matches ? 1 : 0]);
  const rows = next.map((entry) => (kind === "image" ? picture(entry) : sound(entry)));
  $("ol", section).append(...rows);
  list.shown += next.length;
  $(".more", section).hidden = list.shown >= entries.length;
  $("small", section).textContent = list.total ? `${number(list.shown)} / ${number(list.total)}` : "";
  if (isAsked) rows[0]?.querySelector(".open").focus();
  else if (rows[0]) setCurrent(rows[0]);
}

export function baseName(entry) {
  return entry.name.split("/").at(-1);
}

function thumbnail(entry, isLarge = false) {
  return `/thumbnails/${entry.number}?v=${entry.digest}${isLarge ? "&large=1" : ""}`;
}

function row(id, entry, open) {
  const item = document.getElementById(id).content.firstElementChild.cloneNode(true);
  const name = baseName(entry);
  const score = entry.score === null ? "" : entry.score.toFixed(2);
  item.entry = entry;
  $(".name bdi", item).textContent = name;
  $(".name", item).title = entry.name;
  $(".score", item).textContent = score;
  $(".score", item).title = say("scoreHint");
  $(".open", item).setAttribute("aria-label", say(open, name, score && say("score", score)));
  label($(".similar", item), say("similarTo", name));
  $(".similar", item).addEventListener("click", () => onSimilar(entry));
  item.addEventListener("focusin", () => setCurrent(item));
  for (const control of controls(item)) control.tabIndex = -1;
  return item;
}

function picture(entry) {
  const item = row("picture", entry, "open");
  const image = $("img", item);
  image.addEventListener("error", () => image.classList.add("broken"));
  image.src = thumbnail(entry);
  $(".badge", item).toggleAttribute("hidden", !entry.video);
  $(".open", item).addEventListener("click", () => view(item));
  return item;
}

function sound(entry) {
  const item = row("sound", entry, "play");
  const position = $(".position", item);
  $(".time", item).textContent = clock(entry.duration_s);
  label(position, say("position", baseName(entry)));
  position.addEventListener("input", () => seek(item, entry, position.value / 1000));
  $(".open", item).addEventListener("click", () => toggle(item, entry));
  const waveform = new Image(); // as a mask it would hide all where there is none
  waveform.addEventListener("load", () => {
    $(".bars", item).style.setProperty("--wave", `url("${waveform.src}")`);
    $(".bars", item).classList.add("drawn");
  });
  waveform.src = thumbnail(entry);
  return item;
}

// ---- the keyboard: one stop of the Tab key in each list, arrows within and between them ----

function controls(item) {
  return item.querySelectorAll("button, input");
}

function setCurrent(item) {
  const list = lists[item.closest("section").id];
  if (list.current !== item) for (const control of list.current ? controls(list.current) : []) control.tabIndex = -1;
  for (const control of controls(item)) control.tabIndex = 0;
  list.current = item;
}

/** The entry whose row has the focus; null where none has. */
export function focused() {
  return document.activeElement?.closest?.("main li")?.entry ?? null;
}

/** Focus the first result; false where there is none. */
export function focusFirst() {
  const first = $("main .open");
  first?.focus();
  return Boolean(first);
}

/** Move the focus from the focused result to the nearest one in the direction of an arrow key; Home and End lead to the
 * ends of its list. Returns false where there is none. */
export function move(key) {
  const from = document.activeElement.closest("main li");
  if (!from) return false;
  const own = [...from.parentElement.children];
  const target = key === "Home" ? own[0] : key === "End" ? own.at(-1) : nearest(from, key);
  target?.querySelector(".open").focus();
  return Boolean(target);
}

function nearest(from, key) {
  const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  const middle = (item) => {
    const { left, top, width, height } = item.getBoundingClientRect();
    return [left + width / 2, top + height / 2];
  };
  const [fromX, fromY] = middle(from);
  let found = null;
  let least = Infinity;
  for (const item of document.querySelectorAll("main li")) {
    if (y && item.parentElement !== from.parentElement && !isNarrow.matches) continue; // up and down stay in a list
    const [toX, toY] = middle(item);
    const along = x * (toX - fromX) + y * (toY - fromY);
    const across = Math.abs(y * (toX - fromX)) + Math.abs(x * (toY - fromY));
    if (along < 4) continue;
    const far = along + 3 * across;
    if (far < least) [found, least] = [item, far];
  }
  return found;
}

// ---- one picture or video, large ----

let viewed = null;

function view(item) {
  const { entry } = (viewed = item);
  const dialog = document.getElementById("viewer");
  const medium = document.createElement(entry.video ? "video" : "img");
  if (entry.video) Object.assign(medium, { controls: true, preload: "metadata", playsInline: true, poster: thumbnail(entry, true) });
  else medium.alt = baseName(entry);
  medium.addEventListener("error", () => {
    const trouble = document.createElement("p");
    trouble.className = "trouble";
    trouble.append(say(entry.video ? "cannotPlay" : "cannotShow"), " ", saving(entry));
    $(".shown", dialog).replaceChildren(trouble);
  });
  medium.src = entry.video ? `/files/${entry.number}` : thumbnail(entry, true);
  stop();
  $(".shown", dialog).replaceChildren(medium);
  document.getElementById("viewer-name").textContent = entry.name;
  document.getElementById("viewer-save").href = `/files/${entry.number}?save=1`;
  if (!dialog.open) dialog.showModal();
}

/** Show the next or previous picture in the open view. */
export function turn(step) {
  const next = step > 0 ? viewed.nextElementSibling : viewed.previousElementSibling;
  if (next) view(next);
}

/** The entry in the open view; null where none is open. */
export function inView() {
  return document.getElementById("viewer").open ? viewed.entry : null;
}

document.getElementById("viewer").addEventListener("close", () => {
  $("#viewer .shown").replaceChildren(); // a video would play on
  if (viewed?.isConnected) viewed.querySelector(".open").focus();
});
