import csv
import os
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml

from stablerep.backbones import load_backbone
from stablerep.cli import main
from stablerep.fit import _is_first_rank, build_cli, choose_run_folder, count_devices
from tests.stablerep.datasets import write_dataset, write_image_folder

CONFIGS = Path(__file__).parents[2] / "configs"
TIMEOUT_SECONDS = 300

SMALL = [
    *("--data.num_captions_per_rank", "4"),
    *("--data.image_size", "64"),
    *("--data.num_workers", "0"),
    *("--model.backbone_options", "{patch_size: 8, depth: 1, embed_dim: 16, num_heads: 2}"),
    *("--model.projection_hidden_features", "16"),
    *("--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.log_every_n_steps", "1"),
]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Options that point the shipped config at data of this test."""
    write_dataset(tmp_path / "shards", [8, 8], num_images=4, size=64)
    write_image_folder(tmp_path / "scenes", num_images=12, size=64)
    return [
        *("--data.root", str(tmp_path / "shards")),
        *("--trainer.callbacks.data", str(tmp_path / "scenes")),
        *("--output", str(tmp_path / "run")),
    ]


def fit(*args: str, config: str = "embedded") -> int:
    return main(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *args])


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.e2e
def test_one_step_of_the_embedded_config_runs_at_its_own_size(tmp_path: Path, folders: list[str]) -> None:
    write_dataset(tmp_path / "enough", [64], num_images=4, size=64)
    options = ["--data.root", str(tmp_path / "enough"), "--trainer.accelerator", "cpu"]
    assert fit(*folders, *options, "--trainer.max_steps", "1") == 0
    backbone = load_backbone(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 96)


@pytest.mark.e2e
def test_second_run_has_its_own_folder_and_goes_on_from_the_first(folders: list[str], tmp_path: Path) -> None:
    assert fit(*folders, *SMALL, "--trainer.max_steps", "4") == 0  # four steps are one epoch
    first = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    assert fit(*folders, *SMALL, "--trainer.max_steps", "8", "--ckpt_path", "last") == 0
    second = torch.load(tmp_path / "run-2" / "checkpoints" / "last.ckpt", weights_only=True)
    assert second["global_step"] == 8
    assert [int(row["step"]) for row in read_metrics(tmp_path / "run-2") if row["loss"]] == [4, 5, 6, 7]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == first


def test_option_that_a_resumed_optimizer_would_ignore_is_refused(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*folders, *SMALL, "--trainer.max_steps", "1") == 0
    changed = ["--model.optimizer.learning_rate", "0.5", "--ckpt_path", "last"]
    assert fit(*folders, *SMALL, "--trainer.max_steps", "2", *changed) == 1
    rate = yaml.safe_load((CONFIGS / "embedded.yaml").read_text())["model"]["optimizer"]["learning_rate"]
    assert f"model.optimizer.learning_rate is {rate} in checkpoint" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.usefixtures("interruptible")
def test_interrupted_run_says_so(folders: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stablerep.cli", "fit", "--config", str(CONFIGS / "embedded.yaml")]
    with subprocess.Popen(
        [*command, *folders, *SMALL, "--trainer.max_steps", "1000000", "--trainer.max_time", "00:00:03:00"],
        env=os.environ | {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        timer = threading.Timer(TIMEOUT_SECONDS, process.kill)  # ends the reading below
        timer.start()
        try:
            next(line for line in process.stderr if "step 0: k-NN" in line)
            process.send_signal(signal.SIGINT)
            lines = process.stderr.read().strip().splitlines()
            assert process.wait(TIMEOUT_SECONDS) == 130
        finally:
            timer.cancel()
            process.kill()
    assert lines[-1] == "stablerep fit: interrupted"


@pytest.mark.e2e
def test_equal_seeds_give_equal_runs(folders: list[str], tmp_path: Path) -> None:
    for seed in ("0", "0", "1"):
        assert fit(*folders, *SMALL, "--trainer.max_steps", "3", "--seed_everything", seed) == 0
    runs = [tmp_path / name for name in ("run", "run-2", "run-3")]
    losses = [[row["loss"] for row in read_metrics(run) if row["loss"]] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.e2e
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.num_captions_per_rank", "40"], "holds 16 captions, fewer than the 2 ranks x"),
        (["--data.root", "corrupt"], "00000.tar cannot be decoded"),  # which one rank meets
    ],
)
def test_error_ends_all_ranks_without_a_traceback(
    args: list[str], message: str, folders: list[str], tmp_path: Path
) -> None:
    write_dataset(tmp_path / "corrupt", [8], num_images=4, size=64, corrupt={3})
    command = [sys.executable, "-m", "stablerep.cli", "fit", "--config", str(CONFIGS / "embedded.yaml")]
    result = subprocess.run(
        [*command, *folders, *SMALL, "--trainer.devices", "2", *args],
        env=os.environ | {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("stablerep fit: error: ") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--data.num_views_per_caption", "9"], 1, "num_views_per_caption must be <= 4"),
        (["--data.num_captions_per_rank", "99"], 1, "holds 16 captions, fewer than the 1 ranks"),
        (["--data.root", "nowhere"], 1, "nowhere is not a dataset"),
        (["--ckpt_path", "none.ckpt"], 1, "checkpoint none.ckpt does not exist"),
        (["--ckpt_path", "last"], 1, "ckpt_path is last, but there is no"),
        (["--model.temperature", "-1"], 1, "temperature must be > 0, got -1.0"),
        (["--model.backbone", "vit_tiny_patch16_22"], 1, "did you mean vit_tiny_patch16_224?"),
        (["--trainer.callbacks.data", "nowhere"], 1, "labelled images nowhere/train do not exist"),
        (["--checkpoint_every_n_steps", "0"], 1, "checkpoint_every_n_steps must be >= 1, got 0"),
        (["--trainer.max_steps", "-1"], 1, "trainer.max_steps or trainer.max_epochs must be set"),
        (["--trainer.accumulate_grad_batches", "2"], 1, "accumulate_grad_batches must be 1"),
        (["--trainer.limit_train_batches", "5"], 1, "trainer.limit_train_batches must be 1.0, as the order"),
        (["--trainer.overfit_batches", "2"], 1, "trainer.overfit_batches must be 0.0, as the order"),
        (["--trainer.fast_dev_run", "true"], 1, "trainer.fast_dev_run must be False, as the order"),
        (["--trainer.accelerator", "warp"], 1, "warp"),
        (["--rank_timeout_seconds", "0"], 1, "rank_timeout_seconds must be in [1, 1e6], got 0.0"),
        (["--rank_timeout_seconds", ".inf"], 1, "rank_timeout_seconds must be in [1, 1e6], got inf"),
        (
            ["--trainer.num_nodes", "4"],
            1,
            "trainer.num_nodes is 4, but NODE_RANK, MASTER_ADDR, MASTER_PORT must",
        ),
        (
            ["--trainer.strategy", "fsdp"],
            1,
            "trainer.strategy must be auto, ddp or a class_path, stablerep.dis",
        ),
        (["--config_version", "0"], 1, "config_version must be 1, got 0 in the command line: it was written"),
        (["--ckpt_path", "https://example.com/a.ckpt"], 1, "must be a local file, got https://example.com/"),
        (
            ["--trainer.callbacks", "[{class_path: stablerep.callbacks.OnlineProbe}]"],
            2,
            "did you mean stablerep.callbacks.OnlineProbes?",
        ),
        (["--data.num_view_per_caption", "2"], 2, "did you mean --data.num_views_per_caption?"),
        (["--trainer.max_step", "2"], 2, "did you mean --trainer.max_steps?"),
        (["--data.positives", "captions"], 2, "caption"),
    ],
)
def test_bad_option_gets_one_line(
    args: list[str], code: int, message: str, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*folders, *SMALL, *args) == code
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("stablerep fit: error: ")
    assert message in last_line


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="an accelerator is here")
def test_accelerators_that_are_not_there_are_named(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--trainer.accelerator", "gpu", "--trainer.devices", "4"]
    assert fit(*folders, *SMALL, *missing) == 1
    message = "stablerep fit: error: trainer.devices is 4, but there is no accelerator gpu here"
    assert capsys.readouterr().err.strip().splitlines()[-1] == message


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {
                **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "1"},
                **{"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            },
            "trainer.devices x trainer.num_nodes must be 1, the ranks that Slurm has started, got 2 x 1",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"},
            "trainer.devices x trainer.num_nodes must be 3, the ranks that torchrun has started, got 2 x 1",
        ),
    ],
)
def test_another_number_of_ranks_than_was_started_is_refused(
    environment: dict[str, str],
    message: str,
    folders: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert fit(*folders, *SMALL, "--trainer.devices", "2") == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_ranks_that_do_not_meet_say_so_in_one_line(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        environment = {
            **{
                "TORCHELASTIC_RUN_ID": "7",
                "WORLD_SIZE": "2",
                "RANK": "1",
                "LOCAL_RANK": "0",
                "GROUP_RANK": "1",
            },
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        options = ["--trainer.num_nodes", "2", "--rank_timeout_seconds", "1"]
        assert fit(*folders, *SMALL, *options) == 1
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith(f"stablerep fit: error: the ranks did not meet at 127.0.0.1:{port} within")


@pytest.mark.distributed
def test_others_know_when_the_rank_that_holds_their_store_has_left(tmp_path: Path) -> None:
    """Under torchrun and Slurm; it, or who started it, says why, and the others need not."""
    program = f"""
