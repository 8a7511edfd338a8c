"""`stablerep fit`: a LightningCLI with one verb.

Each run has a folder of its own: `--output`, or when that holds a run, the same name with `-2`, `-3`, ….

    config.yaml                the run's whole configuration
    metrics.csv, events.*      the logs
    checkpoints/last.ckpt      replaced whole, every `--checkpoint_every_n_steps` and at the end
"""

import logging
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from stablerep.arguments import SuggestingErrors
from stablerep.callbacks import Throughput
from stablerep.checkpoint import AtomicCheckpointIO
from stablerep.datamodule import MultiPositiveDataModule
from stablerep.module import StableRep

PROCESS_GROUP_TIMEOUT = timedelta(minutes=5)  # torch's half an hour is what a hang would cost
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
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
    r"GPU available but not used",  # trainer.accelerator is the config's choice
)


class FitParser(SuggestingErrors, LightningArgumentParser):
    """Lightning's parser, with errors that name the nearest right option."""


class FitCLI(LightningCLI):
    """Adds what every run has: folder, loggers, last checkpoint, throughput, short timeouts."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside trainer, model and data, and what model and data share."""
        parser.add_argument(
            "--output",
            type=str,
            default="runs/fit",
            help="folder of the run; -2, -3, … is added if it is taken",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="checkpoint to resume from; `last` is that of the newest run of --output",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps", type=int, default=1000, help="steps between checkpoints, >= 1"
        )
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("data.num_captions_per_rank", "model.num_captions_per_rank")
        parser.link_arguments("data.num_views_per_caption", "model.num_views_per_caption")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Settles the run's folder and the checkpoint, before anything is built."""
        if (every := self.config.checkpoint_every_n_steps) < 1:
            raise ValueError(f"checkpoint_every_n_steps must be >= 1, got {every}")
        output = Path(self.config.output)
        self.ckpt_path = find_checkpoint(self.config.ckpt_path, output)
        self.run_folder = choose_run_folder(output)
        self.run_folder.mkdir(parents=True, exist_ok=True)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The configured trainer, with the run's folder, loggers, strategy and checkpoints."""
        trainer = self.config_init.trainer
        folder = str(self.run_folder)
        kwargs |= {"default_root_dir": folder, "plugins": [*_as_list(trainer.plugins), AtomicCheckpointIO()]}
        if trainer.logger in (None, True):
            kwargs["logger"] = [
                CSVLogger(folder, name="", version=""),
                TensorBoardLogger(folder, name="", version=""),
            ]
        if trainer.strategy == "auto" and count_devices(trainer) * trainer.num_nodes > 1:
            kwargs["strategy"] = DDPStrategy(timeout=PROCESS_GROUP_TIMEOUT)
        callbacks: list[pl.Callback] = [Throughput(), *_as_list(trainer.callbacks)]
        if trainer.enable_checkpointing is not False:
            callbacks.append(self._build_checkpoint_callback())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _build_checkpoint_callback(self) -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=self.run_folder / LAST_CHECKPOINT.parent,
            filename=LAST_CHECKPOINT.stem,
            every_n_train_steps=self.config.checkpoint_every_n_steps,
            enable_version_counter=False,  # one file, replaced whole
        )

    def fit(self) -> None:
        """Trains, then saves the last weights."""
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            self.trainer.fit(
                self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path, weights_only=True
            )
        except SystemExit as end:  # what Lightning makes of Ctrl-C, which it then ignores
            if not self.trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from end
        if self.trainer.checkpoint_callback:
            self.trainer.save_checkpoint(self.run_folder / LAST_CHECKPOINT, weights_only=False)
            if self.trainer.is_global_zero:
                print(f"checkpoint: {self.run_folder / LAST_CHECKPOINT}")


def main(args: list[str]) -> int:
    """Trains as `args` say (without the verb).

    With several devices Lightning starts the other ranks by running this process's own command line again:
    then this is to be called from the command line and not with arguments of its own.

    Raises:
        ValueError: If data, model or trainer are set to what cannot be.
        OSError: If the data or a checkpoint is missing, or the output cannot be written.
    """
    _show_log_lines()
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            cli = FitCLI(
                StableRep,
                MultiPositiveDataModule,
                args=args,
                run=False,
                parser_class=FitParser,
                parser_kwargs={
                    "prog": "stablerep fit",
                    "description": "Train a vision transformer on shards.",
                },
                save_config_kwargs={"overwrite": True},  # the folder is the run's own
                seed_everything_default=0,
                trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # the module saves plain types itself
            )
            cli.fit()
        except MisconfigurationException as error:
            raise ValueError(" ".join(str(error).split())) from error
    return 0


def choose_run_folder(output: Path) -> Path:
    """`output`, or the first of `output-2`, `output-3`, … that holds nothing which a run would replace."""
    folder, number = output, 1
    while any((folder / name).exists() for name in _RUN_FILES):
        number += 1
        folder = output.with_name(f"{output.name}-{number}")
    return folder


def find_checkpoint(ckpt_path: str | None, output: Path) -> str | None:
    """The checkpoint to resume from.

    Raises:
        FileNotFoundError: If it was asked for and is not there.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        if not Path(ckpt_path).is_file():
            raise FileNotFoundError(f"checkpoint {ckpt_path} does not exist")
        return ckpt_path
    later = [path for path in output.parent.glob("*") if _is_later_run(path.name, output.name)]
    runs = [path for path in (output, *later) if (path / LAST_CHECKPOINT).exists()]
    if not runs:
        raise FileNotFoundError(f"ckpt_path is last, but there is no {output / LAST_CHECKPOINT}")
    return str(max(runs, key=lambda run: (run / LAST_CHECKPOINT).stat().st_mtime) / LAST_CHECKPOINT)


def _is_later_run(name: str, first: str) -> bool:
    """Whether it is `first-2`, `first-3`, …, and not another run whose name begins alike."""
    return name.startswith(f"{first}-") and name.removeprefix(f"{first}-").isdecimal()


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


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _show_log_lines() -> None:
    """The package's log lines go to stderr: all from the first rank, warnings from the others."""
    for name in ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_advertisement)
    log = logging.getLogger("stablerep")
    log.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler())


class _StderrHandler(logging.Handler):
    """Writes to what stderr is when the line comes: one process may train several times, each captured."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)
