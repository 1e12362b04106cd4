"""The capacity board: how much, how fast, how much more, until when."""

from __future__ import annotations

from typing import Final

from panels import Json, board, override, row, stat, table, thresholds, timeseries
from queries import FROM, SAMPLED, STEP, TO, bucket, gauge, in_last, newest, rates

UID: Final = "orbitstream-capacity"
WORKER: Final = "process = 'worker'"
WRITER: Final = "process = 'writer'"
FULL: Final = thresholds(("green", None), ("orange", 0.7), ("red", 0.9))
SLOW_MS: Final = 100
"""The promise is an arrival-to-commit p99 under this; the error budget is 1 % of the seconds."""

BUSY_SHARE: Final = (
    "SELECT max(busy) AS busy FROM (\n"
    "  SELECT (max(busy_s) - min(busy_s)) / nullif(extract(epoch FROM max(time) - min(time)), 0) AS busy\n"
    f"  FROM engine_stats WHERE process = 'writer' AND time > {TO} - interval '1 minute' AND time <= {TO}\n"
    "  GROUP BY node, name\n) AS writers"
)
TREND: Final = (
    "SELECT regr_slope(database_bytes, extract(epoch FROM sampled_at)) AS slope,\n"
    "    regr_intercept(database_bytes, extract(epoch FROM sampled_at)) AS level\n"
    f"  FROM storage_stats WHERE sampled_at > {TO} - interval '7 days' AND sampled_at <= {TO}"
)


def glance() -> list[Json]:
    return [
        stat(1, (4, 4), "Committed now", "Points a second that became rows, over the last 10 seconds of the range.",
             f'{in_last(10, "committed")}'.replace("sum(grown)::float8", 'sum(grown)::float8 AS "points/s"', 1),
             unit="rowsps", field={"decimals": 0}),
        stat(2, (4, 4), "Refused", "Points a second that were answered 503 for want of room, over the last 5 minutes "
             "of the range. Anything but 0 means that the lanes are full: the database takes less than arrives.",
             f'{in_last(300, "refused")}'.replace("sum(grown)::float8", 'sum(grown)::float8 AS "points/s"', 1),
             unit="rowsps", limit=thresholds(("green", None), ("red", 0.001))),
        stat(3, (4, 4), "Head-room", "How many times the present rate the engine could take. By the writers: 1 / the "
             "busiest writer's share of time in transactions, over the last minute. To the knee: the rate that "
             "`orbitstream capacity` measured last over the rate of the last 10 seconds. Below 1.5 add a writer.",
             f'SELECT (SELECT 1 / nullif(busy, 0) FROM ({BUSY_SHARE}) AS busiest) AS "by the writers",\n'
             "  (SELECT knee_points_per_second FROM capacity ORDER BY measured_at DESC LIMIT 1)\n"
             f'    / nullif(({in_last(10, "committed")}), 0) AS "to the knee"',
             unit="suffix: x", limit=thresholds(("red", None), ("orange", 1.5), ("green", 3)),
             field={"decimals": 1, "max": 1000}),
        stat(4, (4, 4), "Fullest lane", "Share of the fullest lane that waits for the database.",
             newest('max(queue_bytes / nullif(capacity_bytes, 0)::float8) AS "full"', WORKER),
             unit="percentunit", limit=FULL, field={"decimals": 1}),
        stat(5, (4, 4), "Seconds until full", "When the lane that fills fastest would be full at the rate of the last "
             "10 seconds of the range; no value while none fills.",
             "SELECT min(greatest(0, (capacity - used) / growth))::float8 AS \"until full\" FROM (\n"
             "  SELECT max(capacity_bytes) AS capacity,\n"
             f"    regr_intercept(queue_bytes, extract(epoch FROM time - {TO})) AS used,\n"
             f"    regr_slope(queue_bytes, extract(epoch FROM time - {TO})) AS growth\n"
             f"  FROM engine_stats WHERE {WORKER} AND time > {TO} - interval '10 seconds' AND time <= {TO}\n"
             "  GROUP BY node, name\n) AS lanes WHERE growth > 0.001 * capacity / 60",
             unit="s", limit=thresholds(("red", None), ("orange", 60), ("green", 600)),
             field={"noValue": "never", "decimals": 0}),
        stat(6, (4, 4), "Residual", "Points published and neither settled nor queued, over all lanes: 0, or a point "
             "was lost or invented. Known while less than 256 KiB wait in a lane; `orbitstream verify` tells "
             "it always.",
             f'SELECT sum(abs(residual))::float8 AS "points" FROM (\n'
             "  SELECT DISTINCT ON (node, name) residual FROM engine_stats\n"
             f"  WHERE {WORKER} AND residual IS NOT NULL AND time > {TO} - interval '10 minutes' AND time <= {TO}\n"
             "  ORDER BY node, name, time DESC\n) AS lanes",
             unit="short", limit=thresholds(("red", None), ("green", 0), ("red", 1)), field={"decimals": 0}),
    ]  # fmt: skip


