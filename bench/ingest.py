"""End to end with real processes: points/s committed against COPY alone in the same run, CPU a point, latency, memory.

python -m bench.ingest --seconds 5 --format json
python -m bench.ingest --rate 10000 --batch 100 --fleets 1000 --seconds 30
python -m bench.ingest --database-url postgresql://... --history 100000000 --fleets 1000
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psycopg

from bench import results
from bench.memory import Memory
from engine import copy_format, migrate, rig, settings, trial
from engine.columnstore import Columnstore
from engine.rows import Columns
from simulator.control import make_jobs
from simulator.flags import build_parser, settings_from
from simulator.load import Plan

FLEETS = (100, 10_000, 100_000)
STAGES = ("edge", "writer", "maintenance", "supervisor")
WARM_UP_S = 8.0
"""How long the warm-up lasts, and COPY alone, at most."""
PARSING_S = 4.0
SPARE = 1.25
"""How many times the points that the warm-up's pace comes to are prepared."""
HISTORY_BATCH = 100_000
HISTORY_DAYS = 10
HISTORY_PAIRS = 5


def orjson_us(batch: int) -> float:
    """Return the CPU time of orjson.loads a point, in us, with all cores at it, as they are in the measurement."""
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores) as pool:
        return statistics.mean(pool.map(_orjson_us, [batch] * cores))


def _orjson_us(batch: int) -> float:
    """Return the CPU time of orjson.loads a point, in us, over bodies as the simulator sends them.

    The mean over PARSING_S, before and after a load: what our processes take meanwhile, which it is compared with, is a
    mean over as long, and a shared machine changes its pace within seconds.
    """
    flags = ["--rate", "0", "--batch", str(batch), "--satellites", "1000", "--processes", "1"]
    plan = Plan(
        make_jobs(settings_from(build_parser().parse_args(flags)), 2, ("h", 1), host="h", path="", token=None)[0]
    )
    bodies: list[bytes] = []
    points = 0
    while points < 20_000:
        made = plan.next_block(plan.start.monotonic)
        assert made is not None
        bodies += [bytes(request.data).partition(b"\r\n\r\n")[2] for request in made[1]]
        points += sum(request.points for request in made[1])
    begin, rounds, taken = time.process_time(), 0, 0.0
    while taken < PARSING_S:
        for body in bodies:
            orjson.loads(body)
        rounds += 1
        taken = time.process_time() - begin
    return taken / (rounds * points) * 1e6


