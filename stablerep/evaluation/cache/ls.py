"""`stablerep evaluate cache ls`: what is in the cache."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from stablerep.evaluation.cache.files import (
    CachedFile,
    DamagedFileError,
    default_cache_folder,
    format_bytes,
    format_table,
    list_files,
    read_header,
)

TABLE_HEAD = ["key", "model", "data", "split", "feature", "values", "size", "last used"]
_DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class ListConfig:
    """Which cache."""

    cache: str = field(default_factory=default_cache_folder)
    """Folder of the cached features."""


def run(config: ListConfig) -> int:
    """Prints one line a file, the last used first, and the sum of their sizes.

    Returns:
        0.
    """
    files = list_files(Path(config.cache))
    if files:
        print(format_table(TABLE_HEAD, [describe_file(file) for file in files]))
    total = sum(file.num_bytes for file in files)
    print(f"{config.cache}: {len(files)} files, {format_bytes(total)}")
    return 0


def describe_file(file: CachedFile) -> list[str]:
    """The entries of one line, from the header alone."""
    size, age = format_bytes(file.num_bytes), format_age(time.time() - file.last_used)
    try:
        header = read_header(file.path)
        key = json.loads(header.metadata["key"])
        values = header.tensors["values"]
        shape = "×".join(map(str, values.shape))
        described = [*(header.metadata[name] for name in ("model", "data", "split")), key["feature"]]
    except (FileNotFoundError, DamagedFileError, KeyError, ValueError):
        return [file.key[:12], "(damaged)", "", "", "", "", size, age]
    return [file.key[:12], *described, f"{shape} {values.dtype}", size, age]


def format_age(seconds: float) -> str:
    """As people say it: 3 h ago."""
    for unit, unit_seconds in (("days", _DAY_SECONDS), ("h", 3600.0), ("min", 60.0)):
        if seconds >= unit_seconds:
            return f"{seconds / unit_seconds:.0f} {unit} ago"
    return "now"
