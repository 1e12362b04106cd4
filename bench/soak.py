"""A long run: load at 70 % of the knee, a SIGKILL a minute; memory, latency, conservation, exactly once.

python -m bench.soak --minutes 30
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from bench import results
from bench.memory import Samples, slopes
from engine import heartbeat, migrate, rig, settings, trial
from engine.demo import compare
from engine.rig import RigError

KNEE_SHARE = 0.7
DISK_BYTES = 175
"""Of disk for a point: its row and index entries, the log of what was sent, and what the WAL holds meanwhile."""
SAMPLE_S = 2.0


class Watch(threading.Thread):
    """Sample memory and commit latency, and kill a worker or a writer now and then."""

    def __init__(self, service: int, lane_dir: Path, kill_every: float) -> None:
        super().__init__(daemon=True)
        self._service, self._lane_dir, self._kill_every = service, lane_dir, kill_every
        self._done = threading.Event()
        self.memory: Samples = []
        self.bins: list[np.ndarray[Any, Any]] = []
        self.kills = {"edge": 0, "writer": 0}
        self.start()

    def run(self) -> None:
        dice = random.Random(1)
        begin = time.monotonic()
        next_kill = begin + self._kill_every
        while not self._done.wait(SAMPLE_S):
            now = time.monotonic()
            self.memory.append((now - begin, rig.anonymous_bytes(self._service)))
            self.bins.append(np.asarray(sum(b.latency_bins for b in heartbeat.read_all(self._lane_dir)), np.uint64))
            if now >= next_kill:
                next_kill += self._kill_every
                self._kill(dice)

    def _kill(self, dice: random.Random) -> None:
        # The arbiter is not among them: it is the parent of the workers, which have no children.
        tree = rig.process_tree(self._service)
        victims = [(pid, "writer") for pid, command in tree.items() if "engine.writer" in command]
        edge = [pid for pid, command in tree.items() if "gunicorn" in command]
        victims += [(pid, "edge") for pid in edge if len(rig.process_tree(pid)) == 1]
        pid, stage = dice.choice(victims)
        os.kill(pid, signal.SIGKILL)
        self.kills[stage] += 1

    def stop(self) -> None:
        self._done.set()
        self.join()


def drift(bins: list[np.ndarray[Any, Any]]) -> dict[str, float]:
    """Return the p99 from arrival to commit, in ms, of the first and the last third."""
    third = len(bins) // 3
    first, last = bins[third] - bins[0], bins[-1] - bins[-third - 1]
    return {name: round(heartbeat.latency_ms(part, (0.99,))[0], 1) for name, part in (("first", first), ("last", last))}


def soak(options: argparse.Namespace, home: Path, lane_dir: Path) -> dict[str, Any]:
    """Run it all; return the figures."""
    with rig.private_database(home, lambda message: None) as server:
        migrate.migrate(settings.load({}), server.dsn, lambda message: None)
        overrides = rig.overrides(server.dsn, lane_dir, options.workers, options.writers)
        knee = options.rate / KNEE_SHARE if options.rate else find_knee(server.dsn, lane_dir, overrides, options)
        rate = KNEE_SHARE * knee
        needed, free = rate * options.minutes * 60 * DISK_BYTES, shutil.disk_usage(home).free
        if needed > free:
            raise RigError(
                f"{needed / 1e9:.0f} GB are needed in {home.parent} and {free / 1e9:.0f} are free: "
                "give fewer --minutes (SOAK_MINUTES with make), or a lower --rate"
            )
        sent_log = home / "sent.parquet"  # gigabytes: not into memory
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute("TRUNCATE telemetry")
        with rig.service(overrides, lane_dir) as (service, url):
            rig.say("soak", f"{rate:,.0f} points/s for {options.minutes:g} minutes")
            watch = Watch(service.pid, lane_dir, options.kill_every)
            load = argparse.Namespace(**{**vars(options), "seconds": options.minutes * 60})
            flags = trial.load_flags(rate, load)
            report = rig.simulate(url, {**flags, "--sent-log": sent_log, "--idempotency-keys": True})
            watch.stop()
            rig.stop(service)
        verify = subprocess.run(
            [sys.executable, "-P", "-m", "engine", "verify", "--json"],
            env={**os.environ, **overrides}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            rig.say("soak", f"comparing {report['sent']:,} points sent with what is stored")
            comparison = compare(sent_log, connection)
    lanes = json.loads(verify.stdout)["lanes"]
    return {
        "knee_points_per_second": round(knee),
        "accepted": comparison.accepted,
        "unknown": report["unknown"],
        "refused": report["refused"],
        "retries": report["retries"],
        "lost": comparison.lost,
        "duplicated": comparison.duplicated,
        "invented": comparison.invented,
        "residual": sum(abs(lane["residual"]) for lane in lanes),
        "kills": watch.kills,
        "memory_percent_a_minute": slopes(watch.memory),
        "memory_mb": {stage: round(size / 1e6, 1) for stage, size in watch.memory[-1][1].items()},
        "commit_p99_ms": drift(watch.bins),
        "latency_ms": report["latency_ms"],
    }


def find_knee(dsn: str, lane_dir: Path, overrides: dict[str, str], options: argparse.Namespace) -> float:
    """Return the knee, by a short search."""
    rig.say("soak", "looking for the knee")
    with rig.service(overrides, lane_dir) as (service, url), psycopg.connect(dsn, autocommit=True) as connection:
        bench = trial.Bench(service.pid, url, lane_dir, connection, options)
        full = bench.trial(0.0)
        knee, _ = trial.find_knee(bench, full, options, lambda: 1.0)
        rig.stop(service)
    return knee.offered


def main() -> int:
    """Soak; exit code 1 when a point was lost, duplicated or invented, or the residual is not 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=30.0)
    add("--kill-every", type=float, default=60.0, help="seconds from one SIGKILL to the next (60)")
    add("--rate", type=float, help="points/s (70 %% of the knee, which is looked for first)")
    add("--batch", type=int, default=1000)
    add("--satellites", type=int, default=1000)
    add("--workers", type=int, default=2)
    add("--writers", type=int, default=1)
    add("--output", type=Path)
    parser.set_defaults(bound=500.0, seconds=4.0, trials=8)
    options = parser.parse_args()
    home = rig.private_folder(Path("/tmp"), "orbitstream-soak")
    lane_dir = rig.private_folder(Path("/dev/shm"), "orbitstream-soak", 0o700)
    try:
        figures = soak(options, home, lane_dir)
    except RigError as error:
        parser.exit(1, f"soak: {error}\n")
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
    configuration = {name: getattr(options, name) for name in ("minutes", "kill_every", "batch", "satellites")}
    path = results.save("soak", configuration, figures, options.output)
    wrong = sum(figures[name] for name in ("lost", "duplicated", "invented", "residual"))
    print(
        f"accepted {figures['accepted']} points in {options.minutes:g} min, {sum(figures['kills'].values())} kills: "
        f"{figures['lost']} lost, {figures['duplicated']} duplicated, residual {figures['residual']}; "
        f"p99 to commit {figures['commit_p99_ms']['first']} ms, then {figures['commit_p99_ms']['last']} ms; "
        f"memory {figures['memory_percent_a_minute']} % a minute; {path}"
    )
    return 1 if wrong or not figures["accepted"] else 0


if __name__ == "__main__":
    sys.exit(main())
