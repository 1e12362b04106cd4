"""The HTTP edge under wrk: requests/s by worker class and durability, in turns, and the latency at half the rate.

python -m bench.edge --seconds 4 --rounds 3        (wrk: apt install wrk)
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from bench import results
from engine import migrate, rig, settings

POINT = '{"satellite_id":"SAT-%06d","battery_charge_percent":80.5,"storage_usage_mb":1000,"signal_strength_dbm":-70}'
SCRIPT = """
wrk.method, wrk.path = "POST", "{path}"
wrk.headers["Content-Type"] = "application/json"
local points = {{}}
for number = 1, {points} do points[number] = string.format('{point}', number) end
wrk.body = table.concat(points, ",")
if {points} > 1 then wrk.body = "[" .. wrk.body .. "]" end
"""
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}

# name: worker class, durability, points a request
CASES = {
    "one point, event loop": ("eventloop", "process", 1),
    "one point, gthread": ("gthread", "process", 1),
    "one point, event loop, disk": ("eventloop", "disk", 1),
    "1,000 points, event loop": ("eventloop", "process", 1000),
    "1,000 points, event loop, disk": ("eventloop", "disk", 1000),
}
RATIOS = {
    "event loop to gthread": ("one point, event loop", "one point, gthread"),
    "disk to process, one point": ("one point, event loop, disk", "one point, event loop"),
    "disk to process, 1,000 points": ("1,000 points, event loop, disk", "1,000 points, event loop"),
}


def load(url: str, points: int, seconds: float, connections: int) -> dict[str, Any]:
    """Run wrk; return requests/s, latency in ms, and how many answers were no 202."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        path = "/telemetry" if points == 1 else "/telemetry/batch"
        script.write(SCRIPT.format(path=path, points=points, point=POINT))
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}", "--latency", "-s", script.name, url]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", told)
    latency = {f"p{share}_ms": float(value) * UNITS[unit] for share, value, unit in
               re.findall(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s)\s*$", told, re.MULTILINE)}  # fmt: skip
    return {
        "requests_per_second": float(re.findall(r"Requests/sec:\s+([\d.]+)", told)[0]),
        "requests": int(re.findall(r"(\d+) requests in", told)[0]),
        "not_202": int(failed[1]) if failed else 0,
        **latency,
    }


def measure(case: str, dsn: str, options: argparse.Namespace, *, rate: float | None = None) -> dict[str, Any]:
    """Measure one case on a service of its own; with `rate`, by the simulator at so many requests/s, open loop."""
    worker_class, durability, points = CASES[case]
    parent = Path("/var/tmp" if durability == "disk" else "/dev/shm")
    lane_dir = rig.private_folder(parent, "orbitstream-edge", 0o700)
    overrides = rig.overrides(dsn, lane_dir, options.workers, options.writers) | {
        "ORBITSTREAM_DURABILITY": durability,
        "ORBITSTREAM_WORKER_CLASS": worker_class,
    }
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("TRUNCATE telemetry")
            with rig.service(overrides, lane_dir) as (_, url):
                if rate is None:
                    found = load(url, points, options.seconds, options.connections)
                    accepted = (found["requests"] - found["not_202"]) * points
                else:
                    flags = {"--rate": rate / 1000, "--satellites": 1000, "--batch": 1, "--duration": options.seconds}
                    found = rig.simulate(url, {**flags, "--anomaly-rate": 0})
                    accepted = found["accepted"]
                begun = time.monotonic()
                while (stored := _stored(connection)) < accepted:
                    if time.monotonic() - begun > 60:
                        raise rig.RigError(f"{accepted - stored} points of {accepted} were not stored after 60 s")
                    time.sleep(0.1)  # a count is a query: often enough for a figure in tenths
                drained = time.monotonic() - begun
                found["drained_after_s"] = round(drained, 2)
                found["committed_points_per_second"] = round(accepted / (options.seconds + drained))
                return found
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)


def _stored(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT count(*) FROM telemetry").fetchone()
    assert row is not None
    return int(row[0])


def main() -> int:
    """Measure every case in turns, write results/edge.json, print a line each."""
    parser = argparse.ArgumentParser(prog="python -m bench.edge", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=4.0)
    add("--rounds", type=int, default=3)
    add("--connections", type=int, default=64)
    add("--workers", type=int, default=2)
    add("--writers", type=int, default=1)
    add("--output", type=Path)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("bench.edge: wrk is not installed: apt install wrk", file=sys.stderr)
        return 2
    home = rig.private_folder(Path("/tmp"), "orbitstream-edge")
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    try:
        with rig.private_database(home, lambda message: None) as server:
            migrate.migrate(settings.load({}), server.dsn, lambda message: None)
            for _ in range(options.rounds):
                for case in CASES:
                    found = measure(case, server.dsn, options)
                    runs[case].append(found)
                    print(
                        f"{case:32} {found['requests_per_second']:>8,.0f} requests/s, p50 {found['p50_ms']:.1f} ms, "
                        f"p99 {found['p99_ms']:.1f} ms, all stored {found['drained_after_s']:.1f} s later",
                        flush=True,
                    )
            rates = {case: statistics.median(run["requests_per_second"] for run in runs[case]) for case in CASES}
            half = rates["one point, event loop"] / 2
            open_loop = measure("one point, event loop", server.dsn, options, rate=half)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    committed = {case: statistics.median(run["committed_points_per_second"] for run in runs[case]) for case in CASES}
    ratios = {name: round(rates[above] / rates[below], 3) for name, (above, below) in RATIOS.items()}
    ratios |= {
        f"{name}, committed": round(committed[above] / committed[below], 3) for name, (above, below) in RATIOS.items()
    }
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:.2f} (medians of {options.rounds})")
    latency = open_loop["latency_ms"]
    print(f"at {half:,.0f} requests/s, open loop: p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms")
    configuration = {
        name: getattr(options, name) for name in ("seconds", "rounds", "connections", "workers", "writers")
    }
    figures = {"runs": runs, "ratios": ratios, "half_rate": {"requests_per_second": half, "latency_ms": latency}}
    path = results.save("edge", configuration, figures, options.output)
    results.bars("edge", "requests accepted", "requests/s", rates, options.output)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
