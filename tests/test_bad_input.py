"""Bad input through the real command line: one line that names the thing, the exit code, nothing lost."""

import functools
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stablerep.cli import main
from stablerep.fit import LAST_CHECKPOINT
from stablerep.module import StableRep
from tests.stablerep.datasets import write_dataset, write_image_folder

CONFIG = str(Path(__file__).parents[1] / "configs" / "embedded.yaml")
SMALL_VIT = "{patch_size: 8, depth: 1, embed_dim: 16, num_heads: 2}"
FIT = [
    *("fit", "--config", CONFIG, "--data.root={}/shards", "--output={}/run"),
    *("--data.num_captions_per_rank=4", "--data.num_workers=0", "--data.image_size=16"),
    *("--model.backbone_options", SMALL_VIT, "--model.projection_hidden_features=16"),
    *("--trainer.accelerator=cpu", "--trainer.precision=32", "--trainer.max_steps=2"),
    *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--trainer.callbacks=null"),
]
GENERATE = ["generate", "--captions={}/captions.txt", "--output={}/new"]
EVALUATE = [
    *("evaluate", "--checkpoint={}/model.ckpt", "--data={}/labelled", "--output={}/scores"),
    *("--protocols=[knn]", "--knn.k=[3]", "--num_workers=0", "--device=cpu", "--cache={}/features"),
]
VERIFY = ["verify", "--dataset={}/shards"]
WORDS = {"generate": GENERATE, "fit": FIT, "evaluate": EVALUATE, "verify": VERIFY}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what each verb needs: captions, a model, shards, a labelled set, a checkpoint."""
    (tmp_path / "captions.txt").write_text("a red cube\na dog\n")
    (tmp_path / "file").write_text("precious")
    write_dataset(tmp_path / "shards", [8, 8], num_images=4, size=16)
    write_image_folder(tmp_path / "labelled")
    model = StableRep(
        "vit_tiny_patch16_224",
        {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2},
        image_size=16,
        projection_hidden_features=16,
        projection_out_features=128,
    )
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    return tmp_path


def read_files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def fails(
    place: Path, capsys: pytest.CaptureFixture[str], verb: str, options: list[str], message: str
) -> None:
    """The verb fails (1, or 75) with one line with `message`, nothing is lost, --debug explains."""
    before = read_files(place)
    words = [word.format(place) if word != SMALL_VIT else word for word in [*WORDS[verb], *options]]
    capsys.readouterr()
    assert main(words) in (1, 75)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("stablerep ")]
    assert len(lines) == 1, error
    assert verb == "verify" or error.rstrip().endswith(lines[0])  # it goes on to the next shard
    assert lines[0].startswith(f"stablerep {verb}: ")
    assert message.format(place) in lines[0]
    after = read_files(place)
    assert {path: after.get(path) for path in before} == before
    if verb != "verify":  # it reports what it finds, and none of it is a failure of its own
        assert main([*words, "--debug"]) == 1
        assert "Traceback (most recent call last)" in capsys.readouterr().err


Damage = Callable[[Path], object]


def truncate(name: str, num_bytes: int) -> Damage:
    return lambda place: os.truncate(place / name, num_bytes)


def write(name: str, content: bytes) -> Damage:
    return lambda place: (place / name).write_bytes(content)


def remove(pattern: str) -> Damage:
    def remove_each(place: Path) -> None:
        for path in list(place.glob(pattern)):
            path.unlink()

    return remove_each


def nothing(place: Path) -> None:
    """The option alone is the bad input."""


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (remove("captions.txt"), [], "caption file {}/captions.txt does not exist"),
        (nothing, ["--captions={}"], "caption file {} is not a file"),
        (write("captions.txt", b""), [], "caption file {}/captions.txt holds no caption (0 bytes"),
        (write("captions.txt", b"\n \n\t\n"), [], "caption file {}/captions.txt holds no caption (3 rows"),
        (
            write("captions.txt", b"a dog\n" + b"x" * 10_000),
            [],
            "{}/captions.txt, line 2: a caption must have at most 8192 characters, got 10000",
        ),
        (
            write("captions.txt", b"a dog\na \xff\n"),
            [],
            "{}/captions.txt, line 2: byte 0xff at offset 8 is not UTF-8",
        ),
        (write("captions.txt", "ein Würfel".encode("utf-16")), [], "{}/captions.txt, line 1: byte 0xff"),
        (nothing, ["--output={}/file/new"], "output {}/file/new cannot be written: Not a directory"),
        (nothing, ["--output={}/file"], "output {}/file cannot be written: File exists"),
        (nothing, ["--generator.model={}/none"], "model folder {}/none does not exist"),
        (nothing, ["--generator.model={}/labelled"], "model folder {}/labelled holds no diffusers pipeline"),
    ],
)
def test_generate_names_what_is_wrong(
    damage: Damage, options: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(place)
    fails(place, capsys, "generate", options, message)


def corrupt_jpeg(place: Path) -> None:
    """A dataset whose markers agree with its tars, but one image of which is cut off."""
    for path in (place / "shards").iterdir():
        path.unlink()
    write_dataset(place / "shards", [8], num_images=4, size=16, corrupt={3})


def other_model(place: Path) -> None:
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, place / "other.ckpt")


def other_architecture(place: Path) -> None:
    """A checkpoint of this project by a wider backbone."""
    options = [word.format(place) for word in FIT if word != SMALL_VIT]
    options.insert(options.index("--model.backbone_options") + 1, SMALL_VIT.replace("16", "32"))
    assert main(options) == 0
    (place / "run" / LAST_CHECKPOINT).rename(place / "wider.ckpt")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (truncate("shards/00001.tar", 2000), [], "{}/shards/00001.tar: has 2000 bytes, expected "),
        (truncate("shards/00001.tar", 0), [], "{}/shards/00001.tar: has 0 bytes, expected "),
        (remove("shards/00001.tar"), [], "{}/shards/00001.tar: missing"),
        (corrupt_jpeg, ["--data.num_views_per_caption=4"], ".0 of {}/shards/00000.tar cannot be decoded"),
        (remove("shards/*_stats.json"), [], "{}/shards holds no complete shard (of 2 planned)"),
        (remove("shards/*"), [], "{}/shards is not a dataset: it has no dataset.json"),
        (write("shards/dataset.json", b"{"), [], "{}/shards/dataset.json: not readable as JSON"),
        (nothing, ["--data.root={}/none"], "{}/none is not a dataset"),
        (nothing, ["--output={}/file/run"], "Not a directory: {}/file/run"),
        (nothing, ["--output={}/file"], "File exists: {}/file"),
        (nothing, ["--ckpt_path={}/none.ckpt"], "checkpoint {}/none.ckpt does not exist"),
        (nothing, ["--ckpt_path={}/file"], "checkpoint {}/file is not readable"),
        (write("file", b""), ["--ckpt_path={}/file"], "checkpoint {}/file is not readable"),
        (other_model, ["--ckpt_path={}/other.ckpt"], "checkpoint {}/other.ckpt is of another model"),
        (nothing, ["--ckpt_path={}/model.ckpt"], "checkpoint {}/model.ckpt holds weights alone"),
        (other_architecture, ["--ckpt_path={}/wider.ckpt"], "checkpoint {}/wider.ckpt does not fit"),
    ],
)
def test_fit_names_what_is_wrong(
    damage: Damage, options: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(place)
    fails(place, capsys, "fit", options, message)


def labelled_tars(place: Path) -> Path:
    """The labelled set as shards, its folders gone."""
    for split in ("train", "test"):
        images = sorted((place / "labelled" / split).rglob("*.png"))
        with tarfile.open(place / "labelled" / split / "00000.tar", "w") as tar:
            for index, path in enumerate(images):
                (path.parent / "a.cls").write_text(str(int(path.parent.name == "square")))
                tar.add(path, f"{index}.png")
                tar.add(path.parent / "a.cls", f"{index}.cls")
    return place / "labelled"


def torn_labelled_tar(place: Path) -> None:
    os.truncate(labelled_tars(place) / "test" / "00000.tar", 3000)


def no_labelled_shard(place: Path) -> None:
    (labelled_tars(place) / "test" / "00000.tar").unlink()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (nothing, ["--checkpoint={}/none.ckpt"], "checkpoint {}/none.ckpt does not exist"),
        (other_model, ["--checkpoint={}/other.ckpt"], "checkpoint {}/other.ckpt is no vision transformer"),
        (nothing, ["--checkpoint={}/file"], "checkpoint {}/file is not readable"),
        (truncate("model.ckpt", 5000), [], "checkpoint {}/model.ckpt is not readable"),
        (truncate("labelled/test/circle/2.png", 60), [], "test/circle/2.png: not a readable image"),
        (nothing, ["--data={}/none"], "labelled set not found: {}/none is not a folder"),
        (nothing, ["--data={}/shards"], "knn needs classes, but the labels of {}/shards are its captions"),
        (torn_labelled_tar, [], "{}/labelled/test/00000.tar: the tar is truncated"),
        (no_labelled_shard, [], "no images in {}/labelled/test"),
        (nothing, ["--output={}/file/scores"], "Not a directory: {}/file/scores"),
        (nothing, ["--output={}/file"], "File exists: {}/file"),
    ],
)
def test_evaluate_names_what_is_wrong(
    damage: Damage, options: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(place)
    fails(place, capsys, "evaluate", options, message)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate("shards/00001.tar", 2000), "{}/shards/00001.tar: has 2000 bytes, expected "),
        (remove("shards/00000_stats.json"), "{}/shards/00000.tar: not finished"),
        (remove("shards/dataset.json"), "{}/shards is not a dataset: it has no dataset.json"),
    ],
)
def test_verify_names_what_is_wrong(
    damage: Damage, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(place)
    fails(place, capsys, "verify", [], message)


@pytest.mark.e2e
def test_fewer_shards_than_workers_train_on_every_caption(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    training_step = StableRep.training_step

    @functools.wraps(training_step)
    def record(self: StableRep, batch: Any, batch_index: int) -> torch.Tensor:
        seen.extend(batch["captions"])
        return training_step(self, batch, batch_index)

    monkeypatch.setattr(StableRep, "training_step", record)
    words = [word.format(place) if word != SMALL_VIT else word for word in FIT]
    assert main([*words, "--data.num_workers=3", "--trainer.max_steps=4"]) == 0
    assert sorted(seen) == sorted(f"caption number {index}" for index in range(16))
