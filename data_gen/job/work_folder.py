"""The folder `.work/` of a dataset: what the workers of an unfinished job tell each other.

    .work/00012/claim-0003.json   who makes the shard; saves double work, correctness never rests on it
    .work/00012/part-….tar        finished samples of an unfinished shard; the name ends in their sha256
    .work/00012/death-….json      a worker that died in the shard: where, how far it had come, and why
    .work/00012/set_aside.json    the shard has killed `MAX_DEATHS` workers at the same place
    .work/workers/….json          what each worker is doing, for `stablerep status`
    .work/jobs/4711.json          the Slurm job that was submitted for the dataset

Of a shard's claims the one with the highest number counts. Whoever takes a shard over from a dead worker
publishes the next number, which only one can; nobody touches the claim of another. A shard's files go when it
is published. Nothing here is needed to read a dataset.
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from data_gen.shards import to_json
from data_gen.storage import Store

MAX_DEATHS = 3
PLACE_VARIABLE = "STABLEREP_WORKER_PLACE"
"""Environment variable that names a worker's place, where one worker follows another."""
_FOLDER = ".work"


@dataclass(frozen=True)
class Worker:
    """A process that makes shards.

    Args:
        name: Unique among all workers, ever.
        host: Its machine, and there its room of process numbers, as containers have their own.
        pid: Its process there.
        place: Where it runs: what the workers that follow it on the same device share with it.
    """

    name: str
    host: str
    pid: int
    place: str

    @classmethod
    def of_this_process(cls) -> "Worker":
        """This process; the same however often it is asked for."""
        return _worker_of(os.getpid())


@cache
def _worker_of(pid: int) -> Worker:
    host = socket.gethostname()
    with contextlib.suppress(OSError):
        host += f"/{os.stat('/proc/self/ns/pid').st_ino}"
    name = f"{socket.gethostname()}-{pid}-{uuid.uuid4().hex[:6]}"
    return Worker(name, host, pid, os.environ.get(PLACE_VARIABLE, name))


