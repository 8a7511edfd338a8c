"use strict";
// Which captions a view shows, and in which order. A view is the URL's hash as URLSearchParams:
//   q        words that the caption has, all of them     id        how a seed, key, caption id or sha256 begins
//   min.X    X of an image is at least                   max.X     … at most
//   is.X     X of an image is                            has.X     X of an image contains
//   sort     low.X or high.X                             page      from 1
//   at       the caption that is enlarged, 00003.17      view      failed: the captions without images
//   reason   of a failure
// A caption is shown if one of its images passes every filter at once.

const fold = (text) => String(text ?? "").normalize("NFC").toLowerCase();

/** Words that a text must hold, as a function of the folded text. */
function wordsTest(query) {
  const words = fold(query).split(/\s+/).filter(Boolean);
  return words.length ? (text) => words.every((word) => text.includes(word)) : null;
}

const foldedCaptions = new Map(); // position → folded caption, for searches while somebody types
function foldedCaptionAt(position) {
  if (!foldedCaptions.has(position)) foldedCaptions.set(position, fold(captionAt(position)));
  return foldedCaptions.get(position);
}

function captionTest(view) {
  const hasWords = wordsTest(view.get("q"));
  if (!hasWords) return null;
  return {
    load: () => loadBlocks("captions", dataset.numCaptions),
    passes: (position) => hasWords(foldedCaptionAt(position)),
  };
}

function identityTest(view) {
  const start = (view.get("id") ?? "").trim().toLowerCase();
  if (!start) return null;
  return {
    load: () => loadBlocks("details", dataset.numCaptions),
    passes: (position, image) => {
      const [key, captionId, , seeds, sha256] = rowAt("details", position);
      return [key, captionId, seeds[image], sha256[image]].some((name) => name.toLowerCase().startsWith(start));
    },
  };
}

/** The bound that a view sets, null if it sets none. */
function boundOf(view, name) {
  const text = view.get(name);
  return text === null || text.trim() === "" || Number.isNaN(Number(text)) ? null : Number(text);
}

function columnTest(view, column) {
  const load = () => loadColumn(column);
  const value = (position, image) => valueAt(column, position, image);
  if (column.kind === "number") {
    const low = boundOf(view, `min.${column.name}`);
    const high = boundOf(view, `max.${column.name}`);
    if (low === null && high === null) return null;
    const passes = (number) => number !== null && (low === null || number >= low) && (high === null || number <= high);
    return { load, column, passes: (position, image) => passes(value(position, image)) };
  }
  if (column.kind === "label") {
    const label = view.get(`is.${column.name}`);
    return label ? { load, column, passes: (position, image) => value(position, image) === label } : null;
  }
  const hasWords = wordsTest(view.get(`has.${column.name}`));
  return hasWords ? { load, column, passes: (position, image) => hasWords(fold(value(position, image))) } : null;
}

/** Every filter that a view sets. */
function testsOf(view) {
  const tests = [captionTest(view), identityTest(view), ...dataset.columns.map((column) => columnTest(view, column))];
  return tests.filter(Boolean);
}

/** The column that a view is sorted by, and whether the highest comes first; null for the dataset's order. */
function orderOf(view) {
  const [, end, name] = /^(low|high)\.(.*)$/s.exec(view.get("sort") ?? "") ?? [];
  const column = dataset.columns.find((candidate) => candidate.kind === "number" && candidate.name === name);
  return column ? { column, descends: end === "high" } : null;
}

/** For each image of a caption, whether it passes. */
function matchesOf(tests, position) {
  return Array.from({ length: dataset.numImages }, (_, image) => tests.every((test) => test.passes(position, image)));
}

/** Positions sorted by the lowest image that passes, or downwards by the highest; those without a value are last. */
function sortPositions(positions, { column, descends }, tests) {
  const keys = new Float64Array(dataset.numCaptions).fill(Infinity);
  for (const position of positions) {
    for (let image = 0; image < dataset.numImages; image += 1) {
      const number = valueAt(column, position, image);
      const counts = number !== null && tests.every((test) => test.passes(position, image));
      if (counts) keys[position] = Math.min(keys[position], descends ? -number : number);
    }
  }
  return positions.sort((one, other) => keys[one] - keys[other] || one - other);
}

const everyPosition = () => Uint32Array.from({ length: dataset.numCaptions }, (_, position) => position);

/** What a view shows: `positions` in order, `matches(position)` for each image, `column` to print beside it. */
async function selectCaptions(view) {
  const tests = testsOf(view);
  const order = orderOf(view);
  await Promise.all([...tests.map((test) => test.load()), order && loadColumn(order.column)]);
  let positions = everyPosition();
  if (tests.length) positions = positions.filter((position) => matchesOf(tests, position).includes(true));
  if (order) positions = sortPositions(positions, order, tests);
  const column = order?.column ?? tests.find((test) => test.column?.kind === "number")?.column ?? null;
  return { positions, column, matches: (position) => matchesOf(tests, position) };
}

/** Rows of the failures that a view shows. */
async function selectFailures(view) {
  const hasWords = wordsTest(view.get("q")) ?? (() => true);
  const reason = view.get("reason");
  const blocks = await loadBlocks("failures", dataset.numFailures);
  return blocks.flat().filter((row) => hasWords(fold(row[0])) && (!reason || row[1] === reason));
}
