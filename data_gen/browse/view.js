"use strict";
// The view is the URL's hash, and `show` draws what it says.

const form = document.getElementById("filters");
const statusLine = document.getElementById("status");
let turns = 0; // counts calls of `show`, so that a slow one does not draw over a later one
let selected = { name: null }; // the last selection, by the view's filters
let drawn = null; // the filters and page that the cards show
let current = { page: 1, numPages: 1, rank: -1, positions: [] };

const readView = () => new URLSearchParams(location.hash.slice(1));

/** The hash of a view with changes; null removes a part. */
function hashOf(view, changes) {
  const changed = new URLSearchParams(view);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") changed.delete(name);
    else changed.set(name, value);
  }
  return `#${changed}`;
}

const filtersOf = (view) => hashOf(view, { at: null, page: null });

async function show() {
  turns += 1;
  const turn = turns;
  const isCurrent = () => turn === turns;
  const view = readView();
  fillForm(view);
  document.documentElement.dataset.state = "loading";
  try {
    await (view.get("view") === "failed" ? showFailures(view, isCurrent) : showCaptions(view, isCurrent));
  } catch (error) {
    if (!isCurrent()) return;
    statusLine.textContent = error.message;
    document.documentElement.dataset.state = "failed";
    return;
  }
  if (isCurrent()) document.documentElement.dataset.state = "ready";
}

async function select(view, what, function_) {
  const name = filtersOf(view);
  if (selected.name !== name) {
    const timer = setTimeout(() => { statusLine.textContent = `Reading ${what}…`; }, 200);
    try {
      const selection = await function_(view);
      selected = { name, selection };
      return selection;
    } finally {
      clearTimeout(timer);
    }
  }
  return selected.selection;
}

function pageOf(view, number, perPage) {
  const numPages = Math.max(1, Math.ceil(number / perPage));
  const page = Math.min(numPages, Math.max(1, Math.floor(Number(view.get("page"))) || 1));
  return { page, numPages };
}

async function showCaptions(view, isCurrent) {
  const selection = await select(view, "captions", selectCaptions);
  if (!isCurrent()) return;
  const { positions } = selection;
  const position = view.has("at") ? positionOf(view.get("at")) : -1;
  const rank = position < 0 ? -1 : positions.indexOf(position);
  const { page: asked, numPages } = pageOf(view, positions.length, CAPTIONS_PER_PAGE);
  const page = rank < 0 ? asked : Math.floor(rank / CAPTIONS_PER_PAGE) + 1;
  current = { page, numPages, rank, positions };
  const pageView = new URLSearchParams(hashOf(view, { at: null, page: page === 1 ? null : page }).slice(1));
  document.getElementById("cards").hidden = false;
  document.getElementById("failures").hidden = true;
  if (drawn !== `#${pageView}`) {
    await drawCards(selection, pageView, page, isCurrent);
    if (!isCurrent()) return;
    drawn = `#${pageView}`;
  }
  drawPagers(pageView, page, numPages);
  statusLine.textContent = describeSelection(positions.length, dataset.numCaptions, "captions")
    + (view.has("at") && position < 0 ? `; caption ${view.get("at")} is not here` : "");
  if (position >= 0) await openDetail(position, rank, positions.length, isCurrent);
  else if (detail.open) detail.close();
}

async function showFailures(view, isCurrent) {
  const rows = await select(view, "failures", selectFailures);
  if (!isCurrent()) return;
  if (detail.open) detail.close();
  const { page, numPages } = pageOf(view, rows.length, FAILURES_PER_PAGE);
  current = { page, numPages, rank: -1, positions: [] };
  document.getElementById("cards").hidden = true;
  document.getElementById("failures").hidden = rows.length === 0;
  drawn = null;
  drawFailures(rows, page);
  drawPagers(view, page, numPages);
  statusLine.textContent = describeSelection(rows.length, dataset.numFailures, "failed captions");
}

/** Sets every control to what the view says. */
function fillForm(view) {
  for (const control of form.elements) {
    if (control.name && control !== document.activeElement) control.value = view.get(control.name) ?? "";
  }
  const shown = view.get("view") === "failed" ? "failed" : "captions";
  for (const part of form.querySelectorAll("[data-only]")) part.hidden = part.dataset.only !== shown;
  for (const tab of form.querySelectorAll("[data-view]")) {
    tab.ariaCurrent = tab.dataset.view === shown ? "page" : null;
  }
  for (const histogram of form.querySelectorAll(".histogram")) shadeHistogram(histogram, view);
}

/** Covers what lies outside of the chosen range. */
function shadeHistogram(histogram, view) {
  const name = histogram.closest("fieldset").dataset.column;
  const minimum = Number(histogram.dataset.minimum);
  const width = Number(histogram.dataset.maximum) - minimum;
  const numBins = histogram.viewBox.baseVal.width;
  const share = (bound, otherwise) => (bound === null || width === 0 ? otherwise
    : Math.min(1, Math.max(0, (bound - minimum) / width)));
  const low = share(boundOf(view, `min.${name}`), 0);
  const high = share(boundOf(view, `max.${name}`), 1);
  const [before, after] = histogram.querySelectorAll("rect");
  before.setAttribute("width", numBins * low);
  after.setAttribute("x", numBins * high);
  after.setAttribute("width", numBins * (1 - high));
}
