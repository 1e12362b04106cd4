"""The fault matrix of the delivery contract: real kills of real processes, real cuts, and sets compared afterwards.

ORBITSTREAM_CRASH_KILLS and ORBITSTREAM_CRASH_SEED set the length and the seed of the random kills (`make crash`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from engine.embedded import EmbeddedPostgres
from tests.crash.proxy import Proxy
from tests.load import Load, assert_exactly_once, loads_on
from tests.service import POINT, Service, eventually, is_gone, kill

pytestmark = pytest.mark.crash

KILLS = int(os.environ.get("ORBITSTREAM_CRASH_KILLS", "50"))
SEED = int(os.environ.get("ORBITSTREAM_CRASH_SEED", str(random.SystemRandom().randrange(10**6))))
REPORT = os.environ.get("ORBITSTREAM_CRASH_REPORT")


@pytest.fixture
def postgres() -> Iterator[EmbeddedPostgres]:
    """A cluster of this test's own, to be killed."""
    home = Path(tempfile.mkdtemp(prefix="os-test-", dir="/tmp"))
    home.chmod(0o755)
    server = EmbeddedPostgres(home, die_with_parent=True)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(home)


@pytest.fixture
def proxied(service: Service) -> Iterator[Proxy]:
    """A proxy between the service (not its tests) and the database."""
    folder = Path(tempfile.mkdtemp(prefix="os-proxy-", dir="/tmp"))
    proxy = Proxy(folder, service.database)
    service.environment["DATABASE_URL"] = proxy.url
    service.environment["MIGRATION_DATABASE_URL"] = service.database
    yield proxy
    proxy.close()
    shutil.rmtree(folder)


def progress(loads: list[Load], seconds: float = 20.0) -> None:
    """Wait until every load got a batch through from now on."""
    marks = [len(load.accepted) for load in loads]
    eventually(lambda: all(len(load.accepted) > mark for load, mark in zip(loads, marks, strict=True)), seconds, "202s")


def finish(service: Service, loads: list[Load]) -> None:
    """Stop load and service, and check that everything is there once and accounted for."""
    for load in loads:
        load.stop()
    assert service.stop() == 0
    assert_exactly_once(service, loads)
    verified = service.run("verify", "--deep", DATABASE_URL=service.database)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_random_kills_under_load(service: Service) -> None:
    """SIGKILL of a random worker or writer, at random moments."""
    print(f"{KILLS} kills, ORBITSTREAM_CRASH_SEED={SEED}")
    rng = random.Random(SEED)
    service.start(LOG_LEVEL="error", ORBITSTREAM_LANE_BYTES="128MiB")  # the default, which the promise is made with
    loads = loads_on(service, batch=10)
    begun = time.monotonic()
    pause = threading.Event()
    killed = {"worker": 0, "writer": 0}
    while sum(killed.values()) < KILLS:
        kind = rng.choice(("worker", "writer"))
        pids = {"worker": service.workers, "writer": service.writers}[kind]()
        if pids:
            kill([rng.choice(pids)])
            killed[kind] += 1
        pause.wait(rng.uniform(0.0, 0.5))
        if sum(killed.values()) % 10 == 0:
            progress(loads)
    seconds = time.monotonic() - begun
    finish(service, loads)
    accepted = sum(len(load.accepted) for load in loads)
    report = {
        "kills": killed,
        "seconds": round(seconds, 1),
        "accepted": accepted,
        "unknown": sum(len(load.unknown) for load in loads),
        "refused": sum(load.refused for load in loads),
        "stored": service.count(),
        "lost": 0,
        "duplicated": 0,
        "longest_gap_s": round(max(load.longest_gap for load in loads), 3),
        "seed": SEED,
    }
    print(json.dumps(report))
    if REPORT:
        Path(REPORT).write_text(json.dumps(report) + "\n")
    assert report["longest_gap_s"] < 2.0


PUBLISH = ["publish-before-payload", "publish-before-counters", "publish-before-head", "publish-after-head"]
DRAIN = ["drain-within-copy", "drain-before-commit", "drain-after-commit", "drain-before-tail"]


@pytest.mark.parametrize("name", [*PUBLISH, "publish-before-sync", *DRAIN])
def test_a_death_at_each_step_of_publish_and_drain(service: Service, tmp_path: Path, name: str) -> None:
    """Every process that reaches the step for the n-th time kills itself there, and so does its replacement."""
    durable = {"ORBITSTREAM_DURABILITY": "disk", "ORBITSTREAM_LANE_DIR": str(tmp_path)} if "sync" in name else {}
    service.environment |= durable
    service.start(ORBITSTREAM_FAILPOINT=f"{name}:{7 if name in DRAIN else 25}", healthy=False)
    loads = [Load(service, f"L{index}") for index in range(3)]
    victims: Callable[[], list[int]] = service.writers if name in DRAIN else service.workers
    seen: set[int] = set()

    def deaths() -> int:
        seen.update(victims())
        return sum(is_gone(pid) for pid in seen)

    eventually(lambda: deaths() >= 3, 40, f"deaths at {name}")
    for load in loads:
        load.stop()
    service.kill_everything()
    service.start()
    finish(service, loads)


