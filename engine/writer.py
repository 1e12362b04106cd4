"""A writer process: finds lanes whose consumer end is free and drains them, for as long as it lives.

When a flush is due: BATCH_SIZE points wait, or one has waited for BATCH_TIMEOUT; then everything that waits is taken,
up to the lane's bound. The bound halves after a failure, so that a slow database is not asked for more than it can do
within its statement time-out, and grows again with success.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from pathlib import Path
from random import uniform
from typing import Any, Final

import numpy as np
import psycopg

from engine import heartbeat, lanes, logs, process, rows, settings
from engine.drain import MAX_TRANSACTION_POINTS, Flush, LaneStoppedError, attach, drain
from engine.heartbeat import Heartbeat, State
from engine.migrate import find_edition
from engine.ring import Consumer, LaneError
from engine.sealed import SealedConsumer
from engine.settings import Settings
from engine.timestamps import now_us

# Both end before heartbeat.STALE_S, so that a writer is not taken for stuck while it waits for the database.
STATEMENT_TIMEOUT_S: Final = 6
TCP_TIMEOUT_S: Final = 5

SCAN_S: Final = 0.25
"""How often to look for lanes that became free. A new worker's first points wait so long at most."""
RETRY_STOPPED_S: Final = 30.0
MAX_PAUSE_S: Final = 5.0
MIN_PAUSE_S: Final = 0.05
POLL_S: Final = 0.004
"""Between two looks at idle lanes: adds half of itself to the latency; 250 looks a second cost 0.5 % of a core."""

# SQLSTATE classes that say "the statement itself cannot succeed": retrying at once would only repeat it.
_HOPELESS: Final = ("22", "23", "42", "XX", "0A")

log = logging.getLogger("orbitstream.writer")


class Drain:
    """One lane this writer owns, and what it knows of it."""

    def __init__(self, consumer: Consumer, lock: lanes.Lock) -> None:
        self.consumer, self.lock = consumer, lock
        self.attached = False
        self.waiting_since: float | None = None
        self.stopped_until = float("-inf")
        self.name = consumer.lane.path.name

    @property
    def bound(self) -> int:
        return self.consumer.lane.bound or MAX_TRANSACTION_POINTS

    def due(self, now: float, batch_size: int, batch_timeout: float) -> bool:
        """Tell whether a flush is worth its while, or a point has waited long enough."""
        if now < self.stopped_until:
            return False
        lane = self.consumer.lane
        if not isinstance(self.consumer, SealedConsumer) and lane.head == lane.tail and self.attached:
            self.waiting_since = None
            return False
        if self.waiting_since is None:
            self.waiting_since = now
        return not self.attached or lane.queued_points >= batch_size or now - self.waiting_since >= batch_timeout

    @property
    def empty(self) -> bool:
        lane = self.consumer.lane
        return not isinstance(self.consumer, SealedConsumer) and lane.head <= lane.tail


