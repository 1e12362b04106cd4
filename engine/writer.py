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
from typing import Final

import psycopg

from engine import heartbeat, lanes, ledger, logs, process, rows, settings
from engine.backlog import POLL_S, Backlog
from engine.columnstore import Columnstore
from engine.connection import Connection, one_line, pause_after
from engine.consumer import SealedConsumer
from engine.drain import MAX_TRANSACTION_POINTS, Flush, PointRefusedError, drain
from engine.follower import Follower
from engine.heartbeat import Heartbeat, State
from engine.ledger import LaneStoppedError
from engine.migrate import find_edition
from engine.ring import Lane, LaneError
from engine.settings import Settings
from engine.summary import Summary
from engine.timestamps import now_us

SCAN_S: Final = 0.25
"""How often to look for lanes that became free. A new worker's first points wait so long at most."""
REST_S: Final = 10.0
"""A lane that is stopped is looked at again so often: its reason may have been mended."""
SWEEP_S: Final = 3600.0
PROBE_S: Final = 2.0
PATIENT_AFTER: Final = 4
"""Failures in a row from which on the time-outs double: a record that takes longer cannot be cut into smaller ones."""

# SQLSTATE classes that say "the statement itself cannot succeed": repeating it at once would not help. 22 and 23 are
# here for what is no row of a COPY, as a constraint that is checked at COMMIT.
_HOPELESS: Final = ("22", "23", "42", "XX", "0A")
_LOCK_NOT_AVAILABLE: Final = "55P03"

log = logging.getLogger("orbitstream.writer")


