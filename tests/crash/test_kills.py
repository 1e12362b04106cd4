"""Deaths of our own processes: at random, at each named step, stopped and continued, all at once."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import migrate
from engine.columnstore import MIN_POINTS
from tests.load import Load, finish, loads_on, progress
from tests.long_run import KILLS, LONG, SEED, report
from tests.service import Service, command_line, compresses, eventually, is_gone, kill

pytestmark = pytest.mark.crash


HITS = 20 if LONG else 2


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
    seconds = round(time.monotonic() - begun, 1)
    for load in loads:
        load.stop()
    assert service.stop() == 0
    assert service.run("drain").returncode == 0  # of a thousand kills more may be left than a stop has time for
    seen = finish(service, loads, running=False)
    report("random SIGKILLs", kills=KILLS, workers=killed["worker"], writers=killed["writer"], seconds=seconds, **seen)
    assert seen["longest_gap_s"] < 2.0


PUBLISH = ["publish-before-payload", "publish-before-counters", "publish-before-head", "publish-after-head"]
DRAIN = ["drain-within-copy", "drain-before-commit", "drain-after-commit", "drain-before-tail"]
PASSINGS = dict.fromkeys(DRAIN, 7)
PASSINGS["drain-within-copy"] = 40  # more than the pieces of the largest COPY, or nobody gets through


@pytest.mark.parametrize("name", [*PUBLISH, "publish-before-sync", *DRAIN])
def test_a_death_at_each_step_of_publish_and_drain(service: Service, disk_dir: Path, name: str) -> None:
    """Every process that reaches the step for the n-th time kills itself there, and so does its replacement.

    Where the server compresses COPY, the drains that die are some that go straight into the columnstore.
    """
    durable = {"ORBITSTREAM_DURABILITY": "disk", "ORBITSTREAM_LANE_DIR": str(disk_dir)} if "sync" in name else {}
    service.environment |= durable
    assert service.run("migrate").returncode == 0  # else the last death may come before the schema is there
    service.start(ORBITSTREAM_FAILPOINT=f"{name}:{PASSINGS.get(name, 25)}", healthy=False)
    with migrate.connect(service.database, "test") as connection:
        large = name in DRAIN and compresses(connection)
    loads = [Load(service, "L", MIN_POINTS)] if large else [Load(service, f"L{index}") for index in range(3)]
    victims: Callable[[], list[int]] = service.writers if name in DRAIN else service.workers
    seen: set[int] = set()

    def deaths() -> int:
        seen.update(victims())
        return sum(is_gone(pid) for pid in seen)

    eventually(lambda: deaths() >= HITS, 20 + 15 * HITS, f"deaths at {name}")
    if large:
        eventually(lambda: service.get("/health")[1]["compressed_points"] >= MIN_POINTS, 20, "points compressed")
    for load in loads:
        load.stop()
    service.kill_everything()
    assert service.run("drain").returncode == 0
    report(f"SIGKILL at {name}", hits=HITS, **finish(service, loads, running=False))


def test_sigkill_of_the_arbiter(service: Service) -> None:
    service.start()
    loads = loads_on(service)
    workers = service.workers()
    kill([service.arbiter()])
    for pid in workers:
        eventually(lambda pid=pid: is_gone(pid), 5)
    eventually(lambda: len(service.workers()) == 2, 10)
    progress(loads)
    report("SIGKILL of gunicorn", kills=1, **finish(service, loads))


def test_sigkill_of_everything_then_a_restart(service: Service) -> None:
    service.start()
    loads = loads_on(service)
    service.kill_everything()
    for load in loads:
        load.stop()
    service.start()
    seen = finish(service, loads)
    del seen["longest_gap_s"]  # nobody was there to answer
    report("SIGKILL of everything at once", kills=1, **seen)


def test_a_killed_supervisor_takes_all_with_it_and_the_port_is_free(service: Service) -> None:
    service.start()
    loads = loads_on(service)
    everything = service.everything()
    kill([service.pid])
    for pid in everything:
        eventually(lambda pid=pid: is_gone(pid), 5, command_line(pid))
    assert service.process is not None
    service.process.wait(5)
    service.start(PORT=str(service.port))
    progress(loads)
    seen = finish(service, loads)
    seen["restart_s"] = seen.pop("longest_gap_s")
    report("SIGKILL of the supervisor", kills=1, **seen)


def test_a_writer_stopped_and_continued_is_replaced_and_does_no_harm(service: Service) -> None:
    service.start()
    loads = loads_on(service, 1, batch=10)  # little, so that it is the takeover that takes the time
    (writer,) = service.writers()
    begun = time.monotonic()
    kill([writer], signal.SIGSTOP)
    eventually(lambda: [pid for pid in service.writers() if pid != writer], 12, "another writer")
    count = service.count()
    eventually(lambda: service.count() > count, 12)
    taken_over = time.monotonic() - begun
    assert taken_over < 12
    kill([writer], signal.SIGCONT)
    progress(loads)
    report("SIGSTOP of a writer, then SIGCONT", commit_gap_s=round(taken_over, 1), **finish(service, loads))


def test_keyed_retries_over_kills_are_exactly_once(service: Service) -> None:
    """With a key nothing is unknown: the sender repeats until it has an answer, and each point is one row."""
    service.start()
    loads = loads_on(service, keyed=True)
    for _ in range(6):
        kill([service.workers()[0]])
        progress(loads)
        kill(service.writers())
        progress(loads)
    seen = finish(service, loads)
    assert seen["unknown"] == 0
    report("SIGKILLs with keyed retries", kills=12, **seen)


def test_max_requests_recycling_loses_no_answer(service: Service) -> None:
    service.start(GUNICORN_CMD_ARGS="--max-requests 40")
    loads = loads_on(service)
    seen: set[int] = set()
    eventually(lambda: seen.update(service.workers()) or len(seen) >= 8, 60, "recycled workers")
    report("max_requests recycling", **finish(service, loads))
