"""Runs `stablerep evaluate` in this process, small and quick."""

import json
from pathlib import Path
from typing import Any

from stablerep.cli import main
from stablerep.evaluation.results import Results, read_results

QUICK = [
    *("--linear.num_epochs=3", "--linear.num_views=2", "--knn.k=[5]", "--num_workers=0", "--device=cpu"),
    *("--fewshot.num_ways=2", "--fewshot.num_shots=1", "--fewshot.num_queries_per_class=2"),
    *("--fewshot.num_episodes=20", "--zeroshot.templates=plain"),
    *("--robustness.corruptions=[gaussian_noise]", "--robustness.severities=[1, 5]"),
]


def evaluate(checkpoint: Path, data: Path | str, output: Path, *options: str, code: int = 0) -> Results:
    """The rows that the command left in `output`."""
    words = ["evaluate", f"--checkpoint={checkpoint}", f"--data={data}", f"--output={output}"]
    assert main([*words, *QUICK, *options]) == code
    return read_results(output)


def read_run(output: Path) -> dict[str, Any]:
    """The content of run.json."""
    content: dict[str, Any] = json.loads((output / "run.json").read_text())
    return content


def values_of(results: Results) -> dict[tuple[str, str, str], float]:
    """Value by protocol, metric and feature."""
    return {row.key: row.value for row in results.rows}
