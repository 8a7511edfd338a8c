"""What the bytes of a split are, without decoding them: the data's part of a cache's key.

An image is what its bytes are, whatever its name or time says, so each is hashed; that takes a small part of
the time of decoding it. As in git's index, a file that was hashed is not read again while its size, times and
inode stay the same. What the set itself records of an image's bytes is taken as it is, since the image is
compared with it when it is read.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stablerep.evaluation.cache.files import DIGESTS_FOLDER, temporary_name
from stablerep.evaluation.features import digest_images
from stablerep.evaluation.sets.labelled import FileRange, LabelledImage, LabelledSet

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        *((name, pa.int64()) for name in ("offset_bytes", "num_bytes")),
        *((name, pa.int64()) for name in ("inode", "size", "mtime_ns", "ctime_ns")),
        ("path", pa.string()),
        ("sha256", pa.string()),
    ]
)
_SETTLED_NANOSECONDS = 2 * 10**9
_NUM_THREADS = 8
_NUM_IMAGES_PER_TASK = 64


class _Place(NamedTuple):
    path: str
    offset_bytes: int
    num_bytes: int


class _State(NamedTuple):
    """What of a file stays the same while it does not change."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class KnownDigests:
    """Digests of files' parts that were hashed before.

    Args:
        folder: The cache's folder; None knows nothing and keeps nothing.
        set_name: The labelled set; each has a file of its own.
    """

    def __init__(self, folder: Path | None, set_name: str) -> None:
        self._path: Path | None = None
        self._digests: dict[_Place, tuple[_State, str]] = {}
        self._has_changed = False
        if folder is not None:
            name = hashlib.sha256(os.path.abspath(set_name).encode()).hexdigest()[:32]
            self._path = folder / DIGESTS_FOLDER / f"{name}.parquet"
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            # A flipped bit would make this another set, whose features are computed again.
            rows = pq.read_table(path, schema=_SCHEMA, page_checksum_verification=True).to_pydict()
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged and written anew: %s", path, " ".join(str(error).split()))
            return
        columns = [rows[name] for name in ("path", "offset_bytes", "num_bytes")]
        states = [rows[name] for name in _State._fields]
        for place, state, sha256 in zip(
            zip(*columns, strict=True), zip(*states, strict=True), rows["sha256"], strict=True
        ):
            self._digests[_Place(*place)] = (_State(*state), sha256)

    def find(self, place: _Place, state: _State) -> str:
        """The digest, "" where it is not known or the file has changed."""
        known, sha256 = self._digests.get(place, (None, ""))
        return sha256 if known == state else ""

    def add(self, place: _Place, state: _State, sha256: str) -> None:
        """Remembers a digest, unless the file is so new that it could change within one tick of its clock."""
        if max(state.mtime_ns, state.ctime_ns) > time.time_ns() - _SETTLED_NANOSECONDS:
            return
        self._digests[place] = (state, sha256)
        self._has_changed = True

    def save(self) -> None:
        """Writes them, if there are new ones; a folder that cannot be written is a warning."""
        if self._path is None or not self._has_changed:
            return
        columns: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
        for place, (state, sha256) in self._digests.items():
            for name, value in {**place._asdict(), **state._asdict(), "sha256": sha256}.items():
                columns[name].append(value)
        temporary = self._path.with_name(temporary_name(self._path.name))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            table = pa.table(columns, schema=_SCHEMA)
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
            os.replace(temporary, self._path)
        except OSError as error:
            logger.warning("digests of images cannot be kept in %s: %s", self._path, error)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._has_changed = False


def fingerprint_set(dataset: LabelledSet, folder: Path | None) -> Mapping[str, str]:
    """What the readable bytes, names and labels of each split are, 64 hex digits each.

    It is the digest that the split's features will have.

    Args:
        dataset: The set.
        folder: The cache's folder, where digests are remembered; None remembers nothing.
    """
    known = KnownDigests(folder, dataset.name)
    fingerprints = {
        split: digest_images(images, digest_contents(images, known, f"{split}: hashing"))
        for split, images in dataset.splits.items()
    }
    known.save()
    return fingerprints


def digest_contents(images: Sequence[LabelledImage], known: KnownDigests, description: str) -> list[str]:
    """SHA-256 of what each image is decoded from; "" for one that cannot be read, as features have it.

    Args:
        images: The images.
        known: What need not be read again; what is read is added.
        description: What the progress bar is called.
    """
    digests = [image.content.recorded_sha256 for image in images]
    states: dict[str, _State | None] = {}
    unknown = []
    for index, image in enumerate(images):
        if digests[index]:
            continue
        if isinstance(image.content, FileRange):
            path = image.content.path
            if path not in states:
                states[path] = _read_state(path)
            if (state := states[path]) is not None:
                digests[index] = known.find(_place(image.content), state)
        if not digests[index]:
            unknown.append(index)
    tasks = [unknown[i : i + _NUM_IMAGES_PER_TASK] for i in range(0, len(unknown), _NUM_IMAGES_PER_TASK)]
    with (
        ThreadPoolExecutor(_NUM_THREADS) as executor,
        tqdm(total=len(unknown), desc=description, unit=" images", leave=False) as progress,
    ):
        found = executor.map(lambda task: [_hash(images[index]) for index in task], tasks)
        for task, parts in zip(tasks, found, strict=True):
            progress.update(len(task))
            for index, sha256 in zip(task, parts, strict=True):
                digests[index] = sha256
    _remember(images, unknown, digests, states, known)
    return digests


def _remember(
    images: Sequence[LabelledImage],
    unknown: Sequence[int],
    digests: Sequence[str],
    states: Mapping[str, _State | None],
    known: KnownDigests,
) -> None:
    """Adds what was read from files that did not change meanwhile."""
    unchanged: dict[str, bool] = {}
    for index in unknown:
        content = images[index].content
        if not (digests[index] and isinstance(content, FileRange)):
            continue
        state = states[content.path]
        if content.path not in unchanged:
            unchanged[content.path] = state is not None and _read_state(content.path) == state
        if unchanged[content.path] and state is not None:
            known.add(_place(content), state, digests[index])


def _place(content: FileRange) -> _Place:
    return _Place(os.path.abspath(content.path), content.offset_bytes, content.num_bytes)


def _read_state(path: str) -> _State | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _State(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _hash(image: LabelledImage) -> str:
    try:
        return hashlib.sha256(image.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return ""  # extraction reads it again, counts it and says why