import os, time
from pathlib import Path
import torch.distributed as dist
from stablerep.fit import _has_first_rank_left
rank, path = int(os.environ["RANK"]), Path({str(tmp_path / "port")!r})
if rank == 0:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    path.with_suffix(".tmp").write_text(str(store.port))
    path.with_suffix(".tmp").rename(path)
else:
    while not path.exists():
        time.sleep(0.01)
    store = dist.TCPStore("127.0.0.1", int(path.read_text()))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
assert not _has_first_rank_left()
dist.barrier()
if dist.get_rank() == 0:
    os._exit(0)
while not os.path.exists({str(tmp_path / "gone")!r}):
    time.sleep(0.01)
os._exit(0 if _has_first_rank_left() else 1)
"""
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], env=environment | {"RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert ranks[0].wait(TIMEOUT_SECONDS) == 0
        (tmp_path / "gone").touch()
        assert ranks[1].wait(TIMEOUT_SECONDS) == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")  # as stablerep.fit.main has it
@pytest.mark.parametrize("strategy", ["auto", "{class_path: stablerep.distributed.sharding.ShardedStrategy}"])
def test_ranks_wait_for_each_other_as_long_as_was_asked(strategy: str, folders: list[str]) -> None:
    words = ["--config", str(CONFIGS / "embedded.yaml"), *folders, *SMALL, "--trainer.devices", "2"]
    cli = build_cli([*words, "--rank_timeout_seconds", "7", "--trainer.strategy", strategy])
    assert vars(cli.trainer.strategy)["_timeout"] == timedelta(seconds=7)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_PROCID": "8", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # our own launcher within a job of Slurm
    ],
)
def test_log_lines_are_those_of_the_first_rank(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _is_first_rank() is expected


def test_run_that_is_resumed_at_its_end_says_so(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert fit(*folders, *SMALL, "--trainer.max_steps", "2", "--ckpt_path", "auto") == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"nothing left to do: {path} is at step 2"


@pytest.mark.parametrize("given", ["--config {}", "--config={}", "-c {}", "-c{}", "-c={}"])
def test_config_of_another_version_is_refused_before_its_options_are_read(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("config_version: 0\nmodel: {option_of_old: 1}\n")
    assert main(["fit", *given.format(path).split()]) == 1
    message = f"config_version must be 1, got 0 in {path}: it was written for another version of stablerep"
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_run_can_be_started_from_the_config_that_another_left(folders: list[str], tmp_path: Path) -> None:
    assert fit(*folders, *SMALL, "--trainer.max_steps", "2", "--trainer.enable_checkpointing", "false") == 0
    saved = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["config_version"] == 1
    assert not (tmp_path / "run" / "checkpoints").exists()  # as was asked for
    assert main(["fit", "--config", str(saved)]) == 0
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("run", "run-2")]
    assert losses[0] == losses[1]


def test_checkpoint_that_cannot_be_written_ends_the_run(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert fit(*folders, *SMALL, "--trainer.max_steps", "2", "--checkpoint_every_n_steps", "1") == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("No space left on device")


def test_run_folder_is_the_first_free_one(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert choose_run_folder(output) == output
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert choose_run_folder(output) == tmp_path / "run-3"
    (tmp_path / "run-3").mkdir()  # of a run that could not start
    assert choose_run_folder(output) == tmp_path / "run-3"
    (tmp_path / "run-3" / "metrics.csv").touch()  # a logger would begin it anew
    assert choose_run_folder(output) == tmp_path / "run-4"
    (tmp_path / "run" / "config.yaml").unlink()  # a later run has a larger number all the same
    (tmp_path / "run-long").mkdir()
    (tmp_path / "run-long" / "config.yaml").touch()  # and is no run of this output
    assert choose_run_folder(output) == tmp_path / "run-4"


@pytest.mark.parametrize(
    ("devices", "expected"), [(2, 2), ("3", 3), ([0, 4], 2), ("0,1,5", 3), ("auto", 1), (1, 1)]
)
def test_devices_are_counted_as_lightning_reads_them(devices: object, expected: int) -> None:
    class Trainer:
        accelerator = "cpu"

    Trainer.devices = devices  # type: ignore[attr-defined]
    assert count_devices(Trainer) == expected
