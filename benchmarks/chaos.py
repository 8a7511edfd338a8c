"""Does a generation job come out the same to the byte, whatever happens to it?

    python benchmarks/chaos.py [--num_kills 100] [--num_captions 160] [--num_workers 4] …

An undisturbed job of the embedded generator is the reference. Then the same job is run

- with random SIGKILLs over its workers, every tenth time at the whole job, until `num_kills` were sent; a job
  that ends before that is begun anew in another folder;
- on a disk that is full, and on one that is read-only, each put right afterwards;
- on an S3 server (moto, on this machine) that fails one request in ten;
- and a finished copy of it with a truncated tar, and another with a flipped bit, is verified, repaired and
  completed.

Each fault must be named, and each dataset must equal the reference in every byte but those that tell the time
(seconds in the markers). Exits with 1 if one does not. Writes benchmarks/results/chaos.{json,md}.

The disks are small memory file systems, which only root can mount; without, those two faults are left out and
said to be.
"""

import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from tqdm import tqdm

from data_gen.scenes import sample_captions
from data_gen.storage import Store

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
_TIMES = ("seconds", "num_images_made")
"""Of a marker: how long it took, and how much of it the last worker did."""


@dataclass
class Trial:
    """One way to disturb a job.

    Args:
        fault: What was done.
        num_faults: How often.
        named: What the commands said of it.
        is_equal: Whether the dataset came out as the reference.
        seconds: Time until it was complete.
    """

    fault: str
    num_faults: int = 0
    named: list[str] = field(default_factory=list)
    is_equal: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Bench:
    """The job that is disturbed.

    Args:
        folder: Where datasets are made.
        captions: Its captions.
        num_workers: Its workers.
        num_inference_steps: Denoising steps of an image.
        reference: Digests of the undisturbed dataset's files.
    """

    folder: Path
    captions: Path
    num_workers: int
    num_inference_steps: int
    reference: dict[str, str] = field(default_factory=dict)

    def command(self, output: str | Path, *options: str) -> list[str]:
        """`stablerep generate`."""
        return [
            *verb("generate", "--captions", str(self.captions), "--output", str(output)),
            *("--num_workers", str(self.num_workers), "--num_threads_per_worker", "1"),
            *("--generator.num_inference_steps", str(self.num_inference_steps)),
            *("--generator.device", "cpu", "--num_captions_per_shard", "8", "--num_images_per_batch", "8"),
            *("--spill_seconds", "0.5", *options),
        ]

    def is_equal(self, output: str | Path) -> bool:
        """Whether a dataset is the reference; says what differs."""
        there = digest_dataset(Store(output))
        for name in sorted(there.keys() | self.reference.keys()):
            if there.get(name) != self.reference.get(name):
                tqdm.write(f"{output}: {name} differs")
        return there == self.reference


