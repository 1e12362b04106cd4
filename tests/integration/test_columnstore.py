"""What dashboards ask, of telemetry as the writers filled it and of a plain table with the same rows; and the chores.

Two writers, batches that overlap in time, trickles and late points. On a server that compresses COPY the batches go
straight into the columnstore, and the answers have to be the same before and after its chunks are rewritten.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest

from engine import maintenance, migrate, policies, settings
from engine.columnstore import MIN_POINTS
from engine.latest import EVERY_S, SHARE, SLICE, Latest
from engine.rows import Columns
from engine.satellites import Satellites
from tests.service import Service, compresses, eventually

SATELLITES = 40
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
QUERIES = (
    "SELECT count(*), sum(storage_usage_mb), count(temperature_c) FROM {table}",
    "SELECT time, satellite_id, storage_usage_mb FROM {table} ORDER BY time DESC, satellite_id LIMIT 4",
    "SELECT time, satellite_id FROM {table} ORDER BY time, satellite_id LIMIT 9",
    "SELECT time FROM {table} WHERE satellite_id = 'SAT-07' ORDER BY time DESC LIMIT 5",
    "SELECT time, battery_charge_percent FROM {table} WHERE satellite_id = 'SAT-31' ORDER BY time LIMIT 5",
    "SELECT max(time), min(time) FROM {table} WHERE satellite_id = 'SAT-12'",
    "SELECT DISTINCT ON (satellite_id) satellite_id, time, storage_usage_mb FROM {table}"
    " ORDER BY satellite_id, time DESC",
    # These two are wrong after COPYs with client_sorted, which must therefore never be on.
    "SELECT DISTINCT ON (satellite_id) satellite_id, time FROM {table} ORDER BY satellite_id, time",
    "SELECT satellite_id, time FROM {table} ORDER BY satellite_id, time OFFSET 1000 LIMIT 9",
    "SELECT satellite_id, (SELECT time FROM {table} b WHERE b.satellite_id = a.satellite_id ORDER BY time DESC LIMIT 1)"
    " FROM (SELECT DISTINCT satellite_id FROM {table}) a ORDER BY 1",
    "SELECT time, satellite_id FROM {table} WHERE is_anomaly ORDER BY time DESC, satellite_id LIMIT 7",
    "SELECT date_bin('5 min', time, 'epoch') AS bucket, count(*), min(signal_strength_dbm), max(battery_charge_percent)"
    " FROM {table} GROUP BY 1 ORDER BY 1",
    "SELECT satellite_id, count(*) FROM {table} WHERE time > now() - interval '2 hours' GROUP BY 1 ORDER BY 1",
)  # fmt: skip


def points(count: int, start: float, span: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield points at random within `span` seconds; their last two digits are the seed, so that no two times agree."""
    random = np.random.default_rng(seed)
    offsets = random.permutation(count) * (span / count)
    for number, offset in enumerate(offsets.tolist()):
        made_us = round((start + offset) * 1e4) * 100 + seed
        yield {
            "satellite_id": f"SAT-{int(random.integers(SATELLITES)):02d}",
            "timestamp": (EPOCH + timedelta(microseconds=made_us)).isoformat(timespec="microseconds"),
            "battery_charge_percent": float(number % 101),
            "storage_usage_mb": float(number),
            "signal_strength_dbm": -float(number % 110),
        } | ({"temperature_c": float(number % 50)} if number % 3 else {})


def load(service: Service, reference: psycopg.Connection[Any], batches: list[list[dict[str, Any]]]) -> None:
    """Post batches, several at once, and put the same rows into the plain table."""
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda batch: service.post("/telemetry/batch", batch)[0], batches))
    assert answers == [202] * len(batches)
    with (
        reference.cursor() as cursor,
        cursor.copy(
            "COPY reference (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
            " temperature_c, is_anomaly, received_at) FROM STDIN"
        ) as copy,
    ):
        for point in (point for batch in batches for point in batch):
            battery, signal = point["battery_charge_percent"], point["signal_strength_dbm"]
            copy.write_row((
                point["timestamp"], point["satellite_id"], battery, point["storage_usage_mb"], signal,
                point.get("temperature_c"), battery < 10 or signal < -100, datetime.now(UTC),
            ))  # fmt: skip


def assert_same_answers(connection: psycopg.Connection[Any], when: str) -> None:
    for query in QUERIES:
        expected = connection.execute(query.format(table="reference").encode()).fetchall()
        found = connection.execute(query.format(table="telemetry").encode()).fetchall()
        assert found == expected, f"{when}: {query}"


