"""Laws of croissant.json, checked with mlcroissant, rdflib, pyarrow and `sha256sum`."""

import hashlib
import json
import logging
import math
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_gen.croissant import build_checksums, build_croissant
from tests.data_gen.test_card import SmallDataset, make_dataset, write_card_of

mlcroissant = pytest.importorskip("mlcroissant", reason="the reader of the metadata; not installed")

pytestmark = [
    # rdflib's reader of JSON-LD, through which mlcroissant reads too, uses a class that it has deprecated.
    pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning"),
    # mlcroissant 1.1 calls pandas as it was before 3.1.
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index:DeprecationWarning"),
]

ODD_NAMES = {"label": "string", "shard": "int64", "a b/ü": "double", "url": "bool"}
STATED = {"license": "https://spdx.org/licenses/CC-BY-4.0.html", "datePublished": "2026-01-02"}


def state(dataset: SmallDataset, facts: dict[str, Any]) -> None:
    """What a person does with an editor."""
    document = json.loads(dataset.store.read("croissant.json"))
    dataset.store.replace("croissant.json", json.dumps(document | facts).encode())


def open_croissant(dataset: SmallDataset) -> Any:
    return mlcroissant.Dataset(str(dataset.path / "croissant.json"))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_mlcroissant_misses_only_what_nobody_has_stated(
    tmp_path: Path, extension: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(tmp_path / "dataset", extension, ODD_NAMES, num_failed=1, note="A note.")
    write_card_of(dataset)
    issues = open_croissant(dataset).metadata.ctx.issues
    assert not issues.errors
    assert sorted(warning.split('"')[1] for warning in map(str, issues.warnings)) == [
        "https://schema.org/datePublished",
        "https://schema.org/license",
    ]
    state(dataset, STATED)
    write_card_of(dataset)
    caplog.clear()
    issues = open_croissant(dataset).metadata.ctx.issues
    assert (issues.errors, issues.warnings) == (set(), set())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_stated_facts_are_kept_and_the_rest_is_written_anew(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    write_card_of(dataset)
    facts = STATED | {"creator": {"@type": "sc:Organization", "name": "us"}, "citeAs": "@article{us}"}
    state(dataset, facts | {"description": "not a fact of a person"})
    write_card_of(dataset)
    document = json.loads(dataset.store.read("croissant.json"))
    assert document | facts == document
    assert document["description"].startswith("16 synthetic images")


def test_a_licence_in_the_cards_header_is_in_the_metadata_too(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    card = write_card_of(dataset)
    for license_ in ("cc-by-4.0", "cc0-1.0"):
        stated = card.replace("license: unknown", f"license: {license_}")
        dataset.store.replace("README.md", stated.encode())
        write_card_of(dataset)
        assert open_croissant(dataset).metadata.license == [license_]


def test_mlcroissant_reads_every_column_of_every_row(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", extra_columns=ODD_NAMES)
    write_card_of(dataset)
    read = [
        {name: None if is_missing(value) else value for name, value in record.items()}
        for record in open_croissant(dataset).records("images")
    ]
    expected = []
    for shard in dataset.shards:
        for row in pq.read_table(shard.parquet_path).to_pylist():
            extra = {f"images/extra/{quoted}": row.pop(name) for name, quoted in QUOTED.items()}
            ours = {f"images/{name}": value for name, value in row.items()}
            expected.append({"images/shard": shard.name, **ours, **extra})
    assert read == [
        {name: value.encode() if isinstance(value, str) else value for name, value in row.items()}
        for row in expected
    ]


QUOTED = {"label": "label", "shard": "shard", "a b/ü": "a%20b%2F%C3%BC", "url": "url"}


def is_missing(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def test_a_record_says_where_its_image_is(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    write_card_of(dataset)
    images = []
    for record in open_croissant(dataset).records("images"):
        name = f"{record['images/shard'].decode()}.tar"
        images.append(dataset.store.read_range(name, record["images/tar_offset"], record["images/num_bytes"]))
    assert images == [image for sample in dataset.samples for image in sample.images]


def test_the_document_says_in_rdf_that_the_images_are_generated(tmp_path: Path) -> None:
    rdflib = pytest.importorskip("rdflib", reason="the reader of JSON-LD; not installed")
    dataset = make_dataset(tmp_path / "dataset", num_failed=1)
    write_card_of(dataset)
    graph = rdflib.Graph().parse(data=dataset.store.read("croissant.json"), format="json-ld")
    [subject] = graph.subjects(rdflib.RDF.type, rdflib.URIRef("https://schema.org/Dataset"))
    prov, rai = rdflib.PROV, rdflib.Namespace("http://mlcommons.org/croissant/RAI/")
    [activity] = graph.objects(subject, prov.wasGeneratedBy)
    assert (activity, rdflib.RDF.type, prov.Activity) in graph
    [agent] = graph.objects(subject, prov.wasAttributedTo)
    model = json.loads(str(graph.value(agent, rdflib.RDFS.label)))
    assert model == {"model": "tiny", "model_identity": "a1b2"}
    assert "synthetic" in str(graph.value(subject, rai.dataCollection))
    assert "1 (safety_checker)" in str(graph.value(subject, rai.dataCollectionMissingData))
    conforms = {str(value) for value in graph.objects(subject, rdflib.DCTERMS.conformsTo)}
    assert conforms == {"http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"}


def test_one_digest_stands_for_the_plan_the_captions_and_the_shards(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    card = write_card_of(dataset)
    [checksums] = open_croissant(dataset).metadata.file_objects
    assert checksums.description == "sha256 of the plan, the planned captions and the shards"
    assert "`sha256sum -c SHA256SUMS` compares the plan, the planned captions and the shards with" in card
    assert checksums.sha256 == hashlib.sha256(dataset.store.read("SHA256SUMS")).hexdigest()
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=dataset.path, capture_output=True, text=True, check=True)
    names = [line.removesuffix(": OK") for line in done.stdout.splitlines()]
    assert sorted(names) == sorted(
        ["dataset.json", "captions/00000.parquet"]
        + [f"0000{index}.{suffix}" for index in (0, 1) for suffix in ("tar", "parquet")]
    )


def test_the_document_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    shards = dataset.shards[:1] * 400_000
    checksums = build_checksums(dataset.manifest, "0" * 64, shards)
    assert checksums.count(b"\n") == 800_002
    document = build_croissant("name", dataset.manifest, shards, checksums, {}, {})
    assert len(json.dumps(document)) < 20_000
