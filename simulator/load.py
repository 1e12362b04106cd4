"""What is sent when: the schedule of points, and the requests that carry them.

Open loop (rate > 0): point k of a process is due k / R seconds after the start, R points/s in all, whatever the service
does; its timestamp is that due time. A service that stalls finds the missed points waiting, and their latency counts
from when they were due. Closed loop (rate 0): points are made whenever a connection is free.

Points go round the satellites in order. A block is a run of them made at once; those that travel alone leave at their
own due time, the others together, as one batch, when the last of the block is due.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.fleet import Fleet, Floats, Int64s, satellite_ids
from simulator.settings import Job, Settings
from simulator.wire import BatchBody, JsonRows, split_rows

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


@dataclass(frozen=True, slots=True)
class Start:
    """Hold one moment on both clocks: time.monotonic() in seconds, and microseconds since 1970 UTC."""

    monotonic: float
    time_us: int


class OpenLoop:
    """Schedule `satellites` x `rate` points/s for `duration` seconds, at most `limit` of them; None: no end, no limit.

    Two points of one satellite are 1 / rate apart, so for every rate up to 100,000/s their timestamps differ.
    """

    def __init__(self, satellites: int, rate: float, duration: float | None, limit: int | None) -> None:
        self._per_second = satellites * rate
        # The subtraction keeps a product like 10.000000000000002 from scheduling one point too many.
        by_time = math.inf if duration is None else math.ceil(self._per_second * duration - 1e-6)
        self._total = min(by_time, math.inf if limit is None else limit)

    @property
    def seconds(self) -> float:
        """Return how long the schedule lasts."""
        return self._total / self._per_second

    def left(self, first: int) -> float:
        """Return how many points there are from point `first` on."""
        return self._total - first

    def offsets(self, first: int, count: int) -> Floats:
        """Return when the points [first, first + count) are due, in seconds after the start."""
        return np.arange(first, first + count) / self._per_second

    def due(self, elapsed: float) -> int:
        """Return how many points are due within `elapsed` seconds of the start."""
        return int(min(self._total, math.floor(max(elapsed, 0.0) * self._per_second) + 1))


class ClosedClock:
    """Give points their timestamps when there is no schedule: spread evenly from the block before until now.

    Invariant: no satellite gets one microsecond twice. Given that a satellite's turn comes every `satellites` points
    and no step is below 1000 / satellites ns, its timestamps lie 1,000 ns apart or more, so they differ once the
    nanoseconds are cut off. They run ahead of the clock only beyond a million points a second a satellite; `ahead`
    tells how far, and the plan then holds the points back.
    """

    def __init__(self, satellites: int, start_ns: int) -> None:
        self._least_ns = -(-1_000 // satellites)
        self._last_ns = start_ns

    def times_us(self, count: int, now_ns: int) -> Int64s:
        """Return the timestamps of the next `count` points, in microseconds since 1970 UTC."""
        step = max(self._least_ns, (now_ns - self._last_ns) // count)
        times = self._last_ns + step * np.arange(1, count + 1)
        self._last_ns += step * count
        return times // 1_000

    def ahead(self, now_ns: int) -> float:
        """Return how many seconds the last timestamp lies in the future, negative when it lies in the past."""
        return (self._last_ns - now_ns) * 1e-9


@dataclass(slots=True, eq=False)
class Block:
    """Hold n points made together, and what became of each: outcome (n,) is 0, or the verdict that settled it."""

    satellite: Int64s
    time_us: Int64s
    anomalous: npt.NDArray[np.bool_]
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
    failures: int = 0  # attempts in a row of which no byte was sent
    retried: bool = False  # the service has answered an attempt with "later"


def request_head(job: Job, path: str, content_type: bytes, length: int) -> bytes:
    """Return the request line and headers of a POST with a body of `length` bytes, blank line included."""
    lines = [f"POST {job.path}{path} HTTP/1.1", f"Host: {job.host}", "User-Agent: orbitstream-simulator"]
    if job.token is not None:
        lines.append(f"Authorization: Bearer {job.token}")
    lines += [f"Content-Type: {content_type.decode()}", f"Content-Length: {length}", "", ""]
    return "\r\n".join(lines).encode("latin-1")


class RequestMaker:
    """Turn points into requests: reads the fleet, prints the rows, cuts them into single posts and one batch."""

    def __init__(self, job: Job, capacity: int) -> None:
        settings = job.settings
        self._job = job
        self._fleet = Fleet(
            job.first, job.last, seed=settings.seed, anomaly_rate=settings.anomaly_rate, channels=settings.channels
        )
        ids = satellite_ids(job.first, job.last, settings.satellites)
        channels = self._fleet.channels
        length = JsonRows(ids, job.first, channels, capacity=0).width
        head = request_head(job, "/telemetry", b"application/json", length)
        self._singles = JsonRows(ids, job.first, channels, capacity=SINGLES_BLOCK, head=head)
        self._body = BatchBody(settings.format)
        self._batches = JsonRows(ids, job.first, channels, capacity=capacity, tail=self._body.separator)
        self._heads: dict[int, bytes] = {}

    def make(self, satellite: Int64s, time_us: Int64s, due: Floats, alone: npt.NDArray[np.bool_]) -> list[Request]:
        """Make the requests of one block of n points, in the order in which they are due.

        due: (n,) on time.monotonic(), rising; alone: (n,) whether a point is a single post.
        """
        readings = self._fleet.read(satellite, time_us)
        outcome = np.zeros(len(satellite), dtype=np.uint8)
        block = Block(satellite, time_us, readings.anomalous, outcome, open=0)
        requests: list[Request] = []
        singles = np.flatnonzero(alone)
        if len(singles):
            texts = split_rows(self._singles.write(readings.pick(singles)))
            rows = zip(texts, due[singles].tolist(), singles.tolist(), strict=True)
            requests += [Request(text, when, block, row, 1) for text, when, row in rows]
        if len(singles) < len(satellite):
            batch = np.flatnonzero(~alone)
            matrix = self._batches.write(readings.pick(batch) if len(singles) else readings)
            data = memoryview(self._body.join(self._batch_head(len(batch)), matrix))
            requests.append(Request(data, float(due[-1]), block, batch, len(batch)))
        block.open = len(requests)
        return requests

    def _batch_head(self, rows: int) -> bytes:
        head = self._heads.get(rows)
        if head is None:
            length = self._body.length(rows, self._batches.width)
            head = request_head(self._job, "/telemetry/batch", self._body.content_type, length)
            self._heads[rows] = head
        return head


def block_points(settings: Settings, per_second: float) -> int:
    """Return how many points a block has, at `per_second` points/s of the process (0: closed loop)."""
    share = single_share(settings)
    size = SINGLES_BLOCK if share == 1.0 else min(int(settings.batch / (1.0 - share) + 1e-9), MAX_BLOCK)
    size = max(size, settings.batch)
    return min(size, max(1, int(per_second * MAX_WAIT_S))) if per_second else size


def single_share(settings: Settings) -> float:
    """Return the share of the points that travel alone: all of them when a batch is one point."""
    return 1.0 if settings.batch == 1 else settings.single_share


class Plan:
    """Give a sender its requests, block after block, in the order in which they are due, once `begin` was called.

    start: when the run starts; end: when it ends; last_start: when the last request may be sent for the first time, all
    on time.monotonic().
    """

    def __init__(self, job: Job) -> None:
        settings = job.settings
        self._first = job.first
        self._satellites = job.last - job.first
        self._limit = job.points
        self._share = single_share(settings)
        self._size = block_points(settings, self._satellites * settings.rate)
        self._maker = RequestMaker(job, self._size)
        self._next = 0
        self._schedule: OpenLoop | None = None
        if settings.rate:
            self._schedule = OpenLoop(self._satellites, settings.rate, settings.duration, job.points)
        self.closed = self._schedule is None
        duration = math.inf if settings.duration is None else settings.duration
        self._duration = duration if self._schedule is None else min(duration, self._schedule.seconds)
        self.begin(Start(time.monotonic(), time.time_ns() // 1_000))

    def begin(self, start: Start) -> None:
        """Set the moment at which the run starts."""
        self.start = start
        self._clock = ClosedClock(self._satellites, start.time_us * 1_000)
        self.end = start.monotonic + self._duration
        # A closed loop stops at its end; an open one still owes the service what it was late with.
        self.last_start = self.end if self.closed else self.end + GRACE_S

    def scheduled(self, now: float) -> int | None:
        """Return how many points were due by `now`, or None when there is no schedule."""
        if self._schedule is None:
            return None
        return self._schedule.due(min(now, self.end) - self.start.monotonic)

    def next_block(self, now: float) -> list[Request]:
        """Make the next requests; an empty list means that there are no more."""
        if self._schedule is not None:
            left = self._schedule.left(self._next)
        else:
            left = math.inf if self._limit is None else self._limit - self._next
        count = int(min(self._size, left))
        if count <= 0 or now >= self.last_start:
            return []
        points = np.arange(self._next, self._next + count)
        if self._schedule is not None:
            offsets = self._schedule.offsets(self._next, count)
            due = self.start.monotonic + offsets
            time_us = self.start.time_us + (offsets * 1e6).astype(np.int64)
        else:
            now_ns = time.time_ns()
            time_us = self._clock.times_us(count, now_ns)
            due = np.full(count, now + max(0.0, self._clock.ahead(now_ns) - MAX_AHEAD_S))
        self._next += count
        alone = np.floor((points + 1) * self._share) > np.floor(points * self._share)
        return self._maker.make(self._first + points % self._satellites, time_us, due, alone)
