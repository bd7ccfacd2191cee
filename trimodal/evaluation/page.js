// The language of the page, values under the pointer, and what the colours of the map mean. Without it all is still there.
"use strict";
const root = document.documentElement;
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";

function markLanguage() {
  for (const button of document.querySelectorAll("[data-language]"))
    button.setAttribute("aria-pressed", String(button.dataset.language.slice(0, 2) === root.lang.slice(0, 2)));
}
for (const button of document.querySelectorAll("[data-language]"))
  button.addEventListener("click", () => { root.lang = button.dataset.language; markLanguage(); });
markLanguage();

function showTip(event, lines, picture) {
  tip.replaceChildren();
  if (picture) {
    const image = document.createElement("img");
    image.src = picture;
    tip.append(image);
  }
  for (const line of lines) {
    const row = document.createElement("div");
    row.textContent = line;
    tip.append(row);
  }
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
  const top = event.clientY + 14 + box.height > innerHeight ? event.clientY - 14 - box.height : event.clientY + 14;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, top) + "px";
}
const hideTip = () => { tip.hidden = true; };
// A finger that is lifted leaves the tip there, until the next touch elsewhere.
const whenGone = (node, hide) => node.addEventListener("pointerleave", (event) => {
  if (event.pointerType !== "touch") hide();
});
document.addEventListener("pointerdown", (event) => { if (!event.target.closest("svg")) hideTip(); });

// Where the pointer is, in the units of a chart.
function place(svg, event) {
  const matrix = svg.getScreenCTM();
  return { x: (event.clientX - matrix.e) / matrix.a, y: (event.clientY - matrix.f) / matrix.d, scale: matrix.a };
}

// Curves: the values at the point nearest to the pointer, of each curve that has one there.
for (const svg of document.querySelectorAll(".lines")) {
  const lines = [...svg.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name, x: line.dataset.x.split(" "), y: line.dataset.y.split(" "),
    at: line.getAttribute("points").split(" ").map((pair) => parseFloat(pair)) }));
  const cursor = document.createElementNS(SVG, "line");
  cursor.setAttribute("class", "cursor");
  const move = (event) => {
    const { x } = place(svg, event);
    const nearest = (line) => line.at.reduce((best, at, n) => Math.abs(at - x) < Math.abs(line.at[best] - x) ? n : best, 0);
    const found = lines.map((line) => ({ line, n: nearest(line) }));
    const closest = Math.min(...found.map(({ line, n }) => Math.abs(line.at[n] - x)));
    const shown = found.filter(({ line, n }) => Math.abs(line.at[n] - x) <= closest + 0.5);
    if (!shown.length) return;
    const at = shown[0].line.at[shown[0].n];
    for (const [name, value] of [["x1", at], ["x2", at], ["y1", 10], ["y2", 204]]) cursor.setAttribute(name, value);
    svg.append(cursor);
    showTip(event, [shown[0].line.x[shown[0].n], ...shown.map(({ line, n }) => `${line.name}: ${line.y[n]}`)]);
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  whenGone(svg, () => { cursor.remove(); hideTip(); });
}

// Histograms: the shares of the band under the pointer.
for (const band of document.querySelectorAll("[data-tip]")) {
  const show = (event) => showTip(event, [band.dataset.tip]);
  band.addEventListener("pointermove", show);
  band.addEventListener("pointerdown", show);
  whenGone(band, hideTip);
}

// The map: the point nearest to the pointer, and lines to the other points of its sample.
for (const svg of document.querySelectorAll(".map")) {
  const links = svg.querySelector(".links");
  const points = [...svg.querySelectorAll(".point")].map((node) => {
    const [x, y] = node.dataset.at.split(",").map(Number);
    return { node, x, y };
  });
  let near = null;
  const leave = () => {
    if (near) near.node.classList.remove("near");
    near = null;
    links.setAttribute("d", "");
    hideTip();
  };
  const move = (event) => {
    const { x, y, scale } = place(svg, event);
    const far = (point) => Math.hypot(point.x - x, point.y - y);
    const found = points.reduce((best, point) => far(point) < far(best) ? point : best);
    if (far(found) * scale > 22) return leave();
    if (near) near.node.classList.remove("near");
    near = found;
    near.node.classList.add("near");
    const others = points.filter((point) => point !== near && point.node.dataset.sample === near.node.dataset.sample);
    links.setAttribute("d", others.map((point) => `M${near.x},${near.y}L${point.x},${point.y}`).join(""));
    const { words, about, picture } = near.node.dataset;
    showTip(event, [words, about].filter(Boolean), picture);
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  whenGone(svg, leave);
  for (const button of document.querySelectorAll("[data-by]:not(svg)"))
    button.addEventListener("click", () => {
      const { by } = button.dataset;
      for (const { node } of points) node.setAttribute("class", "point c" + node.getAttribute("data-" + by));
      for (const other of document.querySelectorAll("button[data-by]"))
        other.setAttribute("aria-pressed", String(other === button));
      for (const legend of document.querySelectorAll("[data-legend]")) legend.hidden = legend.dataset.legend !== by;
    });
}

// One sound at a time; and on paper nothing is folded.
document.addEventListener("play", (event) => {
  for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
}, true);
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
