import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen.shards import ShardError, Store, list_complete_shards, read_samples
from stablerep.data.opening import open_dataset
from stablerep.data.sources import (
    ON_THIS_MACHINE,
    CacheConfig,
    Extent,
    GeneratedDataset,
    MalformedDataError,
    ShardTable,
    _group,
)
from tests.stablerep.datasets import write_dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "shards", [5, 7], num_images=3)
    return tmp_path / "shards"


@pytest.fixture
def remote(root: Path) -> Iterator[str]:
    """The same in an object store."""
    store = Store("memory://remote/shards")
    for path in sorted(root.iterdir()):
        store.replace(path.name, path.read_bytes())
    yield store.url
    fsspec.filesystem("memory").store.clear()


def read_all(dataset: GeneratedDataset) -> list[tuple[str, int, list[bytes | OSError]]]:
    found = []
    for shard in range(2):
        table = dataset.table(shard)
        for sample in range(dataset.num_samples[shard]):
            extents = [table.extent(shard, sample, image) for image in range(3)]
            found.append(
                (table.captions[sample].as_py(), int(table.ids[sample]), dataset.read(extents[::-1])[::-1])
            )
    return found


def expected(root: Path) -> list[tuple[str, int, list[bytes]]]:
    samples = [sample for shard in list_complete_shards(root) for sample in read_samples(shard)]
    return [(s.caption, int(s.caption_id[:16], 16) >> 1, list(s.images)) for s in samples]


def open_generated(root: Path | str, cache: CacheConfig = ON_THIS_MACHINE) -> GeneratedDataset:
    dataset = open_dataset(str(root), cache)
    assert isinstance(dataset, GeneratedDataset)
    return dataset


def test_images_are_those_of_the_samples_on_disk(root: Path) -> None:
    assert read_all(open_generated(root)) == expected(root)


def test_images_are_those_of_the_samples_in_an_object_store(root: Path, remote: str) -> None:
    assert read_all(open_generated(remote)) == expected(root)


def test_images_are_those_of_the_samples_in_the_cache(root: Path, remote: str, tmp_path: Path) -> None:
    dataset = open_generated(remote, CacheConfig(str(tmp_path / "cache")))
    assert read_all(dataset) == expected(root)
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 2
    for name in ("00000.tar", "00000.parquet", "00001.parquet"):
        fsspec.filesystem("memory").store.pop(f"/remote/shards/{name}")
    dataset._forget()  # as another process
    assert read_all(dataset) == expected(root)


def test_damaged_copy_in_the_cache_is_replaced(root: Path, remote: str, tmp_path: Path) -> None:
    cache = CacheConfig(str(tmp_path / "cache"))
    read_all(open_generated(remote, cache))
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert read_all(open_generated(remote, cache)) == expected(root)


def test_cache_for_one_shard_at_a_time_still_gives_every_image(
    root: Path, remote: str, tmp_path: Path
) -> None:
    largest = max((root / name).stat().st_size for name in ("00000.tar", "00001.tar"))
    dataset = open_generated(remote, CacheConfig(str(tmp_path / "cache"), max_bytes=largest))
    dataset.tables([0, 1])
    assert read_all(dataset) == expected(root)


def test_dataset_reads_on_in_another_process(root: Path) -> None:
    dataset = open_generated(root)
    read_all(dataset)
    assert read_all(pickle.loads(pickle.dumps(dataset))) == expected(root)


def test_few_tables_are_kept(root: Path) -> None:
    dataset = open_generated(root)
    dataset.num_tables_kept = 1
    assert read_all(dataset) == expected(root)
    assert len(dataset._tables) == 1


def test_changed_image_in_an_object_store_is_not_handed_out(root: Path, remote: str) -> None:
    dataset = open_generated(remote)
    extent = dataset.table(0).extent(0, 2, 1)
    content = bytearray((root / "00000.tar").read_bytes())
    content[extent.offset + 100] ^= 1
    Store(remote).replace("00000.tar", bytes(content))
    (found,) = dataset.read([extent])
    assert isinstance(found, OSError)
    assert "differs from its sha256" in str(found)


def test_image_beyond_a_torn_end_is_an_error_of_its_own(root: Path) -> None:
    dataset = open_generated(root)
    extents = [dataset.table(0).extent(0, sample, 0) for sample in (0, 4)]
    with (root / "00000.tar").open("r+b") as file:
        file.truncate(extents[1].offset + 10)
    first, last = dataset.read(extents)
    assert isinstance(first, bytes)
    assert isinstance(last, OSError)
    assert "10 bytes at" in str(last)


