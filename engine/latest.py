"""The newest point of each satellite, kept beside the points: coalesced, and never in their transactions.

A writer sees its points sorted by satellite and time anyway, so it keeps the last of each, and now and then puts what
changed into `satellite_latest`, in slices, for a small share of its time: with a thousand satellites each second, with
a hundred thousand every half minute or so. A writer that is killed forgets what it had not put there yet: the next
point of the satellite mends it.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
import orjson
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from engine import copy_format, rows
from engine.rows import CHANNEL_NAMES, Columns, Times

SLICE: Final = 2000
"""Satellites in one statement: some 15 ms, for which the points of a writer wait."""
EVERY_S: Final = 1.0
SHARE: Final = 0.05
"""Of a writer's time, at most."""
RETRY_S: Final = 60.0
FINISH_S: Final = 2.0
MAX_PENDING: Final = 300_000
"""Points held before they are coalesced early, so that memory is bounded by satellites and not by time."""

_STATEMENT: Final = sql.SQL(
    "INSERT INTO satellite_latest AS known (time, received_at, is_anomaly, satellite_id, {names})"
    " SELECT timestamptz 'epoch' + made * interval '1 microsecond',"
    " timestamptz 'epoch' + got * interval '1 microsecond', anomaly, satellite, {names}"
    " FROM unnest(%s::bigint[], %s::bigint[], %s::boolean[], %s::text[]{arrays})"
    " AS new (made, got, anomaly, satellite, {names})"
    " ON CONFLICT (satellite_id) DO UPDATE SET time = excluded.time, received_at = excluded.received_at,"
    " is_anomaly = excluded.is_anomaly, {sets}"
    " WHERE (known.time, known.received_at) <= (excluded.time, excluded.received_at)"
).format(
    names=sql.SQL(", ").join(map(sql.Identifier, CHANNEL_NAMES)),
    arrays=sql.SQL(", %s::double precision[]" * len(CHANNEL_NAMES)),
    sets=sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in CHANNEL_NAMES),
)


class Latest:
    """What one writer has still to tell `satellite_latest`."""

    def __init__(self) -> None:
        self._parts: list[tuple[Columns, Times]] = []
        self._held = 0
        self._sorted: tuple[Columns, Times] | None = None  # one point a satellite; put up to _done
        self._done = 0
        self._next = time.monotonic() + EVERY_S

    def add(self, columns: Columns, received: Times) -> None:
        """Note points that were committed; sorted by satellite and time."""
        self._parts.append(_last(columns, received))
        self._held += len(self._parts[-1][0])
        if self._held > MAX_PENDING:
            self._parts = [_coalesce(self._parts)]
            self._held = len(self._parts[0][0]) // 2  # so many satellites: coalescing again at once would gain nothing

    def due(self, now: float) -> bool:
        """Tell whether there is something to put, and it is time."""
        return now >= self._next and (self._sorted is not None or bool(self._parts))

    def put(self, connection: psycopg.Connection[Any]) -> None:
        """Put one slice into the table; raises psycopg.Error, and then leaves it alone for a while."""
        begun = time.monotonic()
        self._next = begun + RETRY_S
        if self._sorted is None:
            self._sorted, self._done = _coalesce(self._parts), 0
            self._parts, self._held = [], 0
        columns, received = self._sorted
        chosen = np.arange(self._done, min(self._done + SLICE, len(columns)))
        with connection.transaction():
            connection.execute("SET LOCAL synchronous_commit = off")
            connection.execute(_STATEMENT, _arrays(copy_format.take(columns, chosen), received[chosen]))
        self._done += len(chosen)
        ended = time.monotonic()
        finished = self._done >= len(columns)
        if finished:
            self._sorted = None
        self._next = ended + max((ended - begun) / SHARE, EVERY_S if finished else 0.0)

    def finish(self, connection: psycopg.Connection[Any]) -> None:
        """Put what there is within FINISH_S, before the writer ends; raises psycopg.Error."""
        deadline = time.monotonic() + FINISH_S
        while time.monotonic() < deadline and (self._sorted is not None or self._parts):
            self.put(connection)


def _last(columns: Columns, received: Times) -> tuple[Columns, Times]:
    """Return the last point of each satellite of sorted points."""
    ids = columns.satellite_id
    chosen = np.flatnonzero(np.append(ids[1:] != ids[:-1], True))
    return copy_format.take(columns, chosen), received[chosen]


def _coalesce(parts: list[tuple[Columns, Times]]) -> tuple[Columns, Times]:
    columns = rows.concatenate([part for part, _ in parts])
    received: Times = np.concatenate([times for _, times in parts])
    order = copy_format.order(columns)
    return _last(copy_format.take(columns, order), received[order])


def _arrays(columns: Columns, received: Times) -> list[Any]:
    nothing = np.full(len(columns), np.nan)
    return [
        _literal(columns.time),
        _literal(received),
        _literal(columns.is_anomaly),
        [each.decode() for each in columns.satellite_id.tolist()],
        *(_literal(columns.values.get(name, nothing)) for name in CHANNEL_NAMES),
    ]


def _literal(values: NDArray[Any]) -> str:
    """Return numbers as a PostgreSQL array; NaN is NULL. Some 50 times as fast as a list of Python's floats."""
    text = orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)
    return f"{{{text[1:-1].decode()}}}"
