"""Time the dashboards' historical queries on 30 days of telemetry, on each way to store it: python -m bench.query

    plain         a PostgreSQL table with the indexes of telemetry
    row store     a hypertable with the same indexes
    columnstore   telemetry as `orbitstream migrate` makes it, loaded as the writers load it, rewritten by its policy
    kept          the same answer from what is kept beside the points: satellite_latest and the aggregates

All hold the same rows, of the simulator's fleet. Needs TimescaleDB under the timescale license and an account that may
create a database; it makes one and drops it. It writes its figures with the commit and the machine as JSON, and a plot
(pip install 'orbitstream[bench]'). The full run takes some 10 minutes and 25 GB on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import psycopg

from bench import results
from engine import copy_format, limits, migrate, policies, settings
from engine.columnstore import Columnstore
from engine.latest import Latest
from engine.rows import Columns, take
from engine.satellites import Satellites
from engine.trial import scratch
from simulator.anomalies import Anomaly
from simulator.fleet import Fleet, satellite_ids

BATCH: Final = 20_000
TABLES: Final = {"plain": "plain", "row store": "row_store", "columnstore": "telemetry"}

# Each query on points, and the same answer from what the dashboards ask instead, where there is such a thing: they ask
# points only for spans of up to two hours. {end} is the instant after the newest point.
QUERIES: Final[dict[str, tuple[str, str | None]]] = {
    "last value of a satellite": (
        "SELECT time, battery_charge_percent FROM {table} WHERE satellite_id = 'SAT-00042' ORDER BY time DESC LIMIT 1",
        "SELECT time, battery_charge_percent FROM satellite_latest WHERE satellite_id = 'SAT-00042'",
    ),
    "a satellite's two hours, by 10 seconds": (
        "SELECT date_bin('10 seconds', time, 'epoch') AS bucket, avg(battery_charge_percent),"
        " min(battery_charge_percent), max(battery_charge_percent) FROM {table}"
        " WHERE satellite_id = 'SAT-00042' AND time >= {end} - interval '2 hours'"
        " AND time < {end} GROUP BY 1 ORDER BY 1",
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


def batches(options: argparse.Namespace, end: datetime) -> Iterator[Columns]:
    """Yield the fleet's readings of the days before `end`, evenly, in batches as a writer marks and sorts them."""
    count, points = options.satellites, options.points
    fleet, ids = Fleet(0, count, seed=5, anomaly_rate=0.01), satellite_ids(0, count, count)
    fleet_limits = limits.of_settings(settings.load({}))
    span = options.days * 86_400_000_000
    first = int(end.timestamp() * 1e6) - span
    for start in range(0, points, BATCH):
        numbers = np.arange(start, min(start + BATCH, points))
        readings = fleet.read(numbers % count, first + (numbers * (span / points)).astype(np.int64))
        readings = readings.pick(np.flatnonzero(readings.anomaly != Anomaly.SILENCE))
        values = {
            channel.name: column / 10.0**channel.decimals
            for channel, column in zip(fleet.channels, readings.values, strict=True)
        }
        columns = Columns(readings.time_us, ids[readings.satellite], values, np.zeros(len(readings.time_us), np.bool_))
        columns.is_anomaly = fleet_limits.critical(columns)
        yield take(columns, copy_format.order(columns))


