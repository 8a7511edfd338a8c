"""`stablerep browse`: pages of a dataset, for people; they open from disk, without a server or a network.

    index.html         the plan and the filters; written last
    browse.json        says that the folder is of this command; written first
    build-1/           all that index.html loads; another run writes build-2, then removes build-1
        style.css, *.js
        data/00000/    a block of 500 captions: captions.js, details.js, column0.js, … and failures.js
        images/00000/  a shard's thumbnails: a sheet a caption, in folders of 1,000
        originals/     the images as they are in the shards, if they are asked for

A page that comes from disk may load scripts and images but not fetch files, so the data are scripts too.
"""

import importlib.util
import os
import sys
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_gen.shards import open_store, read_manifest

if TYPE_CHECKING:
    from data_gen.browse.contents import ShardContents
    from data_gen.browse.page import Overview

_MAX_NUM_THREADS = 8


@dataclass(frozen=True)
class BrowseConfig:
    """Writes pages that show a dataset: every caption with its images, filters, sorting, search.

    Args:
        dataset: Folder or URL of the dataset; it need not be finished.
        output: Folder of the pages: new, empty, or with pages of this command, which are replaced.
        thumbnail_size: Longer side of a thumbnail in pixels, 16 to 1024; smaller images stay as they are.
        full_images: Copy the images themselves too, for the view of one caption; as large as the dataset.
        num_threads: Shards that are read at the same time, >= 1; null is one a core, at most 8.
    """

    dataset: str
    output: str
    thumbnail_size: int = 128
    full_images: bool = False
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if not 16 <= self.thumbnail_size <= 1024:
            raise ValueError(f"thumbnail_size must be in [16, 1024], got {self.thumbnail_size}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be >= 1, got {self.num_threads}")


def run(config: BrowseConfig) -> int:
    """Writes the pages, naming each damaged shard.

    Returns:
        0 if every finished shard is shown, 1 if one is damaged. Shards that are not finished are no failure.

    Raises:
        FileNotFoundError: There is no dataset.
        ShardError: Its manifest is damaged.
        ValueError: The output holds something else, or a package is missing.
        OSError: The output cannot be written.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("the pages need jinja2: pip install 'stablerep[report]'")
    from data_gen.browse.output import claim_folder, open_build, publish_page
    from data_gen.browse.page import build_page

    manifest = read_manifest(config.dataset)
    output = claim_folder(config.output)
    with open_build(output) as build:
        overview = _write_build(config, build)
        publish_page(output, build, build_page(overview, manifest, build.name))
    print(
        f"{output / 'index.html'}: {overview.num_captions:,} captions with {overview.num_images:,} images, "
        f"{overview.num_failures:,} failed; of {manifest.num_shards:,} shards "
        f"{len(overview.missing):,} are not finished, {len(overview.damaged):,} damaged"
    )
    return int(bool(overview.damaged))


def _write_build(config: BrowseConfig, build: Path) -> "Overview":
    """Reads every shard, a few at a time, and writes its images and rows; few shards' rows are held."""
    from tqdm import tqdm

    from data_gen.browse.blocks import BlockWriter
    from data_gen.browse.contents import read_contents
    from data_gen.browse.page import Overview, copy_assets
    from data_gen.browse.thumbnails import PictureFolder

    store = open_store(config.dataset)
    manifest = read_manifest(store)
    pictures = PictureFolder(
        build, config.thumbnail_size, config.full_images, manifest.num_images_per_caption
    )
    num_threads = config.num_threads or min(os.cpu_count() or 1, _MAX_NUM_THREADS)

    def read(shard_index: int) -> "ShardContents":
        return read_contents(store, manifest, shard_index, pictures)

    overview = Overview(store=store, pictures=pictures)
    with (
        BlockWriter(build / "data") as blocks,
        closing(_map_in_order(read, manifest.num_shards, num_threads)) as contents_of_shards,
    ):
        for contents in tqdm(contents_of_shards, "browse", manifest.num_shards, unit="shard"):
            if contents.problem:
                tqdm.write(f"stablerep browse: {contents.problem}", file=sys.stderr)
            overview.add(contents)
            blocks.add(contents)
        blocks.close()
        overview.columns = blocks.summarise_columns()
    copy_assets(build)
    return overview


def _map_in_order(
    function: "Callable[[int], ShardContents]", num_items: int, num_threads: int
) -> "Generator[ShardContents]":
    """`map(function, range(num_items))`, at most twice as many results ahead as there are threads."""
    pending: deque[Future[ShardContents]] = deque()
    executor = ThreadPoolExecutor(num_threads)
    try:
        for item in range(num_items):
            pending.append(executor.submit(function, item))
            if len(pending) >= 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
