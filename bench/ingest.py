"""End to end with real processes: points/s committed against COPY alone in the same run, CPU a point, memory.

python -m bench.ingest --seconds 5 --format json
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import psycopg

from bench import results
from engine import migrate, rig, settings, trial
from simulator.control import make_jobs
from simulator.flags import build_parser, settings_from
from simulator.load import Plan

FLEETS = (100, 10_000, 100_000)


def orjson_us(batch: int) -> float:
    """Return the CPU time of orjson.loads a point, in us, over bodies as the simulator sends them."""
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
    begin = time.process_time()
    for _ in range(5):
        for body in bodies:
            orjson.loads(body)
    return (time.process_time() - begin) / (5 * points) * 1e6


class Memory(threading.Thread):
    """Sample the largest process of each stage every half second."""

    def __init__(self, service: int) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._done = threading.Event()
        self.samples: list[dict[str, int]] = []
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.5):
            self.samples.append(rig.anonymous_bytes(self._service))

    def stop(self) -> dict[str, list[float]]:
        """Return MB by stage, sample after sample."""
        self._done.set()
        self.join()
        stages = self.samples[0] if self.samples else {}
        return {stage: [round(sample.get(stage, 0) / 1e6, 1) for sample in self.samples] for stage in stages}


def measure(satellites: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one size of fleet on a database and a service of its own."""
    config = settings.load({})
    home = rig.private_folder(Path("/tmp"), "orbitstream-bench")
    lane_dir = rig.private_folder(Path("/dev/shm"), "orbitstream-bench", 0o700)
    flags = argparse.Namespace(**{**vars(options), "satellites": satellites})
    try:
        with rig.private_database(home, lambda message: None) as server:
            migrate.migrate(config, server.dsn, lambda message: None)
            ceiling = trial.copy_ceiling(server.dsn, satellites, options.writers, seconds=options.seconds / 2)
            overrides = rig.overrides(server.dsn, lane_dir, flags.workers, flags.writers)
            with rig.service(overrides, lane_dir) as (service, url), psycopg.connect(server.dsn) as connection:
                connection.autocommit = True
                bench = trial.Bench(service.pid, url, lane_dir, connection, flags)
                memory = Memory(service.pid)
                found = bench.trial(0.0)
                sizes = memory.stop()
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
    return {
        "satellites": satellites,
        "accepted_per_second": round(found.accepted),
        "committed_per_second": round(found.committed),
        "copy_per_second": round(ceiling),
        "committed_to_copy": round(found.committed / ceiling, 3),
        "cpu_us_per_point": {stage: round(value, 3) for stage, value in found.cpu_us.items()},
        "memory_mb": sizes,
    }


def main() -> int:
    """Measure every fleet, write results/ingest-FORMAT.json, print a line each."""
    parser = argparse.ArgumentParser(prog="python -m bench.ingest", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--fleets", type=int, nargs="+", default=list(FLEETS))
    add("--seconds", type=float, default=5.0)
    add("--batch", type=int, default=1000)
    add("--format", default="json", choices=["json", "columnar", "ndjson", "arrow"])
    add("--workers", type=int, default=2)
    add("--writers", type=int, default=1)
    add("--output", type=Path)
    options = parser.parse_args()
    floor = orjson_us(options.batch)
    figures = []
    for satellites in options.fleets:
        found = measure(satellites, options)
        ours = sum(found["cpu_us_per_point"][stage] for stage in ("edge", "writer", "maintenance", "supervisor"))
        found["cpu_to_orjson"] = round(ours / floor, 2)
        figures.append(found)
        print(
            f"{satellites:>7,} satellites: committed {found['committed_per_second']:,}/s, "
            f"{found['committed_to_copy']:.2f} of COPY alone, CPU {ours:.2f} us a point, "
            f"{found['cpu_to_orjson']:.1f} times orjson.loads",
            flush=True,
        )
    growth = figures[-1]["committed_per_second"] / figures[0]["committed_per_second"]
    configuration = {name: getattr(options, name) for name in ("seconds", "batch", "format", "workers", "writers")}
    name = f"ingest-{options.format}"
    path = results.save(
        name, configuration, {"fleets": figures, "largest_to_smallest": round(growth, 3)}, options.output
    )
    rates = {f"{found['satellites']:,} satellites": float(found["committed_per_second"]) for found in figures}
    results.bars(name, "committed end to end", "points/s", rates, options.output)
    print(f"largest fleet to smallest: {growth:.2f}; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