def test_neighbours_are_read_in_one_request() -> None:
    extents = [Extent(0, 0, 100, ""), Extent(1, 500, 10, ""), Extent(0, 10**6, 5, ""), Extent(0, 150, 50, "")]
    assert _group(extents, [0, 3, 2, 1]) == [[0, 3], [2], [1]]


def test_request_has_a_bound() -> None:
    extents = [Extent(0, place * (3 << 20), 3 << 20, "") for place in range(5)]
    assert _group(extents, [0, 1, 2, 3, 4]) == [[0, 1], [2, 3], [4]]


def rewrite_table(root: Path, shard: str, change) -> None:  # type: ignore[no-untyped-def]
    """Writes a side-car anew, with its marker."""
    table = change(pq.read_table(root / f"{shard}.parquet"))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    (root / f"{shard}.parquet").write_bytes(buffer.getvalue())
    marker = root / f"{shard}_stats.json"
    stats = json.loads(marker.read_text())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    stats["parquet"] = {"num_bytes": len(buffer.getvalue()), "sha256": digest}
    marker.write_text(json.dumps(stats))


def replace_column(table: pa.Table, name: str, values: list[object]) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def set_column(name: str, row: int, value: object):  # type: ignore[no-untyped-def]
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        return replace_column(table, name, values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["caption_id"]), "column caption_id is missing"),
        (lambda table: table.drop_columns(["caption"]), "column caption is missing"),
        (set_column("caption_id", 3, None), "a caption_id must be 32 hex digits"),
        (set_column("caption_id", 3, "no hex"), "a caption_id must be 32 hex digits"),
        (set_column("width", 4, 99), "images of unequal size, 16×16 and 99×16"),
        (set_column("tar_offset", 4, -1), "an image lies outside of its tar"),
        (set_column("num_bytes", 4, 10**9), "an image lies outside of its tar"),
        (set_column("index", 4, 0), "expected 5 x 3 rows in order"),
    ],
)
def test_table_that_is_none_of_samples_stops(root: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    rewrite_table(root, "00000", change)
    with pytest.raises(MalformedDataError, match=rf"00000\.parquet: {message}"):
        open_generated(root)


def test_shard_with_images_of_another_size_is_named(root: Path) -> None:
    def enlarge(table: pa.Table) -> pa.Table:
        for name in ("width", "height"):
            table = replace_column(table, name, [64] * table.num_rows)
        return table

    rewrite_table(root, "00001", enlarge)
    with pytest.raises(
        MalformedDataError, match=r"00001\.parquet: images of 64×64 pixels, of 16×16 in .*00000\.parquet"
    ):
        open_generated(root)


def test_later_shard_without_a_column_is_named_before_the_first_step(root: Path) -> None:
    rewrite_table(root, "00001", lambda table: table.drop_columns(["caption_id"]))
    with pytest.raises(MalformedDataError, match=r"00001\.parquet: column caption_id is missing"):
        open_generated(root)


@pytest.mark.parametrize("cut", [0, 3, 1000])
def test_damaged_side_car_of_a_later_shard_is_a_broken_shard(root: Path, cut: int) -> None:
    content = (root / "00001.parquet").read_bytes()
    (root / "00001.parquet").write_bytes(content[:cut] + bytes(len(content) - cut))
    dataset = open_generated(root)
    with pytest.raises(ShardError, match=r"00001\.parquet: sha256 is"):
        dataset.table(1)
    (root / "00001.parquet").write_bytes(content[:cut])
    with pytest.raises(ShardError, match=r"00001\.parquet: has \d+ bytes"):
        open_generated(root).table(1)
    (root / "00001.parquet").unlink()
    with pytest.raises(ShardError, match=r"00001\.parquet: missing"):
        open_generated(root).table(1)


def test_broken_shard_is_told_again_without_being_read_again(root: Path) -> None:
    dataset = open_generated(root)
    content = (root / "00001.tar").read_bytes()
    (root / "00001.tar").write_bytes(content[:-1])
    for _ in range(2):
        with pytest.raises(ShardError, match=r"00001\.tar: has \d+ bytes, expected"):
            dataset.table(1)
        (root / "00001.tar").write_bytes(content)


def test_table_takes_little_memory(root: Path) -> None:
    table = open_generated(root).table(0)
    assert isinstance(table, ShardTable)
    num_bytes = sum(values.nbytes for values in (table.ids, table.labels, table.offsets, table.num_bytes))
    assert num_bytes + table.captions.nbytes < 5 * (2 * 8 + 2 * 3 * 8 + 60)
