"""The same load against what one would otherwise write, on the same machine in the same run.

python -m bench.peers --seconds 4
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from bench import results
from bench.peer_app import MODES
from engine import migrate, rig, settings, trial

REPOSITORY = Path(__file__).resolve().parents[1]


@contextmanager
def peer(mode: str, dsn: str) -> Iterator[str]:
    """Run bench.peer_app under gunicorn; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        environment = {**os.environ, "PEER_MODE": mode, "DATABASE_URL": dsn}
        command = [sys.executable, "-m", "gunicorn", "--no-control-socket", "--log-level", "error", "-k", "gthread"]
        command += ["--workers", "2", "--threads", "4", "--bind", f"fd://{listener.fileno()}"]
        running = subprocess.Popen(
            [*command, "bench.peer_app:create_app()"], env=environment, cwd=REPOSITORY, pass_fds=[listener.fileno()]
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()
            running.wait(30)


def measure_peer(mode: str, dsn: str, options: argparse.Namespace) -> float:
    """Return the rows/s that a peer stored, from its first request to its last row."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE telemetry")

        def count() -> int:
            row = connection.execute("SELECT count(*) FROM telemetry").fetchone()
            return int(row[0]) if row else 0

        with peer(mode, dsn) as url:
            # Few connections and much patience: what is sent is stored soon after the end, and nothing is given up.
            flags = {**trial.load_flags(0.0, options), "--connections": 4, "--timeout": 120}
            report = rig.simulate(url, flags)
            ended = time.monotonic()
            # Counting takes time itself: it is not the peer's.
            while (stored := count()) < report["accepted"]:
                if time.monotonic() - ended > 60:
                    raise rig.RigError(f"{mode} stored {stored} of {report['accepted']} rows")
            late = time.monotonic() - ended
    return float(report["accepted"] / (report["seconds"] + late))


def main() -> int:
    """Measure OrbitStream and its peers; write results/peers.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=4.0)
    add("--batch", type=int, default=1000)
    add("--satellites", type=int, default=1000)
    add("--workers", type=int, default=2)
    add("--writers", type=int, default=1)
    add("--output", type=Path)
    options = parser.parse_args()
    home = rig.private_folder(Path("/tmp"), "orbitstream-bench")
    lane_dir = rig.private_folder(Path("/dev/shm"), "orbitstream-bench", 0o700)
    figures: dict[str, Any] = {}
    try:
        with rig.private_database(home, lambda message: None) as server:
            migrate.migrate(settings.load({}), server.dsn, lambda message: None)
            ceiling = trial.Ceiling(server.dsn, options.satellites, 1, seconds=options.seconds / 2)
            figures["copy alone"] = ceiling.measure()
            overrides = rig.overrides(server.dsn, lane_dir, options.workers, options.writers)
            with rig.service(overrides, lane_dir) as (service, url), psycopg.connect(server.dsn) as connection:
                connection.autocommit = True
                bench = trial.Bench(service.pid, url, lane_dir, connection, options)
                figures["orbitstream"] = bench.trial(0.0).committed
            for mode in MODES:
                figures[f"gthread, {mode}"] = measure_peer(mode, server.dsn, options)
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
    ours = figures["orbitstream"]
    for name, rate in figures.items():
        print(f"{name:>22}: {rate:>10,.0f} points/s committed, orbitstream is {ours / rate:.1f} times that")
    table = {
        name: {"points_per_second": round(rate), "orbitstream_to_it": round(ours / rate, 2)}
        for name, rate in figures.items()
    }
    configuration = {name: getattr(options, name) for name in ("seconds", "batch", "satellites", "workers", "writers")}
    print(results.save("peers", configuration, table, options.output))
    results.bars("peers", "committed, batches of JSON", "points/s", figures, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
