"""`stablerep fit`: a LightningCLI with one verb.

Each run has a folder of its own: `--output`, or when that holds a run, the same name with `-2`, `-3`, ….

    config.yaml                the run's whole configuration
    metrics.csv, events.*      the logs
    checkpoints/last.ckpt      replaced whole, every `--checkpoint_every_n_steps` and at the end
    checkpoints/previous.ckpt  the one before

With several devices the command starts one process a rank and watches them (`stablerep.distributed.launch`),
unless torchrun or Slurm has started them.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from stablerep import distributed
from stablerep.arguments import SuggestingErrors
from stablerep.callbacks import FitProgressBar, Throughput, ViewGrid
from stablerep.datamodule import MultiPositiveDataModule
from stablerep.distributed import launch
from stablerep.distributed.data_parallel import SettledDDPStrategy
from stablerep.distributed.sharding import ShardedStrategy
from stablerep.module import StableRep
from stablerep.runs.checkpoint import LAST_CHECKPOINT, AtomicCheckpointIO, find_checkpoint, list_runs
from stablerep.runs.state import RunCheckpoints, SeedSteps
from stablerep.runs.stopping import StoppedEarly

CONFIG_VERSION = 1
"""Of the options: raised when one is renamed, removed or changes its meaning."""

EXIT_FAILED = 1
"""An error, said in one line by the rank that met it."""

EXIT_UNFINISHED = 75
"""A signal stopped the run, with a checkpoint: `--ckpt_path last` goes on. As of the verbs that make data."""

EXIT_INTERRUPTED = 130

_DEFAULTS_OF_EPOCHS = {
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "reload_dataloaders_every_n_epochs": 0,
    "fast_dev_run": False,
}
_EXACT_STRATEGIES = (SettledDDPStrategy, ShardedStrategy)
_MEETING_PLACE = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
_RUN_FILES = ("config.yaml", "metrics.csv", "checkpoints")

_EXPECTED_WARNINGS = (
    r"LightningCLI's args parameter",  # the front door has taken the verb off the command line
    r".*does not have many workers",  # num_workers is the config's choice, 0 included
    r"This DataLoader will create",  # and so are more workers than cores
    r"Your `?IterableDataset`? has `__len__` defined",  # the stream's length is exact whatever the workers
    r".*torch\.cuda\.amp\.|.*`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
    r"Experiment logs directory .* exists and is not empty",  # left by a run that could not start
    r"Checkpoint directory .* exists and is not empty",  # the last checkpoint is replaced on purpose
    r"The number of training batches .* is smaller than the logging interval",  # steps are what is counted
    r"The dirpath has changed from",  # a resumed run has a folder of its own
    r"The `srun` command is available on your system",  # without it, ranks are started here
    r"GPU available but not used",  # trainer.accelerator is the config's choice
)


class FitParser(SuggestingErrors, LightningArgumentParser):
    """Lightning's parser, with errors that name the nearest right option."""


