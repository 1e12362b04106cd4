"""Faults of the database and of the way to it: killed, away, cut off, half open, full, refusing a point."""

from __future__ import annotations

import json
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from engine.embedded import EmbeddedPostgres
from tests.crash.proxy import Proxy
from tests.load import finish, loads_on, progress
from tests.long_run import LONG, report
from tests.service import POINT, Service, eventually, is_gone, kill

pytestmark = pytest.mark.crash


TURNS = 20 if LONG else 2
AWAY_S = 60 if LONG else 6


def test_killed_backends_and_immediate_shutdowns(postgres: EmbeddedPostgres, lane_dir: Path) -> None:
    with Service(postgres.dsn, lane_dir) as service:
        service.start()
        loads = loads_on(service)
        gaps: dict[str, list[float]] = {"backend": [], "immediate": []}
        for _ in range(TURNS):
            for fault, seen in gaps.items():
                begun = time.monotonic()
                if fault == "immediate":
                    kill([postgres.postmaster_pid], signal.SIGQUIT)
                    eventually(lambda: is_gone(postgres.postmaster_pid), 20)
                    postgres.ensure()
                else:
                    query = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'orbitstream-writer-%%'"
                    kill([pid for (pid,) in service.query(query)])
                before = eventually(lambda: stored(service), 30, "a database that answers")
                eventually(lambda before=before: (stored(service) or 0) > before, 30, "commits again")
                seen.append(time.monotonic() - begun)
                progress(loads)
        figures = finish(service, loads)
        longest = {fault: round(max(seen), 2) for fault, seen in gaps.items()}
        report("SIGKILL of the writer's backend", kills=TURNS, commit_gap_s=longest["backend"], **figures)
        report("immediate shutdown of the database", kills=TURNS, commit_gap_s=longest["immediate"])


def stored(service: Service) -> int | None:
    """Count the rows; None while the database is down or recovering."""
    try:
        return service.count()
    except psycopg.OperationalError:
        return None


def test_a_database_that_is_away_is_waited_for(postgres: EmbeddedPostgres, lane_dir: Path) -> None:
    """202s until the lanes are full, then 503s; all of it is stored soon after the database is back."""
    with Service(postgres.dsn, lane_dir) as service:
        service.start(ORBITSTREAM_LANE_BYTES="16MiB" if LONG else "4MiB")
        loads = loads_on(service)
        begun = time.monotonic()
        stopping = threading.Thread(target=postgres.stop)  # it turns all away at once, and ends after its checkpoint
        stopping.start()
        eventually(lambda: service.get("/health")[0] == 503, 30, "the database away")
        marks = [len(load.accepted) for load in loads]
        eventually(lambda: all(len(load.accepted) > mark + 500 for load, mark in zip(loads, marks, strict=True)), 30)
        assert not any(load.refused for load in loads)
        assert all(load.longest_gap < 2.0 for load in loads)
        assert service.get("/health")[0] == 503
        eventually(lambda: any(load.refused for load in loads), 60, "a full lane")
        threading.Event().wait(begun + AWAY_S - time.monotonic())
        away = time.monotonic() - begun
        for load in loads:
            load.stop()
        accepted = sum(len(load.accepted) for load in loads)
        stopping.join()
        postgres.start()
        back = time.monotonic()
        eventually(lambda: (stored(service) or 0) >= accepted, 30, "the lanes drained")
        drained = time.monotonic() - back
        figures = finish(service, loads)
        del figures["longest_gap_s"]  # a full lane is no gap
        report("database away", away_s=round(away), drained_s=round(drained, 1), **figures)


def test_the_answer_to_commit_is_cut_off(service: Service, proxied: Proxy) -> None:
    """The database commits and the writer cannot know: the ledger tells it."""
    service.start()
    loads = loads_on(service)
    for turn in range(50):
        proxied.cut_after(b"COMMIT")
        eventually(lambda turn=turn: proxied.hits > turn, 20, "a cut")
    progress(loads)
    report("COMMIT sent, answer cut off", cuts=50, **finish(service, loads))


