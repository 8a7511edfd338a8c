"""What tests ask of other processes: whether one still runs, and what they wait for.

Nothing is waited for by a sleep of a fixed length, and no deadline is near what an idle machine needs: the
tests run beside others, on as many cores as there are.
"""

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

MAX_SECONDS = 300.0
"""Time in which anything that these tests wait for has happened, however busy the machine is."""


def wait_until(
    condition: Callable[[], object], explain: Callable[[], str] = lambda: "", seconds: float = MAX_SECONDS
) -> None:
    """Waits for a condition; fails with the explanation where it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} seconds. {explain()}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not one that has ended and waits to be reaped, maybe for ever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_group_running(group: int) -> bool:
    """Whether any process of a process group runs, in the sense of `is_running`."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def stop_process(pid: int) -> None:
    """Stops a process, and returns when it has: before, it would still take other signals, those first."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal has reached a process that does not run, as one that is stopped."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["ShdPnd"], 16) >> number - 1 & 1)


def find_free_ports(number: int) -> list[int]:
    """Ports of the loopback for programs that must be told one.

    They are from below those that the system gives out by itself (32768 and more on Linux), to any connection
    of any process: so that nobody takes them before the program does.
    """
    ports: list[int] = []
    draw = random.SystemRandom()
    while len(ports) < number:
        port = draw.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