class FitCLI(LightningCLI):
    """Adds what every run has: folder, loggers, checkpoints, throughput, short timeouts, a stop by signal."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside trainer, model and data, and what model and data share."""
        parser.add_argument(
            "--output",
            type=str,
            default="runs/fit",
            help="folder of the run; -2, -3, … is added if it is taken, one more than the last that is there",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="checkpoint to resume from; `last` is the newest whole one of the runs of --output, `auto` "
            "is that one where there is any, and else a beginning",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps", type=int, default=1000, help="steps between checkpoints, >= 1"
        )
        parser.add_argument(
            "--rank_timeout_seconds",
            type=float,
            default=300.0,  # torch's half an hour is what a hang would cost
            help="for how long a rank waits for the others, in [1, 1e6]: for one that hangs, and also while "
            "they start or open the data, and while the first one saves or measures a probe",
        )
        parser.add_argument(
            "--config_version", type=int, default=CONFIG_VERSION, help="version of the options, not to be set"
        )
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("data.num_captions_per_rank", "model.num_captions_per_rank")
        parser.link_arguments("data.num_views_per_caption", "model.num_views_per_caption")
        parser.link_arguments("data.positives", "model.positives")
        parser.link_arguments("model.text", "data.needs_captions", compute_fn=_is_given)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Settles the run's folder and the checkpoint, before anything is built."""
        if (every := self.config.checkpoint_every_n_steps) < 1:
            raise ValueError(f"checkpoint_every_n_steps must be >= 1, got {every}")
        if not 1 <= (seconds := self.config.rank_timeout_seconds) <= 1e6:
            raise ValueError(f"rank_timeout_seconds must be in [1, 1e6], got {seconds}")
        check_config_version(self.config.config_version, "the command line")
        check_trainer(self.config.trainer)
        output = Path(self.config.output)
        self.ckpt_path = find_checkpoint(self.config.ckpt_path, output)
        self.run_folder = choose_run_folder(output)
        self.run_folder.mkdir(parents=True, exist_ok=True)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The configured trainer, with the run's folder, loggers, strategy and checkpoints."""
        trainer = self.config_init.trainer
        folder = str(self.run_folder)
        timeout = timedelta(seconds=self.config.rank_timeout_seconds)
        kwargs |= {"default_root_dir": folder, "plugins": [*_as_list(trainer.plugins), AtomicCheckpointIO()]}
        if trainer.logger is not False:
            kwargs["logger"] = [
                CSVLogger(folder, name="", version=""),
                TensorBoardLogger(folder, name="", version=""),
                *([] if trainer.logger in (None, True) else _as_list(trainer.logger)),
            ]
        num_ranks = count_devices(trainer) * trainer.num_nodes
        if trainer.strategy == "ddp" or (trainer.strategy == "auto" and num_ranks > 1):
            kwargs["strategy"] = SettledDDPStrategy()
        elif trainer.strategy != "auto" and not isinstance(trainer.strategy, _EXACT_STRATEGIES):
            named = [f"{strategy.__module__}.{strategy.__name__}" for strategy in _EXACT_STRATEGIES]
            raise ValueError(
                f"trainer.strategy must be auto, ddp or a class_path, {' or '.join(named)}, with which a run "
                f"goes on exactly, got {trainer.strategy}"
            )
        self.checkpoints = RunCheckpoints(
            self.run_folder,
            self.config.checkpoint_every_n_steps,
            resumed_from=self.ckpt_path,
            timeout=timeout,
            is_saving=trainer.enable_checkpointing is not False,
        )
        kwargs["enable_checkpointing"] = True  # the callback stops the run, whether or not it saves
        seed = SeedSteps(int(self.config.seed_everything))
        callbacks = [seed, Throughput(), ViewGrid(), *_as_list(trainer.callbacks), self.checkpoints]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if trainer.enable_progress_bar is not False and not has_bar:
            callbacks.append(FitProgressBar())
        built = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        if isinstance(built.strategy, _EXACT_STRATEGIES):
            built.strategy._timeout = timeout
        return built

    @property
    def num_ranks_to_start(self) -> int:
        """Ranks of this machine that nobody has started yet; 0 where this process is a rank."""
        strategy = self.trainer.strategy
        if self.trainer.world_size == 1 or not isinstance(strategy, ParallelStrategy):
            return 0
        environment = strategy.cluster_environment
        if environment is None or environment.creates_processes_externally:
            return 0
        return self.trainer.num_devices

    def start_ranks(self, args: Sequence[str]) -> int:
        """Runs the same command once a rank, with the folder and the checkpoint that were chosen here."""
        chosen = ["--output", str(self.run_folder), "--ckpt_path", self.ckpt_path or "null"]
        num_ranks = self.num_ranks_to_start
        del self.trainer, self.model, self.datamodule  # their memory is the ranks'
        return launch.run_ranks(launch.rank_command("fit", [*args, *chosen]), num_ranks)

    def fit(self) -> int:
        """Trains as one rank; returns the exit code."""
        on_interrupt = signal.getsignal(signal.SIGINT)
        self.checkpoints.stop.install()
        try:
            self.trainer.fit(
                self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path, weights_only=True
            )
        except StoppedEarly as stop:
            if self.trainer.is_global_zero:
                print(f"stablerep fit: stopped by {stop}", file=sys.stderr)
            return EXIT_UNFINISHED if stop.can_go_on else EXIT_FAILED
        except SystemExit as end:  # what Lightning makes of Ctrl-C, which it then ignores
            if not self.trainer.interrupted:
                raise
            if not launch.is_started_by_us():  # else it may come twice, from the terminal and from the parent
                signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from end
        finally:
            self.checkpoints.close()
        if not self.trainer.is_global_zero:
            return 0
        if not self.checkpoints.has_begun:
            print(
                f"nothing left to do: {self.ckpt_path} is at step {self.trainer.global_step}", file=sys.stderr
            )
        path = self.run_folder / LAST_CHECKPOINT
        if path.exists():
            print(f"checkpoint: {path}")
        return 0


