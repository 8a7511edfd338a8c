"""How a checkpoint was trained, and on what: from the run's folder, and the datasets' own files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from data_gen.shards import DatasetManifest, open_store, read_manifest
from stablerep.backbones import is_checkpoint
from stablerep.loading.official import read_weights

TRAINING_FILE = "training_config.yaml"
_RUN_CONFIG, _CHECKPOINTS = "config.yaml", "checkpoints"
_DATASET_CARD, _NO_LICENSE = "README.md", "unknown"


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset as its own files describe it.

    Attributes:
        name: The last part of its folder, so that no folder of this machine is published.
        manifest: Its dataset.json; None where it is not there any more, or not of this project.
        license: What its card states; "unknown" if it states nothing.
    """

    name: str
    manifest: DatasetManifest | None = None
    license: str = _NO_LICENSE


@dataclass(frozen=True)
class Training:
    """What is known of a training.

    Attributes:
        config: The run's whole configuration, as text; None where the run's folder is not there.
        model: The hyper-parameters that the checkpoint holds.
        num_steps: Optimizer steps until then.
        datasets: On what.
    """

    config: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int | None = None
    datasets: tuple[DatasetFacts, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether there is anything to write down."""
        return self.config is not None or bool(self.model)

    def write(self, folder: Path) -> None:
        """Writes training_config.yaml: the run's configuration as it is, or else the hyper-parameters."""
        if self.config is not None:
            text = self.config
        elif self.model:
            text = yaml.safe_dump({"model": dict(self.model)}, sort_keys=False, allow_unicode=True)
        else:
            return
        (folder / TRAINING_FILE).write_text(text, encoding="utf-8")


def read_training(checkpoint: Path) -> Training:
    """What a checkpoint, the folder of its run and the datasets that it names tell.

    Datasets that are gone are named and no more: an export does not need them.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it cannot be read.
    """
    content = read_weights(checkpoint)
    if not is_checkpoint(content):
        return Training()
    config = _read_run_config(checkpoint)
    steps = content.get("global_step")
    return Training(
        config=config,
        model=_plain(content.get("hyper_parameters") or {}),
        num_steps=int(steps) if isinstance(steps, int) else None,
        datasets=tuple(_read_dataset(root) for root in _find_roots(config)),
    )


def _read_run_config(checkpoint: Path) -> str | None:
    """The configuration of the run to whose `checkpoints` folder the file belongs."""
    folder = checkpoint.resolve().parent
    path = folder.parent / _RUN_CONFIG
    if folder.name != _CHECKPOINTS or not path.is_file():
        return None
    return path.read_text(encoding="utf-8")


def _find_roots(config: str | None) -> list[str]:
    if config is None:
        return []
    try:
        data = (yaml.safe_load(config) or {}).get("data") or {}
        roots = [entry["root"] for entry in data.get("roots") or []]
        return [str(root) for root in roots or [data.get("root")] if root]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return []  # it is copied all the same


def _read_dataset(root: str) -> DatasetFacts:
    name = PurePosixPath(root.rstrip("/")).name or root
    try:
        store = open_store(root)
        return DatasetFacts(name, read_manifest(store), _read_license(store))
    except (OSError, ValueError, ImportError):
        return DatasetFacts(name)


def _read_license(store: Any) -> str:
    """The licence in the header of a dataset's card."""
    try:
        text = store.read(_DATASET_CARD).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        _, opening, rest = text.partition("---\n")
        header = yaml.safe_load(rest.partition("\n---")[0]) if opening else None
        return str((header or {}).get("license") or _NO_LICENSE)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return _NO_LICENSE


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that YAML holds without tags of Python's; tuples become lists."""
    return {str(key): _plain_value(value) for key, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _plain(value)
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
