"""One lane into one database: the transaction that moves records and the ledger together.

Firstly: the ledger row of a lane says up to which position its records are in the database. Given that, and that the
row and the rows of `telemetry` change in one transaction, whoever starts again at the ledger's position stores nothing
twice and leaves nothing out, whatever became of an earlier attempt.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import psycopg
from psycopg import sql

from engine import copy_format, dead_letters, ledger, rows, settlement
from engine.columnstore import Columnstore
from engine.dead_letters import Cause
from engine.failpoints import ARMED, hit
from engine.ledger import Lane, LaneStoppedError, Progress, Source, SourceRecord
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


class PointRefusedError(Exception):
    """The database refuses a point of the transaction (SQLSTATE 22 or 23); nothing of it is stored: drain carefully."""


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
    progress = ledger.lock(cursor, source)
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
    ledger.move(cursor, lane, progress, after)
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
        whole = rows.take(whole, order)
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
            return [stored for part in both for stored in self._halve(record, rows.take(columns, part), received[part])]
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
    return rows.take(columns, order), received[order]
