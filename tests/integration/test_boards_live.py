"""The boards over a service that runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime

from bench.boards import Boards, all_queries, opened
from engine import maintenance, migrate, samples
from tests.conftest import on_each_edition
from tests.service import POINT, Service, eventually

NOT_NOW = {"capacity / 5 Seconds until full", "capacity / 52 Disk full in", "anomalies / 3 How long"}
"""One row, whose value there may be none: no lane fills, no disk, no episode is over."""


@contextmanager
def load(service: Service) -> Iterator[None]:
    """Run the simulator: 100 satellites, 10 readings a second of each, all channels, many anomalies."""
    simulator = subprocess.Popen(
        [sys.executable, "-P", "-m", "simulator", "--api-url", f"http://127.0.0.1:{service.port}", "--quiet",
         "--satellites", "100", "--rate", "10", "--batch", "100", "--duration", "300", "--processes", "1",
         "--anomaly-rate", "0.05", "--channels", "all"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        simulator.terminate()
        simulator.wait(20)


def look(service: Service) -> AbstractContextManager[Boards]:
    """Open the boards as Grafana would ask them at this moment."""
    with migrate.connect(service.database, "test") as owner:
        edition = migrate.find_edition(owner)
    return opened(service.database, edition, datetime.now(UTC))


def sample_two_minutes(url: str) -> None:
    """Have maintenance sample as it does each minute, with the samples so far a minute older each time."""
    with migrate.connect(url, "test") as owner:
        edition = migrate.find_edition(owner)
        owner.execute("ANALYZE telemetry")
        for _ in range(2):
            owner.execute("UPDATE storage_stats SET sampled_at = sampled_at - interval '1 minute'")
            for table in ("fleet_stats", "database_stats"):
                owner.execute(f"UPDATE {table} SET time = time - interval '1 minute'".encode())
            maintenance.sample_storage(owner, edition)
            samples.take(owner)


@on_each_edition
def test_every_panel_has_rows_while_service_and_simulator_run(service: Service) -> None:
    service.start()
    with load(service):
        [(satellite,)] = eventually(lambda: service.query("SELECT satellite_id FROM anomaly_event LIMIT 1"), 20, "one")
        # The fleet's anomalies come and go: this one lasts.
        assert service.post("/telemetry", POINT | {"battery_charge_percent": 5})[0] == 202
        lasting = "SELECT 1 FROM anomaly_event WHERE satellite_id = %s AND cleared_at IS NULL"
        eventually(lambda: service.query(lasting, POINT["satellite_id"]), 20, "an episode that lasts")
        eventually(lambda: service.query("SELECT max(time) - min(time) > '5 s' FROM engine_stats") == [(True,)], 20)
        sample_two_minutes(service.database)
        silent = []
        with look(service) as boards:
            for query in all_queries():
                _, rows = boards.ask(query.sql, boards.view(interval=query.shortest, satellites=(satellite,)))
                if not any(value is not None for row in rows for value in row) and query.name not in NOT_NOW:
                    silent.append(query.name)
    # Background jobs are the policies, which a lesser license does not have.
    assert silent == ([] if boards.edition.name == "timescale" else ["database / 22 Background jobs"])
