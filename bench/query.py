"""Time the dashboards' historical queries on 30 days of telemetry, on each way to store it: python bench/query.py

    plain         a PostgreSQL table with the indexes of telemetry
    row store     a hypertable with the same indexes
    columnstore   telemetry as `orbitstream migrate` makes it, loaded as the writers load it, rewritten by its policy
    aggregates    the same answer from satellite_stats, _hourly or _daily

All hold the same rows, of the simulator's fleet. Needs TimescaleDB under the timescale license and an account that may
create a database; it makes one and drops it. The full run is --points 50000000; it writes its figures with the commit
and the machine as JSON, and a plot (pip install 'orbitstream[bench]').
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import psycopg
from psycopg.conninfo import make_conninfo

from engine import copy_format, migrate, policies, settings
from engine.columnstore import Columnstore
from engine.rows import Columns
from simulator.fleet import Fleet, satellite_ids

BATCH: Final = 100_000
TABLES: Final = {"plain": "plain", "row store": "row_store", "columnstore": "telemetry"}

# Each query on points, and the same answer from an aggregate, where there is one. {end} is the newest instant.
QUERIES: Final[dict[str, tuple[str, str | None]]] = {
    "last value of a satellite": (
        "SELECT time, battery_charge_percent FROM {table} WHERE satellite_id = 'SAT-00042' ORDER BY time DESC LIMIT 1",
        None,
    ),
    "a satellite's day, by 5 minutes": (
        "SELECT time_bucket('5 minutes', time) AS bucket, avg(battery_charge_percent), min(signal_strength_dbm)"
        " FROM {table} WHERE satellite_id = 'SAT-00042' AND time >= {end} - interval '2 days'"
        " AND time < {end} - interval '1 day' GROUP BY 1 ORDER BY 1",
        "SELECT bucket, avg_battery_charge_percent, min_signal_strength_dbm FROM satellite_stats"
        " WHERE satellite_id = 'SAT-00042' AND bucket >= {end} - interval '2 days'"
        " AND bucket < {end} - interval '1 day' ORDER BY 1",
    ),
    "the fleet by 5 minutes, a week": (
        "SELECT time_bucket('5 minutes', time) AS bucket, avg(battery_charge_percent), count(*) FROM {table}"
        " WHERE time >= {end} - interval '8 days' AND time < {end} - interval '1 day' GROUP BY 1 ORDER BY 1",
        "SELECT bucket, sum(sum_battery_charge_percent) / sum(count_battery_charge_percent)::float8, sum(data_points)"
        " FROM satellite_stats WHERE bucket >= {end} - interval '8 days' AND bucket < {end} - interval '1 day'"
        " GROUP BY 1 ORDER BY 1",
    ),
    "the fleet by hours, a month": (
        "SELECT time_bucket('1 hour', time) AS bucket, avg(storage_usage_mb), max(storage_usage_mb) FROM {table}"
        " WHERE time >= {end} - interval '29 days' AND time < {end} - interval '1 day' GROUP BY 1 ORDER BY 1",
        "SELECT bucket, sum(sum_storage_usage_mb) / sum(count_storage_usage_mb)::float8, max(max_storage_usage_mb)"
        " FROM satellite_stats_hourly WHERE bucket >= {end} - interval '29 days' AND bucket < {end} - interval '1 day'"
        " GROUP BY 1 ORDER BY 1",
    ),
    "anomalies of a month, by day": (
        "SELECT time_bucket('1 day', time) AS bucket, count(*) FROM {table} WHERE is_anomaly"
        " AND time >= {end} - interval '29 days' AND time < {end} - interval '1 day' GROUP BY 1 ORDER BY 1",
        "SELECT bucket, sum(anomaly_count) FROM satellite_stats_daily WHERE bucket >= {end} - interval '29 days'"
        " AND bucket < {end} - interval '1 day' GROUP BY 1 ORDER BY 1",
    ),
}


def batches(points: int, satellites: int, begin: datetime, end: datetime) -> Iterator[Columns]:
    """Yield the fleet's readings over [begin, end), evenly, in batches as a writer sorts them."""
    fleet, ids = Fleet(0, satellites, seed=5, anomaly_rate=0.01), satellite_ids(0, satellites, satellites)
    first, span = int(begin.timestamp() * 1e6), int((end - begin).total_seconds() * 1e6)
    for start in range(0, points, BATCH):
        numbers = np.arange(start, min(start + BATCH, points))
        readings = fleet.read(numbers % satellites, first + numbers * span // points)
        values = {
            channel.name: column / 10.0**channel.decimals
            for channel, column in zip(fleet.channels, readings.values, strict=True)
        }
        columns = Columns(readings.time_us, ids[readings.satellite], values, readings.anomalous)
        yield copy_format.take(columns, copy_format.order(columns))


def load(connection: psycopg.Connection[Any], options: argparse.Namespace, end: datetime) -> dict[str, float]:
    """Fill every table and the aggregates; returns seconds of COPY by table, and of what came after."""
    seconds = dict.fromkeys([*TABLES, "policies"], 0.0)
    columnstore = Columnstore(connection)
    for columns in batches(options.points, options.satellites, end - timedelta(days=options.days), end):
        body = copy_format.encode(columns, columns.time)
        names = ", ".join(copy_format.column_names(columns))
        for name, table in TABLES.items():
            begun = time.monotonic()
            with connection.transaction(), connection.cursor() as cursor:
                if name == "columnstore":
                    columnstore.begin(cursor, len(columns))
                with cursor.copy(f"COPY {table} ({names}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
                    copy.write(body)
                if name == "columnstore":
                    columnstore.end(cursor, len(columns))
            seconds[name] += time.monotonic() - begun
    begun = time.monotonic()
    for each in policies.AGGREGATES:
        connection.execute(f"CALL refresh_continuous_aggregate('{each.name}', NULL, NULL)".encode())
    for table in ("telemetry", "satellite_stats"):
        connection.execute(f"CALL run_job({policies.job_of(connection, table, 'policy_compression')})".encode())
    seconds["policies"] = time.monotonic() - begun
    for table in TABLES.values():
        connection.execute(f"VACUUM ANALYZE {table}".encode())
    return seconds


def measure(connection: psycopg.Connection[Any], repeat: int, end: datetime) -> dict[str, dict[str, float]]:
    """Return the median time in ms of each query on each table; the answers have to agree."""
    instant = f"timestamptz '{end.isoformat()}'"
    found: dict[str, dict[str, float]] = {}
    for title, (raw, aggregated) in QUERIES.items():
        ways = {name: raw.format(table=table, end=instant) for name, table in TABLES.items()}
        if aggregated is not None:
            ways["aggregates"] = aggregated.format(end=instant)
        times: dict[str, list[float]] = {name: [] for name in ways}
        answers = {}
        for _ in range(repeat + 1):  # the first warms the caches; then in turns, so that a slow minute hits all
            for name, query in ways.items():
                begun = time.perf_counter()
                answers[name] = connection.execute(query.encode()).fetchall()
                times[name].append((time.perf_counter() - begun) * 1000)
        for name, answer in answers.items():
            same = len(answer) == len(answers["plain"]) and all(
                np.allclose([float(x) for x in one[1:]], [float(x) for x in other[1:]])
                for one, other in zip(answer, answers["plain"], strict=True)
            )
            if not same:
                raise SystemExit(f"{title}: {name} answers otherwise than the plain table")
        found[title] = {name: round(statistics.median(each[1:]), 2) for name, each in times.items()}
    return found


def bytes_per_point(connection: psycopg.Connection[Any], points: int) -> dict[str, float]:
    sizes = {"plain": "pg_total_relation_size('plain')"}
    sizes |= {name: f"hypertable_size('{table}')" for name, table in TABLES.items() if name != "plain"}
    sizes["aggregates"] = " + ".join(f"hypertable_size('{each.name}')" for each in policies.AGGREGATES)
    row = connection.execute(f"SELECT {', '.join(sizes.values())}".encode()).fetchone()
    assert row is not None
    return {name: round(size / points, 1) for name, size in zip(sizes, row, strict=True)}


def summary(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how the columnstore's times compare with the plain table's, and the least gain of the aggregates."""
    ratios = [each["columnstore"] / each["plain"] for each in times.values()]
    best = [min(each["columnstore"], each.get("aggregates", np.inf)) / each["plain"] for each in times.values()]
    gains = [each["plain"] / each["aggregates"] for each in times.values() if "aggregates" in each]
    return {
        "columnstore_over_plain_geometric_mean": round(float(np.exp(np.mean(np.log(ratios)))), 3),
        "columnstore_over_plain_worst": round(max(ratios), 2),
        "best_way_over_plain_geometric_mean": round(float(np.exp(np.mean(np.log(best)))), 3),
        "plain_over_aggregates_least": round(min(gains), 1),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5))
    titles, ways = list(result["ms"]), [*TABLES, "aggregates"]
    for number, way in enumerate(ways):
        heights = [result["ms"][title].get(way, np.nan) for title in titles]
        axes.bar(np.arange(len(titles)) + (number - 1.5) * 0.2, heights, 0.2, label=way)
    axes.set_yscale("log")
    axes.set_ylabel("median, ms")
    axes.set_xticks(np.arange(len(titles)), [title.replace(", ", ",\n") for title in titles], fontsize=8)
    axes.set_title(f"{result['points'] / 1e6:g} M points in {result['days']} days, {result['server']}", fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL"), help="the server (DATABASE_URL)")
    parser.add_argument("--points", type=int, default=50_000_000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--satellites", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-query.json"), help="the plot gets the same name, .png")
    options = parser.parse_args()
    if options.database_url is None:
        parser.error("--database-url or DATABASE_URL is needed")
    name = f"orbitstream_bench_{os.getpid()}"
    with psycopg.connect(options.database_url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}".encode())
        try:
            result = run(make_conninfo(options.database_url, dbname=name), options)
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, options.out.with_suffix(".png"))
    for title, times in result["ms"].items():
        print(f"{title:34}", *(f"{way} {ms:.1f} ms" for way, ms in times.items()), sep="  ")
    print(f"bytes a point {result['bytes_per_point']}  {result['summary']}")
    return 0


def run(url: str, options: argparse.Namespace) -> dict[str, Any]:
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    retention = str((options.days + 10) * 86400)
    edition = migrate.migrate(settings.load({"ORBITSTREAM_RETENTION": retention}), url, lambda _: None)
    if edition.name != "timescale":
        raise SystemExit(f"this needs the timescale license, and here is {edition}")
    with migrate.connect(url, "orbitstream-bench") as connection:
        connection.execute("SELECT alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs")
        for table in ("plain", "row_store"):
            connection.execute(f"CREATE TABLE {table} (LIKE telemetry INCLUDING INDEXES)".encode())
        connection.execute("CREATE INDEX ON plain USING brin (time) WITH (pages_per_range = 32)")
        connection.execute(
            "SELECT create_hypertable('row_store', by_range('time', interval '1 hour'),"
            " create_default_indexes => false)"
        )
        seconds = load(connection, options, end)
        return {
            "command": " ".join(sys.argv),
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
            "server": str(edition),
            "points": options.points,
            "days": options.days,
            "satellites": options.satellites,
            "load_s": {way: round(each, 1) for way, each in seconds.items()},
            "bytes_per_point": bytes_per_point(connection, options.points),
            "ms": (times := measure(connection, options.repeat, end)),
            "summary": summary(times),
        }


if __name__ == "__main__":
    sys.exit(main())
