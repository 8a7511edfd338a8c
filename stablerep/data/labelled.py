"""Plain WebDataset tars of labelled images, `{key}.jpg` + `{key}.cls`: for supervised baselines.

Nothing in them is run: labels are decimal integers, images are decoded by an allow-list, and a member of any
other kind than those below is refused, as is one that is no regular file.
"""

import hashlib
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from data_gen.shards import MAX_IMAGE_MEMBER_BYTES, ShardError, Store
from stablerep.data.sources import CacheConfig, ShardedDataset, ShardTable

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IGNORED_SUFFIXES = ("json", "txt")
MAX_LABEL_BYTES = 20


@dataclass(frozen=True)
class LabelledTar:
    """What one tar holds.

    Shapes:
        ids: int64 [n], 63 bits of the sha256 of the tar's name and the key: keys may be those of other tars.
        labels: int64 [n], class indices.
        offsets: int64 [n], of each image in the tar, bytes.
        num_bytes: int64 [n], size of each image.
    """

    name: str
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]


def list_tars(store: Store) -> list[str]:
    """Names of the tars in a folder."""
    return [name for name in store.list() if name.endswith(".tar")]


def read_labelled_tar(store: Store, name: str) -> LabelledTar:
    """Reads names, labels and places, not the images.

    Raises:
        ShardError: The tar is torn, or holds what is not allowed; names the member.
        OSError: It cannot be read.
    """
    where = store.name_of(name)
    with store.open(name) as file:
        samples = _read_samples(file, where)
    rows = []
    for key, sample in samples.items():
        if sample.keys() != {"cls", "image"}:
            raise ShardError(
                f"{where}: sample {key!r} has no {'cls' if 'image' in sample else 'image'} member"
            )
        digest = int(hashlib.sha256(f"{name}/{key}".encode()).hexdigest()[:16], 16) >> 1
        rows.append((digest, sample["cls"][0], *sample["image"]))
    if not rows:
        raise ShardError(f"{where}: holds no samples")
    ids, labels, offsets, num_bytes = np.array(rows, dtype=np.int64).T
    return LabelledTar(name, ids, labels, offsets, num_bytes)


def _read_samples(file: IO[bytes], where: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """By key: `image` (offset, size) and `cls` (label,)."""
    samples: dict[str, dict[str, tuple[int, ...]]] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isdir():
                    _add_member(samples, member, file, where)
        # tarfile takes a torn header for the end: two blocks of zeros have to follow the last member.
        file.seek(end)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise ShardError(f"{where}: the tar is truncated or damaged at byte {end}")
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{where}: not a readable, uncompressed tar ({error})") from error
    return samples


def _add_member(
    samples: dict[str, dict[str, tuple[int, ...]]], member: tarfile.TarInfo, file: IO[bytes], where: str
) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    suffix = suffix.lower()
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise ShardError(f"{where}: member {member.name} is not a regular file")
    if "." in suffix:
        raise ShardError(
            f"{where}: member {member.name} has more than one dot: the format takes {stem!r} for its key, so "
            "several samples would be one"
        )
    if suffix in IGNORED_SUFFIXES:
        return
    key = f"{folder}/{stem}" if folder else stem
    if suffix in IMAGE_SUFFIXES:
        kind, max_bytes = "image", MAX_IMAGE_MEMBER_BYTES
    elif suffix == "cls":
        kind, max_bytes = "cls", MAX_LABEL_BYTES
    else:
        allowed = ", ".join((*IMAGE_SUFFIXES, "cls", *IGNORED_SUFFIXES))
        raise ShardError(f"{where}: members must be {allowed}, got {member.name}")
    if not 0 < member.size <= max_bytes:
        raise ShardError(f"{where}: member {member.name} must have 1 to {max_bytes} bytes, got {member.size}")
    sample = samples.setdefault(key, {})
    if kind in sample:
        raise ShardError(f"{where}: sample {key!r} has two members for its {kind}: {member.name}")
    if kind == "image":
        sample[kind] = (member.offset_data, member.size)
        return
    file.seek(member.offset_data)
    text = file.read(member.size)
    if re.fullmatch(rb"\s*\d{1,18}\s*", text) is None:
        raise ShardError(f"{where}: label {member.name} must be an integer >= 0, got {text!r}")
    sample[kind] = (int(text),)


class LabelledDataset(ShardedDataset):
    """Images with classes; images of a class are each other's positives.

    Nothing is recorded that the tars could be compared with.

    Args:
        store: The folder.
        tars: What they hold, one or more.
        cache: What is kept on this machine; whole shards are not, for want of their digests.
    """

    has_classes = True

    def __init__(self, store: Store, tars: Sequence[LabelledTar], cache: CacheConfig) -> None:
        self.tars = list(tars)
        if cache.folder and not store.is_local:
            raise ValueError(
                f"cache.folder cannot hold {store.url}: no digests are recorded that copies would have"
            )
        super().__init__(store, [tar.name for tar in tars], [len(tar.ids) for tar in tars], 1, cache)

    @property
    def identity(self) -> str:
        """Of the tars' names, keys, labels and places."""
        digest = hashlib.sha256()
        for tar in self.tars:
            digest.update(tar.name.encode())
            for values in (tar.ids, tar.labels, tar.offsets, tar.num_bytes):
                digest.update(values.tobytes())
        return digest.hexdigest()

    def _recorded(self, shard: int) -> None:
        return None

    def _read_table(self, shard: int) -> ShardTable:
        tar = self.tars[shard]
        return ShardTable(
            ids=tar.ids,
            labels=tar.labels,
            occurrences=np.zeros_like(tar.ids),
            keys=None,
            captions=None,
            offsets=tar.offsets[:, None],
            num_bytes=tar.num_bytes[:, None],
            digests=None,
        )