def test_a_half_open_connection_is_given_up_and_its_backend_ended(service: Service, proxied: Proxy) -> None:
    """The proxy swallows a transaction in its middle: its backend holds the ledger row and is never told to end."""
    service.start()
    loads = loads_on(service)
    proxied.stall_at(b"PGCOPY")
    eventually(lambda: proxied.hits == 1, 10)
    begun, count = time.monotonic(), service.count()
    eventually(lambda: service.count() > count, 30, "commits again")
    taken_over = round(time.monotonic() - begun, 1)
    progress(loads)
    report("half-open connection to the database", commit_gap_s=taken_over, **finish(service, loads))


FAULT = """
CREATE TABLE fault (code text, satellite_id text);
CREATE FUNCTION faulty(satellite text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE found text;
BEGIN
    SELECT code INTO found FROM public.fault WHERE coalesce(satellite_id, satellite) = satellite;
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'made to fail' USING ERRCODE = found;
    END IF;
    RETURN true;
END $$;
-- TimescaleDB looks at chunks that are there already with a search path of its own.
SET search_path = pg_catalog;
ALTER TABLE public.telemetry ADD CHECK (public.faulty(satellite_id));
RESET search_path;
SELECT 1
"""


def arrange_faults(service: Service, codes: dict[str | None, str]) -> None:
    """Let the database refuse each satellite (None: all) with an SQLSTATE."""
    with psycopg.connect(service.database, autocommit=True) as connection:
        connection.execute(FAULT.encode())
        for satellite_id, code in codes.items():
            connection.execute("INSERT INTO fault VALUES (%s, %s)", [code, satellite_id])


def test_a_passing_fault_of_the_server_is_waited_out(service: Service) -> None:
    """Disk full, deadlock, out of locks, statement time-out: nothing is set aside, and all lands once it is over."""
    service.start()
    arrange_faults(service, {})
    for number, code in enumerate(["53100", "40P01", "53200", "57014"], 1):
        service.query("INSERT INTO fault VALUES (%s) RETURNING 1", code)
        batch = [{**POINT, "satellite_id": f"S{number}-{index}"} for index in range(100)]
        assert service.post("/telemetry/batch", batch)[0] == 202
        eventually(lambda code=code: f"({code})" in service.output(), 10, "the failure in the log")
        eventually(lambda: service.get("/health")[1]["stopped_lanes"] == 1, 10)
        assert service.count() == 100 * (number - 1)
        service.query("DELETE FROM fault RETURNING 1")
        eventually(lambda number=number: service.count() == 100 * number, 15)
        report("disk full, deadlock, out of locks, statement time-out", hits=1, accepted=100)
    assert service.query("SELECT count(*) FROM dead_letter") == [(0,)]
    service.await_healthy()


def test_a_poison_point_is_set_aside_and_the_rest_lands(service: Service) -> None:
    poison = {"POISON-1": "23514", "POISON-2": "22003"}
    service.start(BATCH_TIMEOUT="1s", BATCH_SIZE="1000000")
    arrange_faults(service, dict(poison))
    names = [f"S{number}" for number in range(500)]
    batch = [{**POINT, "satellite_id": name} for name in [*names[:250], *poison, *names[250:]]]
    at = datetime.now(UTC).replace(microsecond=0)
    batch[:3] = [{**batch[0], "timestamp": (at - timedelta(seconds=age)).isoformat()} for age in (1, 3, 2)]
    assert service.post("/telemetry/batch", batch)[0] == 202
    for name in ("BEFORE", *poison, "AFTER"):
        assert service.post("/telemetry", {**POINT, "satellite_id": name, "temperature_c": 4.5})[0] == 202
    eventually(lambda: service.count() == 502, 20)
    newest = "SELECT time FROM satellite_latest WHERE satellite_id = 'S0'"
    eventually(lambda: service.query(newest) == [(at - timedelta(seconds=1),)], 10, "the newest, not the last in it")
    refused = [(name, code, "refused") for name, code in poison.items() for _ in range(2)]
    letters = "SELECT point ->> 'satellite_id', sqlstate, reason FROM dead_letter ORDER BY 1"
    eventually(lambda: service.query(letters) == refused, 20, "every dead letter, also of a lane without a good point")
    listed = service.run("dead-letters", "list", "--json").stdout.splitlines()
    assert {json.loads(line)["point"]["satellite_id"] for line in listed} == set(poison)
    assert service.run("verify", "--deep").returncode == 0
    refused = service.run("dead-letters", "replay")
    assert (refused.returncode, refused.stdout.splitlines()[-1]) == (1, "replayed 0 dead letters, 4 refused again")
    service.query("DELETE FROM fault RETURNING 1")
    assert service.run("dead-letters", "replay").stdout == "replayed 4 dead letters, 0 refused again\n"
    assert service.run("dead-letters", "replay").stdout == "replayed 0 dead letters, 0 refused again\n"
    stored = service.query("SELECT temperature_c, battery_charge_percent FROM telemetry WHERE satellite_id ~ 'POISON'")
    assert sorted(stored, key=str) == [(4.5, 80.5)] * 2 + [(None, 80.5)] * 2
    assert service.run("verify", "--deep").returncode == 0
    assert service.run("dead-letters", "purge").stdout == "purged 4 dead letters\n"
    assert service.run("dead-letters", "list").stdout == "no dead letters\n"
    report("points that the database refuses", hits=4, accepted=506)


