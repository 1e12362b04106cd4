"""A load whose every point has a name of its own, and the check of what became of each: sets, not counts."""

from __future__ import annotations

import http.client
import threading
import time
from typing import Any

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
            if self.keyed and status not in (202, 503):  # perhaps stored: safe to repeat, the key makes it one
                status = self.repeat(points, headers)
            if status == 202:
                self.accepted.update(names)
                self.longest_gap = max(self.longest_gap, time.monotonic() - last)
                last = time.monotonic()
            elif status == 503:
                self.refused += 1
            else:
                self.unknown.update(names)

    def repeat(self, points: list[dict[str, object]], headers: dict[str, str]) -> int:
        """Send again until it is accepted; 0, unknown, when the load is stopped before."""
        while not self.stopping.is_set():
            if self.send(points, headers) == 202:
                return 202
        return 0

    def send(self, points: list[dict[str, object]], headers: dict[str, str]) -> int:
        try:
            return self.service.post("/telemetry/batch", points, headers)[0]
        except ConnectionRefusedError:  # nobody has taken it
            self.stopping.wait(0.01)
            return 503
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
    assert accepted - found == set(), f"{len(accepted - found)} of {len(accepted)} lost"
    assert len(stored) == len(found), "duplicated"
    assert found - accepted - unknown == set(), "stored though refused or never sent"


def loads_on(service: Service, count: int = 3, batch: int = 50, *, keyed: bool = False) -> list[Load]:
    """Start loads and wait until each has got through."""
    loads = [Load(service, f"L{index}", batch, keyed=keyed) for index in range(count)]
    eventually(lambda: all(len(load.accepted) > 100 for load in loads), 20, "load")
    return loads


def progress(loads: list[Load], seconds: float = 20.0) -> None:
    """Wait until every load got a batch through from now on."""
    marks = [len(load.accepted) for load in loads]
    eventually(lambda: all(len(load.accepted) > mark for load, mark in zip(loads, marks, strict=True)), seconds, "202s")


def finish(service: Service, loads: list[Load], *, running: bool = True) -> dict[str, Any]:
    """Stop load and service (if it runs), check that all is there once and accounted for; returns what the load saw."""
    for load in loads:
        load.stop()
    if running:
        assert service.stop() == 0
    assert_exactly_once(service, loads)
    verified = service.run("verify", "--deep", DATABASE_URL=service.database)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    # What the boards and the alert read, at every second meanwhile.
    broken = service.query("SELECT time, name, residual FROM engine_stats WHERE residual <> 0 ORDER BY time LIMIT 10")
    assert broken == [], "a residual"
    return {
        "accepted": sum(len(load.accepted) for load in loads),
        "unknown": sum(len(load.unknown) for load in loads),
        "refused": sum(load.refused for load in loads),
        "longest_gap_s": round(max(load.longest_gap for load in loads), 3),
    }
