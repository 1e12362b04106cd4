"""The ledger: one row a lane says up to which position the lane's records are in the database.

Firstly: rows of `telemetry` and the ledger's row of their lane change in one transaction. Given that, the ledger is
right whatever became of a writer, and a lane may be drained only into the database whose ledger knows it, and only from
where that ledger is: `attach` sees to the first, `lock` to the second. FOR UPDATE waits for an older backend that is
still committing, so the position that `lock` returns is final.

Knows nothing of files or shared memory: a lane is a source of records with positions that can be freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import psycopg

from engine.failpoints import ARMED, hit


class LaneStoppedError(Exception):
    """A lane that must not be drained until somebody has looked at it; nothing of it is dropped."""


class SourceRecord(Protocol):
    """A record of a source; positions are 64-bit and grow."""

    @property
    def end(self) -> int: ...
    @property
    def points(self) -> int: ...
    @property
    def time_us(self) -> int: ...
    @property
    def key(self) -> bytes: ...
    @property
    def payload(self) -> memoryview: ...


class Lane(Protocol):
    """What a drain needs to know of where a source keeps its state."""

    @property
    def uuid(self) -> UUID: ...
    @property
    def layout(self) -> bytes: ...
    @property
    def tail(self) -> int: ...
    @property
    def resumed(self) -> bool: ...
    @property
    def database(self) -> UUID | None: ...


class Source(Protocol):
    """Records with positions that can be freed: a lane's consumer end, and whatever else will feed the ledger."""

    @property
    def lane(self) -> Lane: ...
    @property
    def end(self) -> int: ...
    @property
    def sealed(self) -> bool: ...
    def read(self, position: int, max_points: int, max_bytes: int) -> Sequence[SourceRecord]: ...
    def free(self, position: int, settled_points: int) -> None: ...
    def close(self) -> None: ...
    def set_database(self, database: UUID) -> None: ...


class Progress(NamedTuple):
    """The ledger row of a lane; the counters are points since its first drain."""

    position: int
    committed: int
    deduplicated: int
    dead_lettered: int
    forgone: int

    @property
    def settled(self) -> int:
        return self.committed + self.deduplicated + self.dead_lettered + self.forgone


def attach(connection: psycopg.Connection[Any], source: Source, node: str) -> None:
    """Make sure that the lane belongs to this database, and has its ledger row, before anything is drained.

    Raises LaneStoppedError for a lane of another database, or of this one at a later time than it is now (restored).
    """
    lane = source.lane
    database = identity(connection)
    if (why := of_another_database(lane, database)) is not None:
        source.close()  # what comes from now on goes into a lane of this database
        raise LaneStoppedError(why)
    if ARMED:
        hit("attach-before-row")
    if lane.database is None and lane.tail == 0:
        enter(connection, lane, node)
    _compare_end(source, compare(lane, connection))
    if ARMED:
        hit("attach-before-database")
    if lane.database is None:
        source.set_database(database)
    if ARMED:
        hit("attach-after-database")


def enter(connection: psycopg.Connection[Any], lane: Lane, node: str) -> None:
    """Give the lane a row if it has none: it is drained from its beginning then."""
    connection.execute(
        "INSERT INTO ingest_progress (lane, node) VALUES (%s, %s) ON CONFLICT DO NOTHING", [lane.uuid, node]
    )


def catch_up(connection: psycopg.Connection[Any], lane: Lane, node: str) -> bool:
    """Put the lane's row to where the lane was drained to, making it if there is none; tell whether it was behind."""
    done = connection.execute(
        "INSERT INTO ingest_progress AS p (lane, position, node) VALUES (%s, %s, %s)"
        " ON CONFLICT (lane) DO UPDATE SET position = excluded.position WHERE p.position < excluded.position",
        [lane.uuid, lane.tail, node],
    )
    return done.rowcount != 0


def forgo(connection: psycopg.Connection[Any], lane: Lane, points: int) -> None:
    """Count points of the lane that went with a restore or another database, and are not to be had again."""
    connection.execute(
        "UPDATE ingest_progress SET forgone_points = forgone_points + %s WHERE lane = %s", [points, lane.uuid]
    )


