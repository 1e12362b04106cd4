"""Episodes as an operator finds them in the database, whatever becomes of the writers meanwhile."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from engine import migrate, settings
from engine.episodes import Episode
from engine.limits import CRITICAL
from engine.recorder import Recorder
from tests.service import POINT, Service, eventually, kill

BEGUN = datetime.now(UTC) - timedelta(minutes=10)


def post(service: Service, second: int, battery: float, name: str = "A") -> None:
    moment = (BEGUN + timedelta(seconds=second)).isoformat()
    point = {**POINT, "satellite_id": name, "timestamp": moment, "battery_charge_percent": battery}
    assert service.post("/telemetry", point)[0] == 202


def episodes(service: Service) -> list[tuple[object, ...]]:
    return service.query(
        "SELECT satellite_id, severity, kind, round(extract(epoch FROM onset - %s))::int,"
        " round(extract(epoch FROM cleared_at - %s))::int FROM anomaly_event ORDER BY id",
        BEGUN, BEGUN,
    )  # fmt: skip


@pytest.mark.parametrize("writers", ["1", "2"])
def test_an_episode_is_one_row_over_workers_writers_and_their_death(
    service: Service, tmp_path: Path, writers: str
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text("[channels.battery_charge_percent]\nwarning_below = 20\ncritical_rate = 10\n")
    service.start(ORBITSTREAM_LIMITS_FILE=str(limits), ORBITSTREAM_WRITERS=writers, ORBITSTREAM_WORKERS="1")
    for second, battery in ((1, 20.5), (2, 15), (3, 9), (4, 4), (5, 8)):
        post(service, second, battery)
    eventually(lambda: episodes(service) == [("A", "critical", "below", 2, None)], what="the episode under way")
    before = service.writers()
    kill(before)
    eventually(lambda: len(service.writers()) == int(writers) and not set(service.writers()) & set(before))
    post(service, 1, 3)  # late: an anomaly of the past, not of now
    post(service, 20, 21)
    over = [("A", "critical", "below", 2, 20)]
    eventually(lambda: episodes(service) == over, what="the end of the episode")
    assert service.query("SELECT peak <= 9 FROM anomaly_event") == [(True,)]
    for second, battery in ((21, 22), (22, 90), (23, 22)):
        post(service, second, battery)
    eventually(lambda: episodes(service) == [*over, ("A", "critical", "rate", 22, 23)], what="the spike")
    assert service.query("SELECT battery_charge_percent::int FROM telemetry WHERE is_anomaly ORDER BY time, 1") == [
        (3,), (9,), (4,), (8,), (90,),
    ]  # fmt: skip
    assert "anomaly satellite_id=A battery_charge_percent=90 severity=critical rate=10" in service.output()
    assert service.stop() == 0


def test_an_episode_whose_limit_is_gone_ends_at_its_peak(service: Service, tmp_path: Path) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text("[channels.temperature_c]\ncritical_above = 40\n")
    service.start(ORBITSTREAM_LIMITS_FILE=str(limits))
    for second, temperature in ((1, 41), (2, 45), (3, 43)):
        moment = (BEGUN + timedelta(seconds=second)).isoformat()
        point = {**POINT, "timestamp": moment, "temperature_c": temperature}
        assert service.post("/telemetry", point)[0] == 202
    post(service, 4, 3)
    eventually(lambda: len(episodes(service)) == 2, what="an episode of each channel")
    assert service.stop() == 0
    service.start()
    ended = "SELECT channel, cleared_at = peak_at FROM anomaly_event WHERE cleared_at IS NOT NULL"
    eventually(lambda: service.query(ended) == [("temperature_c", True)], what="the end of one episode only")


def test_what_a_writer_saw_end_is_not_taken_up_again(database: str, tmp_path: Path) -> None:
    migrate.migrate(settings.load({}), database, lambda message: None)
    recorder = Recorder(tmp_path, "node", stats=False)
    episode = Episode(b"A", "battery_charge_percent", "below", CRITICAL, 1_000_000, 5.0, 1_000_000, 10.0)
    with psycopg.connect(database, autocommit=True) as connection:
        recorder.add([episode])
        recorder.tick(10.0, connection)
        (lasting,) = recorder.lasting(connection)
        assert (lasting.satellite, lasting.onset) == (b"A", 1_000_000)
        episode.cleared = 2_000_000
        recorder.add([episode])  # to be told to the database, which still has it open, with the next tick
        assert recorder.lasting(connection) == []
        recorder.tick(20.0, connection)
        assert recorder.lasting(connection) == []
        assert connection.execute("SELECT count(*) FROM anomaly_event").fetchall() == [(1,)]
