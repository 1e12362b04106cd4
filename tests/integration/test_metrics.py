"""What the engine says of itself: /metrics, engine_stats and the lanes' words tell one story."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.test_service import refuse_connections
from tests.service import POINT, Service, eventually, kill


def scrape(service: Service) -> dict[str, Any]:
    """Return the families of /metrics by name, as Prometheus' own client reads them."""
    status, body, headers = service.request("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    text = body.decode() if isinstance(body, bytes) else body
    return {family.name.removeprefix("orbitstream_"): family for family in text_string_to_metric_families(text)}


def total(service: Service, name: str) -> float:
    family = scrape(service)[name]
    return sum(sample.value for sample in family.samples if sample.name.endswith((name, "_total")))


@pytest.fixture
def running(service: Service) -> Iterator[Service]:
    yield service.start(ORBITSTREAM_WORKERS="2")


def test_metrics_and_stats_count_every_point_once_and_outlive_a_worker(running: Service) -> None:
    for _ in range(4):
        assert running.post("/telemetry/batch", [POINT] * 25)[0] == 202
    assert running.post("/telemetry", POINT)[0] == 202
    eventually(lambda: total(running, "committed_points") == 101, what="every point committed")
    assert {name: total(running, name) for name in ("accepted_points", "answered_points", "settled_points")} == {
        "accepted_points": 101, "answered_points": 101, "settled_points": 101,
    }  # fmt: skip
    assert (total(running, "residual_points"), total(running, "accepted_requests")) == (0, 5)
    before = set(running.workers())
    kill([min(before)], signal.SIGKILL)
    eventually(lambda: len(set(running.workers()) - before) == 1, what="another worker")
    assert total(running, "accepted_points") == 101
    eventually(lambda: stored(running) == (101, 101, 0), what="the stats of the last second")
    assert running.query("SELECT count(*) FROM engine_stats WHERE process = 'writer' AND arrival_p99_ms > 0")[0][0] > 0
    assert running.query("SELECT DISTINCT process, name FROM engine_stats ORDER BY 2") == [
        ("worker", "lane-0000"), ("worker", "lane-0001"), ("writer", "writer-0"),
    ]  # fmt: skip


def stored(service: Service) -> tuple[int, int, int]:
    """Return accepted, committed and residual points of the newest moment in engine_stats."""
    [row] = service.query(
        "SELECT sum(accepted)::int, sum(committed)::int, sum(residual)::int FROM engine_stats"
        " WHERE time = (SELECT max(time) FROM engine_stats)"
    )
    return row


def test_a_histogram_adds_up(running: Service) -> None:
    assert running.post("/telemetry/batch", [POINT] * 50)[0] == 202
    eventually(lambda: total(running, "committed_points") == 50)
    samples = scrape(running)["commit_latency_seconds"].samples
    buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
    [count] = [sample.value for sample in samples if sample.name.endswith("_count")]
    [seconds] = [sample.value for sample in samples if sample.name.endswith("_sum")]
    assert buckets == sorted(buckets) and buckets[-1] == count == 50
    assert 0 < seconds < 50 * 5


def test_with_the_database_away_refused_points_are_counted(service: Service, server: str) -> None:
    service.start(ORBITSTREAM_LANE_BYTES="64KiB", ORBITSTREAM_WORKERS="1")
    name = str(psycopg.conninfo.conninfo_to_dict(service.database)["dbname"])
    refuse_connections(server, name, refuse=True)
    accepted = refused = 0
    while refused < 60:
        if service.post("/telemetry/batch", [POINT] * 20)[0] == 503:
            refused += 20
        else:
            accepted += 20
    assert (total(service, "accepted_points"), total(service, "refused_points")) == (accepted, refused)
    assert total(service, "queue_points") == accepted
    eventually(lambda: total(service, "database_up") == 0)
    refuse_connections(server, name, refuse=False)
    eventually(lambda: total(service, "committed_points") == accepted, 20)


def test_stats_that_the_database_refuses_do_not_hold_up_points(service: Service) -> None:
    service.start()
    with psycopg.connect(service.database, autocommit=True) as connection:
        connection.execute("ALTER TABLE engine_stats RENAME TO engine_stats_gone")
    eventually(lambda: "no stats and episodes for 60 s" in service.output())
    assert service.post("/telemetry/batch", [POINT] * 10)[0] == 202
    eventually(lambda: service.count() == 10)
    assert service.stop() == 0


def test_a_writer_that_is_no_longer_wanted_is_not_told_of(service: Service) -> None:
    service.start(ORBITSTREAM_WRITERS="2")
    assert service.stop() == 0
    service.start(ORBITSTREAM_WRITERS="1")
    assert [sample.labels["writer"] for sample in scrape(service)["writer_up"].samples] == ["writer-0"]