def test_many_refused_points_take_no_locks_with_them(service: Service) -> None:
    """A savepoint holds a lock as long as it is there, and the server has some thousands of them for all."""
    service.start()
    batch = [{**POINT, "satellite_id": f"{'GOOD' if number % 2 else 'BAD'}-{number}"} for number in range(800)]
    locks = (
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE locktype = 'transactionid' AND application_name LIKE 'orbitstream-writer-%'"
    )
    with psycopg.connect(service.database, autocommit=True) as connection:
        connection.execute("ALTER TABLE telemetry ADD CHECK (satellite_id NOT LIKE 'BAD%')")
        assert service.post("/telemetry/batch", batch)[0] == 202
        held: list[int] = []
        deadline = time.monotonic() + 30
        while connection.execute("SELECT count(*) FROM dead_letter").fetchall() != [(400,)]:
            held += [count for (count,) in connection.execute(locks.encode()).fetchall()]
            assert time.monotonic() < deadline, held
    assert 0 < max(held) <= 3, "the transaction was seen at work, and held its own lock and a savepoint's"
    assert service.count() == 400


def test_a_lane_that_the_database_refuses_is_stopped_and_its_writer_goes_on(service: Service) -> None:
    service.start()
    arrange_faults(service, {"POISON": "23514"})
    with psycopg.connect(service.database, autocommit=True) as connection:
        connection.execute("ALTER TABLE dead_letter RENAME TO away")
    writers = service.writers()
    assert service.post("/telemetry", {**POINT, "satellite_id": "POISON"}, {"Idempotency-Key": "one"})[0] == 202
    eventually(lambda: "is stopped, its points are kept: the database refuses it (42P01)" in service.output(), 20)
    eventually(lambda: service.get("/health")[1]["stopped_lanes"] == 1, 10)
    assert service.writers() == writers, "the writer did not fall over the lane"
    with psycopg.connect(service.database, autocommit=True) as connection:
        connection.execute("ALTER TABLE away RENAME TO dead_letter")
    assert service.stop() == 0
    service.start()
    eventually(lambda: service.query("SELECT count(*) FROM dead_letter") == [(1,)], 20)


def test_a_spike_is_marked_also_beside_a_refused_point(service: Service, tmp_path: Path) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text("[channels.battery_charge_percent]\ncritical_rate = 10\n")
    service.start(ORBITSTREAM_LIMITS_FILE=str(limits), ORBITSTREAM_WORKERS="1", BATCH_TIMEOUT="1s", BATCH_SIZE="1000")
    arrange_faults(service, {"POISON": "23514"})
    begun = datetime.now(UTC) - timedelta(minutes=10)

    def post(second: int, battery: float, name: str = "A") -> None:
        point = {**POINT, "satellite_id": name, "battery_charge_percent": battery}
        moment = (begun + timedelta(seconds=second)).isoformat()
        assert service.post("/telemetry", {**point, "timestamp": moment})[0] == 202

    post(0, 20)
    eventually(lambda: service.count() == 1)
    for second, battery, name in ((100, 20, "A"), (0, 50, "POISON"), (102, 90, "A")):
        post(second, battery, name)
    eventually(lambda: service.count() == 3)
    marked = service.query("SELECT battery_charge_percent FROM telemetry WHERE is_anomaly")
    assert marked == [(90.0,)], "more than 10 a second since the point before, which came in another request"
