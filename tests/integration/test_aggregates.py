"""Aggregates by 5 minutes, hours and days on every edition: upgraded to, refreshed, late points, and past retention."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from engine import migrate, policies, settings
from tests.service import eventually

INSERT = (
    "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
    " received_at, is_anomaly, temperature_c) SELECT {time}, 'SAT-' || n % 3, n % 100, n, -n, now(), n % 10 = 0,"
    " CASE WHEN n % 2 = 0 THEN n END FROM generate_series(1, {count}) n"
)
DIRECTLY = (
    "SELECT date_bin('{width}', time, timestamptz '2000-01-01Z') AS bucket, satellite_id, count(*),"
    " count(*) FILTER (WHERE is_anomaly), avg(battery_charge_percent), min(storage_usage_mb), max(signal_strength_dbm),"
    " avg(temperature_c), count(temperature_c) FROM telemetry GROUP BY 1, 2 ORDER BY 1, 2"
)
AGGREGATED = (
    "SELECT bucket, satellite_id, data_points, anomaly_count, avg_battery_charge_percent, min_storage_usage_mb,"
    " max_signal_strength_dbm, avg_temperature_c, count_temperature_c FROM {name} ORDER BY 1, 2"
)
WIDTHS = {"satellite_stats": "5 minutes", "satellite_stats_hourly": "1 hour", "satellite_stats_daily": "1 day"}


def ran(connection: psycopg.Connection[Any], job: int) -> bool:
    """Run a job; False while the server's scheduler runs it by itself."""
    try:
        connection.execute(f"CALL run_job({job})".encode())
    except psycopg.Error as error:
        if "concurrent refresh" not in str(error):
            raise
        return False
    return True


def refresh(connection: psycopg.Connection[Any], edition: migrate.Edition) -> None:
    """Run what the refresh policies run, from fine to coarse, once."""
    if edition.name == "timescale":
        for name in WIDTHS:
            job = policies.job_of(connection, name, "policy_refresh_continuous_aggregate")
            eventually(lambda job=job: ran(connection, job), 20, f"a refresh of {name}")


def assert_right(connection: psycopg.Connection[Any]) -> None:
    for name, width in WIDTHS.items():
        expected = connection.execute(DIRECTLY.format(width=width).encode()).fetchall()
        found = connection.execute(AGGREGATED.format(name=name).encode()).fetchall()
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            assert [*one[:4], *one[5:7], one[8]] == [*other[:4], *other[5:7], other[8]], name
            assert (one[4], one[7]) == pytest.approx((other[4], other[7])), name


