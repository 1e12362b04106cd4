"""The service as an operator meets it: settings, start, stop, signals, and what each leaves in the table."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from engine import heartbeat, lanes, ring, rows
from tests.conftest import on_each_edition
from tests.load import assert_exactly_once, loads_on
from tests.service import POINT, Service, children, eventually, is_gone

# -- the plan's own lines


@on_each_edition
def test_an_anomaly_is_stored_flagged_and_logged(service: Service) -> None:
    service.start()
    seconds = []
    for number in (1, 2, 3):
        begun = time.monotonic()
        assert service.post("/telemetry", {**POINT, "battery_charge_percent": 5})[0] == 202
        eventually(lambda number=number: service.count() == number)
        seconds.append(time.monotonic() - begun)
    assert min(seconds) < 1.0  # a busy machine may be late once
    assert service.query("SELECT is_anomaly FROM telemetry") == [(True,)] * 3
    eventually(lambda: "WARNING writer-0: anomaly satellite_id=TEST-01 battery_charge_percent=5" in service.output())
    eventually(lambda: re.search("INFO writer-0: inserted [123] rows in [123] flushes", service.output()))


def test_a_threshold_does_what_it_says(service: Service) -> None:
    service.start(ANOMALY_THRESHOLD_BATTERY="50", ANOMALY_THRESHOLD_STORAGE="500", ANOMALY_THRESHOLD_SIGNAL="-60")
    limits = {"battery_charge_percent": (50, 49), "storage_usage_mb": (500, 501), "signal_strength_dbm": (-60, -61)}
    normal = {name: value for name, (value, _) in limits.items()}
    assert service.post("/telemetry", {**POINT, **normal, "satellite_id": "normal"})[0] == 202
    for name, (_, beyond) in limits.items():
        assert service.post("/telemetry", {**POINT, **normal, name: beyond, "satellite_id": name})[0] == 202
    eventually(lambda: service.count() == 4)
    found = dict(service.query("SELECT satellite_id, is_anomaly FROM telemetry"))
    assert found == {"normal": False, **dict.fromkeys(limits, True)}


def test_max_connections_bounds_what_the_service_opens(service: Service) -> None:
    service.start(MAX_CONNECTIONS="3", ORBITSTREAM_WRITERS="8")
    most = 0
    for _ in range(50):
        service.post("/telemetry/batch", [POINT] * 10)
        most = max(
            most,
            service.query("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'orbitstream-%%'")[0][0],
        )
    assert 2 <= most <= 3
    assert len(service.writers()) == 2


def test_a_flush_waits_for_size_or_age(service: Service) -> None:
    service.start(BATCH_SIZE="100", BATCH_TIMEOUT="30s", ORBITSTREAM_WORKERS="1")
    service.post("/telemetry/batch", [POINT] * 99)
    eventually(lambda: service.get("/health")[1]["queue"]["points"] == 99)
    assert service.count() == 0
    service.post("/telemetry", POINT)
    eventually(lambda: service.count() == 100, 5)


# -- starting


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"BATCH_SIZE": "0"}, "BATCH_SIZE"),
        ({"DATABASE_URL": "nonsense"}, "DATABASE_URL"),
        ({"ORBITSTREAM_LANE_DIR": "/proc/lanes"}, "/proc/lanes"),
        ({"ORBITSTREAM_HOST": "0.0.0.0"}, "ORBITSTREAM_HOST"),
        ({"ORBITSTREAM_LIMITS_FILE": "/nowhere.toml"}, "ORBITSTREAM_LIMITS_FILE"),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_line(service: Service, environment: dict[str, str], names: str) -> None:
    ended = service.run("serve", **environment)
    assert ended.returncode == 2
    assert names in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("orbitstream: ")


def test_a_taken_port_and_a_taken_lane_directory_are_told(service: Service, lane_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = service.run("serve", PORT=str(taken.getsockname()[1]))
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
        assert "PORT=" in ended.stderr
    service.start()
    second = service.run("serve")
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"served by process {service.pid}" in second.stderr
    third = service.run("write")
    assert third.returncode == 2


def test_gunicorn_alone_tells_a_bad_setting_too(service: Service) -> None:
    configuration = Path(__file__).resolve().parents[2] / "deploy" / "gunicorn.conf.py"
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "gunicorn", "-c", str(configuration), "engine.app:create_app()"],
        env={**os.environ, **service.environment, "BATCH_SIZE": "none"},
        capture_output=True,
        text=True,
        timeout=30,
        cwd="/",
    )
    assert ended.returncode == 2
    assert ended.stderr == "orbitstream: BATCH_SIZE='none' must be a whole number from 1 to 1000000\n"


def test_gunicorn_and_write_do_the_same_job_as_serve(service: Service, lane_dir: Path) -> None:
    configuration = Path(__file__).resolve().parents[2] / "deploy" / "gunicorn.conf.py"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    web = service.spawn("-m", "gunicorn", "-c", str(configuration), "engine.app:create_app()", PORT=str(port))
    writer = service.spawn("-m", "engine", "write")
    try:
        service.port = port
        eventually(lambda: service.get("/health")[0] == 200, 20)
        for number in range(20):
            assert service.post("/telemetry", {**POINT, "satellite_id": f"S{number}"})[0] == 202
        eventually(lambda: service.count() == 20)
        web.send_signal(signal.SIGTERM)
        assert web.wait(30) == 0
        writer.send_signal(signal.SIGINT)
        assert writer.wait(30) == 0
    finally:
        for process in (web, writer):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


# -- stopping


@on_each_edition
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_loses_nothing_and_exits_0(service: Service, signum: int) -> None:
    service.start()
    loads = loads_on(service)
    everything = service.everything()
    assert service.stop(signum) == 0
    for load in loads:
        load.stop()
    assert_exactly_once(service, loads)
    for pid in everything:
        eventually(lambda pid=pid: is_gone(pid), 5)
    assert "the lanes are empty" in service.output()
    assert "Traceback" not in service.output()


def test_a_stop_flushes_what_still_waits(service: Service) -> None:
    service.start(BATCH_SIZE="1000000", BATCH_TIMEOUT="60s")
    posted = 0
    while service.get("/health")[1]["queue"]["points"] < 10:
        assert service.post("/telemetry", POINT)[0] == 202
        posted += 1
    assert service.count() <= posted - 10
    assert service.stop() == 0
    assert service.count() == posted


def test_sighup_renews_the_workers_without_a_loss(service: Service) -> None:
    service.start()
    loads = loads_on(service)
    before = set(service.workers())
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(service.workers()) == 2 and not before & set(service.workers()), 30)
    marks = [len(load.accepted) for load in loads]
    eventually(lambda: all(len(load.accepted) > mark for load, mark in zip(loads, marks, strict=True)))
    for load in loads:
        load.stop()
    assert service.stop() == 0
    assert_exactly_once(service, loads)


def test_a_stop_in_the_middle_of_the_start_leaves_nothing_running(service: Service) -> None:
    for _ in range(3):
        process = service.spawn("-m", "engine", "serve")
        eventually(lambda process=process: children(process.pid) or process.poll() is not None, 20)
        everything = [process.pid, *children(process.pid)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        for pid in everything:
            eventually(lambda pid=pid: is_gone(pid), 5)


# -- the database away


def refuse_connections(server: str, database: str, *, refuse: bool) -> None:
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS {str(not refuse).lower()}".encode())
        if refuse:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])


@on_each_edition
def test_the_service_starts_and_accepts_with_the_database_away(service: Service, server: str) -> None:
    name = str(psycopg.conninfo.conninfo_to_dict(service.database)["dbname"])
    refuse_connections(server, name, refuse=True)
    service.start(healthy=False)
    assert service.post("/telemetry/batch", [POINT] * 10)[0] == 202
    status, report, _ = service.get("/health")
    assert (status, report["status"], report["queue"]["points"]) == (503, "degraded", 10)
    refuse_connections(server, name, refuse=False)
    service.await_healthy()
    eventually(lambda: service.count() == 10)


@on_each_edition
def test_a_full_lane_is_503_with_retry_after_and_drains_when_the_database_returns(
    service: Service, server: str
) -> None:
    name = str(psycopg.conninfo.conninfo_to_dict(service.database)["dbname"])
    service.start(ORBITSTREAM_LANE_BYTES="64KiB", ORBITSTREAM_WORKERS="1")
    refuse_connections(server, name, refuse=True)
    accepted = 0
    for _ in range(1000):
        status, problem, headers = service.post("/telemetry/batch", [POINT] * 20)
        if status == 503:
            break
        accepted += 20
    assert status == 503
    assert problem["type"].rpartition(":")[2] == "lane-full"
    assert (problem["retryable"], problem["accepted"]) == (True, 0)
    assert int(headers["retry-after"]) >= 1
    assert service.get("/health/ready")[0] == 503
    eventually(lambda: max(beat.failures for beat in heartbeat.read_all(service.lane_dir)) >= 4)
    report = service.get("/health")[1]
    assert (report["database"], report["stopped_lanes"]) == ("away", 0)
    refuse_connections(server, name, refuse=False)
    eventually(lambda: service.count() == accepted, 30)
    eventually(lambda: service.get("/health/ready")[0] == 200)
    assert service.post("/telemetry", POINT)[0] == 202


def test_points_stay_in_the_lanes_over_a_stop_without_the_database(service: Service, server: str) -> None:
    name = str(psycopg.conninfo.conninfo_to_dict(service.database)["dbname"])
    service.start(ORBITSTREAM_DRAIN_TIMEOUT="1s")
    refuse_connections(server, name, refuse=True)
    assert service.post("/telemetry/batch", [POINT] * 7)[0] == 202
    assert service.stop() == 0
    assert f"7 points stay in the lanes in {service.lane_dir}" in service.output()
    refuse_connections(server, name, refuse=False)
    drained = service.run("drain")
    assert (drained.returncode, drained.stdout) == (0, f"stored 7 points, 0 left in {service.lane_dir}\n")
    assert service.count() == 7
    assert service.run("drain").stdout.startswith("stored 0 points")


def test_a_status_file_that_has_not_got_its_size_stops_nobody(service: Service) -> None:
    """As a tick of the supervisor finds it while the writer makes it, or as a writer killed just then leaves it."""
    heartbeat.beat_file(service.lane_dir, 0).touch(0o600)
    service.start()
    assert service.post("/telemetry", POINT)[0] == 202
    assert service.stop() == 0
    assert service.count() == 1


def test_a_writer_without_a_status_file_says_so_and_drains_once_it_has_one(service: Service) -> None:
    in_its_place = heartbeat.beat_file(service.lane_dir, 0)
    in_its_place.mkdir()
    service.start(healthy=False)
    assert service.post("/telemetry", POINT)[0] == 202
    eventually(lambda: f"{in_its_place} cannot be written: Is a directory" in service.output())
    in_its_place.rmdir()
    eventually(lambda: service.count() == 1, 20)
    assert service.stop() == 0
    assert "Traceback" not in service.output()


def test_a_damaged_record_is_told_and_those_before_it_are_stored(service: Service, server: str) -> None:
    name = str(psycopg.conninfo.conninfo_to_dict(service.database)["dbname"])
    service.start(ORBITSTREAM_WORKERS="1", ORBITSTREAM_DRAIN_TIMEOUT="0s")
    refuse_connections(server, name, refuse=True)
    for satellite in ("FIRST", "SECOND", "DAMAGED"):
        assert service.post("/telemetry", {**POINT, "satellite_id": satellite})[0] == 202
    assert service.stop() == 0
    (path,) = service.lane_dir.glob("*.ring")
    damaged = path.read_bytes().replace(b"DAMAGED", b"UNKNOWN")
    path.write_bytes(damaged)
    refuse_connections(server, name, refuse=False)
    drained = service.run("drain")
    assert drained.returncode == 1 and "stored 2 points" in drained.stdout, drained
    assert "no valid record at position" in drained.stderr and "Traceback" not in drained.stderr, drained.stderr
    assert {row[0] for row in service.query("SELECT satellite_id FROM telemetry")} == {"FIRST", "SECOND"}
    assert path.exists()
    (service.lane_dir / "lane-0007.ring").symlink_to("gone")
    producer, lock = lanes.claim_producer(service.lane_dir, ring.MIN_CAPACITY, rows.layout())
    producer.lane.close()
    lock.release()
    verified = service.run("verify")
    assert verified.returncode == 1 and "lane-0007.ring: not checked, " in verified.stdout, verified
    assert re.search(r"lane-0000.ring: not checked, a record between \d+ and \d+ is damaged", verified.stdout), verified
    assert "lane-0001.ring: published 0 = " in verified.stdout, "the others are looked at"


def test_a_client_encoding_of_the_environment_changes_nothing(service: Service) -> None:
    service.start(PGCLIENTENCODING="LATIN1")
    assert service.post("/telemetry", {**POINT, "satellite_id": "é"})[0] == 202
    eventually(lambda: service.query("SELECT satellite_id FROM telemetry") == [("é",)])


def test_files_that_are_no_lanes_are_left_aside(service: Service, lane_dir: Path) -> None:
    (lane_dir / "archive").mkdir()
    for name in ("lane-0000.ring", "archive/x.ring"):
        (lane_dir / name).touch()
    for name in ("lane-0002.producer", "lane-0003.ring", "archive/y.ring"):
        (lane_dir / name).symlink_to("gone")
    (lane_dir / ".lane-0001.ring.new").mkdir()
    service.start(healthy=False)
    assert service.post("/telemetry", POINT)[0] == 202
    eventually(lambda: service.count() == 1)
    assert (lane_dir / "lane-0004.ring").exists()
    status, report, _ = service.get("/health")
    assert (status, report["stopped_lanes"]) == (503, 1)
    assert set(json.loads(service.run("status", "--json").stdout)["unreadable"]) == {"lane-0000.ring", "lane-0003.ring"}
    unknown = service.run("lanes", "resume", "lane-0009.ring")
    assert unknown.returncode == 1 and "there is no lane lane-0009.ring" in unknown.stderr
    assert service.stop() == 0
    assert "what lane-0000.ring holds is not known: " in service.output()
    assert "the lanes are empty" not in service.output()
    drained = service.run("drain")
    assert drained.returncode == 1
    assert "0 left in" in drained.stdout and "and what these hold: lane-0000.ring, lane-0003.ring" in drained.stdout
    for name in ("lane-0000.ring", "lane-0003.ring"):
        (lane_dir / name).unlink()
    service.start()


def test_a_lane_directory_in_which_nothing_can_be_made_stops_the_edge(lane_dir: Path) -> None:
    for number in range(lanes.MAX_UNUSABLE + 2):
        (lane_dir / f"lane-{number:04d}.producer").symlink_to("gone")
    with pytest.raises(lanes.LaneDirError, match=r"cannot make a lane in .*symbolic links"):
        lanes.claim_producer(lane_dir, ring.MIN_CAPACITY, rows.layout())


def test_a_reader_that_has_seen_enough_is_no_error(service: Service) -> None:
    for command in (["--help"], ["lanes", "list", "--json"], ["status"]):
        for unbuffered in ("", "1"):
            reader, writer = os.pipe()
            os.close(reader)
            ended = subprocess.run(
                [sys.executable, "-P", "-m", "engine", *command],
                env={**os.environ, **service.environment, "PYTHONUNBUFFERED": unbuffered},
                stdout=writer,
                stderr=subprocess.PIPE,
                timeout=60,
                cwd="/",
            )
            os.close(writer)
            # Newer versions of argparse keep it to themselves that nobody reads their help.
            assert ended.returncode in ((0, 128 + signal.SIGPIPE) if "--help" in command else (128 + signal.SIGPIPE,))
            assert ended.stderr == b"", command


def test_a_relative_lane_directory_is_one_folder(service: Service, tmp_path: Path) -> None:
    (tmp_path / "lanes").mkdir(0o700)
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "engine", "drain"],
        env={**os.environ, **service.environment, "ORBITSTREAM_LANE_DIR": "lanes"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"0 left in {tmp_path}/lanes" in ended.stdout, ended.stderr
    assert "must not be empty" in service.run("serve", ORBITSTREAM_LANE_DIR="").stderr


def test_an_older_copy_of_the_lanes_is_not_taken_for_drained(service: Service, lane_dir: Path, tmp_path: Path) -> None:
    def post(name: str) -> None:
        assert service.post("/telemetry", {**POINT, "satellite_id": name})[0] == 202

    service.start(ORBITSTREAM_WORKERS="1")
    post("FIRST")
    assert service.stop() == 0
    shutil.copy(lane_dir / "lane-0000.ring", tmp_path)
    service.start(ORBITSTREAM_WORKERS="1")
    post("SECOND")
    assert service.stop() == 0
    shutil.copy(tmp_path / "lane-0000.ring", lane_dir)
    service.start(healthy=False, ORBITSTREAM_WORKERS="1")
    eventually(lambda: "the lane went back in time" in service.output(), 20)
    post("THIRD")
    eventually(
        lambda: (
            {name for (name,) in service.query("SELECT satellite_id FROM telemetry")} == {"FIRST", "SECOND", "THIRD"}
        )
    )


def use_another_database(service: Service, server: str) -> None:
    """Have the service started next use a new, empty database of the same server."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS test_other WITH (FORCE)")
        connection.execute("CREATE DATABASE test_other")
    service.database = psycopg.conninfo.make_conninfo(service.database, dbname="test_other")
    service.environment["DATABASE_URL"] = service.database


