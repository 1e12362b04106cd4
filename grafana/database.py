"""The database board: what the server does for the engine, and what the aggregates save."""

from __future__ import annotations

from typing import Final

from panels import Json, board, override, row, stat, table, thresholds, timeseries
from queries import IN_RANGE, TO, bucket, gauge, rates

UID: Final = "orbitstream-database"


def ratio(of: str, over: str, name: str) -> str:
    inner = rates("database_stats", {of: of, over: over}, IN_RANGE)
    return f'SELECT "time", {of} / nullif({of} + {over}, 0) AS "{name}" FROM (\n{inner}\n) AS each_second'


def database() -> Json:
    """Return the board of the server."""
    newest = f"SELECT * FROM database_stats WHERE time <= {TO} ORDER BY time DESC LIMIT 1"
    minute = {"interval": "1m", "points": 300}
    panels = [
        stat(1, (5, 5), "Connections", "Client connections of the server, all databases, by the newest sample, and "
             "how many it allows.",
             f'SELECT connections AS "open", max_connections AS "allowed" FROM ({newest}) AS newest', unit="short"),
        stat(2, (4, 5), "Locks waited for", "Locks that are asked for and not granted, by the newest sample.",
             f'SELECT locks_waiting AS "waiting" FROM ({newest}) AS newest', unit="short",
             limit=thresholds(("green", None), ("orange", 1), ("red", 10))),
        stat(3, (5, 5), "Dead letters", "Points that the database refused and that were not replayed yet: "
             "`orbitstream dead-letters list`.",
             'SELECT count(*) AS "points" FROM dead_letter WHERE replayed_at IS NULL', unit="short",
             limit=thresholds(("green", None), ("red", 1))),
        timeseries(4, (10, 5), "What the aggregates save", "Time to average the last 3 hours of one satellite, asked "
                   "once a minute: from the points, from the 5-minute and the hourly aggregates. Without the timescale "
                   "license the aggregates are views, and save nothing.",
                   gauge({"points": "max(raw_ms)", "5 minutes": "max(five_minutes_ms)", "hourly": "max(hourly_ms)"},
                         "database_stats", f"{IN_RANGE} AND raw_ms IS NOT NULL"), unit="ms", field={"min": 0},
                   **minute),
        *row(10, "Load",
             timeseries(11, (8, 8), "Transactions", "Transactions a second of this database, ended by commit or by "
                        "rollback.",
                        rates("database_stats", {"commits": "commits", "rollbacks": "rollbacks"}, IN_RANGE),
                        unit="ops", field={"min": 0}, **minute),
             timeseries(12, (8, 8), "Cache hits", "Share of blocks found in the server's buffers; what is not may "
                        "still come from the operating system's cache.", ratio("blocks_hit", "blocks_read", "hits"),
                        unit="percentunit", field={"max": 1}, **minute),
             timeseries(13, (8, 8), "Write-ahead log", "Bytes a second written to the log, by all databases of the "
                        "server.", rates("database_stats", {"log": "wal_bytes"}, IN_RANGE), unit="Bps",
                        field={"min": 0}, **minute),
             timeseries(14, (8, 8), "Connections over time", "Client connections of the server, most in each interval.",
                        gauge({"open": "max(connections)", "allowed": "max(max_connections)"}, "database_stats",
                              IN_RANGE), unit="short", field={"min": 0}, **minute),
             timeseries(15, (8, 8), "Waiting and deadlocks", "Locks waited for, most in each interval, and deadlocks "
                        "since the server's counters began.",
                        gauge({"waiting": "max(locks_waiting)", "deadlocks": "max(deadlocks)"}, "database_stats",
                              IN_RANGE), unit="short", field={"min": 0}, **minute),
             timeseries(16, (8, 8), "Temporary files", "Bytes a second that sorts and joins write to disk for want of "
                        "memory.", rates("database_stats", {"files": "temp_bytes"}, IN_RANGE), unit="Bps",
                        field={"min": 0}, **minute)),
        *row(20, "Size and jobs",
             timeseries(21, (8, 9), "Size", "Points with their indexes, aggregates, and everything else, sampled each "
                        "minute.",
                        f'SELECT {bucket("sampled_at")} AS "time", max(telemetry_bytes)::float8 AS "points",\n'
                        '  max(aggregate_bytes)::float8 AS "aggregates",\n'
                        '  max(database_bytes - telemetry_bytes - aggregate_bytes)::float8 AS "rest"\n'
                        "FROM storage_stats WHERE $__timeFilter(sampled_at)\nGROUP BY 1\nORDER BY 1",
                        unit="bytes", field={"min": 0}, **minute),
             table(22, (16, 9), "Background jobs", "The policies of TimescaleDB: refresh, compression, retention. "
                   "Without the timescale license there is at most the scheduler's own.",
                   'SELECT job AS "Job", does AS "Does", relation AS "Of", extract(epoch FROM every)::float8 AS "Every"'
                   ','
                   '\n  last_status AS "Last run", extract(epoch FROM now() - last_success)::float8 AS "Succeeded ago",'
                   '\n  runs AS "Runs", failures AS "Failures"\nFROM background_job\nORDER BY failures DESC, job\n'
                   "LIMIT 50",
                   overrides=[override("Every", unit="s"), override("Succeeded ago", unit="s"),
                              override("Failures", unit="short",
                                       thresholds=thresholds(("green", None), ("red", 1)),
                                       custom__cellOptions={"type": "color-text"})])),
        *row(30, "Queries",
             table(31, (24, 9), "Slowest queries", "The queries of this database that took most in all, since the "
                   "counters of pg_stat_statements began, sampled each minute; values are left out. Empty where the "
                   "server does not load pg_stat_statements, or the account that migrates may not read it.",
                   'SELECT query AS "Query", calls AS "Calls", rows AS "Rows", total_ms AS "In all", mean_ms AS "Mean",'
                   '\n  worst_ms AS "Worst"\nFROM slow_query\nORDER BY total_ms DESC\nLIMIT 20',
                   overrides=[override("In all", unit="ms"), override("Mean", unit="ms"),
                              override("Worst", unit="ms")])),
    ]  # fmt: skip
    return board(UID, "OrbitStream database", "The database server: load, cache, log, size, jobs, and what aggregates "
                 "save.", panels, [], span="now-3h", refresh="1m")  # fmt: skip
