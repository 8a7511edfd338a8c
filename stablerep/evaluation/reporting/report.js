"use strict";
// What a person does on the page: sorts a table, chooses predictions, explores the map. Without scripts
// everything is there to read.

document.documentElement.classList.add("has-script");

/** Makes every column with data-sort a button; a first click puts the largest number, or the letter A, on top. */
function makeSortable(table) {
  const body = table.tBodies[0];
  Array.from(body.rows).forEach((row, place) => { row.dataset.place = place; });
  for (const head of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const isNumber = head.dataset.sort === "number";
      const turns = isNumber ? ["descending", "ascending", null] : ["ascending", "descending", null];
      sortBy(table, head, turns[(turns.indexOf(head.getAttribute("aria-sort")) + 1) % 3]);
    });
  }
}

function sortBy(table, head, order) {
  const isNumber = head.dataset.sort === "number";
  const valueOf = (row) => row.cells[head.cellIndex].dataset.value;
  const compare = (a, b) => (isNumber ? Number(valueOf(a)) - Number(valueOf(b))
    : valueOf(a).localeCompare(valueOf(b), "en", { numeric: true }));
  const sign = order === "descending" ? -1 : 1;
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((a, b) => (order && sign * compare(a, b)) || a.dataset.place - b.dataset.place);
  table.tBodies[0].append(...rows);
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  if (order) head.setAttribute("aria-sort", order);
}

document.querySelectorAll("table.sortable").forEach(makeSortable);

const confusionChoice = document.getElementById("confusion-choice");
if (confusionChoice) {
  const show = () => {
    for (const block of document.querySelectorAll("[data-confusion]")) {
      block.classList.toggle("unchosen", block.dataset.confusion !== confusionChoice.value);
    }
  };
  confusionChoice.addEventListener("change", show);
  show();
}

const map = document.getElementById("feature-map");
if (map) {
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const svg = map.querySelector("svg");
  const tip = document.getElementById("map-tip");
  const circles = Array.from(svg.querySelectorAll("circle"));
  const places = circles.map((circle) => [circle.cx.baseVal.value, circle.cy.baseVal.value]);
  const groups = Array.from(svg.querySelectorAll("g"));
  const buttons = Array.from(document.querySelectorAll(".legend button"));
  const choice = document.getElementById("class-choice");
  const MAX_DISTANCE = 14; // in units of the map, around the pointer
  let marked = -1;

  const isShown = (circle) => !map.dataset.chosen || circle.parentNode.dataset.class === map.dataset.chosen;

  /** Says of a point which image it is; −1 says nothing. */
  const mark = (place) => {
    if (marked >= 0) circles[marked].classList.remove("marked");
    marked = place;
    tip.hidden = place < 0;
    if (place < 0) return;
    const circle = circles[place];
    circle.classList.add("marked");
    const index = Number(circle.dataset.i);
    const name = document.createElement("b");
    name.textContent = data.names[index];
    const words = [data.classes[data.targets[index]]];
    const predicted = data.predictions ? data.predictions[index] : data.targets[index];
    if (predicted !== data.targets[index]) words.push(`taken for ${data.classes[predicted] ?? "nothing"}`);
    tip.replaceChildren(name, document.createElement("br"), words.filter(Boolean).join(", "));
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    const [x, y] = places[place].map((value) => value * scale);
    const left = Math.min(Math.max(4, x - tip.offsetWidth / 2), map.clientWidth - tip.offsetWidth - 4);
    const above = y - tip.offsetHeight - 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${above > 0 ? above : y + 14}px`;
  };

  const markNearest = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    let best = -1;
    let least = (MAX_DISTANCE * Math.max(1, scale)) ** 2;
    places.forEach(([px, py], place) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance <= least && isShown(circles[place])) [best, least] = [place, distance];
    });
    mark(best);
  };

  /** The nearest point that lies more in a key's direction than across it. */
  const step = (key) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    const first = circles.findIndex(isShown);
    if (marked < 0 || !isShown(circles[marked])) return mark(first);
    const [x, y] = places[marked];
    let best = marked;
    let least = Infinity;
    places.forEach(([px, py], place) => {
      const along = (px - x) * dx + (py - y) * dy;
      const across = Math.abs((px - x) * dy + (py - y) * dx);
      const distance = along + 2 * across;
      if (along > 0 && across <= along && distance < least && isShown(circles[place])) {
        [best, least] = [place, distance];
      }
    });
    return mark(best);
  };

  const choose = (name) => {
    if (name === "" || name === map.dataset.chosen) delete map.dataset.chosen;
    else map.dataset.chosen = name;
    const chosen = map.dataset.chosen;
    for (const group of groups) group.classList.toggle("faded", chosen !== undefined && group.dataset.class !== chosen);
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.class === chosen));
    mark(-1);
  };

  svg.setAttribute("tabindex", "0");
  svg.addEventListener("pointermove", markNearest);
  svg.addEventListener("pointerdown", markNearest);
  svg.addEventListener("pointerleave", () => { if (document.activeElement !== svg) mark(-1); });
  svg.addEventListener("blur", () => mark(-1));
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") mark(-1);
    if (!/^Arrow/.test(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    step(event.key);
    event.preventDefault();
  });
  for (const button of buttons) button.addEventListener("click", () => choose(button.dataset.class));
  choice?.addEventListener("change", () => choose(choice.value));
}
