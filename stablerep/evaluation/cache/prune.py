"""`stablerep evaluate cache prune`: makes room, by age, by size, or of everything."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stablerep.evaluation.cache.files import (
    DIGESTS_FOLDER,
    DIGESTS_NAME,
    TEMPORARY_NAME,
    CachedFile,
    default_cache_folder,
    format_bytes,
    format_table,
    list_files,
)
from stablerep.evaluation.cache.ls import TABLE_HEAD, describe_file

_DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class PruneConfig:
    """Which files of which cache."""

    cache: str = field(default_factory=default_cache_folder)
    """Folder of the cached features."""
    max_age_days: float | None = None
    """Remove what was last used longer ago, days."""
    max_bytes: int | None = None
    """Remove what was used least recently, until the rest has at most so many bytes."""
    everything: bool = False
    """Remove all files, and what is known of the bytes of images."""
    dry_run: bool = False
    """Say what would be removed, and remove nothing."""

    def __post_init__(self) -> None:
        if self.max_age_days is None and self.max_bytes is None and not self.everything:
            raise ValueError("prune needs one of max_age_days, max_bytes and everything")
        for name in ("max_age_days", "max_bytes"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")


def run(config: PruneConfig) -> int:
    """Removes files and prints a table of them.

    Returns:
        0.
    """
    folder = Path(config.cache)
    files = list_files(folder)
    chosen = choose_files(files, config, time.time())
    if chosen:
        print(format_table(TABLE_HEAD, [describe_file(file) for file in chosen]))
    # Of a process that was killed as it wrote; one that still writes is not a day old.
    leftovers = [
        file
        for place in (folder, folder / DIGESTS_FOLDER)
        for file in list_files(place, TEMPORARY_NAME)
        if time.time() - file.last_used > _DAY_SECONDS
    ]
    notes = list_files(folder / DIGESTS_FOLDER, DIGESTS_NAME) if config.everything else []
    if not config.dry_run:
        for file in (*chosen, *leftovers, *notes):
            file.path.unlink(missing_ok=True)
    freed = sum(file.num_bytes for file in (*chosen, *leftovers, *notes))
    kept = sum(file.num_bytes for file in files) - sum(file.num_bytes for file in chosen)
    verb = "would be removed" if config.dry_run else "removed"
    print(
        f"{config.cache}: {len(chosen)} files {verb}, {format_bytes(freed)}; "
        f"{len(files) - len(chosen)} files stay, {format_bytes(kept)}"
    )
    return 0


def choose_files(files: Sequence[CachedFile], config: PruneConfig, now: float) -> list[CachedFile]:
    """The files to remove.

    Args:
        files: All files, the last used first.
        config: What is asked for; what one of its bounds refuses goes.
        now: Seconds since 1970.
    """
    chosen = []
    num_bytes = 0
    for file in files:
        age_days = (now - file.last_used) / _DAY_SECONDS
        if config.everything or (config.max_age_days is not None and age_days > config.max_age_days):
            chosen.append(file)
            continue
        num_bytes += file.num_bytes
        if config.max_bytes is not None and num_bytes > config.max_bytes:
            chosen.append(file)
    return chosen
