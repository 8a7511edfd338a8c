"""`stablerep evaluate cache verify`: is every file of the cache what was written?"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from stablerep.evaluation.cache.files import (
    DamagedFileError,
    default_cache_folder,
    format_bytes,
    list_files,
    verify_file,
)


@dataclass(frozen=True)
class VerifyConfig:
    """Which cache, and what becomes of damaged files."""

    cache: str = field(default_factory=default_cache_folder)
    """Folder of the cached features."""
    remove: bool = False
    """Remove damaged files; an evaluation computes their features anew either way."""


def run(config: VerifyConfig) -> int:
    """Compares every file with its own sha256 and names each that differs.

    Returns:
        0 if all are sound, 1 if one is damaged.
    """
    files = list_files(Path(config.cache))
    num_sound, num_damaged = 0, 0
    total = sum(file.num_bytes for file in files)
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, leave=False) as progress:
        for file in files:
            try:
                verify_file(file.path)
                num_sound += 1
            except DamagedFileError as error:
                num_damaged += 1
                progress.write(f"stablerep evaluate cache verify: {error}", file=sys.stderr)
                if config.remove:
                    file.path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue  # pruned meanwhile
            progress.update(file.num_bytes)
    what = "damaged and removed" if config.remove else "damaged"
    print(f"{config.cache}: {num_sound} files sound, {num_damaged} {what}; {format_bytes(total)}")
    return 1 if num_damaged else 0
