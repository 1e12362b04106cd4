"""One sender process: takes requests from its plan when they are due, carries them over its connections, keeps count.

Started by control.py as ``python -m simulator.sender``; they talk in lines over the process's stdin and stdout:

    parent  -> sender    the Job as JSON;  then  go {"monotonic":..,"time_us":..}  and perhaps  stop
    sender  -> parent    {"ready":true};  {"progress":TALLY} a few times a second;  {"result":TALLY,"latencies":..}
                         or  {"failed":"one line"}
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import heapq
import json
import os
import random
import select
import selectors
import signal
import sys
import time
from collections import deque
from itertools import count
from typing import Any, BinaryIO

import numpy as np

from simulator.connection import Answer, Connection, Verdict
from simulator.histogram import Latencies
from simulator.load import GRACE_S, Block, Plan, Request
from simulator.orbits import ElementsError
from simulator.replay import ReplayPlan
from simulator.report import Tally
from simulator.schedule import Start
from simulator.sent_log import SILENT, Spool
from simulator.settings import STOP_GRACE_S, Job

CHORES_S = 0.1
# Waits before connecting again double from the first to the last of these.
FIRST_RECONNECT_S = 0.05
LAST_RECONNECT_S = 1.0
PR_SET_PDEATHSIG = 1


class Sender:
    """Run a plan over `connections` until it is done or `stop` is called.

    Invariant: a request is in exactly one place: queued, busy on a connection, or paused with its connection; it leaves
    the last two only by a verdict. Given that, every point sent is counted and logged once, with its last verdict.
    """

    def __init__(
        self, job: Job, plan: Plan | ReplayPlan, spool: Spool | None, control: BinaryIO, output: BinaryIO
    ) -> None:
        self._plan = plan
        self._spool = spool
        self._control = control
        self._output = output
        self._timeout = job.settings.timeout
        self._keyed = job.settings.idempotency_keys
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, None)
        known: dict[bytes, Answer] = {}
        self._free = deque(
            Connection(self._selector, job.family, job.address, known) for _ in range(job.settings.connections)
        )
        self._queue: deque[Request] = deque()
        self._busy: dict[Connection, tuple[Request, float]] = {}
        self._paused: list[tuple[float, int, Connection, Request]] = []
        self._ticket = count()
        self._more = True
        self._stop_by: float | None = None
        # No attempt starts after this moment, neither a first one nor a retry.
        self._last_attempt = plan.end + GRACE_S
        self._chores_at = 0.0
        self._started = plan.start.monotonic
        self._last_answer = self._started
        self._jitter = random.Random(job.number)
        self._cpu_before = time.process_time()
        self._waits: list[float] = []
        self.tally = Tally()
        self.latencies = Latencies()

    def run(self) -> None:
        """Send until nothing is left to send or to wait for."""
        clock = time.monotonic
        while True:
            now = clock()
            if now >= self._chores_at:
                self._do_chores(now)
            self._dispatch(now)
            if not (self._more or self._busy or self._paused):
                break
            for key, mask in self._selector.select(self._patience(now)):
                connection = key.data
                if connection is None:
                    self._hear()
                    continue
                verdict = connection.on_ready(mask)
                if verdict is not None:
                    self._settle(connection, verdict)
        self._finish()

    def stop(self) -> None:
        """Start nothing new; what is in flight has two seconds."""
        if self._stop_by is None:
            self._stop_by = self._last_attempt = time.monotonic()
            self._stop_by += STOP_GRACE_S
            self._drop_queue()
            for _, _, connection, request in self._paused:
                self._abandon(connection, request)
            self._paused.clear()

    def _hear(self) -> None:
        """Take the parent's word; its silence (end of file) means that it is gone."""
        if self._control.readline().strip() in (b"stop", b""):
            self._selector.unregister(self._control)
            self.stop()

    def _dispatch(self, now: float) -> None:
        """Give free connections what is due, and paused ones another try."""
        while self._paused and self._paused[0][0] <= now:
            _, _, connection, request = heapq.heappop(self._paused)
            self.tally.retries += request.retried
            self._start(connection, request, now)
        if self._plan.closed and now < self._started:  # what is scheduled says itself when it is due
            return
        while self._free and self._more:
            if not self._queue and not self._refill(now):
                break
            request = self._queue[0]
            if request.due > now:
                break
            if now >= self._plan.last_start:
                self._drop_queue()
                break
            if self._plan.closed:
                request.due = now
            else:
                self.tally.behind_seconds = max(self.tally.behind_seconds, now - request.due)
            self._start(self._free.popleft(), self._queue.popleft(), now)

    def _refill(self, now: float) -> bool:
        """Queue the next block's requests; False when there are no more."""
        while not self._queue:
            made = self._plan.next_block(now)
            if made is None:
                self._more = False
                return False
            block, requests = made
            self._queue.extend(requests)
            if not requests:
                self._log(block)
        return True

    def _start(self, connection: Connection, request: Request, now: float) -> None:
        self._busy[connection] = (request, now + self._timeout)
        verdict = connection.submit(request.data)
        if verdict is not None:
            self._settle(connection, verdict)

    def _patience(self, now: float) -> float:
        """Return how long to wait for events at most, in seconds."""
        until = self._chores_at if now >= self._started else min(self._chores_at, self._started)
        if self._paused:
            until = min(until, self._paused[0][0])
        if self._queue and self._free:
            until = min(until, self._queue[0].due)
        return max(0.0, until - now)

    def _settle(self, connection: Connection, verdict: Verdict) -> None:
        """Act on what became of an attempt."""
        request, _ = self._busy.pop(connection)
        if verdict == Verdict.UNKNOWN and self._keyed:
            # With a key of its own it can be sent again: however often it arrives, it is stored once.
            request.doubtful = True
            self._pause(connection, request, verdict)
            return
        if verdict > Verdict.UNKNOWN:
            self._pause(connection, request, verdict)
            return
        self._free.append(connection)
        self._record(request, verdict)

    def _pause(self, connection: Connection, request: Request, verdict: Verdict) -> None:
        """Let the request wait for its next attempt, on its connection: nothing else is sent there meanwhile."""
        if verdict == Verdict.RETRY:
            request.retried = True
            request.failures = 0
            wait = connection.retry_after * self._jitter.uniform(1.0, 1.25)
        else:
            if verdict == Verdict.UNKNOWN:
                request.retried = True
            # The first failure is most often a connection that the service closed while it was idle: no wait.
            wait = min(FIRST_RECONNECT_S * 2 ** min(request.failures - 1, 9), LAST_RECONNECT_S)
            wait = wait if request.failures else 0.0
            request.failures += 1
        wake = time.monotonic() + wait
        if wake >= self._last_attempt:
            self._abandon(connection, request)
        else:
            heapq.heappush(self._paused, (wake, next(self._ticket), connection, request))

    def _abandon(self, connection: Connection, request: Request) -> None:
        """End a request that waits for an attempt: nothing of it is stored, unless an earlier attempt was."""
        self._free.append(connection)
        if request.retried or request.doubtful:
            self._record(request, Verdict.REFUSED)
        else:
            self._release(request.block)

    def _record(self, request: Request, verdict: Verdict) -> None:
        """Count and log a settled request."""
        if request.doubtful and verdict == Verdict.REFUSED:
            verdict = Verdict.UNKNOWN
        now = self._last_answer = time.monotonic()
        self._waits.append(now - request.due)
        tally = self.tally
        tally.requests += 1
        if verdict == Verdict.ACCEPTED:
            tally.accepted += request.points
        elif verdict == Verdict.REFUSED:
            tally.refused += request.points
        else:
            tally.unknown += request.points
        request.block.outcome[request.rows] = verdict
        self._release(request.block)

    def _release(self, block: Block) -> None:
        """Log a block when the last of its requests has left it."""
        block.open -= 1
        if block.open == 0:
            self._log(block)

    def _log(self, block: Block) -> None:
        sent = (block.outcome > 0) & (block.outcome != SILENT)
        self.tally.silent += int(np.count_nonzero(block.outcome == SILENT))
        self.tally.anomalies += int(np.count_nonzero((block.anomaly > 0) & sent))
        self.tally.beyond_limits += int(np.count_nonzero(block.beyond & sent))
        if self._spool is not None:
            self._spool.append(block)

    def _drop_queue(self) -> None:
        self._more = False
        for request in self._queue:
            self._release(request.block)
        self._queue.clear()

    def _do_chores(self, now: float) -> None:
        """Find what took too long, tell the parent how far we are."""
        self._chores_at = now + CHORES_S
        stopping = self._stop_by is not None and now >= self._stop_by
        late = [connection for connection, (_, deadline) in self._busy.items() if stopping or now >= deadline]
        for connection in late:
            self._settle(connection, connection.give_up())
        self._count()
        self._tell({"progress": self.tally.export()})

    def _count(self) -> None:
        self.latencies.add(self._waits)
        self._waits.clear()
        tally = self.tally
        in_flight = sum(request.points for request, _ in self._busy.values())
        tally.sent = tally.accepted + tally.refused + tally.unknown + in_flight
        tally.seconds = self._last_answer - self._started
        tally.cpu_seconds = time.process_time() - self._cpu_before

    def _finish(self) -> None:
        self.tally.scheduled = self._plan.scheduled(time.monotonic())
        self._count()
        if self._spool is not None:
            self._spool.close()
        self._tell({"result": self.tally.export(), "latencies": self.latencies.export()})

    def _tell(self, message: dict[str, Any]) -> None:
        tell(self._output, message)


