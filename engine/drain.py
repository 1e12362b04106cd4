"""One lane into one database: the transaction that moves records and the ledger together.

Firstly: the ledger row of a lane says up to which position its records are in the database. Given that, and that the
row and the rows of `telemetry` change in one transaction, whoever starts again at the ledger's position stores nothing
twice and leaves nothing out, whatever became of an earlier attempt. FOR UPDATE waits for an older backend that is
still committing, so the position it returns is final.

Knows nothing of files or shared memory: a lane is a source of records with positions that can be freed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol
from uuid import UUID

import numpy as np
import psycopg
from psycopg import sql

from engine import copy_format, dead_letters, rows, settlement
from engine.columnstore import Columnstore
from engine.dead_letters import Cause
from engine.failpoints import ARMED, hit
from engine.rows import Columns, Times
from engine.timestamps import now_us

MAX_TRANSACTION_POINTS: Final = 100_000
"""Beyond this a transaction gains no speed (sorted COPY: 141k rows/s at 10k rows, 197k at 100k), and costs latency."""
MAX_TRANSACTION_BYTES: Final = 64 << 20
CAREFUL_POINTS: Final = 1000
"""Points of a transaction in which a refused point is looked for: each one takes a COPY for every halving."""

_KEY_WORDS: Final = {
    dead_letters.KEY_REUSED: "the idempotency key was used before with another body",
    dead_letters.KEY_EXPIRED: "the record waited so long that its idempotency key may have been forgotten",
}


class LaneStoppedError(Exception):
    """A lane that must not be drained until somebody has looked at it; nothing of it is dropped."""


class PointRefusedError(Exception):
    """The database refuses a point of the transaction (SQLSTATE 22 or 23); nothing of it is stored: drain carefully."""


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


@dataclass(slots=True)
class Flush:
    """What one transaction settled; `columns` (None: no row) are sorted as stored, `received` in us since 1970."""

    columns: Columns | None
    received: Times
    deduplicated: int = 0
    dead_lettered: int = 0
    compressed: bool = False
    """Whether the rows went straight into the columnstore."""

    @property
    def committed(self) -> int:
        return 0 if self.columns is None else len(self.columns)


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
        connection.execute(
            "INSERT INTO ingest_progress (lane, node) VALUES (%s, %s) ON CONFLICT DO NOTHING", [lane.uuid, node]
        )
    _compare_end(source, compare(lane, connection))
    if ARMED:
        hit("attach-before-database")
    if lane.database is None:
        source.set_database(database)
    if ARMED:
        hit("attach-after-database")


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
        f"it was drained into database {lane.database}, this one is {database}: set DATABASE_URL to the former, "
        "or move the lane away"
    )


def compare(lane: Lane, connection: psycopg.Connection[Any]) -> int:
    """Return the ledger's position; raises LaneStoppedError if it is behind what was drained of the lane once."""
    found = connection.execute("SELECT position FROM ingest_progress WHERE lane = %s", [lane.uuid]).fetchone()
    position: int | None = found[0] if found else None
    _compare(lane, position)
    return position or 0


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


