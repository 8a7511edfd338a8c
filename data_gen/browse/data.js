"use strict";
// The data of the pages. They come in blocks of rows, each a script that calls `receive`: a page that is opened
// from disk may load scripts, but not fetch files.

const dataset = JSON.parse(document.getElementById("dataset").textContent);
const shardPositions = new Map(dataset.shards); // name → position of its first caption
const receivedBlocks = new Map(); // "captions/3" → rows
const loadedBlocks = new Map(); // "captions/3" → promise of rows

function receive(kind, block, rows) {
  receivedBlocks.set(`${kind}/${block}`, rows);
}

/** Loads a block once; resolves to its rows. */
function loadBlock(kind, block) {
  const name = `${kind}/${block}`;
  if (!loadedBlocks.has(name)) {
    loadedBlocks.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const path = `${dataset.folder}/data/${String(block).padStart(5, "0")}/${kind}.js`;
      script.onload = () => {
        script.remove();
        resolve(receivedBlocks.get(name));
      };
      script.onerror = () => {
        script.remove();
        loadedBlocks.delete(name);
        reject(new Error(`${path} is not there. If the pages were written anew, load this page again.`));
      };
      script.src = path;
      document.head.append(script);
    }));
  }
  return loadedBlocks.get(name);
}

/** Loads every block of a kind that lies in [firstBlock, number of blocks that numRows need). */
function loadBlocks(kind, numRows, firstBlock = 0) {
  const numBlocks = Math.ceil(numRows / dataset.blockSize);
  const blocks = Array.from({ length: Math.max(0, numBlocks - firstBlock) }, (_, index) => firstBlock + index);
  return Promise.all(blocks.map((block) => loadBlock(kind, block)));
}

/** Loads the blocks that hold these rows. */
function loadRows(kind, positions) {
  const blocks = new Set(Array.from(positions, (position) => Math.floor(position / dataset.blockSize)));
  return Promise.all(Array.from(blocks, (block) => loadBlock(kind, block)));
}

/** A row of a block that is loaded. */
function rowAt(kind, position) {
  const block = Math.floor(position / dataset.blockSize);
  return receivedBlocks.get(`${kind}/${block}`)[position - block * dataset.blockSize];
}

const captionAt = (position) => rowAt("captions", position)[0];

/** Loads a column: whole, or the blocks of some rows. */
function loadColumn(column, positions = null) {
  const kind = `column${column.number}`;
  if (positions === null) return loadBlocks(kind, dataset.numCaptions, column.firstBlock);
  const there = Array.from(positions).filter((position) => position >= column.firstBlock * dataset.blockSize);
  return loadRows(kind, there);
}

/** A column's value for an image, null where it has none. A block has one value a caption, or one an image. */
function valueAt(column, position, image) {
  const block = Math.floor(position / dataset.blockSize);
  if (block < column.firstBlock) return null;
  const rows = receivedBlocks.get(`column${column.number}/${block}`);
  const row = position - block * dataset.blockSize;
  const numRows = Math.min(dataset.blockSize, dataset.numCaptions - block * dataset.blockSize);
  return rows.length === numRows ? rows[row] : rows[row * dataset.numImages + image];
}

/** Where a caption is in the dataset: its shard, and its place in it. */
function placeOf(position) {
  let low = 0;
  let high = dataset.shards.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (dataset.shards[middle][1] <= position) low = middle;
    else high = middle - 1;
  }
  const [shard, first] = dataset.shards[low];
  return { shard, index: position - first };
}

/** The position of "00003.17", -1 if it is not there. */
function positionOf(place) {
  const [shard, index] = place.split(".");
  const position = shardPositions.has(shard) && /^\d+$/.test(index) ? shardPositions.get(shard) + Number(index) : -1;
  return position >= 0 && position < dataset.numCaptions && placeOf(position).shard === shard ? position : -1;
}

/** The sheet with the thumbnails of a caption. */
function sheetPath(position) {
  const { shard, index } = placeOf(position);
  return `${dataset.folder}/images/${shard}/${Math.floor(index / dataset.captionsPerFolder)}/${index}.jpg`;
}

/** An image as it is in its shard; only with `dataset.hasOriginals`. */
function originalPath(position, fileName) {
  const { shard, index } = placeOf(position);
  return `${dataset.folder}/originals/${shard}/${Math.floor(index / dataset.originalsPerFolder)}/${fileName}`;
}
