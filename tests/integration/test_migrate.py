"""Migrations on every edition: fresh, again, checked, failed, and two at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from engine import migrate, policies, settings
from engine.migrate import MigrationError
from tests.conftest import on_each_edition
from tests.service import Service, eventually


@pytest.fixture
def command(any_database: str, tmp_path: Path) -> Service:
    return Service(any_database, tmp_path)


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


def test_fresh_again_and_checked(command: Service) -> None:
    first = command.run("migrate", "--check")
    assert first.returncode == 1
    assert "pending 0001 telemetry" in first.stdout
    fresh = command.run("migrate")
    assert fresh.returncode == 0, fresh.stderr
    assert "applied 0001 telemetry" in fresh.stderr
    again = command.run("migrate")
    assert again.returncode == 0
    assert "applied" not in again.stderr
    checked = command.run("migrate", "--check")
    assert checked.returncode == 0
    assert "up to date" in checked.stdout
    with psycopg.connect(command.database, autocommit=True) as connection:
        edition = migrate.find_edition(connection)
    assert "\n".join((str(edition), *edition.offers)) in checked.stdout
    assert ("lacks: " in checked.stdout) == (edition.name != "timescale")
    roles = rows(command.database, "SELECT rolname FROM pg_roles WHERE rolname LIKE 'orbitstream\\_%' ORDER BY 1")
    assert {"orbitstream_ingest", "orbitstream_owner", "orbitstream_read"} <= {role for (role,) in roles}


def test_a_hypertable_has_chunks_of_the_set_interval(command: Service) -> None:
    assert command.run("migrate", ORBITSTREAM_CHUNK_INTERVAL="2h").returncode == 0
    with psycopg.connect(command.database, autocommit=True) as connection:
        edition = migrate.find_edition(connection)
        connection.execute(
            "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
            " received_at, is_anomaly) SELECT '2026-01-01T00:00Z'::timestamptz + n * interval '1 h', 'A', 1, 1, 1,"
            " now(), false FROM generate_series(0, 3) n"
        )
        if edition.name == "plain":
            assert connection.execute("SELECT count(*) FROM telemetry").fetchone() == (4,)
        else:
            chunks = connection.execute(
                "SELECT count(*), max(range_end - range_start)::text FROM timescaledb_information.chunks"
            )
            assert chunks.fetchone() == (2, "02:00:00")
        indexes = connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'telemetry'").fetchall()
    assert {"telemetry_satellite_time", "telemetry_anomaly"} <= {name for (name,) in indexes}


def test_a_migration_that_fails_leaves_the_version_before_it(
    any_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = migrate.migrations()
    broken = migrate.Migration(9999, "broken", "any", "CREATE TABLE half (a int); SELECT 1 / 0;")
    monkeypatch.setattr(migrate, "migrations", lambda: [*real, broken])
    config = settings.load({})
    with pytest.raises(MigrationError, match="9999 broken failed and was undone: division by zero"):
        migrate.migrate(config, any_database, lambda _: None)
    assert rows(any_database, "SELECT to_regclass('half')") == [(None,)]
    with migrate.connect(any_database, "test") as connection:
        edition = migrate.find_edition(connection)
    last = max(migration.version for migration in real if edition.fits(migration.edition))
    assert rows(any_database, "SELECT max(version) FROM orbitstream_migration") == [(last,)]
    monkeypatch.setattr(migrate, "migrations", lambda: real)
    migrate.migrate(config, any_database, lambda _: None)


def test_a_changed_file_and_a_newer_database_are_told(command: Service) -> None:
    assert command.run("migrate").returncode == 0
    rows(command.database, "UPDATE orbitstream_migration SET checksum = 'x' WHERE version = 1 RETURNING 1")
    changed = command.run("migrate")
    assert changed.returncode == 1
    last = changed.stderr.splitlines()[-1]
    assert last.startswith("orbitstream: migration 0001 telemetry is in the database in another form")
    rows(command.database, "UPDATE orbitstream_migration SET version = 9999 WHERE version = 1 RETURNING 1")
    newer = command.run("migrate", "--check")
    assert newer.returncode == 1
    assert "install the newer OrbitStream" in newer.stderr


@on_each_edition
def test_two_at_once_apply_each_migration_once(database: str) -> None:
    command = [sys.executable, "-P", "-m", "engine", "migrate"]
    given = {**os.environ, "DATABASE_URL": database}
    both = [subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=60)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count("applied 0001 telemetry") == 1


def test_who_waits_for_the_database_waits_for_anothers_migration_too(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with migrate.connect(service.database, "test") as other:
        other.execute("SELECT pg_advisory_lock(%s)", [migrate.ADVISORY_LOCK])
        monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 1)
        with pytest.raises(migrate.MigrationBusyError, match="wait for it"):
            migrate.migrate(settings.load({}), service.database, lambda _: None)
        waiting = subprocess.Popen(
            [sys.executable, "-P", "-c", "import sys; from engine import migrate; migrate.LOCK_TIMEOUT_S = 1;"
             "from engine.__main__ import main; sys.exit(main(['migrate', '--wait']))"],
            env={**os.environ, "DATABASE_URL": service.database}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert waiting.stderr is not None
        eventually(lambda: "another migration has been running" in waiting.stderr.readline(), 20)
    said = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 0 and "applied 0001 telemetry" in said


def test_an_unreachable_database_is_one_line(tmp_path: Path) -> None:
    ended = Service("postgresql://nobody@127.0.0.1:1/none", tmp_path).run("migrate")
    assert ended.returncode == 1
    assert ended.stderr.startswith("orbitstream: cannot reach the database: ")
    assert ended.stderr.count("\n") == 1


@on_each_edition
def test_old_points_are_dropped(service: Service) -> None:
    service.start(ORBITSTREAM_RETENTION="1h")
    insert = (
        "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
        " received_at, is_anomaly) SELECT now() - age, 'A', 1, 1, 1, now(), false"
        " FROM unnest(ARRAY[interval '1 min', interval '5 h', interval '2 d']) age RETURNING 1"
    )
    assert service.stop() == 0
    service.query(insert)
    service.start(ORBITSTREAM_RETENTION="1h")
    with migrate.connect(service.database, "test") as connection:
        by_policy = migrate.find_edition(connection).name == "timescale"
        if by_policy:
            job = policies.job_of(connection, "telemetry", "policy_retention")
            connection.execute(f"CALL run_job({job})".encode())
    eventually(lambda: service.count() == 1)
    assert ("past retention" in service.output()) != by_policy