def main(args: list[str]) -> int:
    """Trains as `args` say (without the verb).

    Returns:
        0, or 75 when a signal stopped the run, or of another rank's failure its exit code.

    Raises:
        ValueError: If data, model or trainer are set to what cannot be.
        OSError: If the data or a checkpoint is missing, the output cannot be written, or a rank is lost.
    """
    _show_log_lines()
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            return _run(args)
        except MisconfigurationException as error:
            raise ValueError(" ".join(str(error).split())) from error
        except dist.DistError as error:  # before there is a group; one line a machine is enough
            if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
                return EXIT_FAILED
            where = ":".join(os.environ.get(name, "") for name in _MEETING_PLACE[1:])
            raise ConnectionError(
                f"the ranks did not meet at {where} within --rank_timeout_seconds "
                f"({' '.join(str(error).split())[:160]}…)"
            ) from error


def _run(args: list[str]) -> int:
    cli = build_cli(args)
    check_ranks(cli.trainer)
    if cli.num_ranks_to_start:
        return cli.start_ranks(args)
    if launch.is_started_by_us():
        launch.watch_parent()
    try:
        return cli.fit()
    except KeyboardInterrupt:
        if launch.is_started_by_us():  # the process that started the ranks says so, once
            return EXIT_INTERRUPTED
        raise
    except Exception as error:
        if distributed.is_distributed():
            return _fail_as_rank(error)
        raise


def build_cli(args: list[str]) -> FitCLI:
    """Data, model and trainer as `args` say.

    Raises:
        ValueError: If they are set to what cannot be.
        OSError: If what is to be resumed is missing, or the output cannot be written.
    """
    check_config_files(args)
    return FitCLI(
        StableRep,
        MultiPositiveDataModule,
        args=args,
        run=False,
        parser_class=FitParser,
        parser_kwargs={"prog": "stablerep fit", "description": "Train a vision transformer on shards."},
        save_config_kwargs={"overwrite": True},  # the folder is the run's own
        seed_everything_default=0,
        trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # the module saves plain types itself
    )


def _fail_as_rank(error: Exception) -> int:
    """Raises the error of the rank that failed first; the others, which it took along, say nothing."""
    if isinstance(error, distributed.FailedElsewhereError):
        return EXIT_FAILED
    if distributed.is_lost_rank(error) and _has_first_rank_left():
        return EXIT_FAILED
    if not distributed.tell_failure(error).startswith(f"rank {distributed.rank()}:"):
        return EXIT_FAILED
    if distributed.is_lost_rank(error):
        raise ConnectionError(
            f"rank {distributed.rank()} lost another rank, which was killed or does not answer; "
            f"--ckpt_path last goes on from the last checkpoint ({' '.join(str(error).split())[:160]}…)"
        ) from error
    raise error


def _has_first_rank_left() -> bool:
    """Whether the store has gone with rank 0, as under torchrun and Slurm: it, or they, have said why."""
    if launch.is_started_by_us() or distributed.rank() == 0:
        return False
    try:
        dist.distributed_c10d._get_default_store().check(["stablerep/failure"])
    except dist.DistNetworkError:
        return True
    except RuntimeError:  # it does not answer
        pass
    return False


def check_config_files(args: Sequence[str]) -> None:
    """Looks at the version of each config file, before its options are read.

    Raises:
        ValueError: If one was written for other options.
    """
    following = [*args[1:], ""]
    for arg, after in zip(args, following, strict=True):
        if arg.startswith("-c"):  # argparse takes `-c FILE`, `-cFILE` and `-c=FILE`
            path = arg.removeprefix("-c").removeprefix("=") or after
        elif arg.partition("=")[0] == "--config":
            path = arg.partition("=")[2] or after
        else:
            continue
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser says what is wrong with it
        if isinstance(values, dict):
            check_config_version(values.get("config_version", CONFIG_VERSION), path)