class Writer:
    """The drain loop over lanes, one database connection, and the log of it."""

    def __init__(self, config: Settings, url: str, index: int, beat: Heartbeat) -> None:
        self.config, self.url, self.index, self.beat = config, url, index, beat
        self.layout = rows.layout()
        self.drains: dict[Path, Backlog] = {}
        self.resting: dict[Path, float] = {}  # stopped lanes, and when to look at them again
        self.seen_free: dict[Path, float] = {}
        self.connection: Connection | None = None
        self.columnstore: Columnstore | None = None
        self.failures = 0
        self.next_attempt = self.next_scan = self.next_sweep = self.next_probe = 0.0
        self.stop_at: float | None = None
        self.summary = Summary(log)
        self.follower = Follower(config, stats=index == 0)

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
                self.look_around(now)
            if self.stop_at is not None and (now >= self.stop_at or all(each.empty for each in self.drains.values())):
                break
            stored = self.pass_over(now)
            self.record()
            if not stored:
                time.sleep(POLL_S)  # a producer wakes nobody: that would cost it a system call a request
            self.put_latest()
        self.record(ending=True)
        self.put_latest(ending=True)
        self.summary.flush()
        self.beat.enter(State.ENDED)
        self.disconnect()

    # -- lanes

    def look_around(self, now: float) -> None:
        """Take each lane that is ours by number, and any other that has been free for a while; let go of old ones."""
        for mine in [each for each in self.drains.values() if each.retirable(self.layout)]:
            self.finish(mine)
        paths = lanes.lane_files(self.config.lane_dir)
        self.resting = {path: until for path, until in self.resting.items() if path in paths}
        for path in paths:
            if path in self.drains or now < self.resting.get(path, now):
                continue
            ours = int(path.stem.rpartition("-")[2]) % self.config.writer_count == self.index
            patience = 0.0 if ours or self.stop_at is not None else 8 * SCAN_S
            if now - self.seen_free.setdefault(path, now) >= patience:
                self.take(path, now)
        self.count_stopped()

    def take(self, path: Path, now: float) -> None:
        try:
            claimed = lanes.claim_consumer(path)
        except (LaneError, OSError) as error:
            self.rest(path, str(error))
            return
        if claimed is None:
            self.seen_free[path] = now  # somebody holds it
            return
        self.drains[path] = Backlog(*claimed)
        log.debug("took %s, %d points waiting", path.name, claimed[0].lane.queued_points)

    def rest(self, path: Path, why: str) -> None:
        """Leave a lane alone for a while: nothing of it is dropped, and an operator may mend it meanwhile."""
        self.resting[path] = time.monotonic() + REST_S
        self.count_stopped()
        log.error("%s is stopped, its points are kept: %s", path.name, why)

    def count_stopped(self) -> None:
        # While the database is away every lane fails, and none of them is why.
        failing = set() if self.failures else {path for path, mine in self.drains.items() if mine.failures}
        self.beat.set_stopped_lanes(len(failing | self.resting.keys()))

    def finish(self, mine: Backlog) -> None:
        """Archive a drained lane that nobody will append to again, and let go of it."""
        mine.waiting_since = None
        if mine.sealed:
            mine.consumer.free(max(mine.consumer.end, mine.lane.tail), mine.lane.settled_points)
        if lanes.retire(mine.consumer, self.layout):
            log.info("%s is drained and archived as %s", mine.path.name, mine.lane.uuid)
            del self.drains[mine.path]
            mine.let_go()

    # -- the connection

    def connected(self, now: float) -> bool:
        """Return whether there is a connection, making one if its time has come."""
        if self.connection is not None:
            return True
        if now < self.next_attempt:
            return False
        try:
            self.connection = Connection.open(self.url, f"orbitstream-writer-{self.index}", self.beat.beat)
            edition = find_edition(self.connection)
            self.columnstore = Columnstore(self.connection)
        except psycopg.Error as error:
            self.away(error)
            return False
        self.beat.set_edition(edition.name)
        self.beat.enter(State.CONNECTED)
        log.info("connected to %s", edition)
        self.compare_archive(self.connection)
        self.follower.resume(self.connection)
        return True

    def disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        for mine in self.drains.values():
            mine.attached = False

    def away(self, error: psycopg.Error) -> None:
        """Note that the database cannot be used now, and when to try again."""
        self.disconnect()
        self.failures += 1
        pause = pause_after(self.failures)
        self.next_attempt = time.monotonic() + pause
        self.beat.failed()
        self.beat.enter(State.DATABASE_AWAY)
        self.summary.alarms.warning("database away, next attempt in %.2f s: %s", pause, one_line(error))

    def compare_archive(self, connection: Connection) -> None:
        """Alarm for archived lanes of this database that the ledger is behind of: rows went with a restore."""
        now = time.monotonic()
        if self.index != 0:
            return
        try:
            if now >= self.next_sweep:
                self.next_sweep = now + SWEEP_S
                for path in lanes.forget_archived(self.config.lane_dir, self.config.archive_keep):
                    log.info("removed archived lane %s", path.name)
            archived = lanes.archived(self.config.lane_dir)
        except OSError as error:
            log.error("the archive cannot be looked at: %s", error)
            return
        for path in archived:
            try:
                lane = Lane(path)
            except (LaneError, OSError) as error:
                log.error("archived lane: %s", error)
                continue
            try:
                if ledger.of_another_database(lane, ledger.identity(connection)) is None:
                    ledger.compare(lane, connection)
            except (LaneStoppedError, psycopg.Error) as error:
                log.error("archived lane %s: %s", path.stem, one_line(error))
            finally:
                lane.close()

    def record(self, *, ending: bool = False) -> None:
        """Write down what is due beside the points."""
        if self.connection is not None:
            try:
                self.follower.record(self.connection, ending=ending)
            except psycopg.Error as error:
                self.away(error)

    def put_latest(self, *, ending: bool = False) -> None:
        """Put some of the newest points into satellite_latest; a failure costs nobody a point."""
        if self.connection is not None:
            try:
                self.follower.put_latest(self.connection, ending=ending)
            except psycopg.Error as error:
                self.disconnect()
                self.summary.alarms.warning("satellite_latest is behind: %s", one_line(error))

    # -- flushing

    def pass_over(self, now: float) -> bool:
        """Flush every lane that is due; tell whether anything was stored."""
        stopping = self.stop_at is not None
        patience = 0.0 if stopping else self.config.batch_timeout
        compressing = not stopping and self.columnstore is not None and self.columnstore.works
        due = [each for each in self.drains.values() if each.due(now, self.config.batch_size, patience, compressing)]
        if not due and self.connection is not None:
            self.probe(self.connection, now)
            return False
        self.next_probe = now + PROBE_S
        stored = False
        while self.connected(time.monotonic()) and due:  # each lane has its turn, also when another's failed
            stored |= self.flush(due.pop(0))
        return stored

    def probe(self, connection: Connection, now: float) -> None:
        """See that an idle connection still has a database at its other end, for the sake of /health."""
        if now >= self.next_probe:
            self.next_probe = now + PROBE_S
            try:
                connection.execute("SELECT 1")
            except psycopg.Error as error:
                self.away(error)

    def flush(self, mine: Backlog) -> bool:
        """Run one transaction for a lane; tell whether it settled anything."""
        assert self.connection is not None
        try:
            if not mine.attached:
                self.attach(self.connection, mine)
                return False  # whether a flush is due is for the next pass to see
            flushed = self.attempt(self.connection, mine)
        except (LaneStoppedError, LaneError, rows.LayoutError) as error:
            self.stop_lane(mine, str(error))
            return False
        except psycopg.Error as error:
            self.failed(mine, error)
            return False
        if flushed is None:
            self.finish(mine)
            return False
        return True

    def attach(self, connection: Connection, mine: Backlog) -> None:
        """Make sure that the lane and the database belong together, before its first flush on this connection."""
        consumer = mine.consumer
        if mine.blocked:
            ended = ledger.end_blocking_backend(connection, mine.lane.uuid)
            log.warning("%s: ended %d backends that held its ledger row", mine.path.name, ended)
            mine.blocked = False
        ledger.attach(connection, consumer, self.config.node)
        mine.attached = True
        self.resting.pop(mine.path, None)
        if isinstance(consumer, SealedConsumer) and consumer.holes(mine.lane.tail):
            log.error("%s lost records when the power went; its file is kept in the archive", mine.path.name)

    def attempt(self, connection: Connection, mine: Backlog) -> Flush | None:
        consumer = mine.consumer
        assert self.columnstore is not None
        if mine.failures >= PATIENT_AFTER:
            connection.be_patient(mine.failures - PATIENT_AFTER + 1)
        begun = time.monotonic()
        try:
            flushed = drain(connection, consumer, mine.bound, self.beat.beat, self.follower.mark, self.columnstore)
        except PointRefusedError as error:
            log.warning("%s: looking for the point that is refused: %s", mine.path.name, one_line(error))
            connection.execute("ROLLBACK")
            flushed = drain(
                connection, consumer, mine.bound, self.beat.beat, self.follower.mark, self.columnstore, careful=True
            )
        if flushed is not None:
            self.note(mine, flushed, time.monotonic() - begun)
        return flushed

    def note(self, mine: Backlog, flushed: Flush, seconds: float) -> None:
        """Count a flush and let the lane's bound grow back."""
        now = now_us()
        self.failures = mine.failures = 0
        mine.waiting_since = None
        bound = mine.lane.bound
        if bound:
            mine.consumer.set_bound(0 if bound * 2 >= MAX_TRANSACTION_POINTS else bound * 2)
        self.beat.committed(flushed.committed, now, now - flushed.received, int(seconds * 1e6))
        if flushed.compressed:
            self.beat.compressed(flushed.committed)
        if flushed.dead_lettered:
            self.beat.dead_lettered(flushed.dead_lettered)
            log.error("%s: %d points set aside in dead_letter", mine.path.name, flushed.dead_lettered)
        self.summary.add(flushed)
        if flushed.columns is not None:
            self.beat.anomalous(int(flushed.columns.is_anomaly.sum()))
        self.summary.tell(self.follower.follow(flushed))
        log.debug("flush lane=%s points=%d ms=%.1f", mine.path.name, flushed.committed, seconds * 1000)

    def failed(self, mine: Backlog, error: psycopg.Error) -> None:
        """Close the connection, as after any error, and decide when this lane, or all of them, are tried again."""
        assert self.connection is not None
        if (error.sqlstate or "").startswith(_HOPELESS):
            self.stop_lane(mine, f"the database refuses it ({error.sqlstate}): {one_line(error)}")
            return
        if mine.lane.tail != mine.tail_seen:  # an attempt before this one was stored, although nobody could say so
            mine.tail_seen = mine.lane.tail
            self.failures = mine.failures = 0
        mine.failures += 1
        mine.blocked = error.sqlstate == _LOCK_NOT_AVAILABLE
        mine.consumer.set_bound(max(1, mine.bound // 2))
        if error.sqlstate is None or self.connection.closed:
            self.away(error)
            return
        pause = pause_after(mine.failures)
        mine.not_before = time.monotonic() + pause
        self.beat.failed()
        self.disconnect()
        self.summary.alarms.warning(
            "%s: next attempt in %.2f s (%s): %s", mine.path.name, pause, error.sqlstate, one_line(error)
        )

    def stop_lane(self, mine: Backlog, why: str) -> None:
        """Give a lane up until its rest is over; its lock is freed for `orbitstream lanes resume`."""
        self.disconnect()
        self.beat.failed()
        del self.drains[mine.path]
        mine.let_go()
        self.rest(mine.path, why)


def main(argv: list[str] | None = None) -> int:
    """Run one writer; started by a supervisor, which is its parent."""
    parser = argparse.ArgumentParser(prog="engine.writer")
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--drain", action="store_true", help="end once the lanes are empty")
    options = parser.parse_args(argv)
    process.die_with_parent(options.parent, signal.SIGKILL)
    process.keep_freed_memory()
    config = settings.load()
    logs.configure(config.log_level, f"writer-{options.index}")
    assert config.database_url is not None, "the supervisor sets DATABASE_URL, also for the embedded server"
    path = heartbeat.beat_file(config.lane_dir, options.index)
    try:
        beat = Heartbeat(path, own=True)
    except OSError as error:
        log.error("%s cannot be written: %s; free some space, or remove it", path, error.strerror)
        return 1
    writer = Writer(config, config.database_url, options.index, beat)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, writer.stop)
    if options.drain:
        writer.stop()
    writer.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
