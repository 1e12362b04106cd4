"""COPY straight into compressed chunks, where the server can do that: asked for by transaction, known by its effect.

Firstly: what a setting or a version promises may silently not happen (a trigger, a unique index, an older server with
aggregates). Given that, a COPY is watched now and then: a server that compresses inserts a row for each thousand, one
that does not inserts them all.

Never `..._copy_client_sorted`: it marks the chunk as ordered, and two COPYs that overlap in time then give silently
wrong answers. We send rows in the table's own order and switch the server's sort off, which is as fast.

Nor `timescaledb.sparse_index = ''`, although the bloom filter that it would do away with takes a byte a point: DELETE
from a chunk made so ends the server with a segmentation fault (TimescaleDB 2.29.2).
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

import psycopg

from engine import copy_format
from engine.rows import Columns

MIN_POINTS: Final = 10_000
"""Fewer rows go to the row store. A COPY makes compressed batches of 1,000 rows of its own: of 10,000 rows ordered by
satellite each holds a tenth of the fleet, of fewer rows so much of it that a query for one satellite reads them all
until the chunk is rewritten."""
WATCH_EVERY_S: Final = 60.0

_WANTED: Final = {
    "timescaledb.enable_direct_compress_copy": "on",
    "timescaledb.enable_direct_compress_copy_sort_batches": "off",
    "timescaledb.enable_direct_compress_copy_client_sorted": "off",
    "timescaledb.enable_direct_compress_auto_segmentby": "off",
}

log = logging.getLogger("orbitstream.writer")


class Columnstore:
    """What is known of one connection's way into the columnstore; `begin` and `end` stand around each COPY."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        known = connection.execute("SELECT name FROM pg_settings WHERE name = ANY(%s)", [list(_WANTED)]).fetchall()
        names = {name for (name,) in known}
        self._offered = next(iter(_WANTED)) in names
        self._ask = "; ".join(f"SET LOCAL {name} = {value}" for name, value in _WANTED.items() if name in names)
        self._works: bool | None = None
        self._watch_at = 0.0
        self._inserted: int | None = None

    @property
    def works(self) -> bool:
        """Tell whether the last COPY that was watched went into compressed chunks."""
        return self._works is True

    def begin(self, cursor: psycopg.Cursor[Any], points: int) -> bool:
        """Ask for compression in this transaction if `points` are enough; tell whether that was done."""
        self._inserted = None
        if not self._offered or points < MIN_POINTS:
            return False
        watch = time.monotonic() >= self._watch_at
        if not (watch or self.works):
            return False
        cursor.execute(self._ask.encode())
        if watch:
            self._inserted = _inserted(cursor)
        return True

    def end(self, cursor: psycopg.Cursor[Any], points: int) -> None:
        """See where the rows went if this COPY was watched."""
        if self._inserted is None:
            return
        works = _inserted(cursor) - self._inserted < points // 2
        if works != self._works:
            where = (
                "straight into the columnstore" if works else "into the row store: the server does not compress COPY"
            )
            log.log(
                logging.INFO if works or self._works is None else logging.WARNING,
                "batches of %d points or more go %s", MIN_POINTS, where,
            )  # fmt: skip
        self._works = works
        self._watch_at = time.monotonic() + WATCH_EVERY_S

    def copy(self, cursor: psycopg.Cursor[Any], columns: Columns, body: bytes) -> None:
        """COPY rows into telemetry, straight into the columnstore where it pays; `body`: `columns` encoded."""
        names = ", ".join(copy_format.column_names(columns))
        self.begin(cursor, len(columns))
        with cursor.copy(f"COPY telemetry ({names}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
            copy.write(body)
        self.end(cursor, len(columns))


def _inserted(cursor: psycopg.Cursor[Any]) -> int:
    """Return the rows that this transaction has inserted, into whichever tables."""
    row = cursor.execute("SELECT coalesce(sum(n_tup_ins), 0)::bigint FROM pg_stat_xact_user_tables").fetchone()
    assert row is not None
    return int(row[0])
