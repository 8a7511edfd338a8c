import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stablerep.distributed import launch
from stablerep.distributed.launch import run_ranks
from tests.processes import MAX_SECONDS, wait_until

ROOT = Path(__file__).parents[3]
WAIT = "[time.sleep(0.05) for _ in range(12000)]"
"""Ten minutes in short sleeps: a signal that comes just as a long one begins is not seen before its end."""


def python(program: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"import os, signal, sys, time; rank = int(os.environ['LOCAL_RANK']); {program}",
    ]


def test_each_rank_has_its_own_number_and_the_same_meeting_place(tmp_path: Path) -> None:
    names = ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    program = f"import json; json.dump([os.environ[n] for n in {names}], open(f'{tmp_path}/{{rank}}', 'w'))"
    assert run_ranks(python(program), 3) == 0
    ranks, addresses, ports = zip(
        *(json.loads((tmp_path / str(i)).read_text()) for i in range(3)), strict=True
    )
    assert ranks == ("0", "1", "2")
    assert len(set(addresses)) == len(set(ports)) == 1


def test_meeting_place_of_several_machines_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert run_ranks(python("sys.exit(os.environ['MASTER_ADDR'] != 'node7')"), 1) == 0


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(75)", 75),
    ],
)
def test_exit_code_is_that_of_the_ranks(program: str, expected: int) -> None:
    assert run_ranks(python(program), 2) == expected


@pytest.mark.parametrize("last_act", ["sys.exit(3)", "os.abort()"])
def test_exit_code_is_that_of_the_rank_that_failed_first(last_act: str, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, time
from pathlib import Path
path = Path({str(tmp_path)!r}) / "first"
if os.environ["LOCAL_RANK"] == "1":
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").rename(path)
    sys.exit(75)
while not path.exists() or os.path.exists(f"/proc/{{path.read_text()}}"):
    time.sleep(0.01)  # until the parent has seen it leave
{last_act}
"""
    assert run_ranks([sys.executable, "-c", program], 2) == 75


def test_rank_that_was_killed_is_named_and_the_others_do_not_outlive_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match="rank 1 was ended by SIGKILL; --ckpt_path last goes on"):
        run_ranks(python(f"rank == 1 and os.kill(os.getpid(), signal.SIGKILL); {WAIT}"), 3)
    assert time.monotonic() - start < MAX_SECONDS
    assert "rank 0 had not left" in caplog.text


def test_signals_to_stop_reach_every_rank() -> None:
    """Also one that comes before they listen: it is held back."""
    tell = "rank or os.kill(os.getppid(), signal.SIGUSR1); "
    stop = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
    listen = "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]); "
    assert run_ranks(python(f"{tell} {stop} {listen} {WAIT}"), 2) == 75


def test_what_a_rank_told_outlives_it(tmp_path: Path) -> None:
    program = f"""
import os, time
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo")
store = dist.distributed_c10d._get_default_store()
path = Path({str(tmp_path)!r}) / "pid"
if dist.get_rank() == 0:
    store.set("failure", "told")
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").rename(path)
    os._exit(0)
while not path.exists() or os.path.exists(f"/proc/{{path.read_text()}}"):
    time.sleep(0.01)
os._exit(0 if store.get("failure") == b"told" else 1)
"""
    start = f"import os; os.environ.update(RANK=os.environ['LOCAL_RANK'], WORLD_SIZE='2'); exec({program!r})"
    assert run_ranks([sys.executable, "-c", start], 2) == 0


def test_rank_stops_when_the_process_that_started_it_is_gone(tmp_path: Path) -> None:
    rank = (
        "from stablerep.distributed.launch import watch_parent; "
        f"signal.signal(signal.SIGTERM, lambda *_: (open('{tmp_path}/stopped', 'w'), sys.exit())); "
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]); "
        f"watch_parent(); open('{tmp_path}/started', 'w'); {WAIT}"
    )
    program = f"from stablerep.distributed.launch import run_ranks; run_ranks({python(rank)!r}, 1)"
    with subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as parent:
        wait_until((tmp_path / "started").exists)
        parent.send_signal(signal.SIGKILL)
    wait_until((tmp_path / "stopped").exists)
