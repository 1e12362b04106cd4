"""Points that were accepted and that the database refuses: set aside as JSON, listed, replayed, purged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from uuid import UUID

import numpy as np
import orjson
import psycopg

from engine.rows import Columns

KEY_REUSED: Final = "key-reused"
KEY_EXPIRED: Final = "key-expired"
REFUSED: Final = "refused"


class Cause(NamedTuple):
    """Why a point is set aside: one of the reasons above, the server's SQLSTATE if it refused it, and words."""

    reason: str
    sqlstate: str | None
    detail: str


def _timestamp(time_us: int) -> str:
    return f"{np.datetime64(time_us, 'us')}Z"


def point_json(columns: Columns, index: int, received_us: int) -> bytes:
    """Return the row of point `index` as JSON, named by the columns of telemetry."""
    values = {name: float(column[index]) for name, column in columns.values.items()}
    row: dict[str, Any] = {
        "time": _timestamp(int(columns.time[index])),
        "satellite_id": columns.satellite_id[index].decode(errors="replace"),
        "received_at": _timestamp(received_us),
        "is_anomaly": bool(columns.is_anomaly[index]),
        **{name: value for name, value in values.items() if not math.isnan(value)},
    }
    return orjson.dumps(row)


def insert(cursor: psycopg.Cursor[Any], lane: UUID, position: int, cause: Cause, points: Iterable[bytes]) -> None:
    """Set points (JSON) of the record that ends at `position` aside, in the transaction that settles the record."""
    cursor.executemany(
        "INSERT INTO dead_letter (reason, sqlstate, detail, point, lane, position)"
        " VALUES (%s, %s, %s, %s::jsonb, %s, %s)",
        [[*cause, point.decode(), lane, position] for point in points],
    )


def waiting(connection: psycopg.Connection[Any], limit: int) -> list[dict[str, Any]]:
    """Return the newest dead letters that were not replayed."""
    found = connection.execute(
        "SELECT id, created_at, reason, sqlstate, detail, point, lane, position FROM dead_letter"
        " WHERE replayed_at IS NULL ORDER BY id DESC LIMIT %s",
        [limit],
    )
    names = [column.name for column in found.description or ()]
    return [dict(zip(names, row, strict=True)) for row in found]


def replay(connection: psycopg.Connection[Any], ids: list[int] | None) -> tuple[int, list[str]]:
    """Store dead letters (all, or those named) as rows, each exactly once; returns how many, and what was refused."""
    wanted = connection.execute(
        "SELECT id FROM dead_letter WHERE replayed_at IS NULL AND (%s::bigint[] IS NULL OR id = ANY(%s)) ORDER BY id",
        [ids, ids],
    ).fetchall()
    stored, refused = 0, []
    for (number,) in wanted:
        try:
            with connection.transaction():
                taken = connection.execute(
                    "UPDATE dead_letter SET replayed_at = now() WHERE id = %s AND replayed_at IS NULL", [number]
                ).rowcount
                if taken:
                    connection.execute(
                        "INSERT INTO telemetry SELECT row.* FROM dead_letter,"
                        " jsonb_populate_record(null::telemetry, point) AS row WHERE id = %s",
                        [number],
                    )
                    stored += 1
        except (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.RaiseException) as error:
            refused.append(f"{number}: {' '.join(str(error).split())}")
    return stored, refused


def purge(connection: psycopg.Connection[Any], ids: list[int] | None, replayed: bool) -> int:
    """Delete dead letters: those named, or with `replayed` those that were stored since; returns how many."""
    return connection.execute(
        "DELETE FROM dead_letter WHERE (%s AND replayed_at IS NOT NULL) OR id = ANY(%s)", [replayed, ids or []]
    ).rowcount
