"""Score the detection of anomalies against the simulator's ground truth: python -m bench.detection [--live]

The readings of a fleet at 10,000 points/s go through the same Monitor as a writer's, in transactions of 50 ms that come
from two lanes, the second late by one transaction: of 250 points, as a live run at that rate makes them. An injected
episode is a satellite's run of readings with one kind of anomaly, as far as a reading of it is beyond a limit; it is
found if an episode of that satellite overlaps it. A found episode that overlaps no injected one is false. What limits
cost is marking and moving states; a writer looks up the numbers of satellites for their newest points in any case, so
that is told apart.

With --live the readings go through a service of its own into a private database, or a scratch one on --database-url's
server, and the episodes are those of anomaly_event.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from engine import heartbeat, limits, migrate, rig, settings, trial
from engine.episodes import Episode, Monitor
from engine.rows import Columns
from engine.satellites import Satellites
from simulator.anomalies import Anomaly, beyond_limits
from simulator.fleet import Fleet, satellite_ids

SATELLITES, STEP_US, FLUSH_US = 1000, 100_000, 50_000
NAMES = ("battery_charge_percent", "storage_usage_mb", "signal_strength_dbm")
START_US = 1_790_000_000_000_000


def main() -> int:
    """Print the score as one JSON object."""
    parser = argparse.ArgumentParser(description="Score the detection of anomalies against the simulator's truth.")
    parser.add_argument("--minutes", type=float, default=20, help="time, simulated or live (%(default)s)")
    parser.add_argument("--anomaly-rate", type=float, default=0.01, help="share of the readings (%(default)s)")
    parser.add_argument("--live", action="store_true", help="through a running service")
    parser.add_argument(
        "--database-url", default=os.environ.get("DATABASE_URL"), help="with --live: the server (a private one)"
    )
    options = parser.parse_args()
    print(json.dumps(live(options) if options.live else offline(options)))
    return 0


def live(options: argparse.Namespace) -> dict[str, Any]:
    """Send the fleet's readings to a service, and score the episodes that the database has afterwards."""
    lane_dir = rig.private_folder(Path("/dev/shm"), "orbitstream-detection", 0o700)
    home = rig.private_folder(settings.load({}).home, "detection")
    truth = lane_dir / "truth.parquet"
    try:
        with ExitStack() as stack:
            if options.database_url:
                dsn = stack.enter_context(trial.scratch(options.database_url))
            else:
                dsn = stack.enter_context(rig.private_database(home, lambda _: None)).dsn
            migrate.migrate(settings.load({}), dsn, lambda _: None)
            running, url = stack.enter_context(rig.service(rig.overrides(dsn, lane_dir, 2, 1), lane_dir))
            flags = {"--satellites": SATELLITES, "--rate": 1e6 / STEP_US, "--duration": options.minutes * 60}
            flags |= {"--batch": 100, "--anomaly-rate": options.anomaly_rate, "--truth": truth, "--quiet": True}
            sent = rig.simulate(url, flags)
            flushes = sum(beat.flushes for beat in heartbeat.read_all(lane_dir))
            rig.stop(running)
            with psycopg.connect(dsn) as connection:
                episodes = list(stored(connection))
        report = score(read_truth(truth), episodes, SATELLITES * options.minutes / 1440)
        return {
            **report,
            "points": sent["accepted"],
            "refused": sent["refused"],
            "points_a_second": round(sent["accepted"] / sent["seconds"]),
            "points_a_transaction": round(sent["accepted"] / max(1, flushes)),
        }
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def stored(connection: psycopg.Connection[Any]) -> Iterator[Episode]:
    for name, channel, onset, cleared in connection.execute(
        "SELECT satellite_id, channel, (extract(epoch FROM onset) * 1000000)::bigint,"
        " coalesce(extract(epoch FROM cleared_at) * 1000000, 0)::bigint FROM anomaly_event"
    ):
        yield Episode(name.encode(), channel, "", 0, onset, 0.0, onset, 0.0, cleared=cleared)


