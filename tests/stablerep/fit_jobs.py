"""`stablerep fit` on two ranks as its users start it, for tests that disturb it."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300


@dataclass
class Job:
    """`stablerep fit` on a tiny model, as its users start it.

    Args:
        folder: Where all is; its dataset has 32 captions.
    """

    folder: Path

    def options(self, **faults: int) -> list[str]:
        """It trains until there is a file `finish`; `faults` are those of `Diary`."""
        diary = {"folder": str(self.folder)} | faults
        model = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
        return [
            *("--data.root", str(self.folder / "shards"), "--output", str(self.folder / "run")),
            *("--data.num_captions_per_rank", "4", "--data.num_views_per_caption", "2"),
            *("--data.image_size", "16", "--data.num_workers", "0"),
            *("--model.backbone", "vit_tiny_patch16_224", "--model.backbone_options", json.dumps(model)),
            *("--model.projection_hidden_features", "16", "--model.projection_out_features", "8"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.log_every_n_steps", "1"),
            *("--trainer.max_steps", "1000000", "--trainer.enable_progress_bar", "false"),
            *("--trainer.max_epochs", "-1", "--checkpoint_every_n_steps", "2"),
            *(
                "--trainer.callbacks",
                json.dumps([{"class_path": "tests.stablerep.diary.Diary", "init_args": diary}]),
            ),
        ]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cleared = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return cleared | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}

    @contextmanager
    def started(self, *options: str, **faults: int) -> Iterator["subprocess.Popen[str]"]:
        """The command as a process group of its own, without the steps of the one before."""
        for path in self.folder.glob("*.json"):
            path.unlink()
        command = [sys.executable, "-m", "stablerep.cli", "fit", *self.options(**faults)]
        with subprocess.Popen(
            [*command, *options],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # its ranks stop then

    def wait_for_steps(
        self, rank: int, num_steps: int, process: "subprocess.Popen[str] | None" = None
    ) -> int:
        """The process of a rank, once it has made that many; fails where the job's ends before."""
        path = self.folder / f"{rank}.json"
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not path.exists() or json.loads(path.read_text())["step"] < num_steps:
            assert time.monotonic() < deadline
            assert process is None or process.poll() is None, process.communicate()
            time.sleep(0.02)
        return int(json.loads(path.read_text())["pid"])

    def read_step(self, run: str) -> int:
        content = torch.load(self.folder / run / "checkpoints" / "last.ckpt", weights_only=True)
        return int(content["global_step"])

    def read_logged_steps(self, run: str) -> list[int]:
        with (self.folder / run / "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]
