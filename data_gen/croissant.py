"""The dataset described for machines: Croissant metadata, and the digests of the files that it describes.

The shards are described as sets of files, not one by one: a document that names every tar and parquet of
400,000 shards would have 300 MB, of which a reader parses each byte before it yields a record. What a list of
files would give, their digests, is in `SHA256SUMS`, which `sha256sum -c` reads; the digest of that file is in
the document, so that one number stands for the plan, the planned captions and the shards. Completion markers,
`fingerprints/` and `fidelity.json` are not listed: they tell of seconds and machines, and equal shards are to
have equal sums.

The images table can be read through mlcroissant. The images themselves cannot: mlcroissant 1.1 opens only
archives that are named one by one, and keeps what it extracts under a hash of the relative name, so that it
would take the `00000.tar` of two datasets for one. Therefore each row says where its image is: `num_bytes`
bytes from `tar_offset` on, in the tar that `images/shard` names.

Version 1.0, since nothing of 1.1 is needed here, and readers of 1.0 refuse 1.1.

Reference: https://docs.mlcommons.org/croissant/docs/croissant-spec.html and
https://docs.mlcommons.org/croissant/docs/croissant-rai-spec.html.
"""

import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from data_gen.shard_writer import IMAGE_COLUMNS
from data_gen.shards import MANIFEST_NAME, DatasetManifest, Shard, to_json

CROISSANT_NAME = "croissant.json"
CHECKSUMS_NAME = "SHA256SUMS"
STATED_FACTS = ("license", "creator", "publisher", "datePublished", "url", "sameAs", "citeAs")
"""What only a person knows, or knows better; whoever writes them into croissant.json finds them kept."""
MIME_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}

_MAX_LABEL_CHARACTERS = 2_000
_DATA_TYPES = {
    "string": "sc:Text",
    "int32": "sc:Integer",
    "int64": "sc:Integer",
    "double": "sc:Float",
    "bool": "sc:Boolean",
}
_TERMS = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet"),
    *("format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet"),
    *("references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField"),
    "transform",
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "prov": "http://www.w3.org/ns/prov#",
    "rdfs": "http://www.w3.org/2000/01/rdf-schema#",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
}


def build_checksums(manifest: DatasetManifest, manifest_sha256: str, shards: list[Shard]) -> bytes:
    """Digests of the plan, the planned captions and the finished shards, in the form of `sha256sum`."""
    files = [
        (MANIFEST_NAME, manifest_sha256),
        *((str(entry["name"]), str(entry["sha256"])) for entry in manifest.caption_files),
        *(
            pair
            for shard in shards
            for pair in ((shard.tar_name, shard.sha256), (shard.parquet_name, shard.parquet_sha256))
        ),
    ]
    return "".join(f"{sha256}  {name}\n" for name, sha256 in files).encode()


def build_croissant(
    name: str,
    manifest: DatasetManifest,
    shards: list[Shard],
    checksums: bytes,
    failures_by_reason: Mapping[str, int],
    stated: Mapping[str, Any],
) -> dict[str, Any]:
    """The document.

    Args:
        name: What the dataset is called.
        manifest: Its plan.
        shards: Its finished shards.
        checksums: Content of `SHA256SUMS`.
        failures_by_reason: Captions without images, by reason.
        stated: Those of `STATED_FACTS` that someone has stated; none of them is made up.
    """
    num_images = sum(shard.num_images for shard in shards)
    num_captions = sum(shard.num_samples for shard in shards)
    description = (
        f"{num_images} synthetic images generated from {num_captions} captions, "
        f"{manifest.num_images_per_caption} images a caption. {manifest.note}"
    )
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": name,
        "description": description.strip(),
        # Further images of the same captions leave those that were there as they are: a minor version.
        "version": f"1.{len(manifest.extended_from)}.0",
        "citeAs": _build_citation(name, manifest),
        "keywords": ["synthetic", "text-to-image", "webdataset"],
        **_describe_provenance(manifest, failures_by_reason),
        **stated,
        "distribution": _build_distribution(manifest, checksums),
        "recordSet": [_build_images_table(manifest)],
    }


def _build_citation(name: str, manifest: DatasetManifest) -> str:
    return (
        f"@misc{{dataset-{manifest.settings_hash[:12]},\n  title = {{{name}}},\n"
        f"  note = {{Synthetic images, settings hash {manifest.settings_hash}}}\n}}"
    )


