"""From a config to a frozen plan: `dataset.json`, with the captions beside it.

The plan holds everything that changes an image or its place, and nothing else: not the number of workers, not
their machines, not where the captions or the model lay.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data_gen.captions.planning import CaptionPlan, plan_captions
from data_gen.captions.sources import Columns, SourceFile, digest_sources
from data_gen.diffusion.models import ModelFiles
from data_gen.job.plan import Plan, has_images
from data_gen.job.work_folder import Worker, WorkFolder
from data_gen.messages import say
from data_gen.shard_writer import write_manifest
from data_gen.shards import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    DatasetManifest,
    hash_settings,
    read_manifest,
    without_names,
)
from data_gen.storage import Store

if TYPE_CHECKING:
    from data_gen.job.generate import GenerateConfig

_OWN_FILES = (".tar", ".parquet", "_stats.json", "README.md", "croissant.json", "SHA256SUMS", "fidelity.json")
"""How the names end of what a job writes beside `dataset.json`."""
_NOT_IN_SETTINGS = ("device", "revision", "tiny_vae_revision", "trust_remote_code", "allow_pickle")
"""Of the generator: what is a machine's or a person's, or stands in the model's identity."""
_SETTINGS = (
    "num_images_per_caption",
    "seed",
    "num_captions_per_shard",
    "num_images_per_batch",
    "stored_image_size",
    "image_format",
    "image_quality",
)
_LEASE_SECONDS = 300.0
"""Of workers that do not say their own."""


@dataclass(frozen=True)
class Draft:
    """A plan that is not frozen yet.

    Args:
        manifest: What `dataset.json` is to hold.
        caption_files: Local files with the planned captions; empty where the dataset has them already.
    """

    manifest: DatasetManifest
    caption_files: tuple[Path, ...]


