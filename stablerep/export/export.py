"""`stablerep export CHECKPOINT --output DIR`: a folder that timm, transformers and open_clip load.

    model.safetensors             the backbone's weights under timm's own names
    config.json                   what timm and transformers build from it, and the input's format
    open_clip_model.safetensors   both towers under open_clip's names, where texts are projected linearly
    open_clip_config.json         what open_clip builds from it
    README.md                     the model card
    training_config.yaml          how it was trained, where that is known
    SHA256SUMS                    for `sha256sum -c SHA256SUMS`

The folder is written beside its final name, loaded back through each library and compared with the source,
and only then moved into place: it is there whole, or not at all. What may be
published of settings: `stablerep.export.privacy`.
"""

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stablerep.export.card import CARD_FILE, ModelFacts, build_card
from stablerep.export.checksums import CHECKSUMS_FILE, find_change, write_checksums
from stablerep.export.comparison import Comparison, compare_forms
from stablerep.export.hub import check_push, check_repository, push_folder
from stablerep.export.open_clip_files import (
    OPEN_CLIP_WEIGHTS,
    find_image_tower,
    refuse_reason,
    write_open_clip_config,
    write_open_clip_weights,
)
from stablerep.export.scores import read_scores
from stablerep.export.timm_files import CONFIG_FILE, WEIGHTS_FILE, build_model_args, write_timm_files
from stablerep.export.training import TRAINING_FILE, read_training
from stablerep.loading import LoadedModel, load_model
from stablerep.loading.clip_models import OPEN_CLIP_CONFIG
from stablerep.loading.timm_models import LOCAL_FOLDER

_OWN_FILES = {
    WEIGHTS_FILE,
    CONFIG_FILE,
    OPEN_CLIP_WEIGHTS,
    OPEN_CLIP_CONFIG,
    CARD_FILE,
    TRAINING_FILE,
    CHECKSUMS_FILE,
}


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to."""

    checkpoint: str
    """Checkpoint that `stablerep fit` wrote, the authors' .pth, or a vision transformer's weights; it may
    stand alone as the first word."""
    output: str
    """Folder to write; it must not be there yet, or be empty."""
    ema: bool = False
    """Export the moving average of the weights (`model.optimizer.ema_decay`) in place of the weights."""
    overwrite: bool = False
    """Replace an earlier export in the output folder, if its files are as they were written, and in the
    repository of `push`, whatever its weights."""
    name: str | None = None
    """What the model card calls the model; null takes the output folder's name."""
    license: str = "unknown"
    """Licence of the weights, an identifier of the hub such as apache-2.0; it depends on the generator and on
    the captions, so none is assumed."""
    results: str | None = None
    """results.jsonl of `stablerep evaluate`, or its folder, for the model card; rows of other models are
    refused."""
    push: str | None = None
    """ORG/NAME: upload the folder to the Hugging Face hub, with the token of `hf auth login`; one that
    holds an earlier export needs `overwrite`, one of anything else is refused."""
    private: bool = False
    """Make the repository on the hub a private one; a public one is refused."""

    def __post_init__(self) -> None:
        if not self.license.strip() or "\n" in self.license:
            raise ValueError(f"license must be an identifier on one line, got {self.license!r}")
        if self.push is not None:
            check_repository(self.push)
        elif self.private:
            raise ValueError("private needs push: without it nothing is uploaded")


def main(args: list[str]) -> int:
    """Exports as `args` say (without the verb), the first of which may be the checkpoint.

    Returns:
        0.

    Raises:
        ValueError: If the checkpoint, an option or the results are wrong, or a form does not give back what
            the source computes; then nothing is written.
        OSError: If a file is missing or the output cannot be written.
    """
    from stablerep.cli import VERBS, parse_config

    if args and not args[0].startswith("-"):
        args = ["--checkpoint", *args]
    return run(parse_config(ExportConfig, args, prog="stablerep export", description=VERBS["export"].help))


