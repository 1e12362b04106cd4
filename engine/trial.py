"""Trials: one running service under one load after the other, watched from outside; and COPY alone to compare with."""

from __future__ import annotations

import argparse
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import psycopg
from psycopg import sql

from engine import copy_format, heartbeat, lanes, migrate, rig
from engine.columnstore import Columnstore
from engine.rig import RigError
from engine.rows import Columns, Ids, Times, take
from engine.settings import Settings

COPY_BATCHES: Final = (10_000, 50_000, 100_000)
"""Rows of one COPY and transaction; the best of them is the ceiling."""
CHOOSING_S: Final = 2.0
"""For how long each way is tried, at most."""
DRAIN_S: Final = 120.0
LOOK_S: Final = 0.05
OVERLOAD: Final = 2
SETTLING: Final = 0.4
"""How many times as long as other trials an overload is, and the share of it before lanes are taken to fill steadily:
for some seconds a server that rested takes more than it can keep up."""
CONNECTIONS: Final = 64
"""Of each process of the simulator in an overload: as many as a fleet's are spread evenly over the workers. Of 16 one
worker may get 10 and another 6, and the lane of the one is full long before the other's."""
FIRST_STEP: Final = 0.25
STEP_POWER: Final = 0.8
LOWEST: Final = 0.05
"""Steps towards the knee and its least, as shares of what is committed at saturation. Step n is the first over n to the
power; ten then reach from nearly 0 to twice the saturation, and end in steps of 4 %."""

_LEFT: Final = (
    "SELECT datname FROM pg_database WHERE datname ~ '^orbitstream_scratch_[0-9a-f]{8}$'"
    " AND pg_get_userbyid(datdba) = current_user"
    " AND NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = pg_database.datname)"
)


@dataclass(slots=True)
class Trial:
    """What one run of the simulator came to: rates in points/s, latency from arrival to commit in ms, the share of the
    points that went straight to the columnstore, CPU us a point by stage; copy: rows/s of COPY alone at the time."""

    offered: float
    accepted: float
    committed: float
    p50_ms: float
    p99_ms: float
    refused: int
    behind_s: float
    compressed: float
    cpu_us: dict[str, float]
    copy: float = 1.0

    @property
    def share(self) -> float:
        """Return the offered rate as a share of COPY alone."""
        return self.offered / self.copy

    def passes(self, bound_ms: float) -> bool:
        """Tell whether the service kept up: nothing refused, nothing late."""
        return not self.refused and self.p99_ms <= bound_ms and self.behind_s < 1.0


class Look(NamedTuple):
    """All lanes at one moment: time.monotonic(), points since they were made, and how full the fullest of them is."""

    time: float
    accepted: int
    settled: int
    fill: float
    refused: int


class Overload(NamedTuple):
    """What a load came to while it lasted: points/s that arrived and that drained, and how much of the fullest lane
    was filled a second."""

    arriving: float
    draining: float
    filling: float

    @property
    def seconds_until_full(self) -> float | None:
        """Return how long an empty lane lasts; None for one that does not fill."""
        return 1 / self.filling if self.filling > 0 else None


@contextmanager
def scratch_database(config: Settings, home: Path) -> Iterator[str]:
    """Yield the URL of a migrated scratch database: on the server of DATABASE_URL, or, without one, on a private server
    in `home`. Raises RigError, psycopg.Error."""
    if config.database_url is None:
        with rig.private_database(home, lambda message: None) as server:
            migrate.migrate(config, server.dsn, lambda message: None)
            yield server.dsn
        return
    with scratch(config.migration_database_url or config.database_url) as url:
        migrate.migrate(config, url, lambda message: None)
        yield url


