"""How a checkpoint was trained, and on what: from the run's folder, and the datasets' own files."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from data_gen.shards import DatasetManifest, open_store, read_manifest
from stablerep.backbones import is_checkpoint
from stablerep.export.privacy import publish_settings, publish_text
from stablerep.loading.official import read_weights

TRAINING_FILE = "training_config.yaml"
_RUN_CONFIG, _CHECKPOINTS = "config.yaml", "checkpoints"
_DATASET_CARD, _NO_LICENSE = "README.md", "unknown"
_HEADING = """# How it was trained. Absolute paths are cut to their last part, addresses have no user,
# password or query, what is called password, secret, token, api_key or credential is removed, and of loggers
# the classes alone are left.
"""


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset as its own files describe it.

    Attributes:
        name: The last part of its folder, so that no folder of this machine is published.
        manifest: Its dataset.json as it is now; None where it is not there any more, or not of this project.
        license: What its card states; "unknown" if it states nothing.
    """

    name: str
    manifest: DatasetManifest | None = None
    license: str = _NO_LICENSE


@dataclass(frozen=True)
class Training:
    """What is known of a training.

    Attributes:
        config: The run's configuration as it may be published; None where the run's folder is not there.
        model: The hyper-parameters that the checkpoint holds, likewise.
        num_steps: Optimizer steps until then.
        datasets: On what.
    """

    config: Mapping[str, Any] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int | None = None
    datasets: tuple[DatasetFacts, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether there is anything to write down."""
        return self.config is not None or bool(self.model)

    @property
    def has_generated_images(self) -> bool:
        """Whether a dataset of `stablerep generate` was found."""
        return any(dataset.manifest is not None for dataset in self.datasets)

    def write(self, folder: Path) -> None:
        """Writes training_config.yaml: the run's configuration, or else the hyper-parameters."""
        if not self.is_known:
            return
        settings = {"model": dict(self.model)} if self.config is None else dict(self.config)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (folder / TRAINING_FILE).write_text(f"{_HEADING}{text}", encoding="utf-8")


def read_training(checkpoint: Path) -> Training:
    """What a checkpoint, the folder of its run and the datasets that it names tell.

    Datasets that are gone are named and no more: an export does not need them. A relative name of one is that
    of the folder in which the run was started.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it cannot be read.
    """
    content = read_weights(checkpoint)
    if not is_checkpoint(content):
        return Training()
    folder = _find_run(checkpoint)
    config = None if folder is None else _read_run_config(folder)
    steps = content.get("global_step")
    return Training(
        config=None if config is None else publish_settings(config),
        model=publish_settings(_plain(content.get("hyper_parameters") or {})),
        num_steps=int(steps) if isinstance(steps, int) else None,
        datasets=() if folder is None else tuple(_read_datasets(folder, config or {})),
    )


def _find_run(checkpoint: Path) -> Path | None:
    """The folder of the run to whose `checkpoints` folder the file belongs."""
    for path in (Path(os.path.abspath(checkpoint)), checkpoint.resolve()):
        folder = path.parent.parent
        if path.parent.name == _CHECKPOINTS and (folder / _RUN_CONFIG).is_file():
            return folder
    return None


def _read_run_config(folder: Path) -> dict[str, Any] | None:
    try:
        config = yaml.safe_load((folder / _RUN_CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return config if isinstance(config, dict) else None


def _read_datasets(folder: Path, config: Mapping[str, Any]) -> Iterator[DatasetFacts]:
    start = _find_start(folder, config.get("output"))
    for root in _find_roots(config):
        name = PurePosixPath(publish_text(root)).name or root
        is_relative = "://" not in root and not Path(root).is_absolute()
        if not is_relative:
            yield _read_dataset(name, root)
        elif start is not None:
            yield _read_dataset(name, str(start / root))
        else:
            yield DatasetFacts(name)


def _find_start(folder: Path, output: Any) -> Path | None:
    """Where `stablerep fit` was started, from the run's folder and the relative name that it was given."""
    path = Path(str(output or ""))
    if path.is_absolute() or not path.parts or ".." in path.parts:
        return None
    start = folder.parents[len(path.parts) - 1] if len(path.parts) <= len(folder.parents) else folder
    return start if (start / path).parent == folder.parent else None  # else it was moved


def _find_roots(config: Mapping[str, Any]) -> list[str]:
    try:
        data = config.get("data") or {}
        roots = [entry["root"] for entry in data.get("roots") or []]
        return [str(root) for root in roots or [data.get("root")] if root]
    except (AttributeError, KeyError, TypeError):
        return []  # it is written all the same


def _read_dataset(name: str, root: str) -> DatasetFacts:
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
