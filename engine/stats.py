"""What lanes and writers say of themselves at one moment: the one source of /metrics, engine_stats and `top`.

Read from the words of the lanes' headers and of the heartbeats alone: it costs the request path nothing, works with the
database away, and outlives every process that counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from engine import heartbeat, lanes
from engine.heartbeat import Bins, State
from engine.ring import Lane

WALK_BYTES: Final = 256 << 10
"""With more waiting in a lane its balance is not known here: see `verify`. A walk checks the CRC of each record, and a
writer's drain waits for it: a thousand records of a thousand points each were 40 MB a look."""
LOOKS: Final = 5
"""Looks at a lane that moves, before its balance is taken for not known."""

_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """What a process has used: CPU seconds, bytes of memory that it shares with nobody (lanes left out)."""

    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class LaneSample:
    """One lane, and the worker that appends to it if there is one; counters since the lane was made."""

    name: str
    uuid: str
    pid: int
    usage: Usage | None
    accepted: int
    requests: int
    answered: int
    refused: int
    settled: int
    queue_points: int
    queue_bytes: int
    capacity_bytes: int
    residual: int | None

    @property
    def fill(self) -> float:
        return self.queue_bytes / self.capacity_bytes


@dataclass(frozen=True, slots=True)
class WriterSample:
    """One writer; counters since its heartbeat file was made, whichever process counted."""

    name: str
    pid: int
    usage: Usage | None
    alive: bool
    state: str
    edition: str
    age_s: float
    committed: int
    dead_lettered: int
    anomalies: int
    flushes: int
    failures: int
    stopped_lanes: int
    busy_s: float
    waited_s: float
    last_commit_us: int
    latency: Bins
    durations: Bins


@dataclass(frozen=True, slots=True)
class Sample:
    """Everything at one moment; `taken` is time.monotonic()."""

    taken: float
    lanes: tuple[LaneSample, ...]
    writers: tuple[WriterSample, ...]

    @property
    def residual(self) -> int | None:
        """Points of all lanes that nobody can account for, 0 as it must be; None while a lane's is not known."""
        known = [lane.residual for lane in self.lanes if lane.residual is not None]
        return sum(map(abs, known)) if len(known) == len(self.lanes) else None


def take(folder: Path) -> Sample:
    """Look at every lane and writer of a lane directory."""
    return Sample(time.monotonic(), tuple(_lanes(folder)), tuple(_writers(folder)))


def _lanes(folder: Path) -> Iterator[LaneSample]:
    for lane in lanes.open_lanes(folder):
        try:
            pid = _number(lanes.Lock(lane.path.with_suffix(".producer")).holder())
            published = lane.published
            yield LaneSample(
                name=lane.path.stem,
                uuid=str(lane.uuid),
                pid=pid,
                usage=usage(pid),
                accepted=published.points,
                requests=published.records,
                answered=lane.answered_points,
                refused=lane.refused_points,
                settled=lane.settled_points,
                queue_points=lane.queued_points,
                queue_bytes=max(0, lane.head - lane.tail),
                capacity_bytes=lane.capacity,
                residual=residual(lane),
            )
        finally:
            lane.close()


def residual(lane: Lane) -> int | None:
    """Return published - settled - queued of a lane, each from its own source; None when it cannot be told now.

    The settled points are the ledger's, which a writer copies into the header before it moves the tail: given that the
    tail stood still, the records from tail to head are those that are neither in the database nor lost. A writer that
    died between the two stores leaves the settled points ahead by exactly the first records behind the tail: they are
    accounted for. Were they not, it would show once the lane is drained.
    """
    found = None
    for _ in range(LOOKS):
        tail, settled = lane.tail, lane.settled_points
        head, published = lane.snapshot
        queued = lane.points_between(tail, head) if head - tail <= WALK_BYTES else None
        if queued is None or (lane.tail, lane.settled_points) != (tail, settled):
            continue
        found = published.points - settled - queued
        if found == 0 or (found < 0 and _begins_with(lane, tail, head, -found)):
            return 0
    return found


def _begins_with(lane: Lane, position: int, head: int, points: int) -> bool:
    """Tell whether some whole records from `position` on hold exactly so many points."""
    while points > 0 and position < head and (record := lane.next_record(position)) is not None:
        record.payload.release()
        points, position = points - record.points, record.end
    return points == 0


def _writers(folder: Path) -> Iterator[WriterSample]:
    for path in sorted(folder.glob("writer-*.beat")):
        beat = heartbeat.read(path)
        if beat is None:
            continue
        state = State(beat.state)
        yield WriterSample(
            name=path.stem,
            pid=beat.pid,
            usage=usage(beat.pid) if beat.alive else None,
            alive=beat.alive,
            state=state.name.lower().replace("_", " ") if beat.alive or state is State.ENDED else "stale",
            edition=beat.edition,
            age_s=beat.age,
            committed=beat.committed_points,
            dead_lettered=beat.dead_lettered_points,
            anomalies=beat.anomalous_points,
            flushes=beat.flushes,
            failures=beat.failures,
            stopped_lanes=beat.stopped_lanes,
            busy_s=beat.busy_us / 1e6,
            waited_s=beat.waited_us / 1e6,
            last_commit_us=beat.last_commit_us,
            latency=beat.latency_bins,
            durations=beat.flush_bins,
        )
        beat.close()


def usage(pid: int) -> Usage | None:
    """Return what a process has used so far (proc(5)); None if there is no such process."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        if pid > 0 and fields[0] not in "ZX":
            return Usage((int(fields[11]) + int(fields[12])) / _TICK, (int(pages[1]) - int(pages[2])) * _PAGE)
    return None


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