def add_history(connection: psycopg.Connection[Any], points: int, satellites: int) -> None:
    """Fill telemetry with points of the last days but today's, as writers would have stored them."""
    columnstore = Columnstore(connection)
    names = np.array([b"SAT-%05d" % index for index in range(satellites)])
    span_us = HISTORY_DAYS * 86_400_000_000
    first = time.time_ns() // 1_000 - span_us - 86_400_000_000
    dice = np.random.default_rng(1)
    begin = time.monotonic()
    for start in range(0, points, HISTORY_BATCH):
        index = np.arange(start, start + HISTORY_BATCH)
        columns = trial.random_readings(dice, first + index * span_us // points, names[index % satellites])
        store(connection, columnstore, columns)
        if start % (100 * HISTORY_BATCH) == 0:
            rig.say("ingest", f"history: {start:,} of {points:,} points ({time.monotonic() - begin:.0f} s)")


def store(connection: psycopg.Connection[Any], columnstore: Columnstore, columns: Columns) -> None:
    """COPY sorted points into telemetry as a writer does."""
    with connection.transaction(), connection.cursor() as cursor:
        columnstore.copy(cursor, columns, copy_format.encode(columns, columns.time))


@dataclass(frozen=True, slots=True)
class Stage:
    """A database and a service of one's own, and the bench that loads them."""

    dsn: str
    connection: psycopg.Connection[Any]
    service: int
    bench: trial.Bench
    pace: float
    """Points/s committed in the warm-up."""


@contextmanager
def stage(satellites: int, options: argparse.Namespace, name: str = "bench") -> Iterator[Stage]:
    """Yield an empty database and a service that have worked before; `name`: of their folders.

    What service, server and kernel do once is no part of a rate. Most of it is memory: a page of the server's buffers
    that was never in use is cleared first, an eighth of the CPU that a row of the row store takes then.
    """
    config = settings.load({"DATABASE_URL": options.database_url} if options.database_url else {})
    home = rig.private_folder(Path("/tmp"), f"orbitstream-{name}")
    lane_dir = rig.private_folder(Path("/dev/shm"), f"orbitstream-{name}", 0o700)
    flags = argparse.Namespace(**{**vars(options), "satellites": satellites})
    try:
        with trial.scratch_database(config, home) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
            overrides = rig.overrides(dsn, lane_dir, flags.workers, flags.writers)
            with rig.service(overrides, lane_dir) as (service, url):
                warm = argparse.Namespace(**{**vars(flags), "seconds": min(options.seconds, WARM_UP_S)})
                pace = trial.Bench(service.pid, url, lane_dir, connection, warm).trial(options.rate).committed
                trial.empty(dsn, checkpoint=True)
                bench = trial.Bench(service.pid, url, lane_dir, connection, flags)
                yield Stage(dsn, connection, service.pid, bench, pace)
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def measure(satellites: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one size of fleet, and COPY alone before and after: of a load of WARM_UP_S about as many rows."""
    with stage(satellites, options) as on:
        ceiling = trial.Ceiling(on.dsn, satellites, options.writers, seconds=min(options.seconds, WARM_UP_S))
        ceiling.measure()
        trial.empty(on.dsn, checkpoint=True)  # as COPY alone finds it
        parsing = [orjson_us(options.batch)]
        memory = Memory(on.service)
        found = on.bench.trial(options.rate, int(SPARE * on.pace * options.seconds) if options.prepare else 0)
        sizes = memory.stop()
        parsing.append(orjson_us(options.batch))
        ceiling.measure()
        edition = str(migrate.find_edition(on.connection))
    floor = statistics.mean(parsing)
    figures: dict[str, Any] = {
        "satellites": satellites,
        "server": edition,
        "accepted_per_second": round(found.accepted),
        "committed_per_second": round(found.committed),
        "copy_per_second": round(ceiling.rows_per_second),
        "committed_to_copy": round(found.committed / ceiling.rows_per_second, 3),
        "straight_to_columnstore": round(found.compressed, 3),
        "refused": found.refused,
        "commit_ms": {"p50": round(found.p50_ms, 1), "p99": round(found.p99_ms, 1)},
        "cpu_us_per_point": {stage: round(value, 3) for stage, value in found.cpu_us.items()},
        "committed_to_cpu": round(found.committed / cpu_bound(found.cpu_us), 3),
        "memory": sizes,
        "orjson_us_per_point": round(floor, 3),
        "cpu_to_orjson": round(sum(found.cpu_us[stage] for stage in STAGES) / floor, 2),
    }
    return figures


def filled_to_empty(satellites: int, options: argparse.Namespace) -> list[float]:
    """Return the rate on a table with a history over that on an empty one, of pairs of trials that follow each other.

    Two databases, each with its service, are loaded in turns, so that a machine that changes its pace takes both along.
    """
    with stage(satellites, options) as empty, stage(satellites, options, "history") as filled:
        add_history(filled.connection, options.history, satellites)
        found = []
        for turn in range(HISTORY_PAIRS):
            pair = {on.dsn: on.bench.trial(options.rate).committed for on in (empty, filled)[:: -1 if turn % 2 else 1]}
            found.append(round(pair[filled.dsn] / pair[empty.dsn], 3))
    return found


def cpu_bound(cpu_us: dict[str, float]) -> float:
    """Return the points/s at which what a point takes of all processes, in us of CPU, has every core busy all the time.

    The server and the simulator are taken to be on this machine too.
    """
    return (os.cpu_count() or 1) * 1e6 / sum(cpu_us.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ingest", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--fleets", type=int, nargs="+", default=list(FLEETS))
    add("--rounds", type=int, default=1, help="measure every fleet so many times, in turns (1)")
    add("--seconds", type=float, default=5.0)
    add("--rate", type=float, default=0.0, help="points/s (as many as are taken)")
    add("--prepare", action="store_true", help="make the points before they are sent, as the rows of COPY alone are")
    add("--batch", type=int, default=1000)
    add("--format", default="json", choices=["json", "columnar", "ndjson", "arrow"])
    add("--workers", type=int, default=2)
    add("--writers", type=int, default=1)
    add("--history", type=int, default=0, metavar="POINTS", help="measure again with so many points in the table")
    add("--database-url", default=os.environ.get("DATABASE_URL"), help="make a scratch database there (a private one)")
    add("--name", help="of the results' file (ingest-FORMAT)")
    add("--output", type=Path)
    options = parser.parse_args()
    if options.prepare and options.rate:
        parser.error("--prepare is for loads that the service sets the pace of: leave out --rate")
    return options


def main() -> int:
    """Measure every fleet, write results/NAME.json, print a line each."""
    options = parse()
    figures = []
    for satellites in options.fleets * options.rounds:
        found = measure(satellites, options)
        if options.history:
            pairs = filled_to_empty(satellites, options)
            found["filled_to_empty"] = {"median": statistics.median(pairs), "pairs": pairs}
        figures.append(found)
        ours = sum(found["cpu_us_per_point"][stage] for stage in STAGES)
        print(
            f"{satellites:>7,} satellites: committed {found['committed_per_second']:,}/s, "
            f"{found['committed_to_copy']:.2f} of COPY alone, {found['straight_to_columnstore']:.0%} straight to the "
            f"columnstore, p99 to commit {found['commit_ms']['p99']:.0f} ms, CPU {ours:.2f} us a point, "
            f"{found['cpu_to_orjson']:.1f} times orjson.loads",
            flush=True,
        )
    rates = {
        f"{satellites:,} satellites": float(
            statistics.median(each["committed_per_second"] for each in figures if each["satellites"] == satellites)
        )
        for satellites in options.fleets
    }
    count = len(options.fleets)
    turns = [(figures[first], figures[first + count - 1]) for first in range(0, len(figures), count)]
    growth = {
        name: round(statistics.median(last[name] / first[name] for first, last in turns), 3)
        for name in ("committed_per_second", "copy_per_second")
    }
    names = ("seconds", "rounds", "rate", "prepare", "batch", "format", "workers", "writers", "history")
    name = options.name or f"ingest-{options.format}"
    path = results.save(
        name,
        {each: getattr(options, each) for each in names},
        {"fleets": figures, "last_to_first": growth},
        options.output,
    )
    results.bars(name, "committed end to end", "points/s", rates, options.output)
    print(
        f"last fleet to first: {growth['committed_per_second']:.2f}, COPY alone {growth['copy_per_second']:.2f}; {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
