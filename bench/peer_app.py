"""What one would write without OrbitStream: Falcon in gthread workers, a queue and a thread that writes the rows.

PEER_MODE: insert (a statement a row), executemany, or copy (psycopg's COPY, row by row). What is in the queue when the
process dies is lost; this is a measure of speed alone.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import falcon
import orjson
import psycopg

Row = tuple[Any, ...]
COLUMNS = "time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm, received_at, is_anomaly"
INSERT = f"INSERT INTO telemetry ({COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s, %s)"


def insert(connection: psycopg.Connection[Any], rows: list[Row]) -> None:
    """Send a statement a row, one transaction."""
    with connection.transaction():
        for row in rows:
            connection.execute(INSERT, row)


def executemany(connection: psycopg.Connection[Any], rows: list[Row]) -> None:
    """Let psycopg send the statements together."""
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(INSERT, rows)


def copy(connection: psycopg.Connection[Any], rows: list[Row]) -> None:
    """Write the rows by COPY, one by one."""
    statement = f"COPY telemetry ({COLUMNS}) FROM STDIN"
    with connection.transaction(), connection.cursor() as cursor, cursor.copy(statement) as stream:
        for row in rows:
            stream.write_row(row)


MODES: dict[str, Callable[[psycopg.Connection[Any], list[Row]], None]] = {
    "insert": insert,
    "executemany": executemany,
    "copy": copy,
}


def to_row(point: dict[str, Any], now: datetime) -> Row:
    """Return a point as a row, with the service's limits."""
    battery, storage = point["battery_charge_percent"], point["storage_usage_mb"]
    signal = point["signal_strength_dbm"]
    anomaly = battery < 10 or storage > 95_000 or signal < -100
    time = datetime.fromisoformat(point["timestamp"])
    return time, point["satellite_id"], battery, storage, signal, now, anomaly


class Batch:
    """POST /telemetry/batch."""

    def __init__(self, rows: queue.Queue[list[Row]]) -> None:
        self._rows = rows

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        now = datetime.now(UTC)
        points = orjson.loads(request.bounded_stream.read())
        # A full queue holds the client up: what is accepted is then what the database takes.
        self._rows.put([to_row(point, now) for point in points])
        response.status = falcon.HTTP_202
        response.data = b'{"status":"accepted"}'


def write(rows: queue.Queue[list[Row]]) -> None:
    """Write batches for ever."""
    store = MODES[os.environ["PEER_MODE"]]
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        while True:
            store(connection, rows.get())
            rows.task_done()


def create_app() -> falcon.App:
    """Return the application, its writer running."""
    rows: queue.Queue[list[Row]] = queue.Queue(maxsize=2)
    threading.Thread(target=write, args=(rows,), daemon=True).start()
    app = falcon.App()
    app.add_route("/telemetry/batch", Batch(rows))
    return app
