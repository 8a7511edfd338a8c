import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_benchmark_of_the_step_runs_on_a_processor(tmp_path: Path) -> None:
    options = "{patch_size: 8, depth: 1, embed_dim: 16, num_heads: 2}"
    sizes = {"image_size": 16, "num_captions": 4, "num_views": 2, "hidden_features": 16, "num_steps": 2}
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--output", str(tmp_path)),
            *("--num_repeats", "1", "--task.backbone_options", options, "--task.num_warmup_steps", "1"),
            *[word for name, size in sizes.items() for word in (f"--task.{name}", str(size))],
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "train_step.json").read_text())
    for side in ("direct", "ours"):
        assert measured["turns"][side][0]["images_per_second"] > 0
    assert "| ours |" in (tmp_path / "train_step.md").read_text()
