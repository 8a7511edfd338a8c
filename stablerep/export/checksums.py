"""SHA256SUMS: what `sha256sum -c` compares a folder with."""

import hashlib
from pathlib import Path

CHECKSUMS_FILE = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Writes the digests of all other files of the folder, by name."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != CHECKSUMS_FILE:
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (folder / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")
