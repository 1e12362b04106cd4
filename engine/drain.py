"""One lane into one database: the transaction that moves records and the ledger together.

Firstly: the ledger row of a lane says up to which position its records are in the database. Given that, and that the
row and the rows of `telemetry` change in one transaction, whoever starts again at the ledger's position stores nothing
twice and leaves nothing out, whatever became of an earlier attempt. FOR UPDATE waits for an older backend that is
still committing, so the position it returns is final.

Knows nothing of files or shared memory: a lane is a source of records with positions that can be freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol
from uuid import UUID

import psycopg
from psycopg import sql

from engine import copy_format, rows
from engine.rows import Columns, Times

MAX_TRANSACTION_POINTS: Final = 100_000
"""Beyond this a transaction gains no speed (sorted COPY: 141k rows/s at 10k rows, 197k at 100k), and costs latency."""
MAX_TRANSACTION_BYTES: Final = 64 << 20
COPY_CHUNK: Final = 256 << 10


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
    def bound(self) -> int: ...
    @property
    def database(self) -> UUID | None: ...


class Source(Protocol):
    """Records with positions that can be freed: a lane's consumer end, and whatever else will feed the ledger."""

    @property
    def lane(self) -> Lane: ...
    @property
    def end(self) -> int: ...
    def read(self, position: int, max_points: int, max_bytes: int) -> Sequence[SourceRecord]: ...
    def free(self, position: int, settled_points: int) -> None: ...
    def set_bound(self, points: int) -> None: ...
    def set_database(self, database: UUID) -> None: ...


@dataclass(slots=True)
class Flush:
    """What one transaction stored: columns sorted as stored, and the reception time of each point (us since 1970)."""

    columns: Columns
    received: Times


class Progress(NamedTuple):
    """The ledger row of a lane."""

    position: int
    committed_points: int


def attach(connection: psycopg.Connection[Any], source: Source, node: str) -> None:
    """Make sure that the lane belongs to this database, and has its ledger row, before anything is drained.

    Raises LaneStoppedError for a lane of another database, or of this one at a later time than it is now (restored).
    """
    lane = source.lane
    row = connection.execute("SELECT id FROM orbitstream_database").fetchone()
    if row is None:
        raise LaneStoppedError("the database has lost its identity (orbitstream_database is empty)")
    if lane.database is not None and lane.database != row[0]:
        raise LaneStoppedError(
            f"it was drained into database {lane.database}, this one is {row[0]}: set DATABASE_URL to the former, "
            "or move the lane away"
        )
    if lane.database is None and lane.tail == 0:
        connection.execute(
            "INSERT INTO ingest_progress (lane, node) VALUES (%s, %s) ON CONFLICT DO NOTHING", [lane.uuid, node]
        )
    found = connection.execute("SELECT position FROM ingest_progress WHERE lane = %s", [lane.uuid]).fetchone()
    _compare(lane, found[0] if found else None)
    if lane.database is None:
        source.set_database(row[0])


def _compare(lane: Lane, position: int | None) -> None:
    if position is None or position < lane.tail:
        at = "has no row for it" if position is None else f"is at {position}"
        raise LaneStoppedError(
            f"the database went back in time: its ledger {at}, the lane was drained up to {lane.tail}; "
            "was an older backup restored?"
        )


def drain(
    connection: psycopg.Connection[Any], source: Source, max_points: int, beat: Callable[[], None]
) -> Flush | None:
    """Store the lane's next records, up to `max_points`, and free them; None if there were none.

    `connection` is in autocommit and outside a transaction. Raises LaneStoppedError (nothing stored), or whatever
    psycopg raises: then close the connection and begin again, the ledger knows what became of the attempt.
    """
    lane = source.lane
    cursor = connection.cursor()
    cursor.execute("BEGIN")
    found = cursor.execute(
        "SELECT position, committed_points FROM ingest_progress WHERE lane = %s FOR UPDATE", [lane.uuid]
    ).fetchone()
    _compare(lane, found[0] if found else None)
    progress = Progress(*(found or (0, 0)))
    if progress.position > lane.tail:  # an earlier writer died between COMMIT and its store of the tail
        source.free(progress.position, progress.committed_points)
    records = source.read(progress.position, max_points, MAX_TRANSACTION_BYTES)
    if not records:
        cursor.execute("ROLLBACK")
        return None
    columns, received = rows.unpack(
        lane.layout, [(record.points, record.time_us, record.payload) for record in records]
    )
    end = records[-1].end
    for record in records:
        record.payload.release()
    order = copy_format.order(columns)
    columns, received = copy_format.take(columns, order), received[order]
    beat()
    _copy(cursor, columns, received, beat)
    beat()
    cursor.execute(
        "UPDATE ingest_progress SET position = %s, committed_points = committed_points + %s, flushes = flushes + 1,"
        " updated_at = now() WHERE lane = %s AND position = %s",
        [end, len(columns), lane.uuid, progress.position],
    )
    if cursor.rowcount != 1:
        raise LaneStoppedError(f"its ledger row moved from {progress.position} while it was locked")
    cursor.execute("COMMIT")
    if cursor.statusmessage != "COMMIT":
        raise psycopg.OperationalError(f"COMMIT was answered with {cursor.statusmessage}")
    source.free(end, progress.committed_points + len(columns))
    return Flush(columns, received)


def _copy(cursor: psycopg.Cursor[Any], columns: Columns, received: Times, beat: Callable[[], None]) -> None:
    statement = sql.SQL("COPY telemetry ({}) FROM STDIN (FORMAT BINARY)").format(
        sql.SQL(", ").join(map(sql.Identifier, copy_format.column_names(columns)))
    )
    body = memoryview(copy_format.encode(columns, received))
    with cursor.copy(statement) as copy:
        for start in range(0, len(body), COPY_CHUNK):
            copy.write(body[start : start + COPY_CHUNK])
            beat()
    if cursor.rowcount != len(columns):
        raise LaneStoppedError(f"COPY took {cursor.rowcount} of {len(columns)} rows: is there a trigger on telemetry?")
