"""`orbitstream capacity`: a result that holds together, stored where it should be, and no trace elsewhere."""

from __future__ import annotations

import json

from tests.service import Service


def test_capacity_is_measured_beside_the_data_and_stored(service: Service) -> None:
    assert service.run("migrate").returncode == 0
    done = service.run(
        "capacity", "--json", "--seconds", "0.5", "--trials", "0", "--satellites", "100", "--bound", "5000"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["knee_points_per_second"] <= 1.5 * result["drain_points_per_second"]
    assert result["copy_points_per_second"] > 0 and result["lane_points"] > 500_000
    assert all(result["cpu_us_per_point"][stage] > 0 for stage in ("edge", "writer", "database", "simulator"))
    assert result["predicted"]["4"]["points_per_second"] > 3 * result["predicted"]["1"]["points_per_second"]
    assert any(trial["offered"] == result["knee_points_per_second"] for trial in result["trials"])
    ((knee, report),) = service.query("SELECT knee_points_per_second, report FROM capacity")
    assert knee == result["knee_points_per_second"] and report == result
    assert service.count() == 0, "the load went into the database that serves"
    assert service.query("SELECT datname FROM pg_database WHERE starts_with(datname, 'orbitstream_trial')") == []
    assert list(service.lane_dir.glob("lane-*")) == []
