"""The whole stream through the front door: captions → shards → checkpoint → scores."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_gen.shards import list_complete_shards, read_samples
from stablerep.backbones import load_backbone
from stablerep.cli import main
from stablerep.evaluation.results import read_results

CONFIG = Path(__file__).parents[1] / "configs" / "embedded.yaml"
NUM_CAPTIONS, NUM_IMAGES, NUM_TRAIN, NUM_TEST = 12, 2, 64, 24


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A second thread costs more than it gives to networks this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.mark.e2e
@pytest.mark.usefixtures("one_thread")
def test_captions_become_scores(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run("scenes", "--captions", "captions.txt", "--num_captions", NUM_CAPTIONS)
    run("scenes", "--output", "scenes", "--num_train", NUM_TRAIN, "--num_test", NUM_TEST, "--image_size", 16)
    model = ["--generator.model", tiny_pipeline, "--generator.num_inference_steps", 2]
    sizes = ["--num_images_per_caption", NUM_IMAGES, "--num_captions_per_shard", 5]
    run("generate", "--captions", "captions.txt", "--output", "shards", *model, *sizes)
    run("verify", "--dataset", "shards", "--deep")
    captions = [sample.caption for shard in list_complete_shards("shards") for sample in read_samples(shard)]
    assert captions == Path("captions.txt").read_text().splitlines()

    run(
        *("fit", "--config", CONFIG, "--data.root", "shards", "--output", "run", "--trainer.max_steps", 2),
        *("--data.image_size", 16, "--data.num_captions_per_rank", 4, "--data.num_workers", 0),
        *("--data.num_views_per_caption", NUM_IMAGES, "--model.projection_hidden_features", 16),
        *("--model.backbone_options", "{patch_size: 8, depth: 1, embed_dim: 16, num_heads: 2}"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.log_every_n_steps", 1, "--trainer.callbacks.data", "scenes"),
    )
    checkpoint = Path("run", "checkpoints", "last.ckpt")
    assert load_backbone(checkpoint).image_size == 16
    assert "knn_top1" in Path("run", "metrics.csv").read_text()

    quick = ["--linear.num_epochs", 2, "--linear.num_views", 1, "--knn.k", "[5]", "--num_workers", 0]
    for options in ([], ["--random_init"]):
        run("evaluate", "--checkpoint", checkpoint, "--data", "scenes", "--device", "cpu", *quick, *options)
    folders = sorted(Path("run", "checkpoints", "evaluation").iterdir())
    assert [folder.name for folder in folders] == ["last-scenes", "last-scenes-random_init"]
    for folder in folders:
        results = read_results(folder)
        is_random = folder.name.endswith("random_init")
        assert results.provenance.model == f"{checkpoint}{' (random initialisation)' if is_random else ''}"
        run_facts = json.loads((folder / "run.json").read_text())["facts"]
        assert run_facts["data"]["images"] == {"train": NUM_TRAIN, "test": NUM_TEST}
        names = [row.protocol for row in results.rows]
        assert names == ["linear_paper", "linear_heldout", "linear_bn_paper", "linear_bn_heldout", "knn5"]
        for row in results.rows:
            assert row.interval is not None
            assert 0 <= row.interval[0] <= row.value <= row.interval[1] <= 1
            assert row.n == NUM_TEST
        assert {"report.md", "report.html", "predictions.npz"} <= set(os.listdir(folder))
    assert "Traceback" not in capsys.readouterr().err
