"""Export to Parquet and import: the same points come back, once, whatever is repeated, broken or interrupted."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pyarrow.parquet as pq
import pytest

from engine import archive, migrate, policies
from tests.service import Service

DAY, NEXT, THIRD = (datetime.now(UTC).date() - timedelta(days=ago) for ago in (3, 2, 1))
INSERT = (
    "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
    " received_at, is_anomaly, latitude) SELECT timestamptz '{DAY}T20:00Z' + n * interval '2.000001 s',"
    " 'SÄT,\"\n' || mod(n, 7), mod(n, 100) / 3.0, n, -0.1 * n, now(), mod(n, 9) = 0,"
    " CASE WHEN mod(n, 5) > 0 THEN -n / 7e5 END"
    " FROM generate_series(1, 12000) n"
).replace("{DAY}", str(DAY))
ROWS = "SELECT * FROM telemetry ORDER BY satellite_id, time"
LATEST = "SELECT * FROM satellite_latest ORDER BY satellite_id"
NEWEST = "SELECT DISTINCT ON (satellite_id) * FROM telemetry ORDER BY satellite_id, time DESC, received_at DESC"
KEEP = timedelta(days=30)


def test_what_was_exported_comes_back_once(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert service.run("migrate").returncode == 0
    service.query(INSERT + " RETURNING 1")
    before = service.query(ROWS)
    out = tmp_path / "export"
    exported = service.run("export", "--from", f"{DAY}", "--to", f"{THIRD}T00:00:00Z", "--out", str(out))
    assert (exported.returncode, exported.stdout) == (
        0, f"exported 12000 points to {out}, each file compared with the table\n",
    ), exported.stderr  # fmt: skip
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.parquet"))
    assert files == [f"day={DAY}/telemetry.parquet", f"day={NEXT}/telemetry.parquet"]
    assert sum(pq.ParquetFile(out / file).metadata.num_rows for file in files) == 12000
    again = service.run("export", "--from", f"{DAY}", "--to", f"{THIRD}", "--out", str(out))
    assert again.returncode == 1 and "holds an export already" in again.stderr

    beside = service.run("import", str(out))
    assert beside.returncode == 1 and "has points between" in beside.stderr
    service.query("DELETE FROM telemetry RETURNING 1")
    # Interrupted after three row groups, then repeated to its end, then once more.
    copied = []

    def copy_three(*arguments: object) -> None:
        if len(copied) == 3:
            raise KeyboardInterrupt
        copied.append(arguments)
        real(*arguments)  # type: ignore[arg-type]

    real = archive._copy
    with monkeypatch.context() as patch, migrate.connect(service.database, "test") as connection:
        patch.setattr(archive, "_copy", copy_three)
        with pytest.raises(KeyboardInterrupt):
            archive.restore(connection, out, lambda _: None, KEEP)
    assert 0 < service.count() < 12000
    first, second = service.run("import", str(out)), service.run("import", str(out))
    assert first.returncode == 0, first.stderr
    assert second.stdout == "imported 0 points, 12000 were imported before\n"
    assert service.query(ROWS) == before
    assert service.query(LATEST) == service.query(NEWEST)
    service.query("DELETE FROM telemetry WHERE time < '{NEXT}' RETURNING 1".replace("{NEXT}", str(NEXT)))
    third = service.run("import", str(out))
    assert f"day={DAY}/telemetry.parquet: 0 points stored" in third.stderr and third.stderr.count("--again") == 1
    assert service.run("import", "--again", str(out)).returncode == 0
    assert service.query(ROWS) == before


def test_points_that_move_while_they_are_read_are_exported(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.run("migrate").returncode == 0
    begin, end = (datetime(day.year, day.month, day.day, tzinfo=UTC) for day in (DAY, THIRD))
    with (
        migrate.connect(service.database, "reader") as connection,
        migrate.connect(service.database, "other") as other,
    ):
        other.execute(INSERT.encode())
        full = migrate.find_edition(other).name == "timescale"
        if full:  # chunks with a part in the row store, which the policy moves between the two days
            other.execute("SELECT compress_chunk(chunk) FROM show_chunks('telemetry') AS chunk")
            other.execute(INSERT.replace("mod(n, 7)", "mod(n, 5) + 100").encode())

        def compress(_: str) -> None:
            if full:
                other.execute(f"CALL run_job({policies.job_of(other, 'telemetry', 'policy_compression')})".encode())

        rows = 24000 if full else 12000
        assert archive.export(connection, begin, end, tmp_path / "moved", compress) == rows
        # No server is here on which one statement misses rows: a reader that returns none stands in for it.
        real, calls = archive._read_slice, []

        def first_time_none(*arguments: object) -> object:
            calls.append(arguments)
            return iter(()) if len(calls) == 1 else real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(archive, "_read_slice", first_time_none)
        with other.transaction():
            other.execute("DELETE FROM telemetry WHERE time >= %s", [begin + timedelta(hours=21)])
            left = other.execute("SELECT count(*) FROM telemetry").fetchone()
        hours = archive.export(connection, begin + timedelta(hours=20), end, tmp_path / "again", lambda _: None)
        assert left == (hours,) and hours > 0 and len(calls) > 1
        monkeypatch.setattr(archive, "_read_slice", lambda *_: iter(()))
        with pytest.raises(archive.ArchiveError, match="points went while they were read"):
            archive.export(connection, begin, end, tmp_path / "never", lambda _: None)
        with pytest.raises(archive.ArchiveError, match="of an export that did not end"):
            archive.export(connection, begin, end, tmp_path / "never", lambda _: None)


def test_points_that_would_be_dropped_again_are_refused(service: Service, tmp_path: Path) -> None:
    assert service.run("migrate").returncode == 0
    service.query(INSERT.replace("12000", "500") + " RETURNING 1")
    before, out = service.query(ROWS), tmp_path / "export"
    assert service.run("export", "--from", f"{DAY}", "--to", f"{NEXT}", "--out", str(out)).returncode == 0
    service.query("DELETE FROM telemetry RETURNING 1")
    assert service.run("migrate", ORBITSTREAM_RETENTION="1d").returncode == 0
    refused = service.run("import", str(out), ORBITSTREAM_RETENTION="1d")
    assert refused.returncode == 1, refused
    assert "older than 1 day, 0:00:00: set ORBITSTREAM_RETENTION to " in refused.stderr
    assert service.run("migrate").returncode == 0
    assert service.run("import", str(out)).returncode == 0
    service.query("DELETE FROM telemetry RETURNING 1")
    gone = service.run("import", str(out))
    assert "500 were imported before, and are there no more: --again stores them anew" in gone.stderr
    assert service.run("import", "--again", str(out)).returncode == 0
    assert service.query(ROWS) == before
    assert service.run("verify", "--deep").returncode == 0


def test_a_file_that_changed_is_refused(service: Service, tmp_path: Path) -> None:
    assert service.run("migrate").returncode == 0
    service.query(INSERT.replace("12000", "50") + " RETURNING 1")
    out = tmp_path / "export"
    assert service.run("export", "--from", f"{DAY}", "--to", f"{NEXT}", "--out", str(out)).returncode == 0
    service.query("DELETE FROM telemetry RETURNING 1")
    (path,) = out.rglob("*.parquet")
    table = pq.read_table(path)
    swapped = table.set_column(4, table.schema.field(4), table[4].take(list(reversed(range(len(table))))))
    pq.write_table(swapped, path)
    backwards = service.run("export", "--from", f"{NEXT}", "--to", f"{DAY}", "--out", str(tmp_path / "none"))
    assert backwards.returncode == 1 and "is not before --to" in backwards.stderr
    refused = service.run("import", str(out))
    assert refused.returncode == 1 and "is not what was exported" in refused.stderr
    with psycopg.connect(service.database) as connection:
        for text in ("", "{}", "[]", json.dumps({"export": "no uuid", "files": []}), '{"export": 1}'):
            (out / archive.MANIFEST).write_text(text)
            with pytest.raises(archive.ArchiveError, match="holds no finished export"):
                archive.restore(connection, out, print, KEEP)
        assert connection.execute("SELECT count(*) FROM telemetry").fetchone() == (0,)
