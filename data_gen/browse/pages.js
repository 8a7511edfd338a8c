"use strict";
// What is drawn on the page: cards of captions with their images, or the table of failures.

const CAPTIONS_PER_PAGE = 48;
const FAILURES_PER_PAGE = 200;
const MAX_IMAGES_PER_CARD = 16;

/** An element with properties and children; text is always text, never markup. */
function element(tag, properties = {}, ...children) {
  const { style = {}, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(style)) node.style.setProperty(name, value);
  node.append(...children);
  return node;
}

const formatCount = (number) => number.toLocaleString("en-US");

/** A value as text: integers and text as they are, other numbers rounded. */
function formatValue(value, numDigits = 6) {
  if (value === null) return "–";
  return Number.isInteger(value) || typeof value !== "number" ? String(value) : String(Number(value.toPrecision(numDigits)));
}

/** One image of a caption, cut out of its sheet. */
function cropOf(position, image, alt, loading) {
  const columns = Math.min(dataset.numImages, dataset.sheetColumns);
  const rows = Math.ceil(dataset.numImages / dataset.sheetColumns);
  const style = {
    width: `${100 * columns}%`,
    height: `${100 * rows}%`,
    left: `${-100 * (image % dataset.sheetColumns)}%`,
    top: `${-100 * Math.floor(image / dataset.sheetColumns)}%`,
  };
  const [, width, height] = rowAt("captions", position);
  return element("span", { className: "cell", style: { "aspect-ratio": `${width} / ${height}` } },
    element("img", { loading, decoding: "async", alt, style, src: sheetPath(position) }));
}

function cardOf(position, selection, view) {
  const caption = captionAt(position);
  const { shard, index } = placeOf(position);
  const matches = selection.matches(position);
  const numMatches = matches.filter(Boolean).length;
  const shown = Math.min(dataset.numImages, MAX_IMAGES_PER_CARD);
  const images = Array.from({ length: shown }, (_, image) => {
    const cell = cropOf(position, image, "", "lazy");
    cell.classList.toggle("other", !matches[image]);
    if (selection.column) cell.append(element("small", {}, formatValue(valueAt(selection.column, position, image), 3)));
    return cell;
  });
  const label = dataset.numImages === 1 ? "1 image" : `${dataset.numImages} images`;
  const note = numMatches < dataset.numImages ? `, ${numMatches} pass the filters` : "";
  const style = { "--images": Math.min(shown, 8) };
  return element("li", {}, element("a", { className: "card", href: hashOf(view, { at: `${shard}.${index}` }) },
    element("span", { className: "images", style, role: "img", ariaLabel: label + note }, ...images),
    shown < dataset.numImages ? element("small", {}, `and ${dataset.numImages - shown} more`) : "",
    element("span", { className: "caption", dir: "auto" }, caption)));
}

/** Draws a page of captions, once their rows are there. */
async function drawCards(selection, view, page, isCurrent) {
  const positions = selection.positions.slice((page - 1) * CAPTIONS_PER_PAGE, page * CAPTIONS_PER_PAGE);
  await Promise.all([loadRows("captions", positions), selection.column && loadColumn(selection.column, positions)]);
  if (!isCurrent()) return;
  const cards = Array.from(positions, (position) => cardOf(position, selection, view));
  const list = document.getElementById("cards");
  list.style.setProperty("--images", Math.min(dataset.numImages, 8));
  list.replaceChildren(...cards);
}

function drawFailures(rows, page) {
  const shown = rows.slice((page - 1) * FAILURES_PER_PAGE, page * FAILURES_PER_PAGE);
  document.querySelector("#failures tbody").replaceChildren(...shown.map(([caption, reason, key, , shard]) =>
    element("tr", {},
      element("td", { dir: "auto" }, caption),
      element("td", {}, element("span", { className: "reason" }, reason)),
      element("td", { className: "code" }, shard),
      element("td", { className: "code" }, key))));
}

/** Sets the links and the number of both pagers. */
function drawPagers(view, page, numPages) {
  for (const pager of document.querySelectorAll(".pager")) {
    pager.hidden = numPages < 2;
    for (const link of pager.querySelectorAll("a")) {
      const target = page + Number(link.dataset.turn);
      const isThere = target >= 1 && target <= numPages;
      if (isThere) link.href = hashOf(view, { page: target === 1 ? null : target });
      else link.removeAttribute("href");
      link.ariaDisabled = isThere ? null : "true";
    }
  }
  const input = document.getElementById("page");
  input.value = page;
  input.max = numPages;
  document.getElementById("num-pages").textContent = formatCount(numPages);
}

function describeSelection(number, total, what) {
  if (total === 0) return `No ${what}`;
  if (number === 0) return `None of ${formatCount(total)} ${what} passes the filters`;
  return number === total ? `${formatCount(total)} ${what}` : `${formatCount(number)} of ${formatCount(total)} ${what}`;
}