def identity(connection: psycopg.Connection[Any]) -> UUID:
    """Return the uuid that the first migration gave to the database; raises LaneStoppedError if it is lost."""
    row = connection.execute("SELECT id FROM orbitstream_database").fetchone()
    if row is None:
        raise LaneStoppedError("the database has lost its identity (orbitstream_database is empty)")
    found: UUID = row[0]
    return found


def of_another_database(lane: Lane, database: UUID) -> str | None:
    """Say why a lane that was drained into another database stays stopped; None if it belongs to `database`."""
    if lane.database is None or lane.database == database:
        return None
    return (
        f"it was drained into database {lane.database}, this one is {database}: set DATABASE_URL to the former or, "
        f"if that is gone for good, have this one store what waits: `orbitstream lanes adopt {lane.uuid}`"
    )


def compare(lane: Lane, connection: psycopg.Connection[Any]) -> int:
    """Return the ledger's position; raises LaneStoppedError if it is behind what was drained of the lane once."""
    found = connection.execute("SELECT position FROM ingest_progress WHERE lane = %s", [lane.uuid]).fetchone()
    position: int | None = found[0] if found else None
    _compare(lane, position)
    return position or 0


def lock(cursor: psycopg.Cursor[Any], source: Source) -> Progress:
    """Return the lane's row, locked until the transaction of `cursor` ends.

    Raises LaneStoppedError as `attach` does for a lane, or a database, that went back in time.
    """
    found = cursor.execute(
        "SELECT position, committed_points, deduplicated_points, dead_lettered_points, forgone_points"
        " FROM ingest_progress WHERE lane = %s FOR UPDATE",
        [source.lane.uuid],
    ).fetchone()
    _compare(source.lane, found[0] if found else None)
    assert found is not None
    progress = Progress(*found)
    _compare_end(source, progress.position)
    return progress


def move(cursor: psycopg.Cursor[Any], lane: Lane, before: Progress, after: Progress) -> None:
    """Put the lane's row, which `lock` returned as `before`, to `after`."""
    cursor.execute(
        "UPDATE ingest_progress SET position = %s, committed_points = %s, deduplicated_points = %s,"
        " dead_lettered_points = %s, flushes = flushes + 1, updated_at = now() WHERE lane = %s AND position = %s",
        [*after[:4], lane.uuid, before.position],
    )
    if cursor.rowcount != 1:
        raise LaneStoppedError(f"its ledger row moved from {before.position} while it was locked")


def _compare_end(source: Source, position: int) -> None:
    """Raise LaneStoppedError if a lane of this boot ends before the position up to which it was drained."""
    if position > source.end and not source.sealed:
        source.close()  # what is published from now on goes into another lane
        raise LaneStoppedError(
            f"the lane went back in time: it ends at {source.end}, the ledger is at {position}. Was an older copy of "
            "the lane directory put back? What was published into it since is kept in the file"
        )


def _compare(lane: Lane, position: int | None) -> None:
    if position is None or (position < lane.tail and not lane.resumed):
        at = "has no row for it" if position is None else f"is at {position}"
        raise LaneStoppedError(
            f"the database went back in time: its ledger {at}, the lane was drained up to {lane.tail}. Was an older "
            f"backup restored? `orbitstream lanes resume {lane.uuid}` goes on from here"
        )


def end_blocking_backend(connection: psycopg.Connection[Any], lane: UUID) -> int:
    """Terminate a writer's backend that still holds the lane's ledger row, as of a half-open connection.

    Its transaction id stands in the row (xmax), and pg_locks says whose it is. Only backends of writers are ended: the
    caller owns the lane, so none of them is at work. Returns how many.
    """
    found = connection.execute(
        "SELECT pg_terminate_backend(held.pid) FROM ingest_progress JOIN pg_locks held"
        " ON held.locktype = 'transactionid' AND held.transactionid = ingest_progress.xmax AND held.granted"
        " JOIN pg_stat_activity USING (pid)"
        " WHERE lane = %s AND application_name LIKE 'orbitstream-writer-%%' AND pid <> pg_backend_pid()",
        [lane],
    ).fetchall()
    return len(found)