def run(
    num_kills: int = 100,
    num_captions: int = 160,
    num_workers: int = 4,
    num_inference_steps: int = 10,
    mean_seconds_between_kills: float = 2.0,
    seed: int = 0,
    name: str = "chaos",
) -> int:
    """Runs every trial.

    Args:
        num_kills: SIGKILLs to send.
        num_captions: Captions of the job, four images each, eight a shard.
        num_workers: Worker processes, one thread each.
        num_inference_steps: Denoising steps of an image.
        mean_seconds_between_kills: Of an exponential distribution.
        seed: Of captions and kills.
        name: Of the result files.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        bench = build_bench(Path(folder), num_captions, num_workers, num_inference_steps, seed)
        rng = random.Random(seed)
        trials = [kill_at_random(bench, num_kills, mean_seconds_between_kills, rng)]
        tqdm.write(describe(trials[0]))
        for disturb in (fill_disk, make_read_only, fail_one_request_in_ten, truncate_tar, flip_bit):
            trials.append(disturb(bench))
            tqdm.write(describe(trials[-1]))
    write_results(trials, num_captions, num_workers, num_inference_steps, name)
    return int(not all(trial.is_equal and trial.named for trial in trials if trial.num_faults))


def build_bench(
    folder: Path, num_captions: int, num_workers: int, num_inference_steps: int, seed: int
) -> Bench:
    """Writes the captions and makes the reference."""
    captions = folder / "captions.txt"
    captions.write_text("".join(f"{caption}\n" for caption in sample_captions(num_captions, seed)))
    bench = Bench(folder, captions, num_workers, num_inference_steps)
    start = time.perf_counter()
    subprocess.run(bench.command(folder / "reference" / "dataset"), check=True)
    tqdm.write(f"undisturbed: {time.perf_counter() - start:.0f} s")
    bench.reference.update(digest_dataset(Store(folder / "reference" / "dataset")))
    return bench


def kill_at_random(bench: Bench, num_kills: int, mean_seconds: float, rng: random.Random) -> Trial:
    """SIGKILLs at random moments to random workers, every tenth to the job itself."""
    trial, start = Trial("SIGKILL", is_equal=True), time.perf_counter()
    with tqdm(total=num_kills, desc="kills") as progress:
        for number in count():
            output, options = bench.folder / f"killed-{number}" / "dataset", list[str]()
            while trial.num_faults < num_kills and not is_finished(output):
                with started(bench.command(output, *options)) as (job, lines):
                    kill_workers(job, trial, num_kills, mean_seconds, rng, progress)
                trial.named += lines()
                options = ["--retry_failed"]  # a shard that was hit three times in one place is set aside
            trial.named += complete(bench, output, "--retry_failed")
            trial.is_equal &= bench.is_equal(output)
            shutil.rmtree(output)
            if trial.num_faults == num_kills:
                break
    trial.seconds = time.perf_counter() - start
    trial.named = only_about(trial.named, "SIGKILL")
    return trial


def kill_workers(
    job: "subprocess.Popen[str]",
    trial: Trial,
    num_kills: int,
    mean_seconds: float,
    rng: random.Random,
    progress: Any,
) -> None:
    """Kills until the job ends, or enough were killed."""
    while job.poll() is None and trial.num_faults < num_kills:
        time.sleep(rng.expovariate(1 / mean_seconds))
        workers = children_of(job.pid)
        victims = [job.pid] if trial.num_faults % 10 == 9 else workers
        if not workers or job.poll() is not None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(victims), signal.SIGKILL)
            trial.num_faults += 1
            progress.update()


def fill_disk(bench: Bench) -> Trial:
    """A disk without room for the dataset, which is enlarged afterwards."""
    trial = Trial("disk full")
    with mounted(bench.folder / "full", "256k") as disk:
        if disk is None:
            return trial
        return disturb_once(bench, trial, disk / "dataset", lambda: remount(disk, "size=1g"))


def make_read_only(bench: Bench) -> Trial:
    """A disk that is read-only, and then not."""
    trial = Trial("read-only folder")
    with mounted(bench.folder / "read-only", "1g") as disk:
        if disk is None:
            return trial
        remount(disk, "ro")
        return disturb_once(bench, trial, disk / "dataset", lambda: remount(disk, "rw"))


def disturb_once(bench: Bench, trial: Trial, output: Path, mend: Callable[[], None]) -> Trial:
    """Runs the job, which must fail; mends what is wrong; runs it to its end."""
    start = time.perf_counter()
    failed = subprocess.run(bench.command(output), capture_output=True, text=True)
    trial.num_faults = int(failed.returncode != 0)
    trial.named = only_about(failed.stderr.splitlines(), "No space left", "Read-only")
    mend()
    complete(bench, output)
    trial.is_equal, trial.seconds = bench.is_equal(output), time.perf_counter() - start
    return trial


def fail_one_request_in_ten(bench: Bench) -> Trial:
    """An S3 server that answers one request in ten with an error, or cuts or loses the answer."""
    sys.path.insert(0, str(ROOT))
    from tests.data_gen.s3_server import s3_server

    trial, start = Trial("S3 request failed"), time.perf_counter()
    with s3_server(failure_fraction=0.1) as url:
        output = f"{url}/dataset"
        complete(bench, output)
        trial.num_faults = url.server.num_failures
        trial.named = [
            f"{url.server.num_failures} of {url.server.num_requests} requests failed, and were tried again"
        ]
        url.server.failure_fraction = 0.0
        trial.is_equal = bench.is_equal(output)
    trial.seconds = time.perf_counter() - start
    return trial


def truncate_tar(bench: Bench) -> Trial:
    """A tar that lost its end."""
    return damage(bench, "truncated tar", lambda content: content[: len(content) // 3])


def flip_bit(bench: Bench) -> Trial:
    """A tar with one bit that is another."""

    def flip(content: bytes) -> bytes:
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        return bytes(damaged)

    return damage(bench, "flipped bit", flip)


def damage(bench: Bench, fault: str, change: Callable[[bytes], bytes]) -> Trial:
    """Changes a tar of a finished dataset; verify must name it, and repair and generate must mend it."""
    trial, start = Trial(fault, num_faults=1), time.perf_counter()
    output = bench.folder / fault.replace(" ", "-") / "dataset"
    shutil.copytree(bench.folder / "reference" / "dataset", output)
    tar = output / "00001.tar"
    tar.write_bytes(change(tar.read_bytes()))
    for command, code in (("verify", 1), ("repair", 75)):
        done = subprocess.run(verb(command, "--dataset", str(output)), capture_output=True, text=True)
        if done.returncode == code:
            trial.named += only_about(done.stderr.splitlines(), "00001.tar")
    complete(bench, output)
    trial.is_equal, trial.seconds = bench.is_equal(output), time.perf_counter() - start
    return trial


def verb(name: str, *options: str) -> list[str]:
    """A command of stablerep."""
    return [sys.executable, "-m", "stablerep.cli", name, *options]


def complete(bench: Bench, output: str | Path, *options: str) -> list[str]:
    """Runs the job to its end; what it said."""
    done = subprocess.run(bench.command(output, *options), capture_output=True, text=True)
    if done.returncode != 0:
        tqdm.write(f"{output}: exit code {done.returncode}\n{done.stderr}")
    return done.stderr.splitlines()


@contextmanager
def started(command: list[str]) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], list[str]]]]:
    """A job in the background, and what it has said; waits for it at the end."""
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stderr=said, text=True) as job:

        def read_lines() -> list[str]:
            said.seek(0)
            return said.read().splitlines()

        lines: list[str] = []
        yield job, lambda: lines
        job.wait()
        lines += read_lines()


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path | None]:
    """A memory file system; None where this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    """Changes a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def is_finished(output: Path) -> bool:
    """Whether `stablerep status` says that every caption is written."""
    if not (output / "dataset.json").exists():
        return False
    return subprocess.run(verb("status", "--dataset", str(output)), capture_output=True).returncode == 0


def children_of(pid: int) -> list[int]:
    """Processes that a process started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def only_about(lines: list[str], *words: str) -> list[str]:
    """Lines that hold one of the words."""
    return [line for line in lines if any(word in line for word in words)]


