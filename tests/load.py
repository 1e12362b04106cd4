"""A load whose every point has a name of its own, and the check of what became of each: sets, not counts."""

from __future__ import annotations

import http.client
import threading
import time

from tests.service import POINT, Service, eventually


class Load(threading.Thread):
    """Post batches until told to stop; remembers for each (satellite_id, sequence) what came of it."""

    def __init__(self, service: Service, name: str, batch: int = 50, *, keyed: bool = False) -> None:
        super().__init__(daemon=True)
        self.service, self.label, self.batch, self.keyed = service, name, batch, keyed
        self.accepted: set[str] = set()
        self.unknown: set[str] = set()
        self.refused = 0
        self.longest_gap = 0.0
        self.stopping = threading.Event()
        self.start()

    def run(self) -> None:
        number, last = 0, time.monotonic()
        while not self.stopping.is_set():
            names = [f"{self.label}-{number}-{index}" for index in range(self.batch)]
            number += 1
            points = [{**POINT, "satellite_id": name} for name in names]
            headers = {"Idempotency-Key": names[0]} if self.keyed else {}
            status = self.send(points, headers)
            while self.keyed and status not in (202, 503) and not self.stopping.is_set():
                status = self.send(points, headers)  # safe: the key makes it one
            if status == 202:
                self.accepted.update(names)
                self.longest_gap = max(self.longest_gap, time.monotonic() - last)
                last = time.monotonic()
            elif status == 503:
                self.refused += 1
            else:
                self.unknown.update(names)

    def send(self, points: list[dict[str, object]], headers: dict[str, str]) -> int:
        try:
            return self.service.post("/telemetry/batch", points, headers)[0]
        except (OSError, http.client.HTTPException, ValueError):  # cut off, perhaps within the answer
            return 0

    def stop(self) -> None:
        self.stopping.set()
        self.join(30)
        assert not self.is_alive()


def assert_exactly_once(service: Service, loads: list[Load]) -> None:
    """Accepted: one row. Unknown: one row or none. Nothing else."""
    stored = [row[0] for row in service.query("SELECT satellite_id FROM telemetry")]
    found = set(stored)
    accepted = set().union(*(load.accepted for load in loads))
    unknown = set().union(*(load.unknown for load in loads))
    assert accepted, "the load never got through"
    assert accepted - found == set(), "lost"
    assert len(stored) == len(found), "duplicated"
    assert found - accepted - unknown == set(), "stored though refused or never sent"


def loads_on(service: Service, count: int = 3, batch: int = 50, *, keyed: bool = False) -> list[Load]:
    """Start loads and wait until each has got through."""
    loads = [Load(service, f"L{index}", batch, keyed=keyed) for index in range(count)]
    eventually(lambda: all(len(load.accepted) > 100 for load in loads), 20, "load")
    return loads
