import subprocess
import sys
from pathlib import Path

import pytest

from tests.stablerep.datasets import write_dataset
from tests.stablerep.fit_jobs import ROOT, Job


@pytest.mark.e2e
@pytest.mark.distributed
def test_killed_runs_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """The short form of benchmarks/resume.py; other numbers of ranks are in data/test_resuming.py."""
    write_dataset(tmp_path / "shards", [16, 16], num_images=2, size=16)
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "resume.py"), "--data", str(tmp_path / "shards")),
        *(
            "--num_captions",
            "32",
            "--num_kills",
            "2",
            "--ranks",
            "2:2,2:1",
            "--num_workers",
            "0",
            "--name",
            "",
        ),
    ]
    environment = Job(tmp_path).environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