def read_truth(path: Path) -> list[tuple[np.ndarray, ...]]:
    """Return what the simulator says of its anomalous readings: satellites, times, kinds, beyond a limit."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    heard = np.array(table["outcome"].to_pylist()) == "accepted"
    satellite = np.array([int(name[4:]) for name in table["satellite_id"].to_pylist()])
    kind = np.array([Anomaly[name.upper()] for name in table["anomaly"].to_pylist()])
    moment = table["time"].cast("int64").to_numpy()
    return [(satellite[heard], moment[heard], kind[heard], table["beyond_limit"].to_numpy()[heard])]


def offline(options: argparse.Namespace) -> dict[str, Any]:
    """Put the fleet's readings through a Monitor, and score the episodes that it tells of."""
    fleet = Fleet(0, SATELLITES, seed=1, anomaly_rate=options.anomaly_rate)
    ids = satellite_ids(0, SATELLITES, SATELLITES)
    known = Satellites()
    monitor = Monitor(limits.of_settings(settings.load({})), known)
    found: dict[int, Episode] = {}
    truth: list[tuple[np.ndarray, ...]] = []
    cost, points = {"mark": 0.0, "satellites": 0.0, "advance": 0.0}, 0
    satellite = np.arange(SATELLITES)
    waiting: list[Columns] = []
    transactions = 0
    for step in range(round(options.minutes * 600)):
        moments = START_US + step * STEP_US + satellite * STEP_US // SATELLITES
        readings = fleet.read(satellite, moments)
        heard = readings.anomaly != Anomaly.SILENCE
        truth.append((satellite[heard], moments[heard], readings.anomaly[heard], beyond_limits(readings.values)[heard]))
        values = readings.values / 100.0
        flush = (moments - START_US) // FLUSH_US
        for number in np.unique(flush).tolist():
            for lane in (0, 1):
                chosen = np.flatnonzero(heard & (flush == number) & ((satellite // 7 + step) % 2 == lane))
                if not len(chosen):
                    continue
                columns = Columns(
                    moments[chosen], ids[chosen], {name: values[row][chosen] for row, name in enumerate(NAMES)},
                    np.zeros(len(chosen), np.bool_),
                )  # fmt: skip
                waiting.append(columns)
                if lane == 1 and len(waiting) < 3:
                    continue
                columns = waiting.pop(0)
                began = time.process_time()
                monitor.mark(columns)
                marked = time.process_time()
                runs = known.runs(columns)
                numbered = time.process_time()
                changed = monitor.advance(columns, runs)
                ended = time.process_time()
                found.update((id(episode), episode) for episode in changed)
                cost["mark"] += marked - began
                cost["satellites"] += numbered - marked
                cost["advance"] += ended - numbered
                points += len(columns)
                transactions += 1
    report = score(truth, list(found.values()), SATELLITES * options.minutes / 1440)
    return {
        **report,
        "points": points,
        "points_a_transaction": round(points / transactions),
        "us_a_point": {part: round(seconds / points * 1e6, 3) for part, seconds in cost.items()},
        "us_a_point_for_limits": round((cost["mark"] + cost["advance"]) / points * 1e6, 3),
    }


def injected(truth: list[tuple[np.ndarray, ...]]) -> dict[int, list[tuple[int, int, int]]]:
    """Return for each satellite its injected episodes with a reading beyond a limit: (first, last time, kind)."""
    satellite, moment, kind, beyond = (np.concatenate(parts) for parts in zip(*truth, strict=True))
    order = np.lexsort((moment, satellite))
    satellite, moment, kind, beyond = satellite[order], moment[order], kind[order], beyond[order]
    apart = (satellite[1:] != satellite[:-1]) | (kind[1:] != kind[:-1]) | (np.diff(moment) > 1.5 * STEP_US)
    cut = np.flatnonzero(apart) + 1
    episodes: dict[int, list[tuple[int, int, int]]] = {}
    for run in np.split(np.arange(len(satellite)), cut):
        if kind[run[0]] != Anomaly.NONE and beyond[run].any():
            place = int(satellite[run[0]])
            episodes.setdefault(place, []).append((int(moment[run[0]]), int(moment[run[-1]]), int(kind[run[0]])))
    return episodes


def score(truth: list[tuple[np.ndarray, ...]], found: list[Episode], satellite_days: float) -> dict[str, object]:
    expected = injected(truth)
    by_satellite: dict[int, list[Episode]] = {}
    for episode in found:
        by_satellite.setdefault(int(episode.satellite[4:]), []).append(episode)
    kinds: dict[str, list[int]] = {}
    matched: set[int] = set()
    for satellite, episodes in expected.items():
        for begin, end, kind in episodes:
            hits = [each for each in by_satellite.get(satellite, ())
                    if each.onset <= end and (each.cleared or 1 << 62) >= begin]  # fmt: skip
            matched.update(map(id, hits))
            counts = kinds.setdefault(Anomaly(kind).name.lower(), [0, 0])
            counts[0] += 1
            counts[1] += bool(hits)
    total, hit = (sum(counts[place] for counts in kinds.values()) for place in (0, 1))
    false = sum(1 for each in found if id(each) not in matched)
    lasting = {name: counts for name, counts in kinds.items() if name != "spike"}
    return {
        "injected": total, "found_share": round(hit / total, 4),
        "lasting": sum(counts[0] for counts in lasting.values()),
        "lasting_found_share": round(
            sum(counts[1] for counts in lasting.values()) / max(1, sum(counts[0] for counts in lasting.values())), 4),
        "by_kind": {name: {"injected": counts[0], "found": counts[1]} for name, counts in sorted(kinds.items())},
        "episodes": len(found), "false": false, "satellite_days": round(satellite_days, 2),
        "false_per_satellite_day": round(false / satellite_days, 3),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
