"""What is sent when: the schedule of points, and the requests that carry them.

Open loop (rate > 0): point k of a process is due k / R seconds after the start, R points/s in all, whatever the service
does; its timestamp is that due time. A service that stalls finds the missed points waiting, and their latency counts
from when they were due. Closed loop (rate 0): points are made whenever a connection is free.

Points go round the satellites in order. A block is a run of them made at once; those that travel alone leave at their
own due time, the others in batches, each when its last point is due.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.anomalies import Anomaly, Kinds, beyond_limits
from simulator.bodies import MEDIA_TYPES, Envelope, make_body
from simulator.fleet import Fleet, Readings, read_constellation, satellite_ids
from simulator.schedule import ClosedClock, OpenLoop, Start
from simulator.sent_log import SILENT
from simulator.settings import Job, Settings
from simulator.traits import Floats, Int64s
from simulator.wire import JsonRows, split_rows

# After the end of the run: how long what is due, but late, is still sent, and how long a 503 is still tried again.
GRACE_S = 30.0
# A batch is sent smaller rather than let its first point wait longer than this.
MAX_WAIT_S = 1.0
# Points that travel alone are made this many at a time: numpy's cost a call is then under 1 us a point.
SINGLES_BLOCK = 256
# No timestamp is further in the future than this when its point is sent.
MAX_AHEAD_S = 1.0
# A batch with many single posts beside it would otherwise be made long before its last point leaves.
MAX_BLOCK = 20_000
# Points of several batches are made together, up to so many: a call of numpy costs as much as 100 points in it, and
# rare anomalies a number of calls a block.
LARGE_BLOCK = 20_000
# But points are made so long before they are due at most.
AHEAD_S = 0.05


@dataclass(slots=True, eq=False)
class Block:
    """Hold n points made together, and what became of each: outcome (n,) is 0, or the verdict that settled it.

    anomaly, beyond: (n,) what is wrong with a point, and whether it breaks a limit that the service watches.
    """

    satellite: Int64s
    time_us: Int64s
    anomaly: Kinds
    beyond: npt.NDArray[np.bool_]
    outcome: npt.NDArray[np.uint8]
    open: int  # requests not settled yet


@dataclass(slots=True, eq=False)
class Request:
    """Hold one request: its full text, when it is due (time.monotonic()), and the rows of the block that it carries."""

    data: memoryview
    due: float
    block: Block
    rows: int | Int64s
    points: int
    failures: int = 0  # attempts in a row that brought no answer
    retried: bool = False  # the service has answered an attempt with "later"
    doubtful: bool = False  # an attempt may have been stored


class RequestMaker:
    """Turn points into requests: reads the fleet, prints the rows, cuts them into single posts and batches."""

    def __init__(self, job: Job, capacity: int) -> None:
        settings = job.settings
        self._batch = settings.batch
        self._fleet = Fleet(
            job.first,
            job.last,
            seed=settings.seed,
            anomaly_rate=settings.anomaly_rate,
            channels=settings.channels,
            constellation=read_constellation(settings.tle, job.last),
        )
        ids = satellite_ids(job.first, job.last, settings.satellites)
        channels = self._fleet.channels
        length = JsonRows(ids, job.first, channels, capacity=0).width
        self._single = Envelope(job, "/telemetry", MEDIA_TYPES["json"])
        head = self._single.head(length)
        self._head_length = len(head)
        self._singles = JsonRows(ids, job.first, channels, capacity=SINGLES_BLOCK, head=head)
        self._body = make_body(settings.format, ids, job.first, channels, capacity)
        self._envelope = Envelope(job, "/telemetry/batch", MEDIA_TYPES[settings.format], settings.encoding)

    def warm_up(self, satellite: Int64s, time_us: int) -> None:
        """Work out the orbits of the satellites (n,) around a time, so that the first requests need not wait."""
        self._fleet.read(satellite, np.full(len(satellite), time_us))

    def make(
        self, satellite: Int64s, time_us: Int64s, due: Floats, alone: npt.NDArray[np.bool_] | None
    ) -> tuple[Block, list[Request]]:
        """Make one block of n points and its requests, in the order in which they are due.

        due: (n,) on time.monotonic(), rising; alone: (n,) whether a point is a single post, None for no. A point of a
        satellite that has fallen silent travels in no request; its outcome is SILENT from the start.
        """
        readings = self._fleet.read(satellite, time_us)
        block = new_block(readings)
        requests: list[Request] = []
        talking = block.outcome == 0
        singles = np.empty(0, np.int64) if alone is None else np.flatnonzero(alone & talking)
        batched = np.flatnonzero(talking if alone is None else ~alone & talking)
        if len(singles):
            matrix = self._singles.write(readings.pick(singles))
            self._single.number(matrix, self._head_length)
            each = zip(split_rows(matrix), due[singles].tolist(), singles.tolist(), strict=True)
            requests += [Request(text, when, block, row, 1) for text, when, row in each]
        if len(batched):
            for turn, parts in enumerate(self._body.bodies(readings.pick(batched), self._batch)):
                rows = batched[turn * self._batch : (turn + 1) * self._batch]
                requests.append(Request(self._envelope.wrap(parts), float(due[rows[-1]]), block, rows, len(rows)))
        if len(singles) and len(batched):
            requests.sort(key=lambda request: request.due)
        block.open = len(requests)
        return block, requests


def new_block(readings: Readings) -> Block:
    """Return the block of n readings, before any of them has travelled."""
    anomaly = readings.anomaly
    beyond = np.zeros(len(anomaly), dtype=np.bool_)
    outcome = np.zeros(len(anomaly), dtype=np.uint8)
    where = np.flatnonzero(anomaly)
    if len(where):
        beyond[where] = beyond_limits(readings.values[:, where])
        outcome[where[anomaly[where] == Anomaly.SILENCE]] = SILENT
    return Block(readings.satellite, readings.time_us, anomaly, beyond, outcome, open=0)


def block_points(settings: Settings, per_second: float) -> int:
    """Return how many points a block has, at `per_second` points/s of the process (0: closed loop)."""
    share = single_share(settings)
    size = SINGLES_BLOCK if share == 1.0 else max(int(settings.batch / (1.0 - share) + 1e-9), settings.batch)
    if share < 1.0:
        longest = LARGE_BLOCK if not per_second else min(LARGE_BLOCK, per_second * AHEAD_S)
        size = min(max(size, int(longest // size) * size), max(MAX_BLOCK, settings.batch))
    return min(size, max(1, int(per_second * MAX_WAIT_S))) if per_second else size


def single_share(settings: Settings) -> float:
    """Return the share of the points that travel alone: all of them when a batch is one point."""
    return 1.0 if settings.batch == 1 else settings.single_share


class Plan:
    """Give a sender its requests, block after block, in the order in which they are due, once `begin` was called.

    start: when the run starts; end: when it ends; last_start: when the last request may be sent for the first time, all
    on time.monotonic(). Raises ElementsError when the orbits do not reach the run.
    """

    def __init__(self, job: Job) -> None:
        settings = job.settings
        self._satellites = job.last - job.first
        self._limit = job.points
        self._share = single_share(settings)
        self._start_us = settings.start_us
        self._size = block_points(settings, self._satellites * settings.rate)
        self._maker = RequestMaker(job, self._size)
        # Satellites in turn, from any of them on, for as many points as a block has.
        self._rounds = job.first + np.arange(self._satellites + self._size) % self._satellites
        self._next = 0
        self._prepared: deque[tuple[Block, list[Request]]] | None = None
        self._schedule: OpenLoop | None = None
        if settings.rate:
            self._schedule = OpenLoop(self._satellites, settings.rate, settings.duration, job.points, settings.profile)
        self.closed = self._schedule is None
        duration = math.inf if settings.duration is None else settings.duration
        self._duration = duration if self._schedule is None else min(duration, self._schedule.seconds)
        self.begin(Start(time.monotonic(), time.time_ns() // 1_000))
        self._maker.warm_up(np.arange(job.first, job.last), self.start.time_us)

    def begin(self, start: Start) -> None:
        """Set the moment at which the run starts."""
        if self._start_us is not None:
            start = Start(start.monotonic, self._start_us)
        self.start = start
        self._behind_us = time.time_ns() // 1_000 - start.time_us if self._start_us is not None else 0
        self._clock = ClosedClock(self._satellites, start.time_us * 1_000)
        self.end = start.monotonic + self._duration
        # A closed loop stops at its end; an open one still owes the service what it was late with.
        self.last_start = self.end if self.closed else self.end + GRACE_S

    def scheduled(self, now: float) -> int | None:
        """Return how many points were due by `now`, or None when there is no schedule."""
        if self._schedule is None:
            return None
        return self._schedule.due(min(now, self.end) - self.start.monotonic)

    def prepare(self, stopped: Callable[[], bool]) -> None:
        """Make all blocks of a closed loop with a limit of points now: from then on they are only handed out.

        `stopped` is asked between two blocks whether to leave it.
        """
        self._prepared = deque()
        while not stopped() and (made := self._make_block(time.monotonic())):
            self._prepared.append(made)

    def next_block(self, now: float) -> tuple[Block, list[Request]] | None:
        """Return the next points and their requests (none when all their satellites are silent); None: no more."""
        if now >= self.last_start:
            return None
        if self._prepared is not None:
            return self._prepared.popleft() if self._prepared else None
        return self._make_block(now)

    def _make_block(self, now: float) -> tuple[Block, list[Request]] | None:
        if self._schedule is not None:
            left = self._schedule.left(self._next)
        else:
            left = math.inf if self._limit is None else self._limit - self._next
        count = int(min(self._size, left))
        if count <= 0:
            return None
        if self._schedule is not None:
            offsets = self._schedule.offsets(self._next, count)
            due = self.start.monotonic + offsets
            time_us = self.start.time_us + (offsets * 1e6).astype(np.int64)
        else:
            now_ns = time.time_ns() - self._behind_us * 1_000
            time_us = self._clock.times_us(count, now_ns)
            due = np.full(count, now + max(0.0, self._clock.ahead(now_ns) - MAX_AHEAD_S))
        turn = self._next % self._satellites
        satellite = self._rounds[turn : turn + count]
        alone = self._alone(count)
        self._next += count
        return self._maker.make(satellite, time_us, due, alone)

    def _alone(self, count: int) -> npt.NDArray[np.bool_] | None:
        """Tell which of the next points are single posts; None when none is."""
        if not self._share:
            return None
        points = np.arange(self._next, self._next + count)
        return np.asarray(np.floor((points + 1) * self._share) > np.floor(points * self._share))
