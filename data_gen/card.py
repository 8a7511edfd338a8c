"""The dataset described: README.md (a Hugging Face dataset card) for people, croissant.json for machines.

The card's header names the columns of a sample for the `datasets` library, which otherwise takes them from
the first five samples and fails where a value is missing in all of those.

A job writes the card again when it goes on. What a person has put there by hand is kept: the licence and keys
of the header that are not ours, the text below `REMARKS_LINE`, and the facts of croissant.json that
`data_gen.croissant.STATED_FACTS` lists. A licence in the header goes into croissant.json as well.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import yaml

from data_gen.croissant import (
    CHECKSUMS_NAME,
    CROISSANT_NAME,
    STATED_FACTS,
    build_checksums,
    build_croissant,
)
from data_gen.diffusion.fidelity import FIDELITY_NAME, read_fidelity
from data_gen.shards import MANIFEST_NAME, DatasetManifest, Shard, read_failures, to_json
from data_gen.storage import Store

CARD_NAME = "README.md"
REMARKS_LINE = "<!-- What stands below this line is kept when the card is written again. -->"
NO_LICENSE = "unknown"
"""The hub's word for a dataset of which nobody has stated a licence."""

_HEADER = re.compile(r"---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_NUM_READING_THREADS = 16
_MAX_VALUE_CHARACTERS = 300
_MAX_ROWS_PER_LIST = 10
_COLUMN_DTYPES = {"string": "string", "int64": "int64", "double": "float64", "bool": "bool"}
_SAMPLE_COLUMNS = {
    "key": "string",
    "caption_id": "string",
    "caption": "string",
    "occurrence": "int64",
    "image_extension": "string",
    "image_seeds": ["string"],
    "image_sha256": ["string"],
    "guidance_scales": ["float64"],
    "fingerprints": ["string"],
    "record_sha256": "string",
    "settings_hash": "string",
    "width": "int64",
    "height": "int64",
}
"""Fields of a sample's JSON, `data_gen.shard_writer.to_record`; a list stands for a list of its item."""


def write_card(store: Store, manifest: DatasetManifest, shards: list[Shard]) -> None:
    """Writes README.md, croissant.json and, as the mark that both are up to date, SHA256SUMS.

    Args:
        store: The dataset's folder.
        manifest: The plan.
        shards: The finished shards.
    """
    failures = count_failures(shards)
    checksums = build_checksums(manifest, store.digest(MANIFEST_NAME)[1], shards)
    header, remarks = read_statements(store)
    stated = _read_stated_facts(store)
    if header.get("license", NO_LICENSE) != NO_LICENSE:
        stated["license"] = header["license"]
    croissant = build_croissant(store.name, manifest, shards, checksums, failures, stated)
    store.replace(CROISSANT_NAME, (json.dumps(croissant, indent=2, ensure_ascii=False) + "\n").encode())
    fidelity = read_fidelity(store, manifest)
    card = build_card(store.name, manifest, shards, failures, header, remarks, fidelity)
    store.replace(CARD_NAME, card.encode())
    store.replace(CHECKSUMS_NAME, checksums)


def count_failures(shards: list[Shard]) -> dict[str, int]:
    """Captions without images by reason, the most frequent first, from the completion markers.

    Raises:
        ShardError: A marker does not tell.
    """
    with_failures = [shard for shard in shards if shard.num_failed]
    if not with_failures:
        return {}
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(1 if with_failures[0].store.is_local else _NUM_READING_THREADS) as executor:
        for failures in executor.map(read_failures, with_failures):
            counts.update(failures)
    return dict(counts.most_common())


def read_statements(store: Store) -> tuple[dict[str, Any], str]:
    """What a person has put into the card that is there: its header, and the text below `REMARKS_LINE`."""
    try:
        text = store.read(CARD_NAME).decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        return {}, ""
    text = text.replace("\r\n", "\n")
    _, _, remarks = text.partition(f"{REMARKS_LINE}\n")
    try:
        header = _parse_header(text)
    except (yaml.YAMLError, ValueError) as error:
        print(
            f"{store.name_of(CARD_NAME)}: its header is not kept, it cannot be read: {error}", file=sys.stderr
        )
        header = {}
    return {key: value for key, value in header.items() if value is not None}, remarks


def build_card(
    name: str,
    manifest: DatasetManifest,
    shards: list[Shard],
    failures_by_reason: Mapping[str, int],
    stated_header: Mapping[str, Any],
    remarks: str = "",
    fidelity: Mapping[str, Any] | None = None,
) -> str:
    """The dataset card: a YAML header for the Hugging Face hub, then the plan in words.

    Args:
        name: What the dataset is called.
        manifest: Its plan.
        shards: Its finished shards.
        failures_by_reason: Captions without images, by reason.
        stated_header: Header of an earlier card; its licence and the keys that are not ours are taken over.
        remarks: Text of a person, taken over.
        fidelity: The report of `data_gen.diffusion.fidelity`; None where there is none.
    """
    num_images = sum(shard.num_images for shard in shards)
    num_captions = sum(shard.num_samples for shard in shards)
    header = build_header(name, num_images, _sample_features(manifest), stated_header)
    return f"""{header}
# {name}

{describe_note(manifest)}{num_images} images generated from {num_captions} captions,
{manifest.num_images_per_caption} images a caption. Every image here is synthetic: none is a photograph.

{_describe_counts(manifest, shards, failures_by_reason)}
{_describe_loading(manifest)}
## Check and look
- `sha256sum -c {CHECKSUMS_NAME}` compares the plan, the planned captions and the shards with their digests;
  `stablerep verify --dataset DIR` names the shards that are damaged or missing, and with `--deep` decodes
  every image.
- `stablerep browse --dataset DIR --output PAGES` makes pages with the captions and their images.
- `stablerep export-dataset --dataset DIR --output DIR2 --layout flat` writes one sample an image, in the
  layout of img2dataset, which open_clip trains on.

{describe_provenance(manifest)}{_describe_fidelity(fidelity)}
{describe_license(str(stated_header.get("license", NO_LICENSE)))}
{REMARKS_LINE}
{remarks}"""


def build_header(
    name: str, num_images: int, features: list[dict[str, Any]], stated: Mapping[str, Any]
) -> str:
    """The YAML header of a card, between its two lines of dashes."""
    header = {
        "pretty_name": name,
        "license": stated.get("license", NO_LICENSE),
        "task_categories": ["text-to-image", "image-feature-extraction"],
        "tags": ["synthetic", "webdataset"],
        "size_categories": [_size_category(num_images)],
        "configs": [{"config_name": "default", "data_files": "*.tar"}],
        "dataset_info": {"features": features},
    }
    header |= {key: value for key, value in stated.items() if key not in header}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n"


def build_features(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns as the header of a card names them: dtypes, [item] for a list, a mapping for a struct.

    Lists are called sequences, the word that versions of `datasets` before 4 know too.
    """
    features: list[dict[str, Any]] = []
    for name, kind in columns.items():
        match kind:
            case str():
                features.append({"name": name, "dtype": kind})
            case [item]:
                features.append({"name": name, "sequence": item})
            case _:
                features.append({"name": name, "struct": build_features(kind)})
    return features


def extra_dtypes(manifest: DatasetManifest) -> dict[str, str]:
    """The extra columns with the types that the header of a card has for them."""
    return {name: _COLUMN_DTYPES[kind] for name, kind in manifest.extra_columns.items()}


def describe_note(manifest: DatasetManifest) -> str:
    """The plan's remark, set off from the text around it."""
    return "".join(f"> {line}\n" for line in manifest.note.splitlines()) + "\n" if manifest.note else ""


def describe_provenance(manifest: DatasetManifest) -> str:
    """Where the images come from: settings, captions, machine, and the plans that this one extends."""
    extended = "".join(f"- extended from settings `{settings}`\n" for settings in manifest.extended_from)
    return f"""## Provenance
- settings hash: `{manifest.settings_hash}`
- seed: `{manifest.settings["seed"]}`; each image's noise follows from it, its caption and its index
{extended}
| generator | |
|---|---|
{_table(manifest.settings["generator"])}
| other settings | |
|---|---|
{_table({name: value for name, value in manifest.settings.items() if name not in ("generator", "seed")})}
| captions | |
|---|---|
{_table(manifest.captions_source)}
| machine that planned it | |
|---|---|
{_table(manifest.fingerprint)}
Images are equal bit for bit where the machine settings are; those of each image are in its column
`fingerprint`.
"""


def describe_license(license_: str) -> str:
    """What is known of the licence, and where a person states it."""
    stated = (
        "Nobody has stated a licence for this dataset. Whoever publishes it states one as `license` in the\n"
        "header of this file, where it is kept."
        if license_ == NO_LICENSE
        else f"`{license_}`, as the header says."
    )
    return f"""## Licence
{stated}
The licences of the generator and of the captions apply to what was made with them.
"""


def _parse_header(text: str) -> dict[str, Any]:
    """What stands between the first line and the next that is `---` and nothing else."""
    if text.partition("\n")[0].rstrip() != "---":
        return {}
    match = _HEADER.match(text)
    if match is None:
        raise ValueError("no second line of dashes ends it")
    header = yaml.safe_load(match[1]) or {}
    if not isinstance(header, dict):
        raise ValueError(f"expected keys with values, got {type(header).__name__}")
    return header


def _read_stated_facts(store: Store) -> dict[str, Any]:
    """The facts in the croissant.json that is there, without the citation that this package wrote."""
    try:
        document = json.loads(store.read(CROISSANT_NAME))
    except (FileNotFoundError, ValueError):
        return {}
    facts = {name: document[name] for name in STATED_FACTS if name in document}
    if str(facts.get("citeAs")).startswith("@misc{dataset-"):
        del facts["citeAs"]
    return facts


def _sample_features(manifest: DatasetManifest) -> list[dict[str, Any]]:
    extension = manifest.settings["image_format"]
    record = dict(_SAMPLE_COLUMNS)
    extra = {"extra": extra_dtypes(manifest)} if manifest.extra_columns else {}
    images = {f"{index}.{extension}": "image" for index in range(manifest.num_images_per_caption)}
    return build_features(
        {"__key__": "string", "__url__": "string", "txt": "string", **images, "json": record | extra}
    )


def _describe_counts(
    manifest: DatasetManifest, shards: list[Shard], failures_by_reason: Mapping[str, int]
) -> str:
    rows = {
        "captions planned": manifest.num_captions,
        "captions with images": sum(shard.num_samples for shard in shards),
        "captions without images": sum(shard.num_failed for shard in shards),
        **{f"- {reason}": count for reason, count in failures_by_reason.items()},
        "images": sum(shard.num_images for shard in shards),
        "shards finished": f"{len(shards)} of {manifest.num_shards}",
        "bytes": sum(shard.num_bytes + shard.parquet_num_bytes for shard in shards),
    }
    lines = "\n".join(f"| {_escape(name)} | {value} |" for name, value in rows.items())
    return f"| what | how many |\n|---|---|\n{lines}\n"


def _describe_fidelity(fidelity: Mapping[str, Any] | None) -> str:
    """How near the images are to those of full precision."""
    if fidelity is None:
        return ""
    if "unmeasured" in fidelity:
        return f"Against full precision they are not measured: {_code(fidelity['unmeasured'])}.\n"
    units = {"psnr": " dB", "ssim": ""}
    means = [
        f"a mean {name.upper()} of {fidelity[f'{name}_mean']:.4g}{unit}"
        for name, unit in units.items()
        if fidelity[f"{name}_mean"] is not None
    ]
    equal = f", {fidelity['num_equal']} of them equal bit for bit" if fidelity["num_equal"] else ""
    return (
        f"Against full precision, {fidelity['num_images']} of the images have\n"
        f"{' and '.join(means) or 'no figures'}{equal}; `{FIDELITY_NAME}` has more.\n"
    )


def _describe_loading(manifest: DatasetManifest) -> str:
    extension = manifest.settings["image_format"]
    extra = ", ".join(f"`{name}`" for name in manifest.extra_columns)
    return f"""## Contents
- `00000.tar`, …: WebDataset. A sample is a caption: `{{key}}.json`, `{{key}}.txt` (the caption), then
  `{{key}}.0.{extension}` to `{{key}}.{manifest.num_images_per_caption - 1}.{extension}`.
- `00000.parquet`, …: one row an image, with its digest and its place in the tar.
- `00000_stats.json`, …: counts, failures, sizes, digests; written last, so it marks a finished shard.
- `captions/`: the planned captions. `{MANIFEST_NAME}`: the plan. `{CROISSANT_NAME}`: this page for machines.
- Extra columns, taken over from the captions: {extra or "none"}.

```python
import datasets, webdataset

datasets.load_dataset("DIR", split="train", streaming=True)  # txt, json, 0.{extension}, 1.{extension}, …
datasets.load_dataset("parquet", data_files="DIR/[0-9]*.parquet", split="train")  # the rows alone
webdataset.WebDataset("DIR/{{00000..{manifest.shard_name(manifest.num_shards - 1)}}}.tar", shardshuffle=False)
```
"""


def _table(values: Mapping[str, Any]) -> str:
    return "".join(f"| {_escape(name)} | {_code(value)} |\n" for name, value in sorted(_flatten(values)))


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings by dotted name; of a long list its beginning, the rest is in the manifest."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value[:_MAX_ROWS_PER_LIST]):
            yield from _flatten(item, f"{name}.{index}")
        if len(value) > _MAX_ROWS_PER_LIST:
            yield f"{name}.…", f"{len(value) - _MAX_ROWS_PER_LIST} more in {MANIFEST_NAME}"
    else:
        yield name, value


def _code(value: Any) -> str:
    """A value as code that stays in its cell of a table."""
    text = to_json(value)
    if len(text) > _MAX_VALUE_CHARACTERS:
        text = f"{text[:_MAX_VALUE_CHARACTERS]}… ({MANIFEST_NAME})"
    return f"`{_escape(text.replace('`', '´'))}`"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _size_category(num_images: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")]
    bounds += [(10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B")]
    bounds += [(10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T")]
    return next((name for bound, name in bounds if num_images < bound), "n>1T")
