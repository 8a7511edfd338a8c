"""Does a killed training go on as if nothing had happened?

    python benchmarks/resume.py [--num_kills 20] [--num_captions 96] [--ranks 1:1,2:2,4:4,1:2,2:1,2:4,4:1,4:2]

`stablerep fit` trains a tiny model for two epochs; its whole job is killed by SIGKILL at a random moment,
also while it saves, and resumed with `--ckpt_path auto`, on as many ranks or on others. Of the steps that
count, those that no later run did again:

- each caption comes once an epoch, none is missed;
- at equal numbers of ranks each rank has the same captions in each step as in a run that nobody killed, and
  the losses differ by at most 1e-6.

Exits with 1 if one does not hold. Writes benchmarks/results/resume.{json,md}.
"""

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import auto_cli
from tqdm import tqdm

from data_gen.scenes import sample_captions
from stablerep import distributed

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
NUM_EPOCHS = 2
NUM_CAPTIONS_PER_RANK = 4
LARGEST_DIFFERENCE = 1e-6
Steps = dict[int, dict[int, dict[str, Any]]]
"""Step to rank to what that rank saw in it."""


class StepLog(pl.Callback):
    """Writes a line a step: its captions' labels and its loss.

    Args:
        folder: Where; each run has a subfolder, named by its first step and start.
        num_seconds_of_step: Added to each step, so that a kill has something to hit.
    """

    def __init__(self, folder: str, num_seconds_of_step: float = 0.0) -> None:
        self.folder = Path(folder)
        self.num_seconds_of_step = num_seconds_of_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the run's file."""
        run = distributed.all_gather_objects(f"{time.time_ns()}")[0]
        (self.folder / run).mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / run / f"{distributed.rank()}.jsonl").open("w")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the line before anything is saved."""
        line = {
            "step": trainer.global_step - 1,
            "epoch": trainer.current_epoch,
            "labels": batch["labels"].tolist(),
            "loss": float(outputs["loss"]),
        }
        print(json.dumps(line), file=self._file, flush=True)
        time.sleep(self.num_seconds_of_step)


@dataclass(frozen=True)
class Bench:
    """The training that is killed.

    Args:
        folder: Where all is written.
        num_captions: Captions of the dataset.
        num_workers: Worker processes of each rank that read the data.
        num_seconds_of_step: Least duration of a step.
    """

    folder: Path
    num_captions: int
    num_workers: int
    num_seconds_of_step: float

    def start(self, name: str, num_ranks: int, *options: str) -> "subprocess.Popen[bytes]":
        """Starts `stablerep fit` with the output `name`, as a process group of its own."""
        log = {
            "class_path": "resume.StepLog",
            "init_args": {
                "folder": str(self.folder / f"{name}.log"),
                "num_seconds_of_step": self.num_seconds_of_step,
            },
        }
        model = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "drop_path_rate": 0.2}
        command = [
            *(sys.executable, "-m", "stablerep.cli", "fit", "--data.root", str(self.folder / "shards")),
            *("--output", str(self.folder / name), "--checkpoint_every_n_steps", "2"),
            *(
                "--data.num_captions_per_rank",
                str(NUM_CAPTIONS_PER_RANK),
                "--data.num_views_per_caption",
                "2",
            ),
            *("--data.image_size", "16", "--data.num_workers", str(self.num_workers)),
            *("--model.backbone", "vit_tiny_patch16_224", "--model.backbone_options", json.dumps(model)),
            *("--model.projection_hidden_features", "32", "--model.projection_out_features", "16"),
            *("--model.optimizer.learning_rate", "0.001", "--model.optimizer.num_warmup_steps", "4"),
            *("--trainer.max_epochs", str(NUM_EPOCHS), "--trainer.enable_progress_bar", "false"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", str(num_ranks)),
            *("--trainer.callbacks", json.dumps([log])),
        ]
        paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        with (self.folder / f"{name}.out").open("ab") as output:
            return subprocess.Popen(
                [*command, *options],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, name: str, num_ranks: int, *options: str) -> None:
        """Trains to the end.

        Raises:
            RuntimeError: If the command fails; shows what it said.
        """
        if code := self.start(name, num_ranks, *options).wait():
            raise RuntimeError(f"stablerep fit returned {code}:\n{(self.folder / f'{name}.out').read_text()}")

    def read_runs(self, name: str) -> list[Steps]:
        """What each run of an output saw, in the order of their starts."""
        runs = []
        for folder in sorted((self.folder / f"{name}.log").iterdir()):
            steps: Steps = {}
            for path in folder.iterdir():
                whole_lines = path.read_text().rpartition("\n")[0].splitlines()
                for line in map(json.loads, whole_lines):
                    steps.setdefault(line["step"], {})[int(path.stem)] = line
            runs.append(steps)
        return runs


@dataclass(frozen=True)
class Trial:
    """One kill and what came of it.

    Args:
        num_ranks: Ranks of the killed run.
        num_ranks_after: Ranks of the run that went on.
        killed_after_step: Last step that the killed run finished on all ranks.
        resumed_at_step: First step of the run that went on.
        num_missing: Captions that an epoch lacks, over both.
        num_repeated: Captions that an epoch has more than once, over both.
        has_same_captions: Whether each step's captions are the undisturbed run's; None on other ranks.
        largest_difference: Of losses, to the undisturbed run; None on other ranks.
    """

    num_ranks: int
    num_ranks_after: int
    killed_after_step: int
    resumed_at_step: int
    num_missing: int
    num_repeated: int
    has_same_captions: bool | None
    largest_difference: float | None

    @property
    def is_exact(self) -> bool:
        """Whether all holds."""
        is_same = self.has_same_captions is not False and (self.largest_difference or 0) <= LARGEST_DIFFERENCE
        return is_same and self.num_missing == self.num_repeated == 0


def run(
    num_kills: int = 20,
    num_captions: int = 96,
    num_workers: int = 1,
    num_seconds_of_step: float = 0.1,
    ranks: str = "1:1,2:2,4:4,1:2,2:1,2:4,4:1,4:2",
    data: str | None = None,
    seed: int = 0,
    name: str = "resume",
) -> int:
    """Runs every trial.

    Args:
        num_kills: Trials, each with one kill.
        num_captions: Of the dataset; a multiple of what a step takes, for every number of ranks.
        num_workers: Worker processes of each rank.
        num_seconds_of_step: Least duration of a step.
        ranks: Pairs BEFORE:AFTER of numbers of ranks, taken in turn.
        data: A dataset of that many captions, two images each; null has the embedded generator make one.
        seed: Of the moments.
        name: Of the result files; empty for none.
    """
    pairs = [tuple(map(int, pair.split(":"))) for pair in ranks.split(",")]
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        bench = Bench(Path(folder), num_captions, num_workers, num_seconds_of_step)
        if data is None:
            write_shards(bench)
        else:
            (bench.folder / "shards").symlink_to(Path(data).resolve())
        undisturbed: dict[int, Steps] = {}
        for num_ranks in sorted({before for before, after in pairs if before == after}):
            bench.finish(f"undisturbed-{num_ranks}", num_ranks)
            undisturbed[num_ranks] = bench.read_runs(f"undisturbed-{num_ranks}")[0]
        trials = []
        for number, (before, after) in enumerate(tqdm(list(islice(cycle(pairs), num_kills)), desc="kills")):
            trial = kill_and_resume(bench, f"killed-{number}", before, after, undisturbed.get(before), rng)
            tqdm.write(str(trial))
            trials.append(trial)
    if name:
        write_results(trials, bench, name)
    return int(not all(trial.is_exact for trial in trials))


def write_shards(bench: Bench) -> None:
    """The embedded generator's images of the scene grammar's captions, one denoising step each."""
    captions = bench.folder / "captions.txt"
    distinct = list(dict.fromkeys(sample_captions(2 * bench.num_captions, 0)))[: bench.num_captions]
    captions.write_text("".join(f"{caption}\n" for caption in distinct))
    command = [
        *(sys.executable, "-m", "stablerep.cli", "generate", "--captions", str(captions)),
        *("--output", str(bench.folder / "shards"), "--num_images_per_caption", "2"),
        *("--num_captions_per_shard", "20", "--generator.num_inference_steps", "1"),
        *("--generator.device", "cpu", "--num_workers", "1"),
    ]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)


def kill_and_resume(
    bench: Bench,
    name: str,
    num_ranks: int,
    num_ranks_after: int,
    undisturbed: Steps | None,
    rng: random.Random,
) -> Trial:
    """One trial."""
    while start_and_kill(bench, name, num_ranks, rng) == 0:  # it was done before the kill
        remove_runs(bench, name)
    bench.finish(name, num_ranks_after, "--ckpt_path", "auto")  # nothing may be saved yet
    killed, resumed = bench.read_runs(name)
    whole = [number for number, of_ranks in killed.items() if len(of_ranks) == num_ranks]
    start = min(resumed)
    valid = {number: killed[number] for number in whole if number < start} | resumed
    missing, repeated = compare_captions(valid, bench.num_captions)
    is_equal, difference = None, None
    if undisturbed is not None and num_ranks == num_ranks_after:
        is_equal, difference = compare_steps(valid, undisturbed)
    remove_runs(bench, name)
    return Trial(num_ranks, num_ranks_after, max(whole), start, missing, repeated, is_equal, difference)


def start_and_kill(bench: Bench, name: str, num_ranks: int, rng: random.Random) -> int:
    """Kills a run at a random moment; its exit code, 0 where it had ended.

    Raises:
        RuntimeError: If it failed; shows what it said.
    """
    num_steps = NUM_EPOCHS * bench.num_captions // (num_ranks * NUM_CAPTIONS_PER_RANK)
    step = rng.randrange(2, num_steps - 1)
    job = bench.start(name, num_ranks)
    log = bench.folder / f"{name}.log"
    while job.poll() is None and count_lines(log) < step:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 2 * bench.num_seconds_of_step))
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    if (code := job.wait()) not in (0, -signal.SIGKILL):
        raise RuntimeError(f"stablerep fit returned {code}:\n{(bench.folder / f'{name}.out').read_text()}")
    return code


def remove_runs(bench: Bench, name: str) -> None:
    """All that a trial has written."""
    for path in bench.folder.glob(f"{name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def count_lines(log: Path) -> int:
    """Steps of rank 0 in the newest run."""
    files = sorted(log.glob("*/0.jsonl"))
    return files[-1].read_text().count("\n") if files else 0


def compare_captions(steps: Steps, num_captions: int) -> tuple[int, int]:
    """How many captions the epochs lack, and how many they have again."""
    epochs: dict[int, Counter[int]] = {}
    for of_ranks in steps.values():
        for line in of_ranks.values():
            epochs.setdefault(line["epoch"], Counter()).update(line["labels"])
    repeated = sum(counts.total() - len(counts) for counts in epochs.values())
    return NUM_EPOCHS * num_captions - sum(map(len, epochs.values())), repeated


def compare_steps(steps: Steps, undisturbed: Steps) -> tuple[bool, float]:
    """Whether each rank saw the same captions in each step; the largest difference of a loss."""
    if {number: of_ranks.keys() for number, of_ranks in steps.items()} != {
        number: of_ranks.keys() for number, of_ranks in undisturbed.items()
    }:
        return False, float("inf")
    pairs = [
        (line, undisturbed[number][rank])
        for number, of_ranks in steps.items()
        for rank, line in of_ranks.items()
    ]
    is_equal = all(line["labels"] == other["labels"] for line, other in pairs)
    return is_equal, max(abs(line["loss"] - other["loss"]) for line, other in pairs)


def write_results(trials: list[Trial], bench: Bench, name: str) -> None:
    """Writes the table."""
    settings = {
        "num_captions": bench.num_captions,
        "num_captions_per_rank": NUM_CAPTIONS_PER_RANK,
        "num_epochs": NUM_EPOCHS,
        "num_workers": bench.num_workers,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    RESULTS.mkdir(exist_ok=True)
    result = {"settings": settings, "trials": [asdict(trial) for trial in trials]}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    rows = [
        f"| {trial.num_ranks} → {trial.num_ranks_after} | {trial.killed_after_step} | "
        f"{trial.resumed_at_step} | {trial.num_missing} | {trial.num_repeated} | "
        f"{'' if trial.largest_difference is None else f'{trial.largest_difference:.1e}'} | "
        f"{'yes' if trial.is_exact else 'no'} |"
        for trial in trials
    ]
    table = "\n".join(
        [
            f"{NUM_EPOCHS} epochs of {bench.num_captions} captions, {NUM_CAPTIONS_PER_RANK} a rank and step, "
            f"a checkpoint every 2 steps; {settings['machine']}.",
            "",
            "| ranks | last step before SIGKILL | first step after | captions missed | repeated | "
            "largest difference of a loss | exact |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    (RESULTS / f"{name}.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    sys.exit(auto_cli(run, as_positional=False))
