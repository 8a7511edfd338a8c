"""Laws of the dataset card, checked with `datasets` and huggingface_hub; and a dataset to hold them for."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from data_gen.captions import caption_id
from data_gen.card import REMARKS_LINE, build_card, write_card
from data_gen.diffusion.generator import DiffusionGenerator
from data_gen.job.generate import GenerateConfig, run
from data_gen.job.worker import WorkConfig
from data_gen.job.worker import run as run_worker
from data_gen.repair import RepairConfig
from data_gen.repair import run as repair
from data_gen.shard_writer import ShardWriter, write_manifest
from data_gen.shards import (
    SCHEMA_VERSION,
    DatasetManifest,
    Sample,
    Shard,
    ShardError,
    hash_settings,
    list_complete_shards,
)
from data_gen.storage import Store
from tests.data_gen.conftest import CAPTIONS

NUM_IMAGES, NUM_CAPTIONS_PER_SHARD = 2, 6


class SmallDataset(NamedTuple):
    """A dataset of random images, and what was written to it."""

    store: Store
    manifest: DatasetManifest
    samples: list[Sample]

    @property
    def shards(self) -> list[Shard]:
        return list_complete_shards(self.store)

    @property
    def path(self) -> Path:
        return self.store.local_path


def make_dataset(
    root: str | Path,
    extension: str = "jpg",
    extra_columns: Mapping[str, str] | None = None,
    num_captions: int = 8,
    num_failed: int = 0,
    **changes: Any,
) -> SmallDataset:
    """Two shards (6 + 2 captions); the last `num_failed` captions have no images."""
    settings = {
        "generator": {"model": "tiny", "model_identity": "a1b2", "guidance_scale": {"low": 2.0, "high": 8.0}},
        "seed": 3,
        "num_captions": num_captions,
        "image_format": extension,
        "extra_columns": dict(extra_columns or {}),
    }
    captions_file = io.BytesIO()
    pq.write_table(pa.table({"text": ["caption 0"]}), captions_file)
    manifest = DatasetManifest(
        schema_version=SCHEMA_VERSION,
        settings=settings,
        settings_hash=hash_settings(settings),
        captions_source={"sources": [{"name": "captions.csv", "sha256": "ab" * 32}], "num_dropped": 1},
        caption_files=(
            {
                "name": "captions/00000.parquet",
                "num_bytes": captions_file.tell(),
                "sha256": hashlib.sha256(captions_file.getvalue()).hexdigest(),
            },
        ),
        extra_columns=extra_columns or {},
        num_captions=num_captions,
        num_images_per_caption=NUM_IMAGES,
        num_captions_per_shard=NUM_CAPTIONS_PER_SHARD,
        num_shards=-(-num_captions // NUM_CAPTIONS_PER_SHARD),
        fingerprint={"torch": "2.10"},
        **changes,
    )
    store = Store(root)
    store.publish("captions/00000.parquet", captions_file.getvalue())
    write_manifest(store, manifest)
    samples = [
        make_sample(index, extension, manifest.extra_columns) for index in range(num_captions - num_failed)
    ]
    for shard_index in range(manifest.num_shards):
        write_shard(store, manifest, shard_index, samples)
    return SmallDataset(store, manifest, samples)


def write_shard(store: Store, manifest: DatasetManifest, shard_index: int, samples: list[Sample]) -> None:
    first, num_planned = shard_index * NUM_CAPTIONS_PER_SHARD, manifest.num_captions_in_shard(shard_index)
    with ShardWriter(store, manifest, shard_index) as writer:
        for index in range(first, first + num_planned):
            if index < len(samples):
                writer.write(samples[index])
            else:
                text = f"caption {index}"
                writer.fail(caption_id(text), text, "safety_checker" if index % 2 else "non_finite")
        writer.publish(num_planned, seconds=1.0)


def make_sample(index: int, extension: str, extra_columns: Mapping[str, str]) -> Sample:
    """The first shard's extra values of type string are missing."""
    rng = np.random.default_rng(index)
    text = f"caption {index}, größer"
    values: dict[str, Any] = {
        "string": f"label {index}" if index >= NUM_CAPTIONS_PER_SHARD else None,
        "int64": index,
    }
    values |= {"double": index / 4, "bool": index % 2 == 0}
    return Sample(
        key=caption_id(text),
        caption_id=caption_id(text),
        caption=text,
        images=tuple(encode(rng, extension) for _ in range(NUM_IMAGES)),
        image_extension=extension,
        image_seeds=tuple(f"{index:016x}{image:016x}" for image in range(NUM_IMAGES)),
        width=16,
        height=12,
        guidance_scales=(2.0, 7.5),
        fingerprints=("a" * 12, "b" * 12),
        extra={name: values[kind] for name, kind in extra_columns.items()},
    )


def encode(rng: np.random.Generator, extension: str) -> bytes:
    buffer = io.BytesIO()
    image_format = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(buffer, format=image_format)
    return buffer.getvalue()


def write_card_of(dataset: SmallDataset) -> str:
    write_card(dataset.store, dataset.manifest, dataset.shards)
    return dataset.store.read("README.md").decode()