def throughput() -> list[Json]:
    return row(
        10, "Throughput",
        timeseries(11, (16, 8), "Points a second", "Accepted: committed in a lane and answered 202. Refused: answered "
                   "503. Committed: rows in the database. Accepted above committed fills the lanes.",
                   rates("engine_stats", {"accepted": "accepted", "refused": "refused", "committed": "committed"},
                         SAMPLED, ("node", "name")),
                   unit="rowsps", field={"min": 0}),
        timeseries(12, (8, 8), "Points a transaction", "How many points a transaction stores on average. Larger "
                   "transactions cost less a point; small ones mean that the database keeps up with ease.",
                   batch_size(), unit="short", field={"min": 0}),
    )  # fmt: skip


def batch_size() -> str:
    inner = rates("engine_stats", {"committed": "committed", "flushes": "flushes"}, f"{SAMPLED} AND {WRITER}",
                  ("node", "name"))  # fmt: skip
    return f'SELECT "time", committed / nullif(flushes, 0) AS "points" FROM (\n{inner}\n) AS each_second'


def queue() -> list[Json]:
    return row(
        20, "Queue",
        timeseries(21, (8, 8), "Lanes in use", "Share of each lane that waits for the database. A full lane answers "
                   "503; nothing is dropped.",
                   gauge({"full": "max(queue_bytes / nullif(capacity_bytes, 0)::float8)"}, "engine_stats",
                         f"{SAMPLED} AND {WORKER}", metric="node || ' ' || name"),
                   unit="percentunit", lines=(("orange", 0.7), ("red", 0.9)), field={"min": 0, "max": 1}),
        timeseries(22, (8, 8), "Points that wait", "Points in the lanes that are not in the database yet, over all "
                   "lanes.",
                   'SELECT "time", sum(points)::float8 AS "waiting" FROM (\n'
                   + gauge({"points": "max(queue_points)"}, "engine_stats", f"{SAMPLED} AND {WORKER}",
                           metric="node || name") + '\n) AS lanes\nGROUP BY 1\nORDER BY 1',
                   unit="short", field={"min": 0}),
        timeseries(23, (8, 8), "Conservation residual", "Published - settled - queued for each lane, from three "
                   "sources: the lane's header, the ledger, the records in the lane. 0, or a point was lost or "
                   "invented; no value while it cannot be told.",
                   gauge({"points": "max(abs(residual))::float8"}, "engine_stats",
                         f"{SAMPLED} AND {WORKER} AND residual IS NOT NULL", metric="node || ' ' || name"),
                   unit="short", lines=(("red", 1),), field={"min": 0, "decimals": 0}),
    )  # fmt: skip


