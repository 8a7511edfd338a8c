import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_benchmark_of_the_losses_runs(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "loss.py"), "--output", str(tmp_path)),
            *("--sizes", "[64]", "--width", "8", "--dtypes", "[float32]", "--num_repeats", "1"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "loss.json").read_text())
    assert [row["loss"] for row in measured["rows"]] == [
        "image",
        "image-text, scale 14",
        "image-text, scale 100",
    ]
    assert max(measured["gradient_error_float32"].values()) < 1e-5
    assert (tmp_path / "loss.md").read_text().count("| direct") == 4
