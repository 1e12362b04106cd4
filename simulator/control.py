"""The parent of the sender processes: starts them together, shows how far they are, stops them, adds up results."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

from simulator.report import Report, Tally, progress_line
from simulator.sent_log import spool_path
from simulator.settings import STOP_GRACE_S, Job, Settings, share

PROGRESS_S = 1.0
# From the word to the first request: time for the word to reach every sender.
LEAD_S = 0.05
# A sender that was told to stop and is still there after this is killed.
KILL_AFTER_S = STOP_GRACE_S + 3.0
POLL_S = 0.1


class Unreachable(Exception):
    """Report that the service cannot be reached; the message is one line with the remedy."""


def reach(host: str, port: int, timeout: float) -> tuple[int, tuple[Any, ...]]:
    """Connect to the service once; return the address family and address that answered, or raise Unreachable."""
    try:
        with socket.create_connection((host, port), timeout=min(timeout, 5.0)) as sock:
            return sock.family, sock.getpeername()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise Unreachable(
            f"cannot reach {host} port {port}: {reason.lower()}; start the service or give its --api-url"
        ) from error


class Progress:
    """Write one line a second: rewritten in place on a terminal, line after line elsewhere."""

    def __init__(self, stream: TextIO, started: float) -> None:
        self._stream = stream
        self._in_place = stream.isatty()
        self._started = started
        self._next = started + PROGRESS_S
        self._shown = (started, 0)

    def show(self, now: float, tally: Tally) -> None:
        """Show the tally if a second has passed since the last line."""
        if now < self._next:
            return
        self._next += PROGRESS_S * max(1, -(-(now - self._next) // PROGRESS_S))
        before, accepted = self._shown
        line = progress_line(now - self._started, tally, (tally.accepted - accepted) / (now - before))
        self._shown = (now, tally.accepted)
        # \033[K clears what a longer line left behind.
        self._stream.write(f"\r{line}\033[K" if self._in_place else f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that was rewritten in place."""
        if self._in_place and self._shown[0] > self._started:
            self._stream.write("\n")
            self._stream.flush()


class SenderProcess:
    """Own one child; `tally` is the latest it told, `result` its last word."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tally: dict[str, Any] = Tally().export()
        self.latencies: dict[str, Any] | None = None
        self.ready = False
        self.done = False
        self.failure: str | None = None
        self._rest = b""
        # The child must find this package however the parent found it; -P keeps the working directory out unless it
        # was in the parent's path. One BLAS thread: none is used.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "simulator.sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
        )
        self.say(job.to_line())

    def fileno(self) -> int:
        """Return the descriptor on which the child speaks."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def say(self, line: bytes) -> None:
        """Send the child a line; a child that is gone shows when it is heard next."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def hear(self) -> None:
        """Take what the child has said."""
        data = os.read(self.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.ready = self.ready or "ready" in message
            self.failure = message.get("failed", self.failure)
            self.tally = message.get("progress") or message.get("result") or self.tally
            self.latencies = message.get("latencies", self.latencies)
        if not data:
            self.done = True
            code = self._process.wait()
            if self.latencies is None and self.failure is None:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                self.failure = f"sender {self.job.number} died ({how}); what it had not told is not counted"

    def kill(self) -> None:
        """End the child now, if it is still there."""
        self._process.kill()

    def close(self) -> None:
        """End the child and reap it."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Run:
    """Run the senders of one run; `interrupt` may be called from a signal handler."""

    def __init__(self, settings: Settings, jobs: list[Job], stderr: TextIO | None) -> None:
        self._jobs = jobs
        self._stderr = stderr
        self._report = Report(settings)
        self._senders: list[SenderProcess] = []
        self.interrupted = 0
        self._kill_at: float | None = None

    def interrupt(self, number: int, _frame: FrameType | None = None) -> None:
        """Ask the run to stop because of a signal."""
        self.interrupted = self.interrupted or number

    def run(self) -> Report:
        """Start the senders, wait for them, return what they did. Whatever happens, none is left behind."""
        with selectors.DefaultSelector() as selector:
            try:
                for job in self._jobs:
                    sender = SenderProcess(job)
                    self._senders.append(sender)
                    selector.register(sender, selectors.EVENT_READ)
                if self._stderr and self._report.settings.prepare:
                    print(f"  making {self._report.settings.points:,} points", file=self._stderr, flush=True)
                self._pump(
                    selector, lambda: any(s.done for s in self._senders) or all(s.ready for s in self._senders), None
                )
                start = self._go()
                progress = Progress(self._stderr, start) if self._stderr else None
                self._pump(selector, lambda: all(s.done for s in self._senders), progress)
                if progress:
                    progress.close()
            finally:
                for sender in self._senders:
                    sender.close()
        return self._add_up()

    def _go(self) -> float:
        """Start all senders at one moment, and return it; when one could not get ready, or on a signal, none starts."""
        started_us = time.time_ns() // 1_000 + round(LEAD_S * 1e6)
        start = time.monotonic() + LEAD_S  # not before that: no point leaves earlier than the report says
        word = {"monotonic": start, "time_us": started_us}
        if any(sender.done for sender in self._senders):
            self._stop(start)
        elif not self.interrupted:
            self._report.started_us = started_us
            for sender in self._senders:
                sender.say(b"go " + json.dumps(word).encode() + b"\n")
        return start

    def _pump(self, selector: selectors.BaseSelector, finished: Callable[[], bool], progress: Progress | None) -> None:
        """Hear the senders until `finished`."""
        while not finished():
            for key, _ in selector.select(POLL_S):
                sender = key.fileobj
                assert isinstance(sender, SenderProcess)
                sender.hear()
                if sender.done:
                    selector.unregister(sender)
            now = time.monotonic()
            if self.interrupted:
                self._stop(now)
            if progress:
                progress.show(now, self._tally())

    def _stop(self, now: float) -> None:
        """Tell the senders to stop, once; kill what has not stopped in time."""
        if self._kill_at is None:
            self._kill_at = now + KILL_AFTER_S
            for sender in self._senders:
                sender.say(b"stop\n")
        elif now >= self._kill_at:
            for sender in self._senders:
                sender.kill()

    def _tally(self) -> Tally:
        tally = Tally()
        for sender in self._senders:
            tally.add(sender.tally)
        return tally

    def _add_up(self) -> Report:
        self._report.tally = self._tally()
        for sender in self._senders:
            if sender.latencies is not None:
                self._report.latencies.merge(sender.latencies)
            if sender.failure is not None:
                self._report.failures.append(sender.failure)
        return self._report


def make_jobs(
    settings: Settings, family: int, address: tuple[Any, ...], *, host: str, path: str, token: str | None
) -> list[Job]:
    """Divide a run among its processes: satellites, and with them the points of the limit."""
    jobs = []
    run = os.urandom(6).hex()
    for number in range(settings.processes):
        first, last = share(settings.satellites, number, settings.processes)
        points = None
        if settings.points is not None:
            points = settings.points * last // settings.satellites - settings.points * first // settings.satellites
        log = settings.sent_log or settings.truth
        spool = spool_path(log, number) if log else None
        jobs.append(
            Job(settings, number, first, last, points, spool, run, family, address, host, path, token, os.getpid())
        )
    return jobs