@pytest.mark.slow
def test_dashboards_see_the_same_as_on_a_plain_table(service: Service) -> None:
    service.start(ORBITSTREAM_WRITERS="2", ORBITSTREAM_COMPRESS_AFTER="60s")
    now = time.time()
    with migrate.connect(service.database, "test") as connection:
        connection.execute("CREATE TABLE reference (LIKE telemetry)")
        starts = [now - 300, now - 280, now - 310, now - 2 * 86400, now - 3 * 3600]
        batches = [
            *(list(points(MIN_POINTS + 2000, start, 250, seed)) for seed, start in enumerate(starts)),
            *(list(points(70, now - 300, 290, seed)) for seed in range(10, 20)),
            *(list(points(30, now - 2 * 86400, 250, seed)) for seed in range(20, 23)),
        ]
        # Large ones first: which of them wait for each other in one flush is up to the writers.
        load(service, connection, batches[:5])
        eventually(lambda: service.count() == sum(map(len, batches[:5])), 60)
        load(service, connection, batches[5:])
        eventually(lambda: service.count() == sum(map(len, batches)), 60)
        compressed = service.get("/health")[1]["compressed_points"]
        assert (compressed >= MIN_POINTS) == compresses(connection), "which way the batches went"
        assert_same_answers(connection, "as written")
        expected = connection.execute(
            "SELECT DISTINCT ON (satellite_id) satellite_id, time, storage_usage_mb FROM reference"
            " ORDER BY satellite_id, time DESC"
        ).fetchall()
        latest = "SELECT satellite_id, time, storage_usage_mb FROM satellite_latest ORDER BY 1"
        eventually(lambda: connection.execute(latest.encode()).fetchall() == expected, 10, "satellite_latest")
        if migrate.find_edition(connection).name != "timescale":
            return
        job = policies.job_of(connection, "telemetry", "policy_compression")
        for run in range(2):  # the first brings the trickles into the columnstore, the second puts all in order
            connection.execute(f"CALL run_job({job})".encode())
            assert_same_answers(connection, f"after run {run + 1} of the policy")
        late = connection.execute(
            "SELECT DISTINCT _timescaledb_functions.chunk_status(chunk)"
            " FROM show_chunks('telemetry', older_than => interval '1 day') AS chunk"
        ).fetchall()
        assert late == [(1,)], "late points are merged: compressed, in order, no part in the row store"


def test_a_hundred_thousand_satellites_take_a_small_share_of_a_writer(database: str, service: Service) -> None:
    assert service.run("migrate").returncode == 0
    count = 100_000
    ids = np.array([f"SAT-{number:06d}" for number in range(count)], "S10")
    made = np.full(count, 1_800_000_000_000_000, np.int64)
    satellites = Satellites()
    latest = Latest(satellites)
    satellites.runs(Columns(made, ids, {}, np.zeros(count, np.bool_)))  # to meet so many costs as much again, once
    with migrate.connect(database, "test") as connection:
        for later in range(3):
            values = {"battery_charge_percent": np.full(count, later + 0.25), "storage_usage_mb": np.zeros(count)}
            values["signal_strength_dbm"] = np.zeros(count)
            columns = Columns(made + later, ids, values, np.zeros(count, np.bool_))
            begun = time.process_time()
            latest.add(columns, made, satellites.runs(columns))
            assert time.process_time() - begun < 0.1
        latest.put(connection)
        assert connection.execute(
            "SELECT count(*), min(battery_charge_percent), min(time) = max(time), count(latitude) FROM satellite_latest"
        ).fetchone() == (SLICE, 2.25, True, 0)
        begun = time.monotonic()
        latest.put(connection)
        took = time.monotonic() - begun
        assert not latest.due(time.monotonic() + took)
        assert latest.due(time.monotonic() + took / SHARE + EVERY_S)
        connection.execute("UPDATE satellite_latest SET time = '2200-01-01', battery_charge_percent = 7")
        for _ in range(count // SLICE - 2):
            latest.put(connection)
        columns = Columns(made + 9, ids, values, np.zeros(count, np.bool_))
        latest.add(columns, made, satellites.runs(columns))
        latest.put(connection)  # an older point does not take the place of a newer one
        assert connection.execute(
            "SELECT count(*), count(*) FILTER (WHERE battery_charge_percent = 7) FROM satellite_latest"
        ).fetchone() == (count, 2 * SLICE)


def test_chunks_are_made_ahead_and_the_storage_is_sampled(any_database: str) -> None:
    edition = migrate.migrate(settings.load({}), any_database, lambda _: None)
    with migrate.connect(any_database, "test") as connection:
        assert maintenance.make_chunks(connection, edition, 3600.0) == (0 if edition.timescaledb is None else 2)
        assert maintenance.make_chunks(connection, edition, 3600.0) == 0
        assert connection.execute("SELECT count(*) FROM telemetry").fetchone() == (0,)
        if edition.name == "timescale":
            states = connection.execute("SELECT is_compressed FROM timescaledb_information.chunks").fetchall()
            assert states == [(compresses(connection),)] * 2
        connection.execute("INSERT INTO storage_stats VALUES (now() - interval '100 days', 1, 1, 1, 1)")
        maintenance.sample_storage(connection, edition)
        (sample,) = connection.execute("SELECT database_bytes > telemetry_bytes, chunks FROM storage_stats").fetchall()
        assert sample == (True, None if edition.timescaledb is None else 2)


def test_maintenance_brings_the_index_on_time_up_to_date(any_database: str) -> None:
    edition = migrate.migrate(settings.load({}), any_database, lambda _: None)
    with migrate.connect(any_database, "test") as connection:
        if edition.timescaledb is None:  # a vacuum that comes by meanwhile would do what is tested here
            connection.execute("ALTER TABLE telemetry SET (autovacuum_enabled = off)")
        connection.execute(
            "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
            " received_at, is_anomaly) SELECT now() + number * interval '1 ms', 'A', 1, 1, 1, now(), false"
            " FROM generate_series(1, 50000) AS number"
        )
        if edition.timescaledb is None:
            with migrate.connect(any_database, "vacuum") as vacuum, vacuum.transaction():
                vacuum.execute("LOCK TABLE telemetry IN SHARE UPDATE EXCLUSIVE MODE")
                assert maintenance.summarize(connection, edition) == 0, "it does not wait for a vacuum"
            assert maintenance.summarize(connection, edition) > 10
        assert maintenance.summarize(connection, edition) == 0