def test_sigkill_of_the_arbiter(service: Service) -> None:
    service.start()
    loads = loads_on(service)
    workers = service.workers()
    kill([service.arbiter()])
    for pid in workers:
        eventually(lambda pid=pid: is_gone(pid), 5)
    eventually(lambda: len(service.workers()) == 2, 10)
    progress(loads)
    finish(service, loads)
    print(f"longest gap in 202s: {max(load.longest_gap for load in loads):.2f} s")


def test_a_writer_stopped_and_continued_is_replaced_and_does_no_harm(service: Service) -> None:
    service.start()
    loads = loads_on(service)
    (writer,) = service.writers()
    begun = time.monotonic()
    kill([writer], signal.SIGSTOP)
    eventually(lambda: [pid for pid in service.writers() if pid != writer], 12, "another writer")
    count = service.count()
    eventually(lambda: service.count() > count, 12)
    assert time.monotonic() - begun < 12
    kill([writer], signal.SIGCONT)
    progress(loads)
    finish(service, loads)


def test_killed_backends_and_immediate_shutdowns(postgres: EmbeddedPostgres, lane_dir: Path) -> None:
    with Service(postgres.dsn, lane_dir) as service:
        service.start()
        loads = loads_on(service)
        for turn in range(6):
            if turn % 2:
                kill([postgres.postmaster_pid], signal.SIGQUIT)
                eventually(lambda: is_gone(postgres.postmaster_pid), 20)
                postgres.ensure()
            else:
                query = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'orbitstream-writer-%%'"
                kill([pid for (pid,) in service.query(query)])
            before = _count(service)
            eventually(lambda before=before: _count(service) > before, 30, "commits again")
            progress(loads)
        finish(service, loads)


def _count(service: Service) -> int:
    try:
        return service.count()
    except psycopg.OperationalError:  # still recovering
        return -1


def test_the_answer_to_commit_is_cut_off(service: Service, proxied: Proxy) -> None:
    """The database commits and the writer cannot know: the ledger tells it."""
    service.start()
    loads = loads_on(service)
    for turn in range(50):
        proxied.cut_after(b"COMMIT")
        eventually(lambda turn=turn: proxied.hits > turn, 20, "a cut")
    progress(loads)
    finish(service, loads)


def test_a_half_open_connection_is_given_up_and_its_backend_ended(service: Service, proxied: Proxy) -> None:
    """The proxy swallows a transaction in its middle: its backend holds the ledger row and is never told to end."""
    service.start()
    loads = loads_on(service)
    proxied.stall_at(b"PGCOPY")
    eventually(lambda: proxied.hits == 1, 10)
    begun, count = time.monotonic(), service.count()
    eventually(lambda: service.count() > count, 30, "commits again")
    print(f"commits again after {time.monotonic() - begun:.1f} s")
    progress(loads)
    finish(service, loads)


FAULT = """
CREATE TABLE fault (code text, satellite_id text);
CREATE FUNCTION faulty(satellite text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE found text;
BEGIN
    SELECT code INTO found FROM fault WHERE coalesce(satellite_id, satellite) = satellite;
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'made to fail' USING ERRCODE = found;
    END IF;
    RETURN true;
END $$;
ALTER TABLE telemetry ADD CHECK (faulty(satellite_id));
SELECT 1
"""


def arrange_fault(service: Service, code: str, satellite_id: str | None = None) -> None:
    with psycopg.connect(service.database, autocommit=True) as connection:
        connection.execute(FAULT.encode())
        connection.execute("INSERT INTO fault VALUES (%s, %s)", [code, satellite_id])


@pytest.mark.parametrize(
    "code", ["53100", "40P01", "53200", "57014"], ids=["disk full", "deadlock", "locks", "timeout"]
)
def test_a_passing_fault_of_the_server_is_waited_out(service: Service, code: str) -> None:
    service.start()
    arrange_fault(service, code)
    assert service.post("/telemetry/batch", [{**POINT, "satellite_id": f"S{n}"} for n in range(100)])[0] == 202
    eventually(lambda: f"({code})" in service.output(), 10, "the failure in the log")
    eventually(lambda: service.get("/health")[1]["stopped_lanes"] == 1, 10)
    assert service.count() == 0
    service.query("DELETE FROM fault RETURNING 1")
    eventually(lambda: service.count() == 100, 15)
    assert service.query("SELECT count(*) FROM dead_letter") == [(0,)]
    service.await_healthy()


