"""The dataset described: README.md (a Hugging Face dataset card) for people, croissant.json for machines."""

import json
from pathlib import Path
from typing import Any

from data_gen.shard_writer import write_file
from data_gen.shards import DatasetManifest, Shard

_COLUMNS = {
    "key": ("sc:Text", "name of the sample in its tar"),
    "index": ("sc:Integer", "index of the image among its caption's"),
    "caption": ("sc:Text", "normalised caption"),
    "caption_id": ("sc:Text", "identity of the caption by content"),
    "image_seed": ("sc:Text", "128-bit key of the image's initial noise"),
    "settings_hash": ("sc:Text", "settings of the job that made it"),
    "sha256": ("sc:Text", "digest of the encoded image"),
    "tar_offset": ("sc:Integer", "offset of the encoded image in the tar, in bytes"),
    "num_bytes": ("sc:Integer", "size of the encoded image, in bytes"),
    "width": ("sc:Integer", "width in pixels"),
    "height": ("sc:Integer", "height in pixels"),
}


def write_card(root: str | Path, manifest: DatasetManifest, shards: list[Shard]) -> None:
    """Writes README.md and croissant.json beside the shards.

    Args:
        root: Folder of the dataset.
        manifest: The plan.
        shards: The finished shards, described by name, size and digest.
    """
    croissant = json.dumps(
        build_croissant(Path(root).resolve().name, manifest, shards), indent=2, ensure_ascii=False
    )
    write_file(Path(root) / "croissant.json", (croissant + "\n").encode())
    write_file(Path(root) / "README.md", build_card(Path(root).resolve().name, manifest, shards).encode())


def build_card(name: str, manifest: DatasetManifest, shards: list[Shard]) -> str:
    """The dataset card: a YAML header for the Hugging Face hub, then the plan in words."""
    num_images, num_captions = (
        sum(shard.num_images for shard in shards),
        sum(shard.num_samples for shard in shards),
    )
    rows = "\n".join(
        f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |"
        for key, value in sorted(manifest.settings["generator"].items())
    )
    return f"""---
pretty_name: {json.dumps(name)}
task_categories: [text-to-image, image-feature-extraction]
tags: [synthetic, webdataset]
size_categories: [{_size_category(num_images)}]
configs:
- config_name: default
  data_files: "*.tar"
---

# {name}

{num_images} images generated from {num_captions} captions,
{manifest.num_images_per_caption} images a caption, in
{len(shards)} of {manifest.num_shards} planned shards. Every image here is synthetic.

| generator | value |
|---|---|
{rows}

- captions: `{manifest.captions_source["name"]}`, {manifest.num_captions} planned
- seed: {manifest.settings["seed"]}
- settings hash: `{manifest.settings_hash}`

Each `.tar` is a WebDataset: `{{key}}.json`, `{{key}}.txt` (caption), then one image file for each index.
The `.parquet` beside it has one row an image. A shard is complete when its `_stats.json` is there, which
holds the sizes and sha256 of both; `stablerep verify` compares them.
"""


def build_croissant(name: str, manifest: DatasetManifest, shards: list[Shard]) -> dict[str, Any]:
    """Croissant 1.0 metadata: the files with their digests, and the columns of the per-image table."""
    files = [
        {
            "@type": "cr:FileObject",
            "@id": path.name,
            "name": path.name,
            "contentUrl": path.name,
            "contentSize": f"{num_bytes} B",
            "encodingFormat": encoding,
            "sha256": sha256,
        }
        for shard in shards
        for path, num_bytes, sha256, encoding in (
            (shard.path, shard.num_bytes, shard.sha256, "application/x-tar"),
            (shard.parquet_path, shard.parquet_num_bytes, shard.parquet_sha256, "application/x-parquet"),
        )
    ]
    file_set = {
        "@type": "cr:FileSet",
        "@id": "images-table",
        "name": "images-table",
        "encodingFormat": "application/x-parquet",
        "includes": "*.parquet",
    }
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"images/{column}",
            "name": column,
            "description": description,
            "dataType": data_type,
            "source": {"fileSet": {"@id": "images-table"}, "extract": {"column": column}},
        }
        for column, (data_type, description) in _COLUMNS.items()
    ]
    return {
        "@context": {
            "@language": "en",
            "@vocab": "https://schema.org/",
            "sc": "https://schema.org/",
            "cr": "http://mlcommons.org/croissant/",
            "dct": "http://purl.org/dc/terms/",
            "conformsTo": "dct:conformsTo",
            "recordSet": "cr:recordSet",
            "field": "cr:field",
            "fileSet": "cr:fileSet",
            "includes": "cr:includes",
            "source": "cr:source",
            "extract": "cr:extract",
            "column": "cr:column",
            "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
        },
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": f"Images generated from captions, {manifest.num_images_per_caption} a caption.",
        "version": "1.0.0",
        "distribution": [*files, file_set],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "images", "name": "images", "field": fields}],
    }


def _size_category(num_images: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")]
    bounds += [(10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B")]
    return next((name for bound, name in bounds if num_images < bound), "n>1B")
