"""What the contract promises beside survival: keys, durability, accounts, lanes of another database or layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import lanes, ring, rows
from engine.timestamps import now_us
from tests.load import finish, loads_on
from tests.service import POINT, Service, eventually

pytestmark = pytest.mark.crash


# -- idempotency keys


def test_a_keyed_request_sent_twice_is_stored_once(service: Service) -> None:
    service.start()
    for bad in ("", "x" * 201, "caf\xe9"):
        status, problem, _ = service.post("/telemetry", POINT, {"Idempotency-Key": bad})
        assert (status, problem["type"].rpartition(":")[2]) == (400, "bad-request")
    batch = [{**POINT, "satellite_id": f"S{number}"} for number in range(5)]
    headers = {"Idempotency-Key": "one"}
    for _ in range(3):
        assert service.post("/telemetry/batch", batch, headers)[:2] == (202, {"status": "accepted", "count": 5})
    for _ in range(2):
        assert service.post("/telemetry", batch[0], {"Idempotency-Key": "two"})[0] == 202
    assert service.post("/telemetry", batch[1], headers)[0] == 202
    eventually(
        lambda: (
            service.query("SELECT sum(deduplicated_points), sum(dead_lettered_points) FROM ingest_progress")
            == [(11, 1)]
        )
    )
    assert service.count() == 6
    assert service.query("SELECT reason, point ->> 'satellite_id' FROM dead_letter") == [("key-reused", "S1")]
    assert service.run("verify", "--deep").returncode == 0


# -- durability, verify, stopped lanes


def test_durability_is_echoed_and_refused_in_memory(service: Service, disk_dir: Path) -> None:
    missing = service.lane_dir / "missing"
    refused = service.run("serve", ORBITSTREAM_DURABILITY="disk", ORBITSTREAM_LANE_DIR=str(missing))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "ORBITSTREAM_DURABILITY=disk cannot be kept in" in refused.stderr
    assert not missing.exists()
    service.environment |= {"ORBITSTREAM_LANE_DIR": str(disk_dir / "lanes"), "ORBITSTREAM_DURABILITY": "disk"}
    service.start()
    assert service.post("/telemetry", POINT)[2]["orbitstream-durability"] == "disk"
    assert service.post("/telemetry/batch", [POINT])[2]["orbitstream-durability"] == "disk"
    eventually(lambda: service.count() == 2)


def test_verify_holds_under_load_and_sees_a_point_that_is_missing(service: Service) -> None:
    service.start()
    loads = loads_on(service)
    for _ in range(3):
        verified = service.run("verify", "--json")
        report = json.loads(verified.stdout)
        assert (verified.returncode, report["holds"], report["total"]["residual"]) == (0, True, 0)
    finish(service, loads)
    service.query("UPDATE ingest_progress SET committed_points = committed_points - 1 WHERE position > 0 RETURNING 1")
    for command in (["verify"], ["lanes", "list"], ["drain"]):
        elsewhere = service.run(*command, "--lane-dir", str(service.lane_dir / "elsewhere"))
        assert elsewhere.returncode == 2 and "no lane directory" in elsewhere.stderr
    shallow = service.run("verify")
    assert shallow.returncode == 1
    assert "residual 1" in shallow.stdout
    assert service.run("verify", "--deep").returncode == 1


def test_a_lane_behind_a_restored_database_is_resumed_by_command(service: Service) -> None:
    service.start(ORBITSTREAM_WORKERS="1")
    service.post("/telemetry", {**POINT, "satellite_id": "LOST-WITH-THE-RESTORE"})
    eventually(lambda: service.count() == 1)
    assert service.stop() == 0
    service.query("UPDATE ingest_progress SET position = 0, committed_points = 0 RETURNING 1")
    service.query("DELETE FROM telemetry RETURNING 1")
    service.start(healthy=False, ORBITSTREAM_WORKERS="1")
    assert service.post("/telemetry", {**POINT, "satellite_id": "SINCE"})[0] == 202
    eventually(lambda: "the database went back in time" in service.output(), 20)
    assert service.get("/health")[0] == 503
    assert service.count() == 0
    listed = json.loads(service.run("lanes", "list", "--json").stdout)
    resumed = service.run("lanes", "resume", listed[0]["uuid"])
    assert resumed.returncode == 0, resumed.stderr
    assert "1 points of it went with the restore" in resumed.stdout
    eventually(lambda: service.query("SELECT satellite_id FROM telemetry") == [("SINCE",)], 40)
    verified = service.run("verify", "--deep")
    assert verified.returncode == 0
    assert "+ forgone 1 + queued 0, residual 0" in verified.stdout
    eventually(lambda: service.get("/health")[0] == 200)
    metrics = service.get("/metrics")[1].decode()
    residuals = [line for line in metrics.splitlines() if "_residual_points{" in line]
    assert [line.split()[-1] for line in residuals] == ["0"]


def test_a_backlog_of_an_older_row_layout_is_drained_rightly(service: Service, lane_dir: Path) -> None:
    names = ("signal_strength_dbm", "battery_charge_percent", "storage_usage_mb")
    description = rows.layout(names)
    producer, lock = lanes.claim_producer(lane_dir, ring.MIN_CAPACITY, description)
    values = dict(zip(rows.CHANNEL_NAMES, (-70.0, 80.0, 1000.0), strict=False))  # by bit: signal, battery, storage
    payload = rows.pack_point(now_us(), b"OLD", values, False)
    producer.publish(payload, 1, now_us())
    lock.release()
    service.start()
    stored = "SELECT satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm FROM telemetry"
    eventually(lambda: service.query(stored) == [("OLD", 80.0, 1000.0, -70.0)])
    eventually(lambda: not producer.lane.path.exists() or service.run("lanes", "list").stdout.count("archived") == 1)
