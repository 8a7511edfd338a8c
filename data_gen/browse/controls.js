"use strict";
// What a person does, by mouse or keys: every control changes the hash, and the hash changes what is shown.

/** Goes to a hash without a new entry in the history. */
function replaceView(hash) {
  history.replaceState(null, "", hash);
  return show();
}

/** The view that the controls say; the page starts anew. */
function readForm() {
  const changes = { page: null, at: null };
  for (const control of form.elements) if (control.name) changes[control.name] = control.value;
  return hashOf(readView(), changes);
}

let typing = 0;
form.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => replaceView(readForm()), 200);
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  replaceView(readForm());
});
form.addEventListener("reset", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  location.hash = hashOf(new URLSearchParams(), { view: readView().get("view") });
});

document.getElementById("page").addEventListener("change", (event) => {
  location.hash = hashOf(readView(), { page: event.target.value, at: null });
});
document.getElementById("skip").addEventListener("click", () => focusCard(0));

for (const pager of document.querySelectorAll(".pager")) {
  pager.addEventListener("click", (event) => {
    if (event.target.closest("a[href]")) scrollToMain();
  });
}

function scrollToMain() {
  window.scrollTo({ top: document.getElementById("main").offsetTop - 16 });
}

function cardLinks() {
  return Array.from(document.querySelectorAll("#cards .card"));
}

function focusCard(index) {
  (cardLinks()[index] ?? document.getElementById("main")).focus();
}

async function closeDetail() {
  if (!readView().has("at")) return;
  const { page, rank } = current;
  await replaceView(hashOf(readView(), { at: null, page: page === 1 ? null : page }));
  if (rank >= 0) focusCard(rank - (page - 1) * CAPTIONS_PER_PAGE);
}

function turnDetail(step) {
  const rank = current.rank + step;
  if (current.rank < 0 || rank < 0 || rank >= current.positions.length) return;
  const { shard, index } = placeOf(current.positions[rank]);
  replaceView(hashOf(readView(), { at: `${shard}.${index}` }));
}

detail.addEventListener("close", closeDetail);
detail.addEventListener("click", (event) => {
  if (event.target === detail) detail.close(); // the backdrop
});
document.getElementById("detail-close").addEventListener("click", () => detail.close());
document.getElementById("detail-previous").addEventListener("click", () => turnDetail(-1));
document.getElementById("detail-next").addEventListener("click", () => turnDetail(1));

async function turnPage(step) {
  const page = current.page + step;
  if (page < 1 || page > current.numPages) return;
  history.pushState(null, "", hashOf(readView(), { page: page === 1 ? null : page }));
  await show();
  focusCard(0);
  scrollToMain();
}

/** Moves the focus from card to card as the keys point. */
function moveFocus(key) {
  const links = cardLinks();
  const index = links.indexOf(document.activeElement);
  if (index < 0) return false;
  const top = (link) => link.getBoundingClientRect().top;
  const perRow = Math.max(1, links.filter((link) => top(link) === top(links[0])).length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perRow, ArrowDown: perRow }[key];
  links[index + step]?.focus();
  return true;
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, select, textarea");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (detail.open) {
    if (sideways) turnDetail(sideways);
    return;
  }
  if (event.key === "/") document.getElementById("search").focus();
  else if (event.shiftKey && sideways) turnPage(sideways);
  else if (!/^Arrow/.test(event.key) || !moveFocus(event.key)) return;
  event.preventDefault();
});

if (matchMedia("(max-width: 860px)").matches) document.querySelector(".filters").open = false;
addEventListener("hashchange", show);
show();