@pytest.mark.parametrize("code", ["23514", "22003"])
def test_a_poison_point_is_set_aside_and_the_rest_lands(service: Service, code: str) -> None:
    service.start(BATCH_TIMEOUT="1s", BATCH_SIZE="1000000")
    arrange_fault(service, code, "POISON")
    names = [f"S{number}" for number in range(500)]
    batch = [{**POINT, "satellite_id": name} for name in [*names[:250], "POISON", *names[250:]]]
    assert service.post("/telemetry/batch", batch)[0] == 202
    for name in ("BEFORE", "POISON", "AFTER"):
        assert service.post("/telemetry", {**POINT, "satellite_id": name, "temperature_c": 4.5})[0] == 202
    eventually(lambda: service.count() == 502, 20)
    letters = service.query("SELECT reason, sqlstate, point ->> 'satellite_id' FROM dead_letter")
    assert letters == [("refused", code, "POISON")] * 2
    listed = service.run("dead-letters", "list", "--json").stdout.splitlines()
    assert {json.loads(line)["point"]["satellite_id"] for line in listed} == {"POISON"}
    assert service.run("verify", "--deep").returncode == 0
    refused = service.run("dead-letters", "replay")
    assert (refused.returncode, refused.stdout.splitlines()[-1]) == (1, "replayed 0 dead letters, 2 refused again")
    service.query("DELETE FROM fault RETURNING 1")
    assert service.run("dead-letters", "replay").stdout == "replayed 2 dead letters, 0 refused again\n"
    assert service.run("dead-letters", "replay").stdout == "replayed 0 dead letters, 0 refused again\n"
    stored = service.query("SELECT temperature_c, battery_charge_percent FROM telemetry WHERE satellite_id = 'POISON'")
    assert sorted(stored, key=str) == [(4.5, 80.5), (None, 80.5)]
    assert service.run("verify", "--deep").returncode == 0
    assert service.run("dead-letters", "purge").stdout == "purged 2 dead letters\n"
    assert service.run("dead-letters", "list").stdout == "no dead letters\n"


def test_max_requests_recycling_loses_no_answer(service: Service) -> None:
    service.start(GUNICORN_CMD_ARGS="--max-requests 40")
    loads = loads_on(service)
    seen: set[int] = set()
    eventually(lambda: seen.update(service.workers()) or len(seen) >= 8, 60, "recycled workers")
    finish(service, loads)


# -- idempotency keys


def test_a_keyed_request_sent_twice_is_stored_once(service: Service) -> None:
    service.start()
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


def test_keyed_retries_over_kills_are_exactly_once(service: Service) -> None:
    """With a key nothing is unknown: the sender repeats until it has an answer, and each point is one row."""
    service.start()
    loads = loads_on(service, keyed=True)
    for _ in range(6):
        kill([service.workers()[0]])
        progress(loads)
        kill(service.writers())
        progress(loads)
    for load in loads:
        load.stop()
    assert service.stop() == 0
    stored = [name for (name,) in service.query("SELECT satellite_id FROM telemetry")]
    accepted = set().union(*(load.accepted for load in loads))
    assert len(stored) == len(set(stored))
    assert accepted <= set(stored)
    assert service.run("verify", "--deep").returncode == 0


@pytest.mark.parametrize("key", ["", "x" * 201, "caf\xe9"])
def test_a_bad_key_is_refused(service: Service, key: str) -> None:
    service.start()
    status, problem, _ = service.post("/telemetry", POINT, {"Idempotency-Key": key})
    assert (status, problem["type"].rpartition(":")[2]) == (400, "bad-request")


# -- durability, verify, stopped lanes


def test_durability_is_echoed_and_refused_in_memory(service: Service, tmp_path: Path) -> None:
    refused = service.run("serve", ORBITSTREAM_DURABILITY="disk")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "ORBITSTREAM_DURABILITY=disk cannot be kept in" in refused.stderr
    service.environment |= {"ORBITSTREAM_LANE_DIR": str(tmp_path / "lanes"), "ORBITSTREAM_DURABILITY": "disk"}
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
    eventually(lambda: service.query("SELECT satellite_id FROM telemetry") == [("SINCE",)], 40)


def test_a_backlog_of_an_older_row_layout_is_drained_rightly(service: Service, lane_dir: Path) -> None:
    from engine import lanes, ring, rows
    from engine.timestamps import now_us

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