def latency() -> list[Json]:
    budget = (
        f"SELECT 1 - count(*) FILTER (WHERE arrival_p99_ms > {SLOW_MS}) / (0.01 * nullif(count(*), 0))::float8 "
        f'AS "left" FROM engine_stats\nWHERE {SAMPLED} AND {WRITER} AND arrival_p99_ms IS NOT NULL'
    )
    return row(
        30, "Latency",
        timeseries(31, (10, 8), "Arrival to commit", "From the reception of a request to the commit of its points: "
                   "the slowest second of each interval, by quantile of the points.",
                   gauge({"p50": "max(arrival_p50_ms)", "p99": "max(arrival_p99_ms)"}, "engine_stats",
                         f"{SAMPLED} AND {WRITER} AND arrival_p50_ms IS NOT NULL"),
                   unit="ms", lines=(("red", SLOW_MS),), field={"min": 0}),
        timeseries(32, (9, 8), "Duration of a transaction", "COPY, ledger and commit: the slowest second of each "
                   "interval, by quantile of the transactions.",
                   gauge({"p50": "max(flush_p50_ms)", "p99": "max(flush_p99_ms)"}, "engine_stats",
                         f"{SAMPLED} AND {WRITER} AND flush_p50_ms IS NOT NULL"),
                   unit="ms", field={"min": 0}),
        stat(33, (5, 8), "Error budget left", f"Of the 1 % of seconds in which the arrival-to-commit p99 may be above "
             f"{SLOW_MS} ms, the share that is left in the range; negative when it is overspent.",
             budget, unit="percentunit", limit=thresholds(("red", None), ("orange", 0), ("green", 0.5)),
             field={"decimals": 0}),
    )  # fmt: skip


def processes() -> list[Json]:
    return row(
        40, "Processes",
        timeseries(41, (6, 8), "Writers busy", "Share of time that each writer spends in transactions. Near 1 it is "
                   "the bottleneck: more writers, or a faster database.",
                   rates("engine_stats", {"busy": "busy_s"}, f"{SAMPLED} AND {WRITER}", ("node", "name"),
                         metric="node || ' ' || name"),
                   unit="percentunit", lines=(("orange", 0.7), ("red", 0.9)), field={"min": 0}),
        timeseries(42, (6, 8), "CPU", "Cores that each worker (by its lane) and each writer uses.",
                   rates("engine_stats", {"cores": "cpu_s"}, f"{SAMPLED} AND cpu_s IS NOT NULL", ("node", "name"),
                         metric="node || ' ' || name"),
                   unit="short", field={"min": 0}),
        timeseries(43, (6, 8), "CPU time a point", "CPU of all workers and writers over points committed: what one "
                   "point costs. It falls as requests and transactions grow.",
                   'SELECT "time", cores * 1000000 / nullif(points, 0) AS "a point" FROM (\n'
                   + rates("engine_stats", {"cores": "cpu_s", "points": "committed"}, SAMPLED, ("node", "name"))
                   + "\n) AS each_second", unit="µs", field={"min": 0}),
        timeseries(44, (6, 8), "Memory", "Memory of each process that it shares with nobody; the lanes are shared.",
                   gauge({"bytes": "max(memory_bytes)::float8"}, "engine_stats",
                         f"{SAMPLED} AND memory_bytes IS NOT NULL", metric="node || ' ' || name"),
                   unit="bytes", field={"min": 0}),
    )  # fmt: skip