def test_an_upgrade_and_late_points_are_in_the_aggregates_within_one_refresh(
    any_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = settings.load({"ORBITSTREAM_CHUNK_INTERVAL": "12h"}), migrate.migrations()
    with monkeypatch.context() as older:  # a database as the version before the aggregates left it, with points in it
        older.setattr(migrate, "migrations", lambda: [each for each in real if each.version <= 5])
        older.setattr(policies, "settle", lambda *_: None)
        migrate.migrate(config, any_database, lambda _: None)
    with migrate.connect(any_database, "test") as connection:
        connection.execute(INSERT.format(time="now() - n * interval '2 min'", count=2000).encode())
    edition = migrate.migrate(config, any_database, lambda _: None)
    with migrate.connect(any_database, "test") as connection:
        refresh(connection, edition)
        assert_right(connection)
        for days in (1, 2):  # each up to the very start of a bucket
            late = f"date_trunc('hour', now()) - interval '{days} days' + n * interval '1 s'"
            connection.execute(INSERT.format(time=late, count=300).encode())
        refresh(connection, edition)
        assert_right(connection)
        assert connection.execute("SELECT count(*) FROM satellite_latest").fetchone() == (3,)


def test_retention_keeps_the_history_of_the_aggregates(any_database: str) -> None:
    config = settings.load({"ORBITSTREAM_CHUNK_INTERVAL": "1d"})
    edition = migrate.migrate(config, any_database, lambda _: None)
    day = timedelta(days=1).total_seconds()
    with migrate.connect(any_database, "test") as connection:
        connection.execute(INSERT.format(time="now() - n * interval '10 min'", count=1500).encode())
        refresh(connection, edition)
        if edition.name != "timescale":  # views see what is there
            connection.execute("DELETE FROM telemetry WHERE time < now() - interval '5 days'")
            assert_right(connection)
            return
        before = connection.execute(AGGREGATED.format(name="satellite_stats").encode()).fetchall()
        # The retention shrinks, points are dropped, and it grows again: the dropped span is never refreshed.
        policies.settle(connection, replace(config, retention=5 * day), edition.name)
        job = policies.job_of(connection, "telemetry", "policy_retention")
        connection.execute(f"CALL run_job({job})".encode())
        row = connection.execute("SELECT count(*) FROM telemetry").fetchone()
        assert row is not None and 5 * 144 - 1 <= row[0] <= 6 * 144
        policies.settle(connection, config, edition.name)
        connection.execute(INSERT.format(time="now() - interval '7 days'", count=1).encode())  # late, into the hole
        refresh(connection, edition)
        for name in WIDTHS:
            total = connection.execute(f"SELECT sum(data_points) FROM {name}".encode()).fetchone()
            assert total == (1500,), name
        assert connection.execute(AGGREGATED.format(name="satellite_stats").encode()).fetchall() == before


def test_what_is_late_by_nearly_the_retention_is_in_every_aggregate(any_database: str) -> None:
    config = settings.load({"ORBITSTREAM_CHUNK_INTERVAL": "1d", "ORBITSTREAM_RETENTION": "3d"})
    edition = migrate.migrate(config, any_database, lambda _: None)
    with migrate.connect(any_database, "test") as connection:

        def totals() -> list[int]:
            refresh(connection, edition)
            found = [connection.execute(f"SELECT sum(data_points) FROM {name}".encode()).fetchone() for name in WIDTHS]
            return [int(row[0]) for row in found if row is not None]

        connection.execute(INSERT.format(time="now() - n * interval '30 min'", count=138).encode())
        for _ in range(2):  # the server's scheduler may be in the middle of its first round
            before = totals()
        assert before == before[:1] * 3
        for hours in (54, 70.5):  # an hour within the retention no window reaches: points are about to be dropped there
            late = f"now() - interval '{hours} hours' + n * interval '1 s'"
            connection.execute(INSERT.format(time=late, count=100).encode())
        assert totals() == [before[0] + 200] * 3


def test_policies_follow_the_settings(any_database: str) -> None:
    config = settings.load({})
    edition = migrate.migrate(config, any_database, lambda _: None)
    migrate.migrate(replace(config, chunk_interval=7200.0, compress_after=600.0), any_database, lambda _: None)
    with migrate.connect(any_database, "test") as connection:
        if edition.timescaledb is None:
            views = connection.execute("SELECT count(*) FROM pg_views WHERE viewname LIKE 'satellite_stats%'")
            assert views.fetchone() == (3,)
            return
        interval = connection.execute(
            "SELECT time_interval FROM timescaledb_information.dimensions WHERE hypertable_name = 'telemetry'"
        )
        assert interval.fetchone() == (timedelta(hours=2),)
        jobs = connection.execute(
            "SELECT proc_name, count(*) FROM timescaledb_information.jobs WHERE job_id >= 1000 GROUP BY 1"
        ).fetchall()
        if edition.name == "apache":
            assert jobs == []
            return
        assert dict(jobs) == {
            "policy_refresh_continuous_aggregate": 3,
            "policy_compression": 4,
            "policy_retention": 4,
        }
        job = policies.job_of(connection, "telemetry", "policy_compression")
        after = connection.execute(
            "SELECT (config->>'compress_after')::interval FROM timescaledb_information.jobs WHERE job_id = %s", [job]
        )
        assert after.fetchone() == (timedelta(minutes=10),)