def run(config: ExportConfig) -> int:
    """Write the folder, check it, move it into place, and upload it where that is asked for.

    Returns:
        0.

    Raises:
        ValueError: As for `main`.
        OSError: As for `main`.
    """
    output = Path(config.output)
    _restore_former(output)
    _check_output(output, config.overwrite)
    if config.push is not None:
        check_push(config.push, private=config.private, overwrite=config.overwrite)
    model = load_model(config.checkpoint, ema=config.ema)
    if model.kind not in ("checkpoint", "stablerep", "weights"):
        raise ValueError(
            "export takes a checkpoint of stablerep fit, the authors' weights or those of a vision "
            f"transformer, got {config.checkpoint}, a model of {model.kind}"
        )
    scores = read_scores(config.results, model) if config.results else []
    training = read_training(Path(config.checkpoint))
    note = refuse_reason(model)
    tower = find_image_tower(model) if note is None else None
    with _whole_folder(output) as folder:
        write_timm_files(folder, model, config.license)
        if note is None:
            write_open_clip_weights(folder, model, config.license)
            write_open_clip_config(folder, model, tower or f"{LOCAL_FOLDER}{_name_place(output)}")
        comparisons = compare_forms(folder, model)
        training.write(folder)
        facts = ModelFacts(
            name=config.name or output.resolve().name,
            location=config.push,
            license=config.license,
            ema=config.ema,
            has_open_clip=note is None,
            open_clip_is_elsewhere=note is None and tower is None,
            model_args=build_model_args(model),
            comparisons=tuple(comparisons),
        )
        (folder / CARD_FILE).write_text(build_card(model, facts, training, scores), encoding="utf-8")
        for path in folder.iterdir():  # safetensors keeps its files from other users
            shutil.copymode(folder / CARD_FILE, path)
        write_checksums(folder)
    print(_describe(output, model, comparisons, note))
    if facts.open_clip_is_elsewhere:
        print(
            f"open_clip looks for the backbone in {_name_place(output)}, seen from where Python is started; "
            f"{CARD_FILE} shows how it is told another place"
        )
    if config.push is not None:
        address = push_folder(
            output, config.push, _OWN_FILES, private=config.private, overwrite=config.overwrite
        )
        print(f"pushed to {address}")
    return 0


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuses what must not be replaced, before the work."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"output {output} is not a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"output {output} is not empty: name another folder, or --overwrite an export")
    if others := sorted(path.name for path in output.iterdir() if path.name not in _OWN_FILES):
        raise ValueError(f"output {output} holds {others[0]}, which is of no export: it is not replaced")
    if change := find_change(output):
        raise ValueError(f"output {output} {change}: it is not replaced")


def _name_place(output: Path) -> str:
    """The folder as the user calls it, without what leads there on this machine."""
    return output.resolve().name if output.is_absolute() or not output.name else output.as_posix()


def _restore_former(output: Path) -> None:
    """Puts an export back that a kill has left aside between two renames; one left after them is removed."""
    folder = output.resolve()
    for former in folder.parent.glob(f".{glob.escape(folder.name)}.*.former"):
        is_replaced = not former.with_suffix(".partial").exists()  # that has become the output
        if output.exists() and is_replaced:
            shutil.rmtree(former)
        elif not output.exists() and not is_replaced:
            os.replace(former, output)


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside the output, which takes its place at the end, or is removed after an error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    parent, name = output.resolve().parent, output.resolve().name
    folder, former = parent / f".{name}.{token}.partial", parent / f".{name}.{token}.former"
    folder.mkdir()
    try:
        yield folder
        if output.exists():
            os.replace(output, former)
        try:
            os.replace(folder, output)
        except OSError:
            if former.exists():
                os.replace(former, output)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _describe(output: Path, model: LoadedModel, comparisons: list[Comparison], note: str | None) -> str:
    lines = [
        f"{model.name}: {model.architecture}, {sum(p.numel() for p in model.backbone.parameters())} weights"
    ]
    lines += [f"  {one.form:<40} {one.difference:.1e}" for one in comparisons]
    if note is not None and model.has_text:
        lines.append(f"no files for open_clip: {note}")
    return "\n".join([*lines, f"{output}"])