class Table:
    """One table that is filled on a connection of its own, beside the others; `seconds` counts what that took."""

    def __init__(self, url: str, name: str) -> None:
        self.connection = migrate.connect(url, f"orbitstream-bench-{name}")
        self.name = name
        self.columnstore = Columnstore(self.connection) if name == "telemetry" else None
        self.seconds = 0.0

    def copy(self, names: str, body: bytes, points: int) -> None:
        begun = time.monotonic()
        with self.connection.transaction(), self.connection.cursor() as cursor:
            if self.columnstore is not None:
                self.columnstore.begin(cursor, points)
            with cursor.copy(f"COPY {self.name} ({names}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
                copy.write(body)
            if self.columnstore is not None:
                self.columnstore.end(cursor, points)
        self.seconds += time.monotonic() - begun

    def finish(self, indexes: list[str]) -> None:
        """Make the indexes of telemetry on a table that was filled without any, and close the connection."""
        begun = time.monotonic()
        self.connection.execute("SET maintenance_work_mem = '256MB'")
        for definition in indexes if self.columnstore is None else ():
            definition = definition.replace(".telemetry ", f".{self.name} ").replace(
                "INDEX telemetry_", f"INDEX {self.name}_"
            )
            self.connection.execute(definition.encode())
        self.connection.execute(f"VACUUM ANALYZE {self.name}".encode())
        self.seconds += time.monotonic() - begun
        self.connection.close()


def load(url: str, options: argparse.Namespace, end: datetime, indexes: list[str]) -> tuple[int, dict[str, float]]:
    """Fill every table; returns the points, and the seconds each table took while the others were filled too."""
    tables, points = {name: Table(url, table) for name, table in TABLES.items()}, 0
    satellites = Satellites()
    latest = Latest(satellites)
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(len(tables)) as pool, migrate.connect(url, "orbitstream-bench") as connection:
        for columns in batches(options, end):
            names, body = ", ".join(copy_format.column_names(columns)), copy_format.encode(columns, columns.time)
            for copying in pending:  # the next batch is made while the last one is copied
                copying.result()
            pending = [pool.submit(table.copy, names, body, len(columns)) for table in tables.values()]
            latest.add(columns, columns.time, satellites.runs(columns))
            if (points + len(columns)) // 1_000_000 > points // 1_000_000:
                print(f"{(points + len(columns)) / 1e6:.0f} M points", file=sys.stderr, flush=True)
            points += len(columns)
        for copying in pending:
            copying.result()
        latest.finish(connection)
        list(pool.map(lambda table: table.finish(indexes), tables.values()))
    return points, {name: table.seconds for name, table in tables.items()}


def settle(connection: psycopg.Connection[Any]) -> float:
    """Do what the policies do of a night: refresh the aggregates, rewrite the chunks; returns seconds."""
    begun = time.monotonic()
    for each in policies.AGGREGATES:
        connection.execute(f"CALL refresh_continuous_aggregate('{each.name}', NULL, NULL)".encode())
    for table in ("telemetry", "satellite_stats"):
        connection.execute(f"CALL run_job({policies.job_of(connection, table, 'policy_compression')})".encode())
    for table in ("telemetry", "satellite_latest", *(each.name for each in policies.AGGREGATES)):
        connection.execute(f"VACUUM ANALYZE {table}".encode())
    return time.monotonic() - begun


def columnstore_size(connection: psycopg.Connection[Any], points: int) -> dict[str, float]:
    """Return how telemetry stands in the columnstore: chunks, points a compressed batch, bytes a point."""
    row = connection.execute(
        "SELECT count(*), sum(pg_total_relation_size(chunk) + pg_total_relation_size(compress_relid)),"
        " sum((xpath('/row/c/text()', query_to_xml(format('SELECT count(*) AS c FROM %s', compress_relid), false, true,"
        " '')))[1]::text::bigint) FROM show_chunks('telemetry') AS chunk"
        " JOIN _timescaledb_catalog.compression_settings ON relid = chunk"
    ).fetchone()
    assert row is not None
    chunks, size, compressed = row
    return {
        "chunks": chunks,
        "points_a_batch": round(points / float(compressed), 1),
        "bytes_a_point": round(float(size) / points, 2),
    }


def measure(connection: psycopg.Connection[Any], repeat: int, end: datetime) -> dict[str, dict[str, float]]:
    """Return the median time in ms of each query on each table; the answers have to agree.

    Over `repeat` turns, and for quick queries up to five times as many.
    """
    instant = f"timestamptz '{end.isoformat()}'"
    found: dict[str, dict[str, float]] = {}
    for title, (raw, kept) in QUERIES.items():
        ways = {name: raw.format(table=table, end=instant) for name, table in TABLES.items()}
        if kept is not None:
            ways["kept"] = kept.format(end=instant)
        times: dict[str, list[float]] = {name: [] for name in ways}
        answers = {}
        begun = time.perf_counter()
        # The first turn warms the caches. Then in turns, so that a slow minute hits all, each time beginning with
        # another one: what follows a query of seconds finds the processor's caches cold.
        order = list(ways.items())
        for turn in range(5 * repeat + 1):
            if turn > repeat and time.perf_counter() - begun > repeat:
                break
            random.Random(turn).shuffle(order)
            for name, query in order:
                asked = time.perf_counter()
                answers[name] = connection.execute(query.encode(), prepare=False).fetchall()
                times[name].append((time.perf_counter() - asked) * 1000)
        for name, answer in answers.items():
            same = len(answer) == len(answers["plain"]) and all(
                one[0] == other[0] and np.allclose([float(x) for x in one[1:]], [float(x) for x in other[1:]])
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
    """Compare with the plain table: the columnstore, what the dashboards ask, and what is kept beside the points."""
    raw = [each["columnstore"] / each["plain"] for each in times.values()]
    asked = [each.get("kept", each["columnstore"]) / each["plain"] for each in times.values()]
    gains = [each["plain"] / each["kept"] for each in times.values() if "kept" in each]
    return {
        "columnstore_over_plain_geometric_mean": round(statistics.geometric_mean(raw), 3),
        "columnstore_over_plain_worst": round(max(raw), 2),
        "dashboards_over_plain_geometric_mean": round(statistics.geometric_mean(asked), 3),
        "dashboards_over_plain_worst": round(max(asked), 2),
        "plain_over_kept_geometric_mean": round(statistics.geometric_mean(gains), 1),
        "plain_over_kept_least": round(min(gains), 1),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5))
    titles, ways = list(result["figures"]["ms"]), [*TABLES, "kept"]
    for number, way in enumerate(ways):
        heights = [result["figures"]["ms"][title].get(way, np.nan) for title in titles]
        axes.bar(np.arange(len(titles)) + (number - 1.5) * 0.2, heights, 0.2, label=way)
    axes.set_yscale("log")
    axes.set_ylabel("median, ms")
    axes.set_xticks(np.arange(len(titles)), [title.replace(", ", ",\n") for title in titles], fontsize=8)
    axes.set_title(result["title"], fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL"), help="the server (DATABASE_URL)")
    parser.add_argument("--points", type=int, default=50_000_000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--satellites", type=int, default=100, help="100: one reading of each in 5.2 s")
    parser.add_argument("--chunk-interval", default="1d", help="ORBITSTREAM_CHUNK_INTERVAL of telemetry and row store")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="folder of query.json and query.png")
    options = parser.parse_args()
    if options.database_url is None:
        parser.error("--database-url or DATABASE_URL is needed")
    with scratch(options.database_url) as url:
        result = run(url, options)
    figures = result["figures"]
    configuration = {
        name: getattr(options, name) for name in ("points", "days", "satellites", "chunk_interval", "repeat")
    }
    path = results.save("query", configuration | {"server": result["server"]}, figures, options.output)
    plot(result, path.with_suffix(".png"))
    for title, times in figures["ms"].items():
        print(f"{title:40}", *(f"{way} {ms:.1f} ms" for way, ms in times.items()), sep="  ")
    print(*(f"{name}: {figures[name]}" for name in ("bytes_per_point", "columnstore", "summary")), path, sep="\n")
    return 0


def run(url: str, options: argparse.Namespace) -> dict[str, Any]:
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    config = settings.load(
        {"ORBITSTREAM_RETENTION": f"{options.days + 10}d", "ORBITSTREAM_CHUNK_INTERVAL": options.chunk_interval}
    )
    edition = migrate.migrate(config, url, lambda _: None)
    if edition.name != "timescale":
        raise SystemExit(f"this needs the timescale license, and here is {edition}")
    with migrate.connect(url, "orbitstream-bench") as connection:
        connection.execute("SELECT alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs")
        for table in ("plain", "row_store"):
            connection.execute(f"CREATE TABLE {table} (LIKE telemetry)".encode())
        connection.execute(
            "SELECT create_hypertable('row_store', by_range('time', make_interval(secs => %s)),"
            " create_default_indexes => false)",
            [config.chunk_interval],
        )
        found = connection.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'telemetry'").fetchall()
        points, seconds = load(url, options, end, [definition for (definition,) in found])
        connection.execute("CREATE INDEX ON plain USING brin (time) WITH (pages_per_range = 32)")
        written = columnstore_size(connection, points)
        print("loaded; aggregates, policies", file=sys.stderr, flush=True)
        seconds["aggregates and policies"] = settle(connection)
        times = measure(connection, options.repeat, end)
        return {
            "server": str(edition),
            "title": f"{points / 1e6:.0f} M points in {options.days} days, {edition}",
            "figures": {
                "points": points,
                "load_s": {way: round(each, 1) for way, each in seconds.items()},
                "bytes_per_point": bytes_per_point(connection, points),
                "columnstore": {"as written": written, "rewritten by its policy": columnstore_size(connection, points)},
                "ms": times,
                "summary": summary(times),
            },
        }


if __name__ == "__main__":
    sys.exit(main())