def storage() -> list[Json]:
    sampled = "$__timeFilter(sampled_at)"
    growth = (
        f"WITH trend AS (\n  {TREND}\n),\nsteps AS (\n"
        f'  SELECT generate_series({bucket(FROM)}, {TO}, {STEP}) AS "time"\n),\nsampled AS (\n'
        f'  SELECT {bucket("sampled_at")} AS "time", max(database_bytes) AS used,\n'
        f"    max(database_bytes + disk_free_bytes) AS room\n  FROM storage_stats WHERE {sampled} GROUP BY 1\n)\n"
        'SELECT steps."time", used::float8 AS "database", room::float8 AS "disk full",\n'
        '  (level + slope * extract(epoch FROM steps."time"))::float8 AS "trend"\n'
        'FROM steps LEFT JOIN sampled USING ("time") CROSS JOIN trend\nORDER BY 1'
    )
    newest_sample = f"SELECT * FROM storage_stats WHERE sampled_at <= {TO} ORDER BY sampled_at DESC LIMIT 1"
    dashed = {"custom__lineStyle": {"fill": "dash", "dash": [10, 10]}, "custom__fillOpacity": 0}
    return row(
        50, "Storage",
        timeseries(51, (12, 8), "Database and disk", "Size of the database, and where its disk is full. The dashed "
                   "line is the trend of the last 7 days; let the range end in the future to see where it leads.",
                   growth, unit="bytes", field={"min": 0}, overrides=[override("trend", **dashed)], interval="1m"),
        stat(52, (4, 8), "Disk full in", "When the disk of the database is full at the growth of the last 7 days of "
             "the range; no value while the database does not grow, or its disk cannot be seen from the service.",
             f"WITH trend AS (\n  {TREND}\n)\nSELECT disk_free_bytes / slope AS \"until full\"\n"
             f"FROM trend, ({newest_sample}) AS newest WHERE slope > 0",
             unit="s", limit=thresholds(("red", None), ("orange", 3 * 86400), ("green", 14 * 86400)),
             field={"noValue": "never", "decimals": 0}),
        stat(53, (4, 8), "A point, a chunk", "Bytes that a stored point takes with its indexes; points in a chunk; "
             "share of the chunks that are in the columnstore. Without TimescaleDB there are no chunks.",
             'SELECT telemetry_bytes / nullif(points, 0)::float8 AS "bytes a point",\n'
             '  points / nullif(chunks, 0)::float8 AS "points a chunk",\n'
             '  compressed_chunks / nullif(chunks, 0)::float8 AS "in the columnstore"\n'
             f"FROM ({newest_sample}) AS newest",
             unit="short", overrides=[override("in the columnstore", unit="percentunit", decimals=0)],
             field={"decimals": 1}),
        stat(54, (4, 8), "Stored", "Points in the table, as the planner estimates them, and the sizes of points and "
             "aggregates.",
             'SELECT points::float8 AS "points", telemetry_bytes::float8 AS "of points",\n'
             f'  aggregate_bytes::float8 AS "of aggregates"\nFROM ({newest_sample}) AS newest', unit="bytes",
             overrides=[override("points", unit="short")]),
    )  # fmt: skip


def lanes() -> Json:
    return table(
        61, (24, 7), "Lanes", "The delivery ledger: up to which byte each lane is in the database, and what it "
        "brought. The 100 lanes that moved last; one that was replaced stays in the ledger for ever.",
        'SELECT\n  lane::text AS "Lane", node AS "Node", committed_points AS "Committed",\n'
        '  deduplicated_points AS "Deduplicated", dead_lettered_points AS "Dead letters",\n'
        '  committed_points / nullif(flushes, 0)::float8 AS "Points a transaction",\n'
        '  greatest(0, extract(epoch FROM now() - updated_at))::float8 AS "Idle for"\n'
        "FROM ingest_progress\nORDER BY updated_at DESC\nLIMIT 100",
        overrides=[
            *(override(name, unit="short") for name in ("Committed", "Deduplicated", "Points a transaction")),
            override("Dead letters", unit="short", thresholds=thresholds(("green", None), ("red", 1)),
                     custom__cellOptions={"type": "color-text"}),
            override("Idle for", unit="s"),
        ],
    )  # fmt: skip


def capacity() -> Json:
    """Return the board that the engine is run by."""
    return board(
        UID, "OrbitStream capacity",
        "Rates, head-room, queue, latency, processes and storage of the engine: how much it does and could do.",
        [*glance(), *throughput(), *queue(), *latency(), *processes(), *storage(), *row(60, "Delivery", lanes())], [],
    )  # fmt: skip