def _describe_provenance(manifest: DatasetManifest, failures_by_reason: Mapping[str, int]) -> dict[str, Any]:
    """W3C PROV for where the images come from, Croissant RAI for how."""
    source, settings = (_shorten(to_json(part)) for part in (manifest.captions_source, manifest.settings))
    generator = manifest.settings["generator"]
    model = {name: value for name, value in generator.items() if name.startswith("model")}
    failures = ", ".join(f"{count} ({reason})" for reason, count in failures_by_reason.items())
    return {
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "rdfs:label": f"text-to-image generation, settings {settings}",
        },
        "prov:wasAttributedTo": {"@type": "prov:SoftwareAgent", "rdfs:label": _shorten(to_json(model))},
        "prov:wasDerivedFrom": {"@type": "prov:Entity", "rdfs:label": f"captions {source}"},
        "rai:dataCollection": (
            "Every image is synthetic: a text-to-image model made it of its caption. None is a photograph."
        ),
        "rai:dataCollectionType": ["Others"],
        "rai:dataCollectionRawData": f"Captions: {source}",
        "rai:dataCollectionMissingData": f"Captions without images: {failures or 'none'}.",
    }


def _shorten(text: str) -> str:
    """Thousands of caption files need not stand here a second time."""
    return (
        text if len(text) <= _MAX_LABEL_CHARACTERS else f"{text[:_MAX_LABEL_CHARACTERS]}… ({MANIFEST_NAME})"
    )


def _build_distribution(manifest: DatasetManifest, checksums: bytes) -> list[dict[str, Any]]:
    """The patterns begin with a digit: mlcroissant's `*` crosses slashes and would take captions/ too."""
    extension = manifest.settings["image_format"]
    return [
        {
            "@type": "cr:FileObject",
            "@id": CHECKSUMS_NAME,
            "name": CHECKSUMS_NAME,
            "description": "sha256 of the plan, the planned captions and the shards",
            "contentUrl": CHECKSUMS_NAME,
            "contentSize": f"{len(checksums)} B",
            "encodingFormat": "text/plain",
            "sha256": hashlib.sha256(checksums).hexdigest(),
        },
        {
            "@type": "cr:FileSet",
            "@id": "images-table",
            "name": "images-table",
            "description": "one row an image, one file a shard",
            "encodingFormat": "application/x-parquet",
            "includes": "[0-9]*.parquet",
        },
        {
            "@type": "cr:FileSet",
            "@id": "shards",
            "name": "shards",
            "description": "WebDataset: a sample is a caption, {key}.json, {key}.txt and {key}.N."
            + extension,
            "encodingFormat": "application/x-tar",
            "includes": "[0-9]*.tar",
        },
        {
            "@type": "cr:FileSet",
            "@id": "image-files",
            "name": "image-files",
            "description": "the images in the shards",
            "containedIn": {"@id": "shards"},
            "encodingFormat": MIME_TYPES[extension],
            "includes": f"*.{extension}",
        },
    ]


def _build_images_table(manifest: DatasetManifest) -> dict[str, Any]:
    """Extra columns stand under `images/extra/`, where no name of theirs meets one of ours."""
    shard = _build_field("images/shard", "shard", "sc:Text", "name of the tar, without .tar")
    shard["source"]["extract"] = {"fileProperty": "filename"}
    shard["source"]["transform"] = {"regex": r"(.+)\.parquet"}
    fields = [
        _build_field(f"images/{name}", name, _DATA_TYPES[kind], description)
        for name, (kind, description) in IMAGE_COLUMNS.items()
    ]
    extra_fields = [
        _build_field(
            f"images/extra/{quote(name, safe='')}", name, _DATA_TYPES[kind], "column of the captions"
        )
        for name, kind in manifest.extra_columns.items()
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": "images",
        "name": "images",
        "description": "One record an image: num_bytes bytes from tar_offset on, in {shard}.tar.",
        "key": [{"@id": "images/key"}, {"@id": "images/index"}],
        "field": [shard, *fields, *extra_fields],
    }


def _build_field(identity: str, column: str, data_type: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": identity,
        "name": column,
        "description": description,
        "dataType": data_type,
        "source": {"fileSet": {"@id": "images-table"}, "extract": {"column": column}},
    }