def drain(
    connection: psycopg.Connection[Any],
    source: Source,
    max_points: int,
    beat: Callable[[], None],
    mark: Callable[[Columns], None],
    columnstore: Columnstore,
    *,
    careful: bool = False,
) -> Flush | None:
    """Settle the lane's next records, up to `max_points`, and free them; None if there were none.

    `mark` sets is_anomaly of what is about to be stored, perhaps more than once. `columnstore` says what is known of
    this connection's way into compressed chunks. `connection` is in autocommit and outside a transaction. Raises
    PointRefusedError (nothing stored: come back with `careful`, which sets refused points aside), LaneStoppedError
    (nothing stored), or whatever else psycopg raises: then close the connection and begin again, the ledger knows what
    became of the attempt.
    """
    lane = source.lane
    cursor = connection.cursor()
    cursor.execute("BEGIN")
    found = cursor.execute(
        "SELECT position, committed_points, deduplicated_points, dead_lettered_points, forgone_points"
        " FROM ingest_progress WHERE lane = %s FOR UPDATE",
        [lane.uuid],
    ).fetchone()
    _compare(lane, found[0] if found else None)
    assert found is not None
    progress = Progress(*found)
    _compare_end(source, progress.position)
    if progress.position > lane.tail:  # an earlier writer died between COMMIT and its store of the tail
        if ARMED:
            hit("recover-before-skip")
        source.free(progress.position, progress.settled)
        if ARMED:
            hit("recover-after-skip")
    records = source.read(
        progress.position, min(max_points, CAREFUL_POINTS) if careful else max_points, MAX_TRANSACTION_BYTES
    )
    if not records:
        cursor.execute("ROLLBACK")
        return None
    end = records[-1].end
    try:
        flush = _Transaction(cursor, lane, beat, mark, columnstore).settle(records, careful=careful)
    except BaseException as error:  # a lane of which its traceback holds views could not be closed
        traceback.clear_frames(error.__traceback__)
        for record in records:
            record.payload.release()
        raise
    after = Progress(
        end,
        progress.committed + flush.committed,
        progress.deduplicated + flush.deduplicated,
        progress.dead_lettered + flush.dead_lettered,
        progress.forgone,
    )
    cursor.execute(
        "UPDATE ingest_progress SET position = %s, committed_points = %s, deduplicated_points = %s,"
        " dead_lettered_points = %s, flushes = flushes + 1, updated_at = now() WHERE lane = %s AND position = %s",
        [*after[:4], lane.uuid, progress.position],
    )
    if cursor.rowcount != 1:
        raise LaneStoppedError(f"its ledger row moved from {progress.position} while it was locked")
    if ARMED:
        hit("drain-before-commit")
    cursor.execute("COMMIT")
    if cursor.statusmessage != "COMMIT":
        raise psycopg.OperationalError(f"COMMIT was answered with {cursor.statusmessage}")
    if ARMED:
        hit("drain-after-commit")
    source.free(end, after.settled)
    return flush


