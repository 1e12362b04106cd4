"""What the capacity board says, and what comes: `orbitstream capacity`, then half its knee, then twice its knee.

python -m bench.overload [--database-url postgresql://...]

At half the knee the board's head-room is compared with the knee. At twice the knee its seconds until full, asked for
each second, are compared with the seconds until the first point is answered 503, and the time until the disk is full
with the growth of the database since the first sample. On a server whose rate swings, as one does that compresses on
cores it shares with the load, nothing fills steadily: the private one without TimescaleDB is the clearer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from bench import boards
from engine import capacity, maintenance, migrate, rig, settings, trial

CALM_S = 14.0
SETTLED_S = 10.0
"""So long after its start an overload is judged: the board's line through the lanes' use is as long."""


class Watched:
    """A running service: its lanes from outside, and what the boards say of it."""

    def __init__(self, dsn: str, lane_dir: Path) -> None:
        self._dsn, self._lane_dir = dsn, lane_dir
        with migrate.connect(dsn, "orbitstream-bench") as connection:
            self._edition = migrate.find_edition(connection)

    def board(self, panel: str) -> dict[str, Any]:
        with boards.opened(self._dsn, self._edition, datetime.now(UTC)) as opened:
            [row] = opened.one(panel)
        return row

    def sample(self) -> tuple[float, int]:
        """Have the storage sampled as maintenance does; returns the time and the bytes of the database."""
        with migrate.connect(self._dsn, "orbitstream-bench") as connection:
            maintenance.sample_storage(connection, self._edition)
            [(size,)] = connection.execute("SELECT pg_database_size(current_database())").fetchall()
        return time.monotonic(), size

    def lanes(self) -> trial.Look:
        return trial.look(self._lane_dir)


def overload(
    watched: Watched, url: str, rate: float, sampled: tuple[float, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Send `rate` points a second until a point is refused; return what the board said on the way.

    `sampled` is the first sample of the storage: the board's line goes through all of them.
    """
    said: list[tuple[float, float]] = []
    before = watched.lanes()
    watched.sample()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(rig.simulate, url, trial.overload_flags(rate, options))
        while watched.lanes().accepted == before.accepted and not sending.done():
            time.sleep(0.01)  # the lanes' headers are polled; ends with the load
        begun = next_look = time.monotonic()
        while (now := watched.lanes()).refused == before.refused and not sending.done():
            if time.monotonic() >= next_look:
                until = watched.board("capacity / 5 Seconds until full")["until full"]
                said.append((time.monotonic() - begun, until))
                next_look += 1.0
            time.sleep(0.02)  # the same
        full = time.monotonic() - begun
        refused = now.refused > before.refused
        grown = watched.sample()
        disk = watched.board("capacity / 52 Disk full in")["until full"]
        sending.result()
    left = [(until, full - at) for at, until in said if at >= SETTLED_S and until and full - at > 2]
    free = shutil.disk_usage(options.home).free
    return {
        "full": refused, "seconds_until_full": round(full, 1),
        "arriving": round((now.accepted - before.accepted) / full),
        "draining": round((now.settled - before.settled) / full),
        "board": [{"after_s": round(at, 1), "said_s": round(until, 1) if until else None, "came_s": round(full - at, 1)}
                  for at, until in said],
        "said_over_came": round(statistics.median(until / came for until, came in left), 3) if left else None,
        "disk": {"board_s": disk, "grown_bytes_a_second": round((grown[1] - sampled[1]) / (grown[0] - sampled[0])),
                 "came_s": free / max(1, (grown[1] - sampled[1]) / (grown[0] - sampled[0]))},
    }  # fmt: skip


def measure(dsn: str, lane_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure capacity and both loads."""
    config = settings.load({"DATABASE_URL": dsn})
    migrate.migrate(config, dsn, lambda _: None)
    found = capacity.measure(dsn, lane_dir, options)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE telemetry, engine_stats, storage_stats")
    capacity.store(config, {**found, "node": config.node})
    shutil.rmtree(lane_dir)
    lane_dir.mkdir(mode=0o700)
    knee, until = found["knee_points_per_second"], found["seconds_until_full_at_twice_the_knee"]
    # Of smaller lanes, or it takes minutes on a slow machine.
    lanes = settings.load({}).lane_bytes
    until = until and until * options.lane_bytes / lanes
    environment = rig.overrides(dsn, lane_dir, options.workers, options.writers)
    with rig.service(environment | {"ORBITSTREAM_LANE_BYTES": str(options.lane_bytes)}, lane_dir) as (_, url):
        watched = Watched(dsn, lane_dir)
        sampled = watched.sample()
        with ThreadPoolExecutor(1) as pool:
            calm = argparse.Namespace(**{**vars(options), "seconds": CALM_S})
            sending = pool.submit(rig.simulate, url, trial.load_flags(knee / 2, calm))
            time.sleep(CALM_S - 2)  # the board is asked under a load that has lasted, and still lasts
            room, rate = watched.board("capacity / 3 Head-room"), watched.board("capacity / 1 Committed now")
            sending.result()
        rig.say("overload", f"{knee / 2:,.0f}/s: head-room {room}; now {2 * knee:,.0f}/s")
        flood = argparse.Namespace(**{**vars(options), "seconds": 1.5 * (until or 20) + 10})
        seen = overload(watched, url, 2 * knee, sampled, flood)
    return {
        "capacity": {"knee": knee,
                     "arriving": found["arriving_at_twice_the_knee"], "draining": found["drain_points_per_second"],
                     "seconds_until_full_of_these_lanes": until and round(until, 1),
                     "said_over_came": until and round(until / seen["seconds_until_full"], 3)},
        "half_the_knee": {"rate": round(rate["points/s"]), "head_room": room,
                          "knee_over_rate": round(knee / rate["points/s"], 2)},
        "twice_the_knee": seen,
    }  # fmt: skip


def main() -> int:
    """Print the comparison; exit code 1 when its seconds until full, or capacity's, are off by more than a fifth."""
    parser = argparse.ArgumentParser(prog="bench.overload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL"), help="a server (a private one)")
    for name, default in (("satellites", 1000), ("batch", 1000), ("workers", 2), ("writers", 1), ("trials", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a trial of the knee (%(default)g)")
    parser.add_argument("--bound", type=float, default=1000.0, help="p99 from arrival to commit in ms (%(default)g)")
    parser.add_argument("--lane-bytes", type=int, default=192 << 20, help="size of a lane (%(default)s)")
    options = parser.parse_args()
    lane_dir = rig.private_folder(Path("/dev/shm"), "orbitstream-overload", 0o700)
    options.home = rig.private_folder(settings.load({}).home, "overload")
    try:
        with ExitStack() as stack:
            if options.database_url:
                dsn = stack.enter_context(trial.scratch(options.database_url))
            else:
                dsn = stack.enter_context(rig.private_database(options.home, lambda _: None)).dsn
            result = measure(dsn, lane_dir, options)
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(options.home, ignore_errors=True)
    print(json.dumps(result, indent=1))
    ratios = [result[of]["said_over_came"] for of in ("capacity", "twice_the_knee")]
    return 0 if all(ratio is not None and 0.8 <= ratio <= 1.2 for ratio in ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
