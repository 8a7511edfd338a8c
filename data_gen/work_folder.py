"""The folder `.work/` of a dataset: what the workers of an unfinished job tell each other.

    .work/00012/claim.json      who makes the shard; saves double work, correctness never rests on it
    .work/00012/part-….tar      finished samples of an unfinished shard; the name ends in their sha256
    .work/00012/death-….json    a worker that died in the shard: how far it had come, and why
    .work/00012/set_aside.json  the shard has killed `MAX_DEATHS` workers at the same place
    .work/workers/….json        what each worker is doing, for `stablerep status`

A shard's files go when it is published. Nothing here is needed to read a dataset.
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
from typing import Any

from data_gen.shards import to_json
from data_gen.storage import Store

MAX_DEATHS = 3
_FOLDER = ".work"


@dataclass(frozen=True)
class Worker:
    """A process that makes shards.

    Args:
        name: Unique among all workers, ever.
        host: Its machine.
        pid: Its process there.
    """

    name: str
    host: str
    pid: int

    @classmethod
    def of_this_process(cls) -> "Worker":
        """A new worker in this process."""
        host, pid = socket.gethostname(), os.getpid()
        return cls(f"{host}-{pid}-{uuid.uuid4().hex[:6]}", host, pid)


class WorkFolder:
    """Claims, spilled samples, deaths and reports of one job.

    Args:
        store: The dataset's folder.
        worker: Who claims and reports.
        lease_seconds: A claim that was not renewed for this long is void.
    """

    def __init__(self, store: Store, worker: Worker, lease_seconds: float) -> None:
        self.worker = worker
        self._store, self._lease_seconds = store, lease_seconds
        self._held: set[str] = set()
        self._lock = threading.Lock()  # a claim given back must not be prolonged by another thread

    def claim(self, shard: str) -> bool:
        """Takes a shard unless a living worker has it; a dead one's claim is recorded as a death.

        Returns:
            Whether it is this worker's now.
        """
        name = f"{_FOLDER}/{shard}/claim.json"
        if not self._store.publish(name, self._claim()):
            holder = self._read(name)
            if holder is not None and self._is_alive(holder):
                return False
            if holder is not None:
                self.record_death(shard, "its worker stopped without giving it back", str(holder["name"]))
            self._store.delete(name)
            if self.is_set_aside(shard) or not self._store.publish(name, self._claim()):
                return False
        self._held.add(shard)
        return True

    def renew(self) -> None:
        """Prolongs this worker's claims."""
        with self._lock:
            for shard in self._held:
                self._store.replace(f"{_FOLDER}/{shard}/claim.json", self._claim())

    def release(self, shard: str) -> None:
        """Gives a shard back."""
        with self._lock:
            self._held.discard(shard)
            self._store.delete(f"{_FOLDER}/{shard}/claim.json")
            self._remove_folder(shard)

    def list_claims(self) -> dict[str, dict[str, Any]]:
        """Claims of living workers by shard."""
        names = [name for name in self._list() if name.endswith("/claim.json")]
        claims = {name.split("/")[1]: claim for name in names if (claim := self._read(name)) is not None}
        return {shard: claim for shard, claim in claims.items() if self._is_alive(claim)}

    def record_death(self, shard: str, reason: str, worker: str) -> None:
        """Notes that a worker died in a shard, and sets the shard aside if too many died at its place.

        Workers that had finished more samples of it than those before them show that it goes on; they count
        afresh. A death is recorded once, whoever finds it.
        """
        num_parts = len(self._list_parts(shard))
        content = {"worker": worker, "reason": reason, "num_parts": num_parts, "time": time.time()}
        digest = hashlib.sha256(worker.encode()).hexdigest()[:16]
        if not self._store.publish(f"{_FOLDER}/{shard}/death-{digest}.json", _encode(content)):
            return
        deaths = [death for death in self.read_deaths(shard) if death.get("num_parts") == num_parts]
        if len(deaths) >= MAX_DEATHS:
            reasons = Counter(str(death.get("reason")) for death in deaths)
            self.set_aside(shard, "; ".join(f"{reason} (×{count})" for reason, count in reasons.items()))

    def bury(self, pid: int, reason: str) -> list[str]:
        """Records the death of a process of this host in each shard that it had claimed, and frees them.

        Returns:
            The shards.
        """
        freed = []
        for name in self._list():
            claim = self._read(name) if name.endswith("/claim.json") else None
            if claim is not None and (claim.get("host"), claim.get("pid")) == (self.worker.host, pid):
                shard = name.split("/")[1]
                self.record_death(shard, reason, str(claim.get("name")))
                self._store.delete(name)
                freed.append(shard)
        return freed

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
            self._held.discard(shard)
            for name in self._list(shard):
                self._store.delete(name)
            self._remove_folder(shard)

    def finish(self) -> None:
        """Removes the reports of dead workers, and the folder once nothing is kept in it."""
        self.list_reports()
        if not self._list():
            self._remove_folder("workers")
            self._remove_folder("")

    def report(self, values: dict[str, Any]) -> None:
        """Says what this worker is doing."""
        content = {**vars(self.worker), "updated": time.time(), **values}
        self._store.replace(f"{_FOLDER}/workers/{self.worker.name}.json", _encode(content))

    def withdraw_report(self) -> None:
        """Removes what this worker has said."""
        self._store.delete(f"{_FOLDER}/workers/{self.worker.name}.json")

    def list_reports(self) -> list[dict[str, Any]]:
        """What the living workers do; reports of dead ones are removed."""
        living = []
        for name in self._list("workers"):
            report = self._read(name)
            if report is None:
                continue
            if self._is_alive({**report, "expires": report["updated"] + self._lease_seconds}):
                living.append(report)
            else:
                self._store.delete(name)
        return living

    def list_shards(self) -> set[str]:
        """Names of the shards about which something is kept."""
        return {name.split("/")[1] for name in self._list()} - {"workers", "logs"}

    def _claim(self) -> bytes:
        expires = time.time() + self._lease_seconds
        return _encode({**vars(self.worker), "expires": expires})

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        """Whether a claim or report is of a living worker: its process on this host, its lease elsewhere."""
        if holder.get("name") == self.worker.name:
            return True
        if holder.get("host") != self.worker.host:
            return bool(holder.get("expires", 0) > time.time())
        pid = int(holder.get("pid", 0))
        return pid != self.worker.pid and _process_exists(pid)

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
