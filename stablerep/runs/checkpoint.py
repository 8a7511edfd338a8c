"""Checkpoints that are written whole or not at all, and that can be told from damaged ones.

A checkpoint is the zip file that torch writes, with the sha256 of all before it as the zip's comment: one
file, one rename, and every reader of such files takes it. Of each run the last two are kept:

    checkpoints/last.ckpt       the newest
    checkpoints/previous.ckpt   the one before, should the newest be damaged
"""

import hashlib
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stablerep.backbones import read_checkpoint

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
PREVIOUS_NAME = "previous.ckpt"
_TRAINING_STATE = {"loops", "lr_schedulers", "optimizer_states", "pytorch-lightning_version"}
_TAG = b"sha256:"
_COMMENT_LENGTH = struct.Struct("<H")  # the last two bytes of a zip file without comment: its length, 0
_TRAILER_BYTES = _COMMENT_LENGTH.size + len(_TAG) + 2 * hashlib.sha256().digest_size
_BLOCK_BYTES = 1 << 22


class NonFiniteWeightsError(ValueError):
    """A weight or a value of the optimizer is NaN or infinite: such a checkpoint is not written."""


class _HashingFile:
    """Writes through to a file, hashes what passes, and keeps its error: torch raises another over it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, block: bytes) -> int:
        self.sha256.update(block)
        try:
            return self._file.write(block)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name, flushes to disk, then renames: a kill leaves an older checkpoint whole.

    What had the name becomes `previous.ckpt` of the same folder. Lightning's own writer stages in the
    system's temporary folder, which may be another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint.

        Raises:
            NonFiniteWeightsError: If it holds a weight or an optimizer's value that is not finite; nothing is
                written.
            OSError: If the folder cannot be written.
        """
        if (name := find_non_finite(checkpoint)) is not None:
            raise NonFiniteWeightsError(
                f"{name} is not finite at step {checkpoint.get('global_step')}: no checkpoint is written"
            )
        final = Path(path)
        _make_folder(final.parent)
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            with temporary.open("w+b") as file:
                hashing = _HashingFile(file)
                try:
                    torch.save(checkpoint, cast(IO[bytes], hashing))  # write and flush are all it calls
                except RuntimeError as error:
                    raise (hashing.error or error) from None
                _write_trailer(file, hashing.sha256.hexdigest())
                file.flush()
                os.fsync(file.fileno())
            if final.exists():
                _keep_as_previous(final)
            os.replace(temporary, final)
            _flush_folder(final.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a checkpoint; never runs code that it holds.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the path is a web address, whose content Lightning would run, or the file is torn
                or damaged, of another model, or without the state of a training to go on from.
        """
        refuse_web_address(path)
        _verify_if_recorded(Path(path))
        checkpoint = read_checkpoint(Path(path))
        if missing := sorted(_TRAINING_STATE - checkpoint.keys()):
            raise ValueError(f"checkpoint {path} holds weights alone: no {missing[0]} to resume from")
        return checkpoint


def find_checkpoint(ckpt_path: str | None, output: Path) -> str | None:
    """The checkpoint to resume from.

    Args:
        ckpt_path: A file; `last` for the newest whole one of the runs `output`, `output-2`, …; `auto` for
            that one where there is any, and otherwise a beginning.
        output: Folder of the first run.

    Raises:
        FileNotFoundError: If it was asked for and is not there.
        ValueError: If it is a web address or damaged, or `last` or `auto` finds damaged checkpoints alone.
    """
    if ckpt_path is None:
        return None
    if ckpt_path not in ("last", "auto"):
        refuse_web_address(ckpt_path)
        if not Path(ckpt_path).is_file():
            raise FileNotFoundError(f"checkpoint {ckpt_path} does not exist")
        _verify_if_recorded(Path(ckpt_path))
        return ckpt_path
    damaged: list[str] = []
    for path in list_checkpoints(output):
        try:
            verify_checkpoint(path)
        except (ValueError, FileNotFoundError) as error:  # a run that goes on may have renamed it
            damaged.append(str(error))
            continue
        for message in damaged:
            logger.warning("%s", message)
        return str(path)
    if damaged:
        raise ValueError(f"ckpt_path is {ckpt_path}, but {damaged[0]}, and no whole one is left")
    if ckpt_path == "last":
        raise FileNotFoundError(f"ckpt_path is last, but there is no {output / LAST_CHECKPOINT}")
    return None


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of the runs `output`, `output-2`, …, the newest first.

    By name, not by the files' times: a copy or a restored backup has those of the copying.
    """
    folders = [run / LAST_CHECKPOINT.parent for run in reversed(list_runs(output))]
    paths = [folder / name for folder in folders for name in (LAST_CHECKPOINT.name, PREVIOUS_NAME)]
    return list(filter(Path.is_file, paths))


def list_runs(output: Path) -> list[Path]:
    """The folders `output`, `output-2`, `output-3`, … that are there, the newest last."""
    numbers = {output: 1} if output.exists() else {}
    for path in output.parent.glob("*"):
        number = path.name.removeprefix(f"{output.name}-")
        if number != path.name and number.isdecimal():  # and not another run whose name begins alike
            numbers[path] = int(number)
    return sorted(numbers, key=lambda path: numbers[path])


def drop_superseded(resumed_from: Path, own: Path) -> None:
    """Removes `previous.ckpt` of the run that went on as this one, when this one has two checkpoints itself.

    A job that is put back into the queue again and again would fill the disk. `last.ckpt` of each stays.

    Args:
        resumed_from: The checkpoint that this run went on from.
        own: `last.ckpt` of this run.
    """
    former, run = resumed_from.parent.parent, own.parent.parent
    is_whole = resumed_from.name == LAST_CHECKPOINT.name and own.with_name(PREVIOUS_NAME).exists()
    if (
        is_whole
        and former.parent.resolve() == run.parent.resolve()
        and _first_name(former) == _first_name(run)
    ):
        with suppress(OSError):  # the disk is somebody else's to tidy then
            resumed_from.with_name(PREVIOUS_NAME).unlink(missing_ok=True)


def _first_name(run: Path) -> str:
    """`output` of `output-3`."""
    name, _, number = run.name.rpartition("-")
    return name if name and number.isdecimal() else run.name


def verify_checkpoint(path: Path) -> None:
    """Compares the sha256 that the file records with that of its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If they differ, or none is recorded.
    """
    recorded = read_recorded_sha256(path)
    if recorded is None:
        raise ValueError(f"checkpoint {path} is torn or of another program: it records no sha256")
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size - _TRAILER_BYTES
        while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
            sha256.update(block)
            left -= len(block)
    sha256.update(_COMMENT_LENGTH.pack(0))
    if sha256.hexdigest() != recorded:
        raise ValueError(
            f"checkpoint {path} is damaged: sha256 {sha256.hexdigest()[:16]}…, recorded {recorded[:16]}…"
        )


def _verify_if_recorded(path: Path) -> None:
    """Files of other programs record none."""
    if read_recorded_sha256(path) is not None:
        verify_checkpoint(path)


def read_recorded_sha256(path: Path) -> str | None:
    """The sha256 at the file's end, in hexadecimal; None where there is none.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if path.stat().st_size < _TRAILER_BYTES:
        return None
    with path.open("rb") as file:
        file.seek(-_TRAILER_BYTES, os.SEEK_END)
        trailer = file.read()
    start = _COMMENT_LENGTH.pack(_TRAILER_BYTES - _COMMENT_LENGTH.size) + _TAG
    return trailer.removeprefix(start).decode("latin1") if trailer.startswith(start) else None


def find_non_finite(checkpoint: dict[str, Any]) -> str | None:
    """The name of the first weight or optimizer's value that is NaN or infinite."""
    for name, tensor in _named_tensors(checkpoint):
        if not bool(torch.isfinite(tensor).all()):
            return name
    return None


def _named_tensors(checkpoint: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in checkpoint.get("state_dict", {}).items():
        if isinstance(value, torch.Tensor):
            yield name, value
    for optimizer in checkpoint.get("optimizer_states", []):
        for index, state in optimizer["state"].items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield f"{name} of the optimizer's parameter {index}", value


def refuse_web_address(path: Any) -> None:
    """Lightning runs the code that a checkpoint from the web may hold.

    Raises:
        ValueError: If the path is an address.
    """
    if "://" in str(path):
        raise ValueError(f"checkpoint must be a local file, got {path}")


def _write_trailer(file: IO[bytes], sha256: str) -> None:
    """Sets the zip's comment: its length is the file's last two bytes, its text follows."""
    comment = _TAG + sha256.encode()
    file.seek(-_COMMENT_LENGTH.size, os.SEEK_END)
    file.write(_COMMENT_LENGTH.pack(len(comment)) + comment)


def _keep_as_previous(final: Path) -> None:
    """Gives `final` its second name, so that there is a `last.ckpt` at every moment."""
    previous, temporary = final.with_name(PREVIOUS_NAME), final.with_name(f".{PREVIOUS_NAME}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(final, temporary)
    except OSError:  # a file system without second names
        os.replace(final, previous)
        return
    os.replace(temporary, previous)


def _make_folder(folder: Path) -> None:
    """Makes a folder whose name, and that of the folder above, outlive a power cut."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for above in (folder.parent, folder.parent.parent):
            _flush_folder(above)


def _flush_folder(folder: Path) -> None:
    """So that the new name, too, outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
