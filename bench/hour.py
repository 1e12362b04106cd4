"""An hour of what the boards read: points, stats of the engine, samples of each minute, episodes, two lanes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import psycopg

from engine import copy_format
from engine.rows import Columns
from simulator.anomalies import beyond_limits
from simulator.fleet import Fleet, satellite_ids

BLOCK = 100_000
"""Points made and stored at a time."""

# A worker takes 1,000 points a second, of which a writer, busy a quarter of its time, stores all in 10 transactions.
STATS = """
    INSERT INTO engine_stats (time, node, process, name, first_of_minute, alive, accepted, refused, settled, residual,
        queue_points, queue_bytes, capacity_bytes, cpu_s, memory_bytes)
    SELECT %(end)s - (3600 - n) * interval '1 second', 'one', 'worker', 'lane-000' || lane, n %% 60 = 0, true, n * 500,
        0, n * 500 - 10, 0, 10 + n, 100000 + n * 1000, 16000000, n * 0.2, 40000000
    FROM generate_series(1::bigint, 3600) AS n, generate_series(0, 1) AS lane;
    INSERT INTO engine_stats (time, node, process, name, first_of_minute, alive, committed, dead_lettered, anomalies,
        flushes, failures, stopped_lanes, busy_s, flush_p50_ms, flush_p99_ms, arrival_p50_ms, arrival_p99_ms, cpu_s,
        memory_bytes)
    SELECT %(end)s - (3600 - n) * interval '1 second', 'one', 'writer', 'writer-0', n %% 60 = 0, true, n * 1000, 0,
        n * 10, n * 10, 0, 0, n * 0.25, 5, 20, 15, CASE WHEN n %% 200 = 0 THEN 150 ELSE 60 END, n * 0.3, 60000000
    FROM generate_series(1::bigint, 3600) AS n"""
SAMPLES = """
    INSERT INTO capacity VALUES (%(end)s, 'one', 40000, 50000, 80000, 60, 2, '{}');
    INSERT INTO storage_stats SELECT %(end)s - (60 - n) * interval '1 minute', 1000000000 + n * 60000000,
        800000000 + n * 60000000, 100000000, n * 1000000, 10, 4, 100000000000, 90000000000 - n * 60000000
    FROM generate_series(1::bigint, 60) AS n ON CONFLICT DO NOTHING;
    INSERT INTO fleet_stats SELECT %(end)s - (60 - n) * interval '1 minute', channel, 100, 90 + n %% 10, 1, 10, 50, 90,
        99, array_fill(5, ARRAY[20])
    FROM generate_series(1::bigint, 60) AS n, unnest(ARRAY['battery_charge_percent', 'storage_usage_mb',
        'signal_strength_dbm']) AS channel;
    INSERT INTO database_stats SELECT %(end)s - (60 - n) * interval '1 minute', 5, 100, n * 600, n, n * 9000, n * 1000,
        0, n * 60, 0, n * 60000000, 30, 5, 1
    FROM generate_series(1::bigint, 60) AS n;
    INSERT INTO slow_query SELECT n, 'SELECT count(*) FROM telemetry WHERE time > $1', n * 100, n * 100, n * 900, 9, 50,
        %(end)s FROM generate_series(1, 20) AS n"""
# Ten that last; of few all others take seconds to minutes; of many, as from a fleet with spikes, one of 500 does.
EPISODES = """
    INSERT INTO anomaly_event (satellite_id, channel, severity, kind, limit_value, onset, cleared_at, peak, peak_at,
        points)
    SELECT 'SAT-' || lpad((n %% %(satellites)s)::text, 5, '0'), 'battery_charge_percent',
        CASE WHEN n %% 2 = 0 THEN 'critical' ELSE 'warning' END, 'below', 10, onset,
        CASE WHEN n <= 10 THEN NULL
            WHEN %(episodes)s <= 1000 OR n %% 500 = 0 THEN onset + (1 + (n - 1) %% 300) * interval '1 second'
            ELSE onset + interval '100 ms' END, 5, onset, 7
    FROM generate_series(1, %(episodes)s) AS n,
        LATERAL (SELECT %(end)s - n * interval '50 minutes' / %(episodes)s) AS begun (onset)"""


def surround(connection: psycopg.Connection[Any], end: datetime, satellites: int, episodes: int) -> None:
    """Store what the boards read beside points: an hour up to `end`."""
    for lane in range(2):
        connection.execute(
            "INSERT INTO ingest_progress (lane, position, committed_points, flushes, node)"
            " VALUES (gen_random_uuid(), 4096, 25000, 50, %s)",
            [f"node-{lane}"],
        )
    for statement in ";".join((STATS, SAMPLES, EPISODES)).split(";"):
        connection.execute(statement.encode(), {"end": end, "satellites": satellites, "episodes": episodes})


def insert_points(connection: psycopg.Connection[Any], end: datetime, satellites: int, points: int) -> None:
    """Store the hour's points by INSERT, for servers that take no COPY."""
    connection.execute(
        "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
        "  received_at, is_anomaly, latitude, longitude, altitude_km, velocity_kmph, temperature_c, bus_voltage_v)"
        " SELECT %(end)s - n * interval '1 hour' / %(points)s, 'SAT-' || lpad((n %% %(satellites)s)::text, 5, '0'),"
        "  CASE WHEN n %% 97 = 0 THEN 5 ELSE 20 + n %% 71 END, (n %% 1000) * 80, -60 - n %% 30,"
        "  %(end)s - n * interval '1 hour' / %(points)s + interval '20 ms', n %% 97 = 0,"
        "  n %% 180 - 90, n %% 360 - 180, 550, 27000, 20, 28"
        " FROM generate_series(1, %(points)s) AS n",
        {"end": end, "points": points, "satellites": satellites},
    )
    _latest(connection, end)


def copy_points(connection: psycopg.Connection[Any], end: datetime, satellites: int, points: int) -> None:
    """Store the hour's points by COPY, in the order in which a fleet sends them: a satellite's lie far apart.

    The index by satellite is made at the end: to grow it by tens of millions of points takes much longer.
    """
    [(definition,)] = connection.execute("SELECT pg_get_indexdef('telemetry_satellite_time'::regclass)").fetchall()
    connection.execute("DROP INDEX telemetry_satellite_time")
    for columns in _blocks(end, satellites, points):
        names = ", ".join(copy_format.column_names(columns))
        with connection.cursor().copy(f"COPY telemetry ({names}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
            copy.write(copy_format.encode(columns, columns.time + 20_000))
    connection.execute(definition.encode())
    _latest(connection, end)


def _blocks(end: datetime, satellites: int, points: int) -> Iterator[Columns]:
    fleet, ids = Fleet(0, satellites, seed=5, anomaly_rate=0.01), satellite_ids(0, satellites, satellites)
    first, span = int((end - timedelta(hours=1)).timestamp() * 1e6), 3_600_000_000
    for start in range(0, points, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, points))
        readings = fleet.read(numbers % satellites, first + numbers * span // points)
        values = {
            channel.name: column / 10.0**channel.decimals
            for channel, column in zip(fleet.channels, readings.values, strict=True)
        }
        yield Columns(readings.time_us, ids[readings.satellite], values, beyond_limits(readings.values))


def _latest(connection: psycopg.Connection[Any], end: datetime) -> None:
    connection.execute(
        "INSERT INTO satellite_latest SELECT DISTINCT ON (satellite_id) * FROM telemetry WHERE time > %s"
        " ORDER BY satellite_id, time DESC ON CONFLICT DO NOTHING",
        [end - timedelta(minutes=1)],
    )
