"""Trials: one running service under one load after the other, watched from outside; and COPY alone to compare with."""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psycopg
from psycopg import sql

from engine import copy_format, heartbeat, lanes, rig
from engine.rig import RigError
from engine.rows import Columns

COPY_BATCHES: Final = (10_000, 50_000)
"""Rows of one COPY and transaction; the best of them is the ceiling."""
DRAIN_S: Final = 120.0


@dataclass(slots=True)
class Trial:
    """What one run of the simulator came to: rates in points/s, latency from arrival to commit in ms."""

    offered: float
    accepted: float
    committed: float
    p99_ms: float
    refused: int
    behind_s: float
    cpu_us: dict[str, float]

    def passes(self, bound_ms: float) -> bool:
        """Tell whether the service kept up: nothing refused, nothing late."""
        return not self.refused and self.p99_ms <= bound_ms and self.behind_s < 1.0


def load_flags(rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return the simulator's flags for `rate` points/s (0: as many as are taken); options: satellites, seconds, batch,
    and perhaps format."""
    return {
        "--satellites": options.satellites,
        "--rate": rate / options.satellites,
        "--duration": options.seconds,
        "--batch": options.batch,
        "--format": getattr(options, "format", "json"),
        "--anomaly-rate": 0,
        "--quiet": True,
    }


def copy_ceiling(dsn: str, satellites: int, writers: int, *, seconds: float) -> float:
    """Return the best rows/s of COPY into telemetry, one transaction a batch, `writers` connections at once.

    The rows have the shape of the simulator's and are sorted as a writer sorts them. Encoding them is not counted.
    """
    best = 0.0
    with ThreadPoolExecutor(writers) as pool:
        for batch in COPY_BATCHES:
            jobs = [pool.submit(_copy_for, dsn, satellites, batch, number, seconds) for number in range(writers)]
            best = max(best, sum(job.result() for job in jobs))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE telemetry")
        connection.execute("CHECKPOINT")
    return best


def _copy_for(dsn: str, satellites: int, batch: int, number: int, seconds: float) -> float:
    rows, spent = 0, 0.0
    dice = np.random.default_rng(number)
    start_us = time.time_ns() // 1_000
    names = np.array([b"SAT-%05d" % index for index in range(satellites)])
    with psycopg.connect(dsn, autocommit=True) as connection:
        while spent < seconds:
            # Writers share the satellites as the workers' lanes do; no two rows have one key.
            index = np.arange(rows, rows + batch)
            columns = Columns(
                time=start_us + index * 2 + number,
                satellite_id=names[index % satellites],
                values={
                    "battery_charge_percent": dice.integers(3_000, 9_900, batch) / 100,
                    "storage_usage_mb": dice.integers(200_000, 8_000_000, batch) / 100,
                    "signal_strength_dbm": dice.integers(-9_000, -5_600, batch) / 100,
                },
                is_anomaly=np.zeros(batch, np.bool_),
            )
            columns = copy_format.take(columns, copy_format.order(columns))
            names_sql = sql.SQL(", ").join(map(sql.Identifier, copy_format.column_names(columns)))
            body = copy_format.encode(columns, np.full(batch, start_us))
            begin = time.perf_counter()
            with connection.transaction(), connection.cursor() as cursor:
                statement = sql.SQL("COPY telemetry ({}) FROM STDIN (FORMAT BINARY)").format(names_sql)
                with cursor.copy(statement) as copy:
                    copy.write(body)
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

    def trial(self, rate: float) -> Trial:
        """Send `rate` points/s (0: as many as are taken), wait until all are committed, and return what came of it."""
        options = self._options
        committed, bins, cpu = self._committed(), self._bins(), self._cpu()
        begin = time.monotonic()
        report = rig.simulate(self._url, load_flags(rate, options))
        now = time.monotonic()
        self._await(committed + report["accepted"])
        drained = time.monotonic()
        points = self._committed() - committed
        # The simulator's start is not load: it counts from its first request. Short waits are told apart no finer.
        seconds = report["seconds"] + (drained - now)
        (p99,) = heartbeat.latency_ms(self._bins() - bins, (0.99,))
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
            p99_ms=p99,
            refused=report["refused"] + report["unknown"] + report["retries"],
            behind_s=report["behind_seconds"],
            cpu_us=spent | {"simulator": report["cpu_seconds"] / max(report["sent"], 1) * 1e6},
        )

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
            time.sleep(0.01)

    def _committed(self) -> int:
        return sum(beat.committed_points for beat in heartbeat.read_all(self._lane_dir))

    def _bins(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.asarray(sum(beat.latency_bins for beat in heartbeat.read_all(self._lane_dir)), np.uint64)

    def _cpu(self) -> dict[str, float]:
        rows = self._connection.execute("SELECT pid FROM pg_stat_activity").fetchall()
        return rig.cpu_seconds(self._service, [row[0] for row in rows])


def find_knee(bench: Bench, low: float, high: float, options: argparse.Namespace) -> tuple[Trial, list[Trial]]:
    """Bisect between a rate that should pass and one that should not; return the best that passed, and all."""
    trials = [bench.trial(low)]
    while not trials[-1].passes(options.bound):
        if len(trials) == 3:
            raise RigError(f"even {low:,.0f} points/s are committed later than {options.bound:g} ms: raise --bound")
        low /= 2
        trials.append(bench.trial(low))
    best = trials[-1]
    for _ in range(options.trials):
        trial = bench.trial(0.5 * (low + high))
        trials.append(trial)
        if trial.passes(options.bound):
            low, best = trial.offered, trial
        else:
            high = trial.offered
    return best, trials