def read_header(card: str) -> dict[str, Any]:
    header: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return header


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_the_folder_and_a_value_that_the_first_samples_lack(
    tmp_path: Path, streaming: bool
) -> None:
    datasets = pytest.importorskip("datasets", reason="the card is for it; not installed")
    dataset = make_dataset(tmp_path / "dataset", extra_columns={"label": "string", "score": "double"})
    write_card_of(dataset)
    loaded = datasets.load_dataset(
        str(dataset.path), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    for index in range(NUM_IMAGES):
        loaded = loaded.cast_column(f"{index}.jpg", datasets.Image(decode=False))
    rows = list(loaded)
    assert [(row["txt"], row["0.jpg"]["bytes"], row["1.jpg"]["bytes"]) for row in rows] == [
        (sample.caption, *sample.images) for sample in dataset.samples
    ]
    assert [row["json"]["extra"] for row in rows] == [sample.extra for sample in dataset.samples]
    assert [row["json"]["guidance_scales"] for row in rows] == [[2.0, 7.5]] * len(rows)


def test_the_header_has_the_columns_that_datasets_finds_in_the_tars(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the card is for it; not installed")
    dataset = make_dataset(
        tmp_path / "dataset", extra_columns={"score": "double", "good": "bool", "n": "int64"}
    )
    write_card_of(dataset)
    cache = str(tmp_path / "cache")
    stated = datasets.load_dataset(str(dataset.path), split="train", streaming=True, cache_dir=cache)
    tars = [str(shard.path) for shard in dataset.shards]
    found = datasets.load_dataset(
        "webdataset", data_files=tars, split="train", streaming=True, cache_dir=cache
    )
    assert stated.features == found.features


def test_the_cards_pattern_finds_the_rows_and_not_the_captions(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the card is for it; not installed")
    dataset = make_dataset(tmp_path / "dataset")
    card = write_card_of(dataset)
    assert 'data_files="DIR/[0-9]*.parquet"' in card
    rows = datasets.load_dataset(
        "parquet",
        data_files=f"{dataset.path}/[0-9]*.parquet",
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows["sha256"][:] == [
        hashlib.sha256(image).hexdigest() for sample in dataset.samples for image in sample.images
    ]


def test_the_hubs_library_reads_the_header(tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard

    card = write_card_of(make_dataset(tmp_path / "dataset"))
    data = DatasetCard(card, ignore_metadata_errors=False).data.to_dict()
    assert data["size_categories"] == ["n<1K"]
    assert data["configs"] == [{"config_name": "default", "data_files": "*.tar"}]
    assert data["license"] == "unknown"


def test_the_card_tells_the_provenance(tmp_path: Path) -> None:
    dataset = make_dataset(
        tmp_path / "dataset",
        extra_columns={"label": "string"},
        num_failed=3,
        note="Images of a model that is not finished.\nDo not publish.",
        extended_from=("ab" * 32,),
    )
    card = write_card_of(dataset)
    for expected in (
        "> Images of a model that is not finished.\n> Do not publish.\n",
        "| captions with images | 5 |",
        "| captions without images | 3 |",
        "| - safety_checker | 2 |",
        "| - non_finite | 1 |",
        '| model_identity | `"a1b2"` |',
        "| guidance_scale.high | `8.0` |",
        '| sources.0.name | `"captions.csv"` |',
        '| torch | `"2.10"` |',
        "seed: `3`",
        dataset.manifest.settings_hash,
        "extended from settings `" + "ab" * 32,
        "Extra columns, taken over from the captions: `label`",
        "Nobody has stated a licence",
    ):
        assert expected in card, expected


def test_the_card_of_400_000_shards_and_10_000_caption_files_stays_small(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    sources = [{"name": f"{index}.csv", "sha256": "ab" * 32} for index in range(10_000)]
    manifest = DatasetManifest(**{**vars(dataset.manifest), "captions_source": {"sources": sources}})
    card = build_card("name", manifest, dataset.shards[:1] * 400_000, {}, {})
    assert len(card) < 10_000
    assert "9990 more in dataset.json" in card


def test_what_a_person_wrote_is_kept(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    card = write_card_of(dataset)
    edited = card.replace("license: unknown\n", "license: cc-by-4.0\nlanguage:\n- de\n") + "A remark.\n"
    dataset.store.replace("README.md", edited.encode())
    assert write_card_of(dataset) == write_card_of(dataset)
    card = write_card_of(dataset)
    assert (read_header(card)["license"], read_header(card)["language"]) == ("cc-by-4.0", ["de"])
    assert card.endswith(f"{REMARKS_LINE}\nA remark.\n")
    assert "Nobody has stated a licence" not in card


def state_by_hand(readme: Path) -> None:
    """What a person does with an editor: a licence, a language, a remark."""
    card = readme.read_text()
    assert "license: unknown\n" in card
    readme.write_text(
        card.replace("license: unknown\n", "license: cc-by-4.0\nlanguage:\n- de\n") + "A remark.\n"
    )


def assert_is_kept(readme: Path) -> None:
    header = read_header(readme.read_text())
    assert (header["license"], header["language"]) == ("cc-by-4.0", ["de"])
    assert readme.read_text().endswith(f"{REMARKS_LINE}\nA remark.\n")
    assert (readme.parent / "SHA256SUMS").exists()


def flip_a_bit(root: Path) -> None:
    content = bytearray((root / "00001.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (root / "00001.tar").write_bytes(content)
    assert repair(RepairConfig(str(root))) == 75


@pytest.mark.parametrize(
    ("disturb", "changes"),
    [
        (lambda root: None, {"num_images_per_caption": 5, "extend": True}),
        (lambda root: (root / "00001_stats.json").unlink(), {}),
        (flip_a_bit, {}),
    ],
    ids=["extended", "a missing shard", "repaired"],
)
def test_a_job_that_goes_on_keeps_what_a_person_wrote(
    make_config: Callable[..., GenerateConfig],
    dataset_copy: Path,
    disturb: Callable[[Path], None],
    changes: dict[str, Any],
) -> None:
    state_by_hand(dataset_copy / "README.md")
    disturb(dataset_copy)
    assert run(make_config(**changes)) == 0
    assert_is_kept(dataset_copy / "README.md")
    assert (
        f"{changes.get('num_images_per_caption', 3)} images a caption"
        in (dataset_copy / "README.md").read_text()
    )


def test_a_job_that_tries_failed_captions_again_keeps_what_a_person_wrote(
    make_config: Callable[..., GenerateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    run_batch = DiffusionGenerator._run

    def flag_the_first(self: DiffusionGenerator, jobs: Any) -> Any:
        images, _ = run_batch(self, jobs)
        return images, ["safety_checker" if job.request.text == CAPTIONS[0] else None for job in jobs]

    with monkeypatch.context() as context:
        context.setattr(DiffusionGenerator, "_run", flag_the_first)
        assert run(config) == 1
    readme = Path(config.output) / "README.md"
    assert "| captions without images | 1 |" in readme.read_text()
    state_by_hand(readme)
    assert run(dataclasses.replace(config, retry_failed=True)) == 0
    assert_is_kept(readme)
    assert "| captions without images | 0 |" in readme.read_text()


def test_a_worker_writes_a_card_anew_that_is_out_of_date(dataset_copy: Path, tiny_pipeline: Path) -> None:
    readme = dataset_copy / "README.md"
    readme.write_text(readme.read_text().replace("15 images generated", "3 images generated"))
    state_by_hand(readme)
    (dataset_copy / "SHA256SUMS").unlink()
    assert run_worker(WorkConfig(str(dataset_copy), model=str(tiny_pipeline), device="cpu")) == 0
    assert_is_kept(readme)
    assert "15 images generated" in readme.read_text()


@pytest.mark.parametrize("name", ["dataset", "x---", "--- x"])
@pytest.mark.parametrize(("newline", "start"), [("\n", ""), ("\r\n", ""), ("\r\n", "\ufeff")])
def test_a_card_is_read_as_any_editor_saves_it(tmp_path: Path, name: str, newline: str, start: str) -> None:
    from huggingface_hub import DatasetCard

    dataset = make_dataset(tmp_path / name)
    write_card_of(dataset)
    state_by_hand(dataset.path / "README.md")
    edited = (dataset.path / "README.md").read_text()
    (dataset.path / "README.md").write_bytes((start + edited.replace("\n", newline)).encode())
    card = write_card_of(dataset)
    assert card.endswith(f"{REMARKS_LINE}\nA remark.\n")
    header = DatasetCard(card).data.to_dict()
    assert (header["license"], header["language"], header["pretty_name"]) == ("cc-by-4.0", ["de"], name)
    assert write_card_of(dataset) == card


@pytest.mark.parametrize("header", ["license: [\n---\n", "license: mit\n", "- a list\n---\n"])
def test_a_header_that_cannot_be_kept_is_said(
    tmp_path: Path, header: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    card = write_card_of(dataset)
    dataset.store.replace("README.md", f"---\n{header}nothing".encode())
    assert write_card_of(dataset) == card
    assert "README.md: its header is not kept" in capsys.readouterr().err


def test_a_marker_that_does_not_tell_its_failures_is_named(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", num_failed=1)
    marker = dataset.path / "00001_stats.json"
    marker.write_text(marker.read_text().replace("failures_by_reason", "other"))
    with pytest.raises(ShardError, match="00001_stats.json: not a completion marker"):
        write_card_of(dataset)


def test_a_value_cannot_leave_its_cell(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    source = {"name": "a | b\n# c `d`"}
    manifest = DatasetManifest(**{**vars(dataset.manifest), "captions_source": source})
    line = next(line for line in build_card("name", manifest, [], {}, {}).splitlines() if "a \\| b" in line)
    assert line == '| name | `"a \\| b\\n# c ´d´"` |'


def test_a_card_is_written_to_a_url(tmp_path: Path) -> None:
    local, remote = make_dataset(tmp_path / "cards"), make_dataset("memory://test-card/cards")
    assert write_card_of(local) == write_card_of(remote)
    for name in ("croissant.json", "SHA256SUMS"):
        assert local.store.read(name) == remote.store.read(name)
