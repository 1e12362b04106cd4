"""Episodes as an operator finds them in the database, whatever becomes of the writers meanwhile."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

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
