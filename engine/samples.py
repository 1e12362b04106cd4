"""What maintenance samples each minute for the boards: the fleet by its newest readings, and the database."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Final

import psycopg

KEEP_DAYS: Final = 90
CHANNELS: Final = ("battery_charge_percent", "storage_usage_mb", "signal_strength_dbm")

_CHANNELS: Final = ", ".join(f"('{name}', {name})" for name in CHANNELS)
_FLEET: Final = f"""
    INSERT INTO fleet_stats
    SELECT date_trunc('minute', now()), channel,
        (SELECT count(*) FROM satellite_latest), count(value),
        min(value), percentile_cont(0.05) WITHIN GROUP (ORDER BY value),
        percentile_cont(0.5) WITHIN GROUP (ORDER BY value), percentile_cont(0.95) WITHIN GROUP (ORDER BY value),
        max(value),
        CASE WHEN channel = 'battery_charge_percent' THEN ARRAY(
            SELECT count(step) FROM generate_series(0, 19) AS number
            LEFT JOIN unnest(array_agg(least(19, floor(value / 5)))) AS step ON step = number GROUP BY number
            ORDER BY number
        ) END
    FROM (VALUES ('battery_charge_percent'), ('storage_usage_mb'), ('signal_strength_dbm')) AS known (channel)
    LEFT JOIN (
        SELECT entry.* FROM satellite_latest, LATERAL (VALUES {_CHANNELS}) AS entry (channel, value)
        WHERE time > now() - interval '1 minute'
    ) AS latest USING (channel)
    GROUP BY channel
    ON CONFLICT DO NOTHING"""
_DATABASE: Final = """
    INSERT INTO database_stats
    SELECT date_trunc('minute', now()), (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
        current_setting('max_connections')::bigint, xact_commit, xact_rollback, blks_hit, blks_read, deadlocks,
        temp_bytes, (SELECT count(*) FROM pg_locks WHERE NOT granted),
        CASE WHEN pg_is_in_recovery() THEN 0 ELSE pg_current_wal_lsn() - '0/0'::pg_lsn END, %s, %s, %s
    FROM pg_stat_database WHERE datname = current_database()
    ON CONFLICT DO NOTHING"""
# COPY, and what else is no query, is left out: such statements are kept as they were sent, passwords included.
_SLOW: Final = r"""
    INSERT INTO slow_query
    SELECT queryid, left(regexp_replace(min(query), '\s+', ' ', 'g'), 500), sum(calls), sum(rows), sum(total_exec_time),
        sum(total_exec_time) / sum(calls), max(max_exec_time), now()
    FROM pg_stat_statements
    WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND calls > 0
        AND query ~* '^\s*(select|insert|update|delete|with|merge)\M'
    GROUP BY queryid ORDER BY sum(total_exec_time) DESC LIMIT 20"""
_QUERIES: Final = (
    "SELECT avg(battery_charge_percent) FROM telemetry WHERE satellite_id = %s AND time > now() - interval '3 hours'",
    "SELECT sum(sum_battery_charge_percent) / sum(count_battery_charge_percent) FROM satellite_stats"
    " WHERE satellite_id = %s AND bucket > now() - interval '3 hours'",
    "SELECT sum(sum_battery_charge_percent) / sum(count_battery_charge_percent) FROM satellite_stats_hourly"
    " WHERE satellite_id = %s AND bucket > now() - interval '3 hours'",
)


def take(connection: psycopg.Connection[Any]) -> None:
    """Store one sample of each, and forget old ones. `connection` is the owner's, in autocommit."""
    connection.execute(_FLEET.encode())
    one = connection.execute("SELECT satellite_id FROM satellite_latest ORDER BY time DESC LIMIT 1").fetchone()
    taken = [_milliseconds(connection, query, one[0]) for query in _QUERIES] if one else [None] * len(_QUERIES)
    connection.execute(_DATABASE, taken)
    _take_slow_queries(connection)
    for name in ("fleet_stats", "database_stats"):
        connection.execute(f"DELETE FROM {name} WHERE time < now() - interval '{KEEP_DAYS} days'".encode())
    connection.execute(  # the onset is before the end, and has an index
        f"DELETE FROM anomaly_event WHERE cleared_at < now() - interval '{KEEP_DAYS} days'"
        f" AND onset < now() - interval '{KEEP_DAYS} days'".encode()
    )


def _take_slow_queries(connection: psycopg.Connection[Any]) -> None:
    if connection.execute("SELECT to_regclass('pg_stat_statements')").fetchone() == (None,):
        return
    no_use = (psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.InsufficientPrivilege)  # not loaded, not ours
    with suppress(*no_use), connection.transaction():
        connection.execute("DELETE FROM slow_query")
        connection.execute(_SLOW.encode())


def _milliseconds(connection: psycopg.Connection[Any], query: str, satellite: str) -> float:
    begun = time.perf_counter()
    connection.execute(query.encode(), [satellite]).fetchone()
    return (time.perf_counter() - begun) * 1000