def test_a_lane_never_drains_into_another_database(service: Service, server: str, lane_dir: Path) -> None:
    service.environment["ORBITSTREAM_WORKERS"] = "1"
    service.start()
    service.post("/telemetry", POINT)
    eventually(lambda: service.count() == 1)
    assert service.stop() == 0
    use_another_database(service, server)
    service.start(healthy=False)
    eventually(lambda: "is stopped, its points are kept: it was drained into database" in service.output(), 20)
    assert service.count() == 0
    assert service.post("/telemetry", POINT)[0] == 202  # into a new lane, which is of this database
    eventually(lambda: service.count() == 1)
    (listed, *_) = json.loads(service.run("lanes", "list", "--json").stdout)
    resumed = service.run("lanes", "resume", listed["name"])
    assert (resumed.returncode, resumed.stdout) == (1, "")
    assert f"{listed['name']} stays stopped: it was drained into database {listed['database']}" in resumed.stderr
    assert service.query("SELECT count(*) FROM ingest_progress WHERE lane = %s", listed["uuid"]) == [(0,)]
    verified = service.run("verify", "--deep")
    assert verified.returncode == 0 and "total: published 1 = committed 1 " in verified.stdout
    assert f"{listed['name']}: not checked, it is of database {listed['database']}\n" in verified.stdout
    assert service.stop() == 0
    archive = lane_dir / lanes.ARCHIVE
    archive.mkdir(exist_ok=True)
    (lane_dir / listed["name"]).rename(archive / f"{listed['uuid']}.ring")
    service.start()
    assert service.post("/telemetry", POINT)[0] == 202
    eventually(lambda: service.count() == 2)
    assert "went back in time" not in service.output()
    report = json.loads(service.run("verify", "--json").stdout)
    assert report["lanes_of_another_database"] == {f"{listed['uuid']}.ring": listed["database"]}
    adopted = service.run("lanes", "adopt", listed["uuid"])
    assert adopted.returncode == 1 and "nothing waits in it" in adopted.stderr


