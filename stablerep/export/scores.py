"""The figures of `stablerep evaluate` that are of the exported model."""

from pathlib import Path

from stablerep.evaluation.results import RESULTS_FILE, Record, read_records
from stablerep.loading import LoadedModel


def read_scores(path_text: str, model: LoadedModel) -> list[Record]:
    """The rows of a results file that are of this model: of its weights, and of what is done with them.

    Args:
        path_text: results.jsonl, or its folder.
        model: What is exported.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or has no row of this model.
    """
    path = _find_file(Path(path_text))
    records = read_records(path)
    of_weights = [record for record in records if record.provenance.hashes["weights"] == model.digest]
    if not of_weights:
        found = ", ".join(dict.fromkeys(record.provenance.hashes["weights"][:12] for record in records))
        raise ValueError(
            f"results {path} has no row of these weights ({model.digest[:12]}); its rows are of "
            f"{found or 'none'}"
        )
    own = [
        record
        for record in of_weights
        if record.provenance.hashes.get("architecture") == model.forward_digest
    ]
    if not own:
        raise ValueError(
            f"results {path} has rows of these weights, but of another architecture or other versions of "
            "libraries: evaluate the checkpoint again"
        )
    return own


def _find_file(path: Path) -> Path:
    candidate = path / RESULTS_FILE if path.is_dir() else path
    if not candidate.is_file():
        raise FileNotFoundError(f"results {path} does not exist, or holds no {RESULTS_FILE}")
    return candidate