@contextmanager
def scratch(server: str) -> Iterator[str]:
    """Yield the URL of an empty database on a server; it is dropped afterwards, as are those that a killed run left.

    A run is known by its connection, which has the database's name as its own. Raises RigError, psycopg.Error.
    """
    name = f"orbitstream_scratch_{secrets.token_hex(4)}"
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
    with psycopg.connect(server, autocommit=True, application_name=name) as owner:
        for (left,) in owner.execute(_LEFT).fetchall():
            owner.execute(drop.format(sql.Identifier(left)))
        try:
            owner.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        except psycopg.errors.InsufficientPrivilege as error:
            raise RigError("the account may not create a scratch database: ALTER ROLE .. CREATEDB") from error
        try:
            yield psycopg.conninfo.make_conninfo(server, dbname=name)
        finally:
            owner.execute(drop.format(sql.Identifier(name)))


def load_flags(rate: float, options: argparse.Namespace, prepared: int = 0) -> dict[str, Any]:
    """Return the simulator's flags for `rate` points/s (0: as many as are taken); options: satellites, seconds, batch,
    and perhaps format. `prepared`: so many points at most, made before the first is sent."""
    flags = {
        "--satellites": options.satellites,
        "--rate": rate / options.satellites,
        "--duration": options.seconds,
        "--batch": options.batch,
        "--format": getattr(options, "format", "json"),
        "--anomaly-rate": 0,
        "--quiet": True,
    }
    return flags | ({"--points": prepared, "--prepare": True} if prepared else {})