def digest_dataset(store: Store) -> dict[str, str]:
    """sha256 of every file; of markers, of what does not tell the time."""
    digests = {}
    for name in store.list(recursive=True):
        content = store.read(name)
        if name.endswith("_stats.json"):
            stats = json.loads(content)
            content = json.dumps({key: stats[key] for key in stats if key not in _TIMES}).encode()
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def describe(trial: Trial) -> str:
    """One line."""
    if not trial.num_faults:
        return f"{trial.fault}: left out, this user may not mount a file system"
    verdict = "equal to the byte" if trial.is_equal else "DIFFERS"
    first = trial.named[0] if trial.named else "not named"
    return f"{trial.fault} × {trial.num_faults}: {verdict}, {trial.seconds:.0f} s; {first}"


def write_results(
    trials: list[Trial], num_captions: int, num_workers: int, num_inference_steps: int, name: str
) -> None:
    """Writes the table, and all that was named."""
    settings = {
        "num_captions": num_captions,
        "num_workers": num_workers,
        "num_inference_steps": num_inference_steps,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    RESULTS.mkdir(exist_ok=True)
    result = {"settings": settings, "trials": [asdict(trial) for trial in trials]}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    rows = [
        f"| {trial.fault} | {trial.num_faults or 'left out'} | {'yes' if trial.is_equal else 'no'} | "
        f"{len(trial.named)} | {trial.seconds:.0f} |"
        for trial in trials
    ]
    table = "\n".join(
        [
            f"{num_captions} captions × 4 images, {num_workers} workers, {num_inference_steps} steps; "
            f"{settings['machine']}.",
            "",
            "| fault | times | dataset equal to the byte | lines that name it | seconds |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )
    (RESULTS / f"{name}.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    sys.exit(auto_cli(run, as_positional=False))
