"""The comparison of what was sent with what is stored: sets, in slices of time, nothing between two slices missed."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest

from engine import demo, migrate, settings
from simulator import sent_log

BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
NAMES = ("A", "B")
SECONDS = 40
Key = tuple[str, int]  # satellite, seconds since BEGIN
ALL: list[Key] = list(itertools.product(NAMES, range(SECONDS)))


def write_log(folder: Path, outcomes: dict[Key, str]) -> Path:
    """Write a sent log of two senders, a row group for every ten of a sender's points, and of one without any point."""
    silent = np.zeros(1, sent_log.ROW)
    silent["outcome"] = sent_log.SILENT
    spools = [str(folder / "silent.spool")]
    Path(spools[0]).write_bytes(silent.tobytes())
    for satellite, name in enumerate(NAMES):
        rows = np.zeros(SECONDS, sent_log.ROW)
        rows["satellite"] = satellite
        rows["time_us"] = int(BEGIN.timestamp()) * 1_000_000 + np.arange(SECONDS) * 1_000_000
        rows["outcome"] = [sent_log.OUTCOMES.index(outcomes.get((name, at), "accepted")) + 1 for at in range(SECONDS)]
        spool = folder / f"{name}.spool"
        spool.write_bytes(rows.tobytes())
        spools.append(str(spool))
    log = folder / "sent.parquet"
    sent_log.merge(spools, np.array(NAMES, "S1"), str(log), None)
    return log


@pytest.mark.parametrize("slice_points", [1, 15, 1_000_000])
def test_every_point_counts_in_one_slice(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_points: int
) -> None:
    monkeypatch.setattr(sent_log, "ROWS_A_GROUP", 10)
    monkeypatch.setattr(demo, "SLICE_POINTS", slice_points)
    log = write_log(tmp_path, {("B", 2): "refused", ("B", 9): "refused", ("B", 30): "unknown", ("B", 31): "unknown"})
    lost: list[Key] = [("A", 0), ("A", 10), ("B", 19), ("A", 39)]  # the first and the last of all, edges of groups
    stored = [key for key in ALL if key not in [*lost, ("B", 9), ("B", 30)]]
    stored += [("A", 20), ("A", 20), ("B", 31)]  # again; a refused one, ("B", 2), is stored as well
    stored += [("A", -1), ("C", 20), ("B", SECONDS)]  # never sent: before, within and after all that was
    migrate.migrate(settings.load({}), database, lambda message: None)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.cursor().executemany(
            "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb,"
            " signal_strength_dbm, received_at, is_anomaly) VALUES (%s, %s, 1, 1, 1, now(), false)",
            [(BEGIN + timedelta(seconds=at), name) for name, at in stored],
        )
        found = demo.compare(log, connection)
    assert (found.sent, found.accepted, found.committed) == (80, 76, len(stored))
    assert (found.lost, found.duplicated, found.invented) == (len(lost), 2, 4)
    assert not found.clean
    wrong = {line.split("Z: ")[0] for line in found.first_keys}
    keys = [*lost, ("A", 20), ("B", 31), ("B", 2), ("A", -1), ("C", 20), ("B", SECONDS)]
    times = {name: np.datetime64(int((BEGIN + timedelta(seconds=name[1])).timestamp()), "s") for name in keys}
    assert wrong == {f"{key[0]} {times[key].astype('datetime64[us]')}" for key in keys}


def test_an_empty_log_finds_all_that_is_stored(database: str, tmp_path: Path) -> None:
    log = tmp_path / "sent.parquet"
    sent_log.merge([], np.array(NAMES, "S1"), str(log), None)
    migrate.migrate(settings.load({}), database, lambda message: None)
    with psycopg.connect(database, autocommit=True) as connection:
        assert demo.compare(log, connection) == demo.Comparison()
        connection.execute(
            "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb,"
            " signal_strength_dbm, received_at, is_anomaly) VALUES (%s, 'A', 1, 1, 1, now(), false)",
            [BEGIN],
        )
        assert demo.compare(log, connection).invented == 1