def tell(output: BinaryIO, message: dict[str, Any]) -> None:
    """Write one message to the parent."""
    output.write(json.dumps(message).encode() + b"\n")
    output.flush()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit at once if that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def main() -> int:
    """Run as a sender process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control, output = open(0, "rb", buffering=0, closefd=False), sys.stdout.buffer  # noqa: SIM115 - as long as we live
    job = Job.from_line(control.readline())
    die_with(job.parent)
    spool: Spool | None = None
    try:
        spool = Spool(job.spool, anomalies_only=job.settings.sent_log is None) if job.spool else None
        # Nothing here makes reference cycles; a full collection would stop the schedule for milliseconds.
        gc.disable()
        plan = Plan(job) if job.settings.replay is None else ReplayPlan(job)
        if job.settings.prepare and isinstance(plan, Plan):
            plan.prepare(stopped=lambda: bool(select.select([control], [], [], 0)[0]))
        tell(output, {"ready": True})
        word, _, start = control.readline().partition(b" ")
        if word != b"go":
            tell(output, {"result": Tally().export(), "latencies": Latencies().export()})
            return 0
        plan.begin(Start(**json.loads(start)))
        Sender(job, plan, spool, control, output).run()
    except (OSError, MemoryError, ElementsError) as error:
        tell(output, {"failed": f"sender {job.number}: {str(error) or type(error).__name__}"})
        return 1
    finally:
        if spool is not None:
            with contextlib.suppress(OSError):
                spool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
