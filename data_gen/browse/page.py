"""`index.html`: the plan of the dataset, what there is of it, the filters, and what the scripts need."""

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from data_gen.browse.blocks import BLOCK_SIZE, ColumnSummary
from data_gen.browse.contents import ShardContents
from data_gen.browse.thumbnails import MAX_FILES_PER_FOLDER, NUM_SHEET_COLUMNS, PictureFolder
from data_gen.shards import DatasetManifest
from data_gen.storage import Store

TEMPLATE_NAME = "index.html.jinja"
SCRIPT_NAMES = ("data.js", "filters.js", "pages.js", "detail.js", "view.js", "controls.js")
STYLE_NAME = "style.css"
HISTOGRAM_HEIGHT = 24
MAX_SHARDS_NAMED = 20
_FOLDER = Path(__file__).parent


@dataclass
class Overview:
    """What was found of the dataset, shard after shard.

    Args:
        store: The dataset's folder.
        pictures: Where the images of the pages are.
    """

    store: Store
    pictures: PictureFolder
    num_captions: int = 0
    num_images: int = 0
    num_failures: int = 0
    failures_by_reason: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    hidden_columns: set[str] = field(default_factory=set)
    columns: list[ColumnSummary] = field(default_factory=list)
    first_positions: dict[str, int] = field(default_factory=dict)

    def add(self, contents: ShardContents) -> None:
        """Counts the next shard."""
        if contents.is_missing:
            self.missing.append(contents.name)
        elif contents.problem is not None:
            self.damaged[contents.name] = contents.problem
        elif contents.captions:
            self.first_positions[contents.name] = self.num_captions
        self.num_captions += len(contents.captions)
        self.num_images += sum(len(caption.image_seeds) for caption in contents.captions)
        self.num_failures += len(contents.failures)
        self.failures_by_reason.update(failure.reason for failure in contents.failures)
        self.hidden_columns.update(contents.hidden_columns)


def build_page(overview: Overview, manifest: DatasetManifest, build_name: str) -> bytes:
    """The page as HTML.

    Args:
        overview: What was found.
        manifest: What was planned.
        build_name: Folder of what the page loads.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,  # captions, notes and column names are text that others wrote
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "short": _short, "bars": draw_bars}
    text = environment.get_template(TEMPLATE_NAME).render(
        name=overview.store.name or overview.store.url,
        overview=overview,
        manifest=manifest,
        model=_find_model(manifest.settings),
        damaged=list(overview.damaged.items()),
        missing=_name_ranges(overview.missing, manifest),
        max_named=MAX_SHARDS_NAMED,
        settings=_flatten(manifest.settings),
        source=_flatten(manifest.captions_source),
        fingerprint=_flatten(manifest.fingerprint),
        histogram_height=HISTOGRAM_HEIGHT,
        build_name=build_name,
        style_name=STYLE_NAME,
        script_names=SCRIPT_NAMES,
        dataset=_describe_for_scripts(overview, manifest, build_name),
    )
    return text.encode(errors="replace")


def copy_assets(build: Path) -> None:
    """Copies what the page loads beside the data."""
    for name in (STYLE_NAME, *SCRIPT_NAMES):
        shutil.copyfile(_FOLDER / name, build / name)


def draw_bars(histogram: Sequence[int]) -> str:
    """The `d` of an SVG path: a bar a bin, each 1 wide, the highest `HISTOGRAM_HEIGHT`."""
    highest = max(histogram)
    heights = [HISTOGRAM_HEIGHT * count / highest for count in histogram]
    shown = ((index, max(height, 1.0)) for index, height in enumerate(heights) if height)
    return "".join(
        f"M{index + 0.1:.1f} {HISTOGRAM_HEIGHT}V{HISTOGRAM_HEIGHT - height:.1f}h.8V{HISTOGRAM_HEIGHT}"
        for index, height in shown
    )


def _describe_for_scripts(overview: Overview, manifest: DatasetManifest, build_name: str) -> dict[str, Any]:
    """What data.js calls `dataset`."""
    return {
        "folder": build_name,
        "numCaptions": overview.num_captions,
        "numFailures": overview.num_failures,
        "numImages": manifest.num_images_per_caption,
        "blockSize": BLOCK_SIZE,
        "sheetColumns": NUM_SHEET_COLUMNS,
        "captionsPerFolder": MAX_FILES_PER_FOLDER,
        "originalsPerFolder": overview.pictures.num_originals_per_folder,
        "hasOriginals": overview.pictures.has_originals,
        "tarFolder": _quote_folder(overview.store) if overview.store.is_local else None,
        "shards": list(overview.first_positions.items()),
        "columns": [
            {
                "name": column.name,
                "number": column.number,
                "kind": column.kind,
                "firstBlock": column.first_block,
            }
            for column in overview.columns
        ],
    }


def _quote_folder(store: Store) -> str:
    """The folder for a shell, wherever that is."""
    return shlex.quote(str(store.local_path.resolve()))


def _find_model(settings: Mapping[str, Any]) -> str | None:
    generator = settings.get("generator")
    return str(generator["model"]) if isinstance(generator, Mapping) and "model" in generator else None


def _name_ranges(names: Sequence[str], manifest: DatasetManifest) -> list[str]:
    """`00003 to 00007` for shards that follow each other."""
    ranges: list[list[int]] = []
    for index in map(int, names):
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    name = manifest.shard_name
    return [name(low) if low == high else f"{name(low)} to {name(high)}" for low, high in ranges]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name → value as text, for a list of settings."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        elif value not in ("", None, {}, []):
            flat[f"{prefix}{name}"] = (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            )
    return flat


def _count(number: int) -> str:
    return f"{number:,}"


def _short(number: float) -> str:
    return f"{number:.4g}"