class _Transaction:
    """What happens between reading records and moving the ledger: keys, COPY, dead letters."""

    def __init__(
        self,
        cursor: psycopg.Cursor[Any],
        lane: Lane,
        beat: Callable[[], None],
        mark: Callable[[Columns], None],
        columnstore: Columnstore,
    ) -> None:
        self.cursor, self.lane, self.beat, self.mark, self.columnstore = cursor, lane, beat, mark, columnstore
        self.dead_lettered = 0

    def settle(self, records: Sequence[SourceRecord], *, careful: bool) -> Flush:
        """Store what is to be stored of `records`, and set aside what cannot be; releases their payloads."""
        verdicts = settlement.settle(self.cursor, self.lane.uuid, records, now_us())
        fresh = [record for record, verdict in zip(records, verdicts, strict=True) if verdict == settlement.FRESH]
        deduplicated = 0
        for record, verdict in zip(records, verdicts, strict=True):
            if verdict == settlement.DUPLICATE:
                deduplicated += record.points
            elif verdict != settlement.FRESH:
                self._set_aside(record, Cause(verdict, None, _KEY_WORDS[verdict]))
        parts = self._store_carefully(fresh) if careful else [self._columns(fresh)] if fresh else []
        for record in records:
            record.payload.release()
        received: Times = np.concatenate([times for _, times in parts]) if parts else np.empty(0, np.int64)
        columns = rows.concatenate([part for part, _ in parts]) if parts else None
        compressed = False
        if columns is not None:
            columns, received = _sorted(columns, received)
            compressed = not careful and self._copy_or_refuse(columns, received)
        return Flush(columns, received, deduplicated, self.dead_lettered, compressed)

    def _columns(self, records: Sequence[SourceRecord]) -> tuple[Columns, Times]:
        return rows.unpack(self.lane.layout, [(record.points, record.time_us, record.payload) for record in records])

    def _copy_or_refuse(self, columns: Columns, received: Times) -> bool:
        """COPY sorted rows, where it pays straight into the columnstore; tell whether they went there."""
        self.mark(columns)
        asked = self.columnstore.begin(self.cursor, len(columns))
        try:
            self._copy(columns, received)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            raise PointRefusedError(str(error)) from error
        self.columnstore.end(self.cursor, len(columns))
        return asked and self.columnstore.works

    def _copy(self, columns: Columns, received: Times) -> None:
        self.beat()
        statement = sql.SQL("COPY telemetry ({}) FROM STDIN (FORMAT BINARY)").format(
            sql.SQL(", ").join(map(sql.Identifier, copy_format.column_names(columns)))
        )
        with self.cursor.copy(statement) as copy:
            for piece in copy_format.pieces(columns, received):
                copy.write(piece)
                self.beat()
                if ARMED:
                    hit("drain-within-copy")
        self.beat()
        if self.cursor.rowcount != len(columns):
            raise LaneStoppedError(
                f"COPY took {self.cursor.rowcount} of {len(columns)} rows: is a trigger on telemetry?"
            )

    def _store_carefully(self, records: Sequence[SourceRecord]) -> list[tuple[Columns, Times]]:
        """COPY records under savepoints, halving what is refused down to the point, and set that point aside."""
        parts = [_sorted(*self._columns([record])) for record in records]
        if parts:
            self._mark_together([columns for columns, _ in parts])
        return [stored for record, part in zip(records, parts, strict=True) for stored in self._halve(record, *part)]

    def _mark_together(self, parts: Sequence[Columns]) -> None:
        """Mark the points of many records as if they were stored at once: a spike is one beside its neighbours."""
        whole = rows.concatenate(parts)
        order = copy_format.order(whole)
        whole = copy_format.take(whole, order)
        self.mark(whole)
        flags = np.empty(len(order), np.bool_)
        flags[order] = whole.is_anomaly
        for part, cut in zip(parts, np.split(flags, np.cumsum([len(part) for part in parts])[:-1]), strict=True):
            part.is_anomaly = cut

    def _halve(self, record: SourceRecord, columns: Columns, received: Times) -> list[tuple[Columns, Times]]:
        self.cursor.execute("SAVEPOINT careful")
        try:
            self._copy(columns, received)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            # Without the release each refused point would hold a lock to the end, and thousands all that there are.
            self.cursor.execute("ROLLBACK TO SAVEPOINT careful; RELEASE SAVEPOINT careful")
            if len(columns) == 1:
                cause = Cause(dead_letters.REFUSED, error.sqlstate, " ".join(str(error).split())[:500])
                self._insert(record, cause, columns, received)
                return []
            half = len(columns) // 2
            both = np.arange(half), np.arange(half, len(columns))
            return [
                stored
                for part in both
                for stored in self._halve(record, copy_format.take(columns, part), received[part])
            ]
        self.cursor.execute("RELEASE SAVEPOINT careful")
        return [(columns, received)]

    def _set_aside(self, record: SourceRecord, cause: Cause) -> None:
        columns, received = self._columns([record])
        self._insert(record, cause, columns, received)

    def _insert(self, record: SourceRecord, cause: Cause, columns: Columns, received: Times) -> None:
        points = [dead_letters.point_json(columns, index, int(received[index])) for index in range(len(columns))]
        dead_letters.insert(self.cursor, self.lane.uuid, record.end, cause, points)
        self.dead_lettered += len(columns)


def _sorted(columns: Columns, received: Times) -> tuple[Columns, Times]:
    """Return points by satellite and time, as whoever looks at them after the COPY expects them."""
    order = copy_format.order(columns)
    return copy_format.take(columns, order), received[order]


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