def check_config_version(version: Any, where: str) -> None:
    """Refuses options of another version.

    Raises:
        ValueError: If they are.
    """
    if version != CONFIG_VERSION:
        raise ValueError(
            f"config_version must be {CONFIG_VERSION}, got {version} in {where}: it was written for another "
            "version of stablerep; take its values over into what `stablerep fit --print_config` shows"
        )


def choose_run_folder(output: Path) -> Path:
    """`output`, or `output-2`, …: one more than the last that holds what a run would replace.

    So a later run has a larger number, whichever were removed.
    """
    runs = list_runs(output)
    taken = [run for run in runs if any((run / name).exists() for name in _RUN_FILES)]
    if not taken:
        return output
    number = 1 if taken[-1] == output else int(taken[-1].name.removeprefix(f"{output.name}-"))
    return output.with_name(f"{output.name}-{number + 1}")


def check_trainer(trainer: Any) -> None:
    """Refuses what would change the order of the data without a word, and accelerators that are not there.

    Raises:
        ValueError: If an option is not at its default, or there is no such accelerator.
    """
    for name, default in _DEFAULTS_OF_EPOCHS.items():
        if (value := trainer[name]) not in (None, default):
            raise ValueError(
                f"trainer.{name} must be {default}, as the order of the data is that of whole epochs, got "
                f"{value}; trainer.max_steps ends a run early"
            )
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.device_count():
        raise ValueError(
            f"trainer.devices is {trainer.devices}, but there is no accelerator {trainer.accelerator} here"
        )


def check_ranks(trainer: pl.Trainer) -> None:
    """Refuses to train on another number of ranks than was asked for, or to wait for what nobody starts.

    Raises:
        ValueError: If torchrun, Slurm or the like have started another number, or several machines are asked
            for and nothing says which of them this is.
    """
    environment: Any = trainer._accelerator_connector.cluster_environment
    num_devices, num_nodes = trainer.num_devices, trainer.num_nodes
    if isinstance(environment, LightningEnvironment):
        missing = [name for name in _MEETING_PLACE if name not in os.environ]
        if num_nodes > 1 and missing:
            raise ValueError(
                f"trainer.num_nodes is {num_nodes}, but {', '.join(missing)} must say which of these "
                "machines this is and where they meet: configs/launch/ has recipes; --trainer.num_nodes 1 "
                "trains on this one"
            )
    elif (num_started := environment.world_size()) != num_devices * num_nodes:
        names: dict[Any, str] = {SLURMEnvironment: "Slurm", TorchElasticEnvironment: "torchrun"}
        raise ValueError(
            f"trainer.devices x trainer.num_nodes must be {num_started}, the ranks that "
            f"{names.get(type(environment), type(environment).__name__)} has started, got {num_devices} x "
            f"{num_nodes}; configs/launch/ has recipes that start one a device"
        )


def count_devices(trainer: Any) -> int:
    """Devices of a node that the trainer's configuration asks for."""
    devices = trainer.devices
    if isinstance(devices, list | tuple):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([device for device in devices.split(",") if device.strip()])
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if trainer.accelerator in ("auto", "gpu", "cuda") else 1
    return int(devices)


def _is_given(value: Any) -> bool:
    return value is not None


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _show_log_lines() -> None:
    """The package's log lines go to stderr: all from the first rank, warnings from the others."""
    for name in ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_advertisement)
    if launch.is_started_by_us():  # the process that started the ranks has said what these say
        for name in ("lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.WARNING)
    log = logging.getLogger("stablerep")
    log.setLevel(logging.INFO if _is_first_rank() else logging.WARNING)
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler())


def _is_first_rank() -> bool:
    """As torchrun, our own launcher or Slurm have numbered the ranks."""
    for names in [("RANK",), ("LOCAL_RANK", "NODE_RANK"), ("SLURM_PROCID",)]:
        if names[0] in os.environ:
            return all(os.environ.get(name, "0") == "0" for name in names)
    return True


class _StderrHandler(logging.Handler):
    """Writes to what stderr is when the line comes: one process may train several times, each captured."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)