class Writer:
    """The drain loop over lanes, one database connection, and the log of it."""

    def __init__(self, config: Settings, url: str, index: int, beat: Heartbeat) -> None:
        self.config, self.url, self.index, self.beat = config, url, index, beat
        self.layout = rows.layout()
        self.drains: dict[Path, Drain] = {}
        self.seen_free: dict[Path, float] = {}
        self.connection: psycopg.Connection[Any] | None = None
        self.failures = 0
        self.next_attempt = 0.0
        self.next_scan = 0.0
        self.stop_at: float | None = None
        self.summary = Summary()

    def stop(self, *_: object) -> None:
        """Ask the loop to drain what is there and end (signal handler)."""
        if self.stop_at is None:
            self.stop_at = time.monotonic() + self.config.drain_timeout

    def run(self) -> None:
        """Drain until asked to stop, then until the lanes are empty or the drain time-out has passed."""
        while True:
            now = time.monotonic()
            self.beat.beat()
            self.summary.tick(now)
            if now >= self.next_scan:
                self.next_scan = now + SCAN_S
                self.take_free_lanes(now)
            if self.stop_at is not None and (now >= self.stop_at or self.drained()):
                break
            if not self.pass_over(now):
                time.sleep(POLL_S)
        self.summary.flush()
        self.beat.enter(State.ENDED)
        self.disconnect()

    def drained(self) -> bool:
        return all(drain.empty for drain in self.drains.values())

    def take_free_lanes(self, now: float) -> None:
        """Take each lane that is ours by number, and any other that has been free for a while; let go of old ones."""
        for drain_ in list(self.drains.values()):
            if drain_.attached and drain_.empty and drain_.consumer.lane.layout != self.layout:
                self.finish(drain_)
        for path in lanes.lane_files(self.config.lane_dir):
            if path in self.drains:
                continue
            ours = int(path.stem.rpartition("-")[2]) % self.config.writer_count == self.index
            patience = 0.0 if ours or self.stop_at is not None else 8 * SCAN_S
            if now - self.seen_free.setdefault(path, now) < patience:
                continue
            try:
                claimed = lanes.claim_consumer(path)
            except LaneError as error:
                self.summary.alarms.warning("%s", error)
                continue
            if claimed is None:
                self.seen_free[path] = now  # not free after all: somebody holds it
                continue
            self.drains[path] = Drain(*claimed)
            log.debug("took %s, %d points waiting", path.name, claimed[0].lane.queued_points)

    def pass_over(self, now: float) -> bool:
        """Flush every lane that is due; tell whether anything was stored."""
        patience = 0.0 if self.stop_at is not None else self.config.batch_timeout
        due = [drain for drain in self.drains.values() if drain.due(now, self.config.batch_size, patience)]
        if (not due and self.connection is not None) or not self.connected(now):
            return False
        return any([self.flush(drain) for drain in due])

    def connected(self, now: float) -> bool:
        """Return whether there is a connection, making one if its time has come."""
        if self.connection is not None:
            return True
        if now < self.next_attempt:
            return False
        try:
            self.connection = self.connect()
        except psycopg.Error as error:
            self.away(error)
            return False
        self.failures = 0
        self.beat.enter(State.CONNECTED)
        return True

    def connect(self) -> psycopg.Connection[Any]:
        connection = psycopg.connect(
            self.url,
            autocommit=True,
            connect_timeout=5,
            tcp_user_timeout=TCP_TIMEOUT_S * 1000,
            application_name=f"orbitstream-writer-{self.index}",
        )
        connection.execute(
            f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'; SET lock_timeout = '{STATEMENT_TIMEOUT_S // 2}s';"
            f" SET idle_in_transaction_session_timeout = '{STATEMENT_TIMEOUT_S}s'; SET synchronous_commit = on;"
            " SET timezone = 'UTC'"
        )
        edition = find_edition(connection)
        self.beat.set_edition(edition.name)
        log.info("connected to %s", edition)
        return connection

    def disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        for drain_ in self.drains.values():
            drain_.attached = False

    def away(self, error: psycopg.Error) -> None:
        """Note that the database cannot be used now, and when to try again: 50 ms to 5 s, with jitter."""
        self.disconnect()
        self.beat.failed()
        self.beat.enter(State.DATABASE_AWAY)
        pause = min(MAX_PAUSE_S, MIN_PAUSE_S * 2 ** min(self.failures, 10)) * uniform(0.5, 1.0)
        self.failures += 1
        self.next_attempt = time.monotonic() + pause
        self.summary.alarms.warning("database away, next attempt in %.2f s: %s", pause, _one_line(error))

    def flush(self, lane: Drain) -> bool:
        """Run one transaction for a lane; tell whether it stored anything."""
        assert self.connection is not None
        consumer = lane.consumer
        try:
            if not lane.attached:
                attach(self.connection, consumer, self.config.node)
                lane.attached = True
                self.warn_of_holes(consumer)
            begun = time.monotonic()
            flushed = drain(self.connection, consumer, lane.bound, self.beat.beat)
        except (LaneStoppedError, LaneError, rows.LayoutError) as error:
            self.halt(lane, str(error))
            return False
        except psycopg.Error as error:
            if (error.sqlstate or "").startswith(_HOPELESS):
                self.halt(lane, f"the database refuses it ({error.sqlstate}): {_one_line(error)}")
            else:
                consumer.set_bound(max(1, lane.bound // 2))
                self.away(error)
            return False
        if flushed is None:
            self.finish(lane)
            return False
        self.beat.set_stopped_lanes(0)
        lane.waiting_since = None
        self.note(lane, flushed, time.monotonic() - begun)
        return True

    def note(self, lane: Drain, flushed: Flush, seconds: float) -> None:
        """Count a flush and let the lane's bound grow back."""
        count, now = len(flushed.columns), now_us()
        bound = lane.consumer.lane.bound
        if 0 < bound <= count:
            lane.consumer.set_bound(0 if bound * 2 >= MAX_TRANSACTION_POINTS else bound * 2)
        self.beat.committed(count, now, now - flushed.received)
        self.summary.add(flushed)
        log.debug("flush lane=%s points=%d ms=%.1f", lane.name, count, seconds * 1000)

    def halt(self, lane: Drain, why: str) -> None:
        """Leave a lane alone for a while: nothing of it is dropped, and its reason may have been mended by then."""
        lane.stopped_until = time.monotonic() + RETRY_STOPPED_S
        self.disconnect()
        self.beat.failed()
        now = time.monotonic()
        self.beat.set_stopped_lanes(sum(now < each.stopped_until for each in self.drains.values()))
        log.error("%s is stopped, its points are kept: %s", lane.name, why)

    def warn_of_holes(self, consumer: Consumer) -> None:
        if isinstance(consumer, SealedConsumer) and consumer.holes(consumer.lane.tail):
            log.error("%s lost records when the power went; the file is kept in archive/", consumer.lane.path.name)

    def finish(self, lane: Drain) -> None:
        """Archive a drained lane that nobody will append to again, and let go of it."""
        lane.waiting_since = None
        path = lane.consumer.lane.path
        if lanes.retire(lane.consumer, self.layout):
            log.info("%s is drained and archived", lane.name)
            del self.drains[path]
            lane.consumer.lane.close()
            lane.lock.release()


class Summary:
    """One line a second on what was stored, and a few warnings on what was anomalous."""

    def __init__(self) -> None:
        self.anomaly_log = logs.Limited(log)
        self.alarms = logs.Limited(log, burst=1)
        self.since = time.monotonic()
        self.points = self.flushes = self.anomalies = 0

    def add(self, flushed: Flush) -> None:
        self.points += len(flushed.columns)
        self.flushes += 1
        anomalous = np.flatnonzero(flushed.columns.is_anomaly)
        if len(anomalous) == 0:
            return
        self.anomalies += len(anomalous)
        shown = anomalous[: max(0, self.anomaly_log.room())]
        for index in shown.tolist():
            values = " ".join(f"{name}={column[index]:g}" for name, column in flushed.columns.values.items())
            identity = flushed.columns.satellite_id[index].decode(errors="replace")
            self.anomaly_log.warning("anomaly satellite_id=%s %s", identity, values)
        self.anomaly_log.hold(len(anomalous) - len(shown))

    def tick(self, now: float) -> None:
        if now - self.since >= 1.0:
            self.flush()

    def flush(self) -> None:
        if self.flushes:
            log.info("inserted %d rows in %d flushes anomalies=%d", self.points, self.flushes, self.anomalies)
        self.anomaly_log.flush()
        self.alarms.flush()
        self.since = time.monotonic()
        self.points = self.flushes = self.anomalies = 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def main(argv: list[str] | None = None) -> int:
    """Run one writer; started by a supervisor, which is its parent."""
    parser = argparse.ArgumentParser(prog="engine.writer")
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    process.die_with_parent(options.parent, signal.SIGKILL)
    config = settings.load()
    logs.configure(config.log_level, f"writer-{options.index}")
    assert config.database_url is not None, "the supervisor sets DATABASE_URL, also for the embedded server"
    beat = Heartbeat(heartbeat.beat_file(config.lane_dir, options.index), own=True)
    writer = Writer(config, config.database_url, options.index, beat)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, writer.stop)
    writer.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