class WorkFolder:
    """Claims, spilled samples, deaths and reports of one job.

    Args:
        store: The dataset's folder.
        worker: Who claims and reports.
        lease_seconds: A claim or a report that was not renewed for this long is void.
    """

    def __init__(self, store: Store, worker: Worker, lease_seconds: float) -> None:
        self.worker = worker
        self._store, self._lease_seconds = store, lease_seconds
        self._held: dict[str, str] = {}
        self._lock = threading.Lock()  # a claim given back must not be prolonged by another thread

    def claim(self, shard: str) -> bool:
        """Takes a shard unless a living worker has it; a dead one's claim is recorded as a death.

        Returns:
            Whether it is this worker's now.
        """
        number, holder = 0, self._read_claim(shard)
        if holder is not None:
            name, claim = holder
            if claim.get("name") == self.worker.name:
                with self._lock:
                    self._held[shard] = name
                return True
            if self._is_alive(name, claim):
                return False
            self.record_death(
                shard, "its worker stopped without giving it back", str(claim["name"]), str(claim["place"])
            )
            if self.is_set_aside(shard):
                return False
            number = _number_of(name) + 1
        name = f"{_FOLDER}/{shard}/claim-{number:04d}.json"
        if not self._store.publish(name, self._encode_worker()):
            return False
        with self._lock:
            self._held[shard] = name
        return True

    def renew(self) -> None:
        """Prolongs this worker's claims."""
        with self._lock:
            for name in self._held.values():
                self._store.replace(name, self._encode_worker())

    def release(self, shard: str) -> None:
        """Gives a shard back."""
        with self._lock:
            name = self._held.pop(shard, None)
            if name is not None:
                self._store.delete(name)
                self._remove_folder(shard)

    def list_claims(self) -> set[str]:
        """Shards that were claimed, by the living or the dead."""
        return {name.split("/")[1] for name in self._list() if "/claim-" in name}

    def has_living_workers(self) -> bool:
        """Whether any worker but this one has reported within its lease, or holds a claim."""
        shards = self.list_claims()
        claims = [claim for shard in shards if (claim := self._read_claim(shard)) is not None]
        return bool(self._other_places()) or any(
            self._is_alive(name, claim) for name, claim in claims if claim.get("name") != self.worker.name
        )

    def record_death(self, shard: str, reason: str, worker: str, place: str) -> None:
        """Notes that a worker died in a shard, and sets the shard aside if too many died at the same sample.

        Workers that had finished more samples of it than those before them show that it goes on; they count
        afresh. Where workers of several places live, deaths of one place alone speak against the place, not
        against the shard. A death is recorded once, whoever finds it.
        """
        num_parts = len(self._list_parts(shard))
        death = {"worker": worker, "place": place, "reason": reason, "num_parts": num_parts}
        digest = hashlib.sha256(worker.encode()).hexdigest()[:16]
        content = _encode({**death, "time": time.time()})
        if not self._store.publish(f"{_FOLDER}/{shard}/death-{digest}.json", content):
            return
        deaths = [death for death in self.read_deaths(shard) if death.get("num_parts") == num_parts]
        places = {death.get("place") for death in deaths}
        if len(deaths) >= MAX_DEATHS and (len(places) > 1 or not self._other_places() - places):
            reasons = Counter(str(death.get("reason")) for death in deaths)
            self.set_aside(shard, "; ".join(f"{reason} (×{count})" for reason, count in reasons.items()))

    def bury(self, pid: int, reason: str) -> tuple[list[str], int]:
        """Records the death of a process of this host in each shard that it had claimed, and frees them.

        Returns:
            The shards, and the number of finished samples that the process had saved.
        """
        shards, num_samples_saved = [], 0
        for name in self._list():
            if "/claim-" not in name and "/workers/" not in name:
                continue
            value = self._read(name)
            if value is None or (value.get("host"), value.get("pid")) != (self.worker.host, pid):
                continue
            if "/claim-" in name:
                shards.append(name.split("/")[1])
                self.record_death(shards[-1], reason, str(value["name"]), str(value["place"]))
            else:
                num_samples_saved = int(value["num_samples_saved"])
            self._store.delete(name)
        return shards, num_samples_saved

    def read_deaths(self, shard: str) -> list[dict[str, Any]]:
        """Deaths in a shard, the oldest first."""
        names = [name for name in self._list(shard) if "/death-" in name]
        deaths = [death for name in names if (death := self._read(name)) is not None]
        return sorted(deaths, key=lambda death: death.get("time", 0))

    def set_aside(self, shard: str, reason: str) -> None:
        """Takes a shard out of the job until `stablerep generate --retry_failed`."""
        self._store.publish(f"{_FOLDER}/{shard}/set_aside.json", _encode({"reason": reason}))

    def list_set_aside(self) -> dict[str, str]:
        """Reasons of the shards that were set aside."""
        names = [name for name in self._list() if name.endswith("/set_aside.json")]
        return {name.split("/")[1]: str((self._read(name) or {}).get("reason")) for name in names}

    def is_set_aside(self, shard: str) -> bool:
        """Whether the shard was taken out of the job."""
        return self._store.exists(f"{_FOLDER}/{shard}/set_aside.json")

    def forgive(self, shard: str) -> None:
        """Takes a shard up again that was set aside; its finished samples stay."""
        for name in self._list(shard):
            if "/death-" in name or name.endswith("/set_aside.json"):
                self._store.delete(name)

    def write_part(self, shard: str, content: bytes) -> None:
        """Spills finished samples: a small tar of the shard format."""
        digest = hashlib.sha256(content).hexdigest()
        self._store.publish(f"{_FOLDER}/{shard}/part-{digest}.tar", content)

    def read_parts(self, shard: str) -> Iterator[bytes]:
        """The spilled tars of a shard; one that is not what its name says is passed over."""
        for name in self._list_parts(shard):
            with contextlib.suppress(FileNotFoundError):
                content = self._store.read(name)
                if name.endswith(f"-{hashlib.sha256(content).hexdigest()}.tar"):
                    yield content

    def clear(self, shard: str) -> None:
        """Removes what is kept about a shard: it is published, or begins anew."""
        with self._lock:
            self._held.pop(shard, None)
            for name in self._list(shard):
                self._store.delete(name)
            self._remove_folder(shard)

    def clear_all(self) -> None:
        """Removes all that is kept: the plan is another one."""
        for shard in self.list_shards():
            self.clear(shard)

    def finish(self) -> None:
        """Removes the reports of dead workers, and the folder once nothing is kept in it."""
        for name in self._list("workers"):
            report = self._read(name)
            if report is not None and not self._is_alive(name, report):
                self._store.delete(name)
        if not self._list():
            for folder in ("workers", "jobs", ""):
                self._remove_folder(folder)

    def report(self, values: dict[str, Any]) -> None:
        """Says what this worker is doing."""
        content = {**vars(self.worker), "updated": time.time(), **values}
        self._store.replace(f"{_FOLDER}/workers/{self.worker.name}.json", _encode(content))

    def withdraw_report(self) -> None:
        """Removes what this worker has said."""
        self._store.delete(f"{_FOLDER}/workers/{self.worker.name}.json")

    def list_reports(self) -> list[dict[str, Any]]:
        """What the living workers do."""
        reports = [(name, report) for name in self._list("workers") if (report := self._read(name))]
        return [report for name, report in reports if self._is_alive(name, report)]

    def record_job(self, job_id: str) -> None:
        """Notes that workers were handed to a cluster's queue."""
        self._store.publish(f"{_FOLDER}/jobs/{job_id}.json", _encode({"time": time.time()}))

    def list_jobs(self) -> list[str]:
        """Ids of the jobs that were submitted, of which Slurm may know no more."""
        return [name.rpartition("/")[2].removesuffix(".json") for name in self._list("jobs")]

    def forget_jobs(self) -> None:
        """Removes what is kept about submitted jobs: nothing is left to do for them, or there is another."""
        for name in self._list("jobs"):
            self._store.delete(name)

    def list_shards(self) -> set[str]:
        """Names of the shards about which something is kept."""
        return {name.split("/")[1] for name in self._list()} - {"workers", "jobs"}

    def _other_places(self) -> set[str]:
        """Places of the living workers, this one's left out."""
        return {str(report["place"]) for report in self.list_reports()} - {self.worker.place}

    def _encode_worker(self) -> bytes:
        return _encode({**vars(self.worker), "lease_seconds": self._lease_seconds})

    def _read_claim(self, shard: str) -> tuple[str, dict[str, Any]] | None:
        """The claim that counts, with its file; None where there is none."""
        for name in sorted((name for name in self._list(shard) if "/claim-" in name), reverse=True):
            if (claim := self._read(name)) is not None:
                return name, claim
        return None

    def _is_alive(self, name: str, holder: dict[str, Any]) -> bool:
        """Whether the worker of a claim or report lives: renewed within the lease, and its process is there.

        The age is measured by the store's own clock.
        """
        if holder.get("name") == self.worker.name:
            return True
        if holder.get("host") == self.worker.host and not _process_exists(int(holder.get("pid", 0))):
            return False
        age = self._store.modified_seconds_ago(name)
        return age is not None and age < holder.get("lease_seconds", self._lease_seconds)

    def _remove_folder(self, folder: str) -> None:
        """Removes an empty folder of a local disk; object stores have none."""
        if self._store.is_local:
            with contextlib.suppress(OSError):
                (self._store.local_path / _FOLDER / folder).rmdir()

    def _list_parts(self, shard: str) -> list[str]:
        return [name for name in self._list(shard) if "/part-" in name]

    def _list(self, folder: str = "") -> list[str]:
        return self._store.list(f"{_FOLDER}/{folder}".rstrip("/"), recursive=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None where it is gone or was torn by a power cut."""
        try:
            value = json.loads(self._store.read(name))
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None


def _number_of(claim: str) -> int:
    return int(claim.rpartition("-")[2].removesuffix(".json"))


def _encode(value: dict[str, Any]) -> bytes:
    return (to_json(value) + "\n").encode()


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
