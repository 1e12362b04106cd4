"""What a writer says of itself, in a small mapped file that outlives it: heartbeat, state, counters, latency.

    <lane dir>/writer-0.beat, 8-byte words written by the writer alone:

       0  process id           4  committed points      8  last commit, us since 1970
       1  beat (ns)            5  flushes               9  server edition (see EDITIONS)
       2  state                6  failures
       3  in state since (ns)  7  stopped lanes       10  dead-lettered points
      11  points that went straight to the columnstore
      12  us spent in flushes                         13  us from arrival to commit, over all points
      14  anomalous points
      64  latency histogram: points by the time from arrival to commit, LATENCY_BINS words
     320  latency histogram: flushes by their duration, FLUSH_BINS words

Times marked ns are CLOCK_MONOTONIC, which all processes of one machine share. The web side reads this for /health
and never talks to the database; the supervisor reads it to find a writer that is alive but no longer moves.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FILE_BYTES: Final = 4096
STALE_S: Final = 5.0
"""A writer that has not beaten for so long is taken for stuck. It beats also while it waits for the database."""
LATENCY_BINS: Final = 256
FLUSH_BINS: Final = 128
EDITIONS: Final = ("unknown", "plain", "apache", "timescale")

_PID, _BEAT, _STATE, _SINCE, _COMMITTED, _FLUSHES, _FAILURES, _STOPPED, _LAST, _EDITION, _DEAD = range(11)
_COMPRESSED, _BUSY, _WAITED, _ANOMALIES = 11, 12, 13, 14
_LATENCY: Final = 64
_FLUSH: Final = 320
Bins = NDArray[np.uint64]
Floats = NDArray[np.floating[Any]]
# Bin i counts latencies up to 10 us * 1.07**i: 7 % wide, from 10 us to 5 minutes. Of flushes: 1.15**i, to 9 minutes.
_FIRST_US, _STEP = 10.0, 1.07
LATENCY_EDGES: Final[Floats] = _FIRST_US * _STEP ** np.arange(LATENCY_BINS)
FLUSH_EDGES: Final[Floats] = 10.0 * 1.15 ** np.arange(FLUSH_BINS)


class State(IntEnum):
    """What a writer is at."""

    STARTING = 0
    CONNECTED = 1
    DATABASE_AWAY = 2
    ENDED = 3


class Heartbeat:
    """The status file of writer `index`. The writer opens it with `own=True` and writes; everybody else reads."""

    def __init__(self, path: Path, *, own: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if own else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if own:
                os.posix_fallocate(fd, 0, FILE_BYTES)
            self._map = mmap.mmap(fd, FILE_BYTES)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        if own:
            self._words[_PID] = os.getpid()
            self.enter(State.STARTING)
            self.beat()

    def close(self) -> None:
        self._words.release()
        self._map.close()

    # -- written by the writer

    def beat(self) -> None:
        self._words[_BEAT] = time.monotonic_ns()

    def enter(self, state: State) -> None:
        if self._words[_STATE] != state or not self._words[_SINCE]:
            self._words[_SINCE] = time.monotonic_ns()
            self._words[_STATE] = state

    def mark_ended(self) -> None:
        """Say that the writer is dead; for whoever supervises it. Its process id may be given to another process."""
        self._words[_PID] = 0
        self.enter(State.ENDED)

    def set_edition(self, edition: str) -> None:
        self._words[_EDITION] = EDITIONS.index(edition)

    def set_stopped_lanes(self, count: int) -> None:
        self._words[_STOPPED] = count

    def failed(self) -> None:
        self._words[_FAILURES] += 1

    def dead_lettered(self, points: int) -> None:
        self._words[_DEAD] += points

    def compressed(self, points: int) -> None:
        self._words[_COMPRESSED] += points

    def anomalous(self, points: int) -> None:
        self._words[_ANOMALIES] += points

    def committed(self, points: int, now_us: int, latencies_us: NDArray[np.int64], flush_us: int) -> None:
        """Count one commit of `flush_us`; `latencies_us` holds for each point the time from arrival to commit."""
        words = self._words
        words[_COMMITTED] += points
        words[_FLUSHES] += 1
        words[_LAST] = now_us
        words[_BUSY] += flush_us
        words[_WAITED] += max(0, int(latencies_us.sum()))
        words[_FLUSH + min(int(np.searchsorted(FLUSH_EDGES, flush_us)), FLUSH_BINS - 1)] += 1
        # The logarithm says the bin in a fifth of the time that a search among the edges takes.
        bins = np.ceil(np.log(np.maximum(latencies_us, _FIRST_US) / _FIRST_US) / np.log(_STEP))
        bins = np.bincount(np.minimum(bins, LATENCY_BINS - 1).astype(np.int64))
        for index in np.flatnonzero(bins).tolist():
            words[_LATENCY + index] += int(bins[index])

    # -- read by anybody

    @property
    def pid(self) -> int:
        return self._words[_PID]

    @property
    def age(self) -> float:
        """Seconds since the last beat."""
        return (time.monotonic_ns() - self._words[_BEAT]) / 1e9

    @property
    def alive(self) -> bool:
        return self.state is not State.ENDED and 0 <= self.age < STALE_S

    @property
    def state(self) -> State:
        return State(self._words[_STATE])

    @property
    def in_state(self) -> float:
        """Seconds since the writer entered its state."""
        return (time.monotonic_ns() - self._words[_SINCE]) / 1e9

    @property
    def committed_points(self) -> int:
        return self._words[_COMMITTED]

    @property
    def flushes(self) -> int:
        return self._words[_FLUSHES]

    @property
    def stopped_lanes(self) -> int:
        return self._words[_STOPPED]

    @property
    def dead_lettered_points(self) -> int:
        return self._words[_DEAD]

    @property
    def compressed_points(self) -> int:
        return self._words[_COMPRESSED]

    @property
    def edition(self) -> str:
        return EDITIONS[self._words[_EDITION]]

    @property
    def failures(self) -> int:
        return self._words[_FAILURES]

    @property
    def last_commit_us(self) -> int:
        """When the last commit was, in us since 1970; 0 if there was none."""
        return self._words[_LAST]

    @property
    def anomalous_points(self) -> int:
        return self._words[_ANOMALIES]

    @property
    def busy_us(self) -> int:
        """Time spent in flushes that were stored."""
        return self._words[_BUSY]

    @property
    def waited_us(self) -> int:
        """The times from arrival to commit, added up over all points."""
        return self._words[_WAITED]

    @property
    def latency_bins(self) -> Bins:
        """Points by the time from arrival to commit; see LATENCY_EDGES."""
        return np.array(self._words[_LATENCY : _LATENCY + LATENCY_BINS], np.uint64)

    @property
    def flush_bins(self) -> Bins:
        """Flushes by their duration; see FLUSH_EDGES."""
        return np.array(self._words[_FLUSH : _FLUSH + FLUSH_BINS], np.uint64)


def beat_file(folder: Path, index: int) -> Path:
    """Name the status file of writer `index`."""
    return folder / f"writer-{index}.beat"


def forget(folder: Path, writers: int) -> None:
    """Remove the status files of writers that an earlier run had more of; the caller supervises all there are."""
    for path in folder.glob("writer-*.beat"):
        number = path.stem.rpartition("-")[2]
        if number.isdecimal() and int(number) >= writers:
            path.unlink(missing_ok=True)


def read(path: Path) -> Heartbeat | None:
    """Map a writer's status file for reading; None if it was removed, or its writer has not given it its size yet."""
    try:
        return Heartbeat(path)
    except (OSError, ValueError):
        return None


def read_all(folder: Path) -> list[Heartbeat]:
    """Map the status files of all writers of a lane directory."""
    return [beat for path in sorted(folder.glob("writer-*.beat")) if (beat := read(path)) is not None]


def quantiles_ms(bins: Bins, edges: Floats, shares: Sequence[float]) -> list[float]:
    """Return the durations (ms) below which the given shares of what was counted lie; 0 when nothing was."""
    total = int(bins.sum())
    if total == 0:
        return [0.0] * len(shares)
    cumulated = np.cumsum(bins)
    return [float(edges[np.searchsorted(cumulated, share * total)]) / 1000 for share in shares]


def latency_ms(bins: Bins, shares: Sequence[float]) -> list[float]:
    """Return the times from arrival to commit (ms) below which the given shares of the points lie."""
    return quantiles_ms(bins, LATENCY_EDGES, shares)
