"use strict";
// One caption, its images enlarged, and all that tells where they are and where they came from.

const detail = document.getElementById("detail");

function factsOf(pairs) {
  return pairs.flatMap(([name, value, className = ""]) =>
    [element("dt", {}, name), element("dd", { className }, formatValue(value))]);
}

function figureOf(position, image, columns) {
  const [key, , extension, seeds, sha256, fingerprints] = rowAt("details", position);
  const fileName = `${key}.${image}.${extension}`;
  const alt = `Image ${image + 1} of ${dataset.numImages} for the caption “${captionAt(position)}”`;
  const original = dataset.hasOriginals ? originalPath(position, fileName) : null;
  const picture = original
    ? element("a", { href: original, target: "_blank", rel: "noopener" }, element("img", { src: original, alt }))
    : cropOf(position, image, alt, "eager");
  return element("figure", {}, picture, element("figcaption", {},
    element("h3", {}, `Image ${image}`),
    element("dl", {}, ...factsOf([
      ...columns.map((column) => [column.name, valueAt(column, position, image)]),
      ["seed", seeds[image], "code"],
      ["sha256", `${sha256[image]}…`, "code"],
      ["fingerprint", fingerprints[image], "code"],
    ]))));
}

/** A column whose value is the same for all images of the caption is a fact of the caption. */
function isShared(column, position) {
  const first = valueAt(column, position, 0);
  return Array.from({ length: dataset.numImages }, (_, image) => valueAt(column, position, image))
    .every((value) => value === first);
}

function placeFacts(position, shared) {
  const [key, captionId, extension] = rowAt("details", position);
  const [, width, height] = rowAt("captions", position);
  const { shard, index } = placeOf(position);
  const member = `${key}.0.${extension}`;
  const command = dataset.tarFolder === null ? null : `tar -xf ${dataset.tarFolder}/${shard}.tar ${member}`;
  return [
    ...shared.map((column) => [column.name, valueAt(column, position, 0)]),
    ["size", `${width} × ${height} pixels`],
    ["shard", `${shard}.tar, caption ${index}`],
    ["key", key, "code"],
    ["caption id", captionId, "code"],
    ...(command ? [["to extract", command, "code"]] : []),
  ];
}

/** Draws a caption into the dialog and opens it. `rank` is its place in the view, -1 if it is not in it. */
async function openDetail(position, rank, total, isCurrent) {
  await Promise.all([
    loadRows("captions", [position]),
    loadRows("details", [position]),
    ...dataset.columns.map((column) => loadColumn(column, [position])),
  ]);
  if (!isCurrent()) return;
  const shared = dataset.columns.filter((column) => isShared(column, position));
  const own = dataset.columns.filter((column) => !shared.includes(column));
  const images = Array.from({ length: dataset.numImages }, (_, image) => figureOf(position, image, own));
  document.getElementById("detail-caption").textContent = captionAt(position);
  document.getElementById("detail-images").replaceChildren(...images);
  document.getElementById("detail-facts").replaceChildren(...factsOf(placeFacts(position, shared)));
  document.getElementById("detail-place").textContent =
    rank < 0 ? "Not among the captions of this view" : `${formatCount(rank + 1)} of ${formatCount(total)}`;
  document.getElementById("detail-previous").disabled = rank <= 0;
  document.getElementById("detail-next").disabled = rank < 0 || rank + 1 >= total;
  if (!detail.open) {
    detail.showModal();
    document.getElementById("detail-caption").focus();
  }
  detail.scrollTop = 0;
}