def overload_flags(rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return the simulator's flags for more points/s than can be stored."""
    return load_flags(rate, options) | {"--connections": CONNECTIONS}


class Ceiling:
    """Measure COPY into telemetry alone, the way a writer does it, on a table that is emptied before and after.

    The rows have the shape of the simulator's, are sorted as a writer sorts them and go straight to the columnstore
    where the server can do that. As many connections at once as there are writers, or one a core if that is faster;
    encoding the rows is not counted. By what the best way is chosen is not counted either: the best of some was lucky.
    """

    def __init__(self, dsn: str, satellites: int, writers: int, *, seconds: float) -> None:
        self._dsn, self._satellites, self._seconds = dsn, satellites, seconds
        ways = [(batch, each) for batch in COPY_BATCHES for each in {writers, os.cpu_count() or 1}]
        rates = {way: self._rate(*way, min(seconds, CHOOSING_S)) for way in ways}
        self._best = max(rates, key=lambda way: rates[way])
        self._rates: list[float] = []

    def measure(self) -> float:
        """Measure for `seconds`, in the best way; return what COPY does now, the median of the last three."""
        self._rates.append(self._rate(*self._best, self._seconds))
        return float(np.median(self._rates[-3:]))

    @property
    def rows_per_second(self) -> float:
        """Return the median of all measurements."""
        return float(np.median(self._rates))

    def _rate(self, batch: int, connections: int, seconds: float) -> float:
        empty(self._dsn, checkpoint=True)
        with ThreadPoolExecutor(connections) as pool:
            jobs = [
                pool.submit(_copy_for, self._dsn, self._satellites, batch, number, seconds)
                for number in range(connections)
            ]
            rate = sum(job.result() for job in jobs)
        empty(self._dsn)
        return rate


def empty(dsn: str, *, checkpoint: bool = False) -> None:
    """Empty telemetry; `checkpoint`: have what is dirty written, so that one trial leaves the next no work."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE telemetry")
        if checkpoint:
            with suppress(psycopg.errors.InsufficientPrivilege):
                connection.execute("CHECKPOINT")


def random_readings(dice: np.random.Generator, times: Times, ids: Ids) -> Columns:
    """Return readings of the required channels, like the simulator's, in the order in which a writer sorts them."""
    count = len(times)
    columns = Columns(
        time=times,
        satellite_id=ids,
        values={
            "battery_charge_percent": dice.integers(3_000, 9_900, count) / 100,
            "storage_usage_mb": dice.integers(200_000, 8_000_000, count) / 100,
            "signal_strength_dbm": dice.integers(-9_000, -5_600, count) / 100,
        },
        is_anomaly=np.zeros(count, np.bool_),
    )
    return take(columns, copy_format.order(columns))


def _copy_for(dsn: str, satellites: int, batch: int, number: int, seconds: float) -> float:
    rows, spent = 0, 0.0
    dice = np.random.default_rng(number)
    start_us = time.time_ns() // 1_000
    names = np.array([b"SAT-%05d" % index for index in range(satellites)])
    with psycopg.connect(dsn, autocommit=True) as connection:
        columnstore = Columnstore(connection)
        while spent < seconds:
            # Writers share the satellites as the workers' lanes do; no two rows have one key.
            index = np.arange(rows, rows + batch)
            columns = random_readings(dice, start_us + index * 2 + number, names[index % satellites])
            body = copy_format.encode(columns, np.full(batch, start_us))
            begin = time.perf_counter()
            with connection.transaction(), connection.cursor() as cursor:
                columnstore.copy(cursor, columns, body)
            spent += time.perf_counter() - begin
            rows += batch
    return rows / spent


class Bench:
    """Load one running service and read what became of it from outside: heartbeats, lanes, /proc."""

    def __init__(
        self, service: int, url: str, lane_dir: Path, connection: psycopg.Connection[Any], options: argparse.Namespace
    ) -> None:
        self._service = service
        self._url = url
        self._lane_dir = lane_dir
        self._connection = connection
        self._options = options

    def trial(self, rate: float, prepared: int = 0) -> Trial:
        """Send `rate` points/s (0: as many as are taken), wait until all are committed, and return what came of it.

        `prepared`: of rate 0 alone, send so many points at most, and make them before the first is sent.
        """
        options = self._options
        committed, compressed, bins, cpu = self._committed(), self._compressed(), self._bins(), self._cpu()
        begin = time.monotonic()
        report = rig.simulate(self._url, load_flags(rate, options, prepared))
        self._await(committed + report["accepted"])
        points = self._committed() - committed
        # From when the first request could leave, since what the simulator does before is no load, to the last commit.
        last = max(beat.last_commit_us for beat in heartbeat.read_all(self._lane_dir))
        seconds = last / 1e6 - datetime.fromisoformat(report["started_at"]).timestamp()
        p50, p99 = heartbeat.latency_ms(self._bins() - bins, (0.5, 0.99))
        used = self._cpu()
        rig.say(
            "trial",
            f"{rate or report['points_per_second']:,.0f}/s: p99 {p99:.0f} ms, {report['refused']} refused"
            f" ({time.monotonic() - begin:.1f} s)",
        )
        spent = {stage: (used[stage] - cpu[stage]) / max(points, 1) * 1e6 for stage in used}
        return Trial(
            offered=rate,
            accepted=report["points_per_second"],
            committed=points / seconds,
            p50_ms=p50,
            p99_ms=p99,
            refused=report["refused"] + report["unknown"] + report["retries"],
            behind_s=report["behind_seconds"],
            compressed=(self._compressed() - compressed) / max(points, 1),
            cpu_us=spent | {"simulator": report["cpu_seconds"] / max(report["sent"], 1) * 1e6},
        )

    def overload(self, rate: float) -> Overload:
        """Send `rate` points/s for a while and watch the lanes fill.

        What drains after it, with the machine to itself, plays no part.
        """
        committed, looks = self._committed(), [look(self._lane_dir)]
        with ThreadPoolExecutor(1) as pool:
            flags = overload_flags(rate, self._options) | {"--duration": OVERLOAD * self._options.seconds}
            sending = pool.submit(rig.simulate, self._url, flags)
            while not sending.done():
                time.sleep(LOOK_S)  # the lanes' headers are polled; ends with the load
                looks.append(look(self._lane_dir))
            accepted = sending.result()["accepted"]
        self._await(committed + accepted)
        return steady(looks)

    def lane_points(self) -> float:
        """Return how many points the lanes hold."""
        room = sum(lane.capacity for lane in lanes.open_lanes(self._lane_dir))
        return room / self._bytes_a_point()

    def _bytes_a_point(self) -> float:
        heads = sum(lane.head for lane in lanes.open_lanes(self._lane_dir))
        return heads / max(self._committed(), 1)

    def _await(self, committed: int) -> None:
        deadline = time.monotonic() + DRAIN_S
        while self._committed() < committed:
            if time.monotonic() > deadline:
                raise RigError(f"the lanes did not drain in {DRAIN_S:.0f} s: see the service's log")
            time.sleep(0.01)  # the heartbeats are polled; until the deadline

    def _committed(self) -> int:
        return sum(beat.committed_points for beat in heartbeat.read_all(self._lane_dir))

    def _compressed(self) -> int:
        return sum(beat.compressed_points for beat in heartbeat.read_all(self._lane_dir))

    def _bins(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.asarray(sum(beat.latency_bins for beat in heartbeat.read_all(self._lane_dir)), np.uint64)

    def _cpu(self) -> dict[str, float]:
        here = migrate.on_this_machine(self._connection)
        rows = self._connection.execute("SELECT pid FROM pg_stat_activity WHERE %s", [here]).fetchall()
        return rig.cpu_seconds(self._service, [row[0] for row in rows])


def look(lane_dir: Path) -> Look:
    """Read the headers of all lanes."""
    accepted = settled = refused = 0
    fill = 0.0
    for lane in lanes.open_lanes(lane_dir):
        accepted += lane.published.points
        settled += lane.settled_points
        refused += lane.refused_points
        fill = max(fill, lane.fill)
        lane.close()
    return Look(time.monotonic(), accepted, settled, fill, refused)


def steady(looks: Sequence[Look]) -> Overload:
    """Return a load's rates, lines of best fit from its settling until its end or the first refused point.

    Raises RigError when there are too few looks to tell.
    """
    first = looks[0]
    loaded = [now for before, now in pairwise(looks) if now.accepted > before.accepted and now.refused == first.refused]
    begin = loaded[0].time + SETTLING * (loaded[-1].time - loaded[0].time) if loaded else 0.0
    points = np.array([look for look in loaded if look.time >= begin])
    if len(points) < 3:
        raise RigError("the load was too short to see how fast the lanes fill: raise --seconds")
    return Overload(*np.polyfit(points[:, 0] - begin, points[:, 1:4], 1)[0].tolist())


def find_knee(
    bench: Bench, full: Trial, options: argparse.Namespace, ceiling: Callable[[], float]
) -> tuple[Trial, list[Trial]]:
    """Look for the highest rate that passes, from what was committed at saturation; return it, and all trials.

    Rates are shares of `ceiling`, rows/s, which is asked before each trial: a machine that slows down takes both along.
    Up after a trial that passed, down after one that did not, in ever smaller steps: a machine that was busy for a
    moment is made up for by the trials that follow. The knee is the trial that passed which the others contradict
    least: by failing at its share or less, or by passing above it.
    """
    trials: list[Trial] = []
    share = first = full.committed / full.copy
    for number in range(1, options.trials + 1):
        copy = ceiling()
        trials.append(replace(bench.trial(share * copy), copy=copy))
        step = FIRST_STEP * first / number**STEP_POWER
        share = max(share + (step if trials[-1].passes(options.bound) else -step), LOWEST * first)
    passed = [trial for trial in trials if trial.passes(options.bound)]
    if not passed:
        least = min(trial.offered for trial in trials)
        raise RigError(f"even {least:,.0f} points/s are committed later than {options.bound:g} ms: raise --bound")

    def contradicting(knee: Trial) -> int:
        return sum((trial.share > knee.share) == trial.passes(options.bound) for trial in trials)

    return min(passed, key=lambda trial: (contradicting(trial), -trial.share)), trials