def test_what_waits_for_a_database_that_is_gone_is_stored_in_another_by_command(
    service: Service, server: str, lane_dir: Path
) -> None:
    service.environment["ORBITSTREAM_WORKERS"] = "1"
    service.start()
    service.post("/telemetry", {**POINT, "satellite_id": "STORED"})
    eventually(lambda: service.count() == 1)
    assert service.stop() == 0
    service.start(healthy=False, DATABASE_URL="postgresql://127.0.0.1:1/gone", ORBITSTREAM_DRAIN_TIMEOUT="1s")
    for _ in range(2):  # one request, sent twice
        assert service.post("/telemetry", {**POINT, "satellite_id": "WAITS"}, {"Idempotency-Key": "k"})[0] == 202
    assert service.stop() == 0
    use_another_database(service, server)
    (lane_dir / "lane-0007.ring").touch()  # somebody's mistake keeps nobody from the others
    service.start(healthy=False)
    eventually(
        lambda: "gone for good, have this one store what waits: `orbitstream lanes adopt" in service.output(), 20
    )
    listed = json.loads(service.run("lanes", "list", "--json").stdout)
    assert [row["state"] for row in listed if row["name"] == "lane-0007.ring"] == ["unreadable"]
    unknown = service.run("verify")
    assert unknown.returncode == 1 and "lane-0007.ring: not checked, " in unknown.stdout, unknown.stderr
    assert "lane-0000.ring: not checked, it is of database" in unknown.stdout, "the others are looked at"
    (lane_dir / "lane-0007.ring").unlink()
    killed = service.run("lanes", "adopt", "lane-0000.ring", ORBITSTREAM_FAILPOINT="adopt-before-database:1")
    assert killed.returncode == -signal.SIGKILL
    adopted = service.run("lanes", "adopt", "lane-0000.ring")
    assert adopted.returncode == 0, adopted.stderr
    assert f"what database {listed[0]['database']} had of it counts as forgone" in adopted.stdout
    eventually(lambda: service.query("SELECT satellite_id FROM telemetry") == [("WAITS",)], 30)
    verified = service.run("verify", "--deep")
    assert verified.returncode == 0, verified.stdout
    assert "published 3 = committed 1 + deduplicated 1 + dead-lettered 0 + forgone 1 + queued 0" in verified.stdout
    eventually(lambda: service.get("/health")[0] == 200)
    again = service.run("lanes", "adopt", listed[0]["uuid"])
    assert (again.returncode, again.stdout) == (0, f"{listed[0]['uuid']}: nothing to do, it is of no other database\n")