def draft_plan(
    config: "GenerateConfig", model: ModelFiles, fingerprint: Mapping[str, Any], store: Store, folder: Path
) -> Draft:
    """Plans what the config asks for; captions that the dataset holds already are not planned again.

    Args:
        config: The job.
        model: Its model.
        fingerprint: Machine settings here.
        store: Where the dataset is, or will be.
        folder: An empty local folder for the planned captions.

    Raises:
        FileNotFoundError: A caption file is missing.
        ValueError: A caption file is damaged, or lacks a column.
    """
    old = read_manifest(store) if store.exists(MANIFEST_NAME) else None
    if old is not None and _has_same_captions(config, old):
        settings = _build_settings(config, model, old.settings["captions_sha256"], old.num_captions)
        manifest = dataclasses.replace(
            old,
            settings=settings,
            settings_hash=hash_settings(settings),
            num_images_per_caption=config.num_images_per_caption,
            fingerprint=dict(fingerprint),
            extended_from=(),
            note=config.note,
        )
        return Draft(manifest, ())
    captions = plan_captions(
        config.caption_patterns,
        columns=Columns(config.caption_column, tuple(config.extra_columns)),
        duplicates=config.duplicates,
        limit=config.limit,
        num_captions_per_shard=config.num_captions_per_shard,
        folder=folder,
    )
    settings = _build_settings(config, model, captions.sha256, captions.num_captions)
    manifest = DatasetManifest(
        schema_version=SCHEMA_VERSION,
        settings=settings,
        settings_hash=hash_settings(settings),
        captions_source=_describe_source(config, captions),
        caption_files=tuple(_describe_file(path) for path in captions.files),
        extra_columns=dict(captions.extra_columns),
        num_captions=captions.num_captions,
        num_images_per_caption=config.num_images_per_caption,
        num_captions_per_shard=config.num_captions_per_shard,
        num_shards=-(-captions.num_captions // config.num_captions_per_shard),
        fingerprint=dict(fingerprint),
        note=config.note,
    )
    return Draft(manifest, captions.files)


def check_draft(store: Store, draft: Draft, extend: bool) -> None:
    """Refuses to mix two plans in one folder.

    Raises:
        ValueError: The folder holds files of others, or a dataset of another plan (the values that differ are
            named), or none that could be extended.
    """
    if not store.exists(MANIFEST_NAME):
        if taken := [name for name in store.list() if name.endswith(_OWN_FILES)]:
            raise ValueError(
                f"output {store.url} holds {taken[0]} but no {MANIFEST_NAME}: not a dataset to go on with"
            )
        if extend:
            raise ValueError(f"output {store.url} holds no dataset to extend")
        return
    old = read_manifest(store)
    if old.settings_hash == draft.manifest.settings_hash or not _is_begun(store):
        return
    before, now = _flatten(without_names(old.settings)), _flatten(without_names(draft.manifest.settings))
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    differences = [f"{name} is {before.get(name)!r} there and {now.get(name)!r} here" for name in names]
    message = f"{store.name_of(MANIFEST_NAME)} is of another plan: {'; '.join(differences)}"
    if names != ["num_images_per_caption"]:
        raise ValueError(message)
    if now["num_images_per_caption"] < before["num_images_per_caption"]:
        raise ValueError(f"{message}; a dataset can be extended, never cut")
    if not extend:
        raise ValueError(f"{message}; --extend makes the missing images alone")


def freeze_plan(store: Store, draft: Draft, extend: bool) -> Plan:
    """Writes the plan, or joins the one that is there.

    Raises:
        ValueError: As for `check_draft`.
        OSError: It cannot be written.
    """
    check_draft(store, draft, extend)
    for path, entry in zip(draft.caption_files, draft.manifest.caption_files, strict=False):
        store.publish(entry["name"], path)
    if write_manifest(store, draft.manifest):
        return Plan(store, draft.manifest)
    check_draft(store, draft, extend)  # of another job that was first by a moment
    old = read_manifest(store)
    if old.settings_hash == draft.manifest.settings_hash:
        if draft.manifest.note not in ("", old.note):
            say(f"note {draft.manifest.note!r} is left out; the dataset's is {old.note!r}")
        if old.fingerprint == draft.manifest.fingerprint or _is_begun(store):
            return Plan(store, old)
        manifest = dataclasses.replace(old, fingerprint=draft.manifest.fingerprint)
    elif _is_begun(store):
        manifest = dataclasses.replace(
            draft.manifest,
            fingerprint=old.fingerprint,
            extended_from=(old.settings_hash, *old.extended_from),
            note=draft.manifest.note or old.note,
        )
    else:
        say(f"{store.name_of(MANIFEST_NAME)} is replaced: nothing was made by its plan")
        manifest = draft.manifest
        _work_folder(store).clear_all()
    write_manifest(store, manifest, replace=True)
    return Plan(store, manifest)


def _has_same_captions(config: "GenerateConfig", old: DatasetManifest) -> bool:
    """Whether the files' bytes and the way they are read are those of the plan that is there."""
    source = old.captions_source
    if (source["options"], old.num_captions_per_shard) != (_options(config), config.num_captions_per_shard):
        return False
    known = [file["sha256"] for file in source["files"]]
    return None not in known and [file.sha256 for file in digest_sources(config.caption_patterns)] == known


def _build_settings(
    config: "GenerateConfig", model: ModelFiles, captions_sha256: str, num_captions: int
) -> dict[str, Any]:
    sampling = {
        name: value for name, value in asdict(config.generator).items() if name not in _NOT_IN_SETTINGS
    }
    names = {
        "model": model.name,
        "model_identity": model.identity,
        "tiny_vae": _name_of(sampling["tiny_vae"]),
    }
    return {
        "generator": sampling | names,
        "captions_sha256": captions_sha256,
        "num_captions": num_captions,
        **{name: getattr(config, name) for name in _SETTINGS},
    }


def _name_of(model: str | None) -> str | None:
    """A model without the folder that it lies in; a hub id as it is."""
    return Path(model).name if model is not None and Path(model).exists() else model


def _describe_source(config: "GenerateConfig", captions: CaptionPlan) -> dict[str, Any]:
    return {
        "files": [_describe_input(file) for file in captions.sources],
        "options": _options(config),
        "num_rows_read": captions.num_rows,
        "num_empty_dropped": captions.num_empty,
        "num_duplicates": captions.num_duplicates,
    }


def _options(config: "GenerateConfig") -> dict[str, Any]:
    """How the caption files are read."""
    return {
        "caption_column": config.caption_column,
        "extra_columns": list(config.extra_columns),
        "duplicates": config.duplicates,
        "limit": config.limit,
    }


def _describe_input(file: SourceFile) -> dict[str, Any]:
    """A caption file without the folder that it lay in."""
    return {**asdict(file), "name": PurePosixPath(file.name).name}


def _describe_file(path: Path) -> dict[str, Any]:
    """Where a file of planned captions goes: a name that no other content has."""
    num_bytes, sha256 = Store(path.parent).digest(path.name)
    name = f"captions/{path.stem}-{sha256[:12]}{path.suffix}"
    return {"name": name, "num_bytes": num_bytes, "sha256": sha256}


def _is_begun(store: Store) -> bool:
    """Whether an image was made, or spilled, in this folder, or a worker is about to."""
    return has_images(store) or _work_folder(store).has_living_workers()


def _work_folder(store: Store) -> WorkFolder:
    return WorkFolder(store, Worker.of_this_process(), _LEASE_SECONDS)


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(
            _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
