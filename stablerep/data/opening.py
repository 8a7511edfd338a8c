"""A dataset from its folder: rank 0 looks, the others take its word, so that all have the same."""

import logging
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TypeVar

from data_gen.shards import MANIFEST_NAME, Shard, Store, list_complete_shards, open_store, read_manifest
from stablerep import distributed
from stablerep.data.labelled import LabelledDataset, LabelledTar, list_tars, read_labelled_tar
from stablerep.data.sources import CacheConfig, GeneratedDataset, ShardedDataset

logger = logging.getLogger(__name__)
_Value = TypeVar("_Value")


def open_dataset(root: str, cache: CacheConfig) -> ShardedDataset:
    """A dataset of `stablerep generate`, or a folder of plain WebDataset tars with labels.

    Raises:
        FileNotFoundError: If root holds neither.
        ValueError: If it has no complete shard, images of unequal size, or a tar that is not allowed; also
            on the other ranks.
    """
    store = open_store(root)
    names = _on_first_rank(lambda: [] if store.exists(MANIFEST_NAME) else list_tars(store))
    dataset: ShardedDataset
    if names:
        dataset = LabelledDataset(store, _read_tars(store, names), cache)
    else:
        dataset = GeneratedDataset(_on_first_rank(lambda: _list_shards(store)), cache)
    own = range(len(dataset.tar_names))[distributed.rank() :: distributed.world_size()]
    _together(lambda: dataset.check_tables(own))
    return dataset


def _list_shards(store: Store) -> list[Shard]:
    manifest, shards = read_manifest(store), list_complete_shards(store)
    if len(shards) < manifest.num_shards and shards:
        logger.warning(
            "%s: %d of %d planned shards are not complete and are left out",
            *(store.url, manifest.num_shards - len(shards), manifest.num_shards),
        )
    if not (shards := [shard for shard in shards if shard.num_samples]):
        raise ValueError(f"{store.url} holds no complete shard (of {manifest.num_shards} planned)")
    return shards


def _read_tars(store: Store, names: list[str]) -> list[LabelledTar]:
    """Each rank reads its part."""
    own = names[distributed.rank() :: distributed.world_size()]
    parts = distributed.all_gather_objects(
        _together(lambda: [read_labelled_tar(store, name) for name in own])
    )
    tars = {tar.name: tar for part in parts for tar in part}
    return [tars[name] for name in sorted(tars, key=PurePosixPath)]


def _on_first_rank(read: Callable[[], _Value]) -> _Value:
    value = _together(lambda: read() if distributed.rank() == 0 else None)
    found: _Value = distributed.all_gather_objects(value)[0]
    return found


def _together(read: Callable[[], _Value]) -> _Value:
    """What it returns; an error on one rank is raised on all."""
    value, error = None, None
    try:
        value = read()
    except (ValueError, OSError) as caught:
        error = caught
    distributed.raise_together(error)
    return value  # type: ignore[return-value]  # where it is None by error, that has been raised
