"""The newest point of each satellite, kept beside the points: coalesced, and never in their transactions.

A writer sees its points sorted by satellite and time anyway, so it keeps the last of each in arrays, by the number of
the satellite, and now and then puts what changed into `satellite_latest`, in slices, for a small share of its time:
with a thousand satellites each second, with a hundred thousand every half minute or so. A writer that is killed forgets
what it had not put there yet: the next point of the satellite mends it.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
import orjson
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from engine.rows import CHANNEL_NAMES, Columns, Floats, Times
from engine.satellites import Runs, Satellites, extended

SLICE: Final = 2000
"""Satellites in one statement: some 15 ms, for which the points of a writer wait."""
EVERY_S: Final = 1.0
SHARE: Final = 0.05
"""Of a writer's time, at most."""
RETRY_S: Final = 60.0
FINISH_S: Final = 2.0

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
    """What one writer has still to tell `satellite_latest`: the newest point of each satellite, by its number."""

    def __init__(self, satellites: Satellites) -> None:
        self.satellites = satellites
        room = satellites.room
        self._time, self._received = np.zeros(room, np.int64), np.zeros(room, np.int64)
        self._is_anomaly, self._untold = np.zeros(room, np.bool_), np.zeros(room, np.bool_)
        self._values: dict[str, Floats] = {}  # of the channels that any point had
        self._round: list[int] = []  # numbers that are put before it is looked which have changed meanwhile
        self._changed = False
        self._next = time.monotonic() + EVERY_S

    def add(self, columns: Columns, received: Times, found: Runs) -> None:
        """Note points that were committed, sorted by satellite and time; `found` tells their satellites."""
        self._make_room()
        rows, numbers = found.ends - 1, found.numbers
        made, got, known = columns.time[rows], received[rows], self._time[numbers]
        if not (made > known).all():
            newer = (made > known) | ((made == known) & (got >= self._received[numbers]))
            rows, numbers, made, got = rows[newer], numbers[newer], made[newer], got[newer]
        self._time[numbers], self._received[numbers] = made, got
        self._is_anomaly[numbers] = columns.is_anomaly[rows]
        for name in columns.values.keys() - self._values.keys():
            self._values[name] = np.full(len(self._time), np.nan)
        for name, kept in self._values.items():
            column = columns.values.get(name)
            kept[numbers] = np.nan if column is None else column[rows]
        self._untold[numbers] = True
        self._changed = True

    def due(self, now: float) -> bool:
        """Tell whether there is something to put, and it is time."""
        return now >= self._next and (bool(self._round) or self._changed)

    def put(self, connection: psycopg.Connection[Any]) -> None:
        """Put one slice into the table; raises psycopg.Error, and then leaves it alone for a while."""
        begun = time.monotonic()
        self._next = begun + RETRY_S
        if not self._round:
            self._round, self._changed = np.flatnonzero(self._untold).tolist(), False
        names = self.satellites.names
        chosen = sorted(self._round[:SLICE], key=names.__getitem__)  # all writers lock rows in the same order
        with connection.transaction():
            connection.execute("SET LOCAL synchronous_commit = off")
            connection.execute(_STATEMENT, self._arrays(chosen, [names[number].decode() for number in chosen]))
        self._untold[chosen] = False
        self._round = self._round[SLICE:]
        ended = time.monotonic()
        self._next = ended + max((ended - begun) / SHARE, 0.0 if self._round else EVERY_S)

    def finish(self, connection: psycopg.Connection[Any]) -> None:
        """Put what there is within FINISH_S, before the writer ends; raises psycopg.Error."""
        deadline = time.monotonic() + FINISH_S
        while time.monotonic() < deadline and (self._round or self._changed):
            self.put(connection)

    def _make_room(self) -> None:
        room = self.satellites.room
        if room == len(self._time):
            return
        self._time, self._received = extended(self._time, room), extended(self._received, room)
        self._is_anomaly, self._untold = extended(self._is_anomaly, room), extended(self._untold, room)
        self._values = {name: extended(kept, room, np.nan) for name, kept in self._values.items()}

    def _arrays(self, chosen: list[int], names: list[str]) -> list[Any]:
        nothing = np.full(len(chosen), np.nan)
        return [
            _literal(self._time[chosen]),
            _literal(self._received[chosen]),
            _literal(self._is_anomaly[chosen]),
            names,
            *(_literal(self._values[name][chosen] if name in self._values else nothing) for name in CHANNEL_NAMES),
        ]


def _literal(values: NDArray[Any]) -> str:
    """Return numbers as a PostgreSQL array; NaN is NULL. Some 50 times as fast as a list of Python's floats."""
    text = orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)
    return f"{{{text[1:-1].decode()}}}"
