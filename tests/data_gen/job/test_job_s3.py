"""Laws of a job whose dataset is in an object store that fails one request in ten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_gen.job.generate import GenerateConfig, run
from data_gen.job.plan import Plan
from data_gen.job.status import build_status
from data_gen.repair import RepairConfig
from data_gen.repair import run as repair
from data_gen.shards import list_complete_shards, read_manifest, read_samples
from data_gen.storage import Store
from data_gen.verify import VerifyConfig
from data_gen.verify import run as verify
from tests.data_gen.conftest import CAPTIONS
from tests.data_gen.datasets import NoiseGenerator
from tests.data_gen.s3_server import ServedUrl, s3_server

MakeConfig = Callable[..., GenerateConfig]


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    monkeypatch.setattr("data_gen.storage.remote.SECONDS_BEFORE_SECOND_TRY", 0.01)
    with s3_server(failure_fraction=0.1, seed=3) as served:
        yield served


def content_of(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.list(recursive=True) if not name.endswith("_stats.json")}


def test_a_job_in_a_failing_store_writes_what_a_disk_gets(
    url: ServedUrl, make_config: MakeConfig, tmp_path: Path
) -> None:
    remote, local = make_config(output=f"{url}/dataset"), make_config()
    assert run(remote) == 0
    assert run(local) == 0
    assert url.server.num_failures > 0
    assert content_of(Store(remote.output)) == content_of(Store(local.output))
    samples = [sample for shard in list_complete_shards(remote.output) for sample in read_samples(shard)]
    assert [sample.caption for sample in samples] == CAPTIONS


def test_a_job_in_a_store_is_resumed_extended_verified_and_repaired(
    url: ServedUrl, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(output=f"{url}/dataset")
    store = Store(config.output)
    assert run(config) == 0
    store.delete("00001_stats.json")
    store.replace("00002.tar", store.read("00002.tar")[:700])
    assert verify(VerifyConfig(config.output)) == 1
    assert repair(RepairConfig(config.output)) == 75
    status = build_status(Plan.read(store), lease_seconds=60)
    assert (status["num_shards_finished"], status["is_finished"]) == (2, False)
    assert run(make_config(output=config.output, num_images_per_caption=4, extend=True)) == 0
    assert read_manifest(store).num_images_per_caption == 4
    assert verify(VerifyConfig(config.output, deep=True)) == 0
    assert not store.list(".work", recursive=True)


def test_captions_are_read_from_a_store(url: ServedUrl, make_config: MakeConfig, tmp_path: Path) -> None:
    for index, caption in enumerate(CAPTIONS):
        Store(f"{url}/captions").publish(f"part-{index}.txt", f"{caption}\n".encode())
    assert run(make_config(captions=f"{url}/captions/part-*.txt")) == 0
    assert run(make_config()) == 0  # the same plan as from the local file
