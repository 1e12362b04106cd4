"""Bytes a point in the columnstore, of the simulator's readings: as writers store them, and once the policy has run.

python -m bench.storage --database-url postgresql://...        (TimescaleDB under the timescale license)
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from bench import results
from bench.ingest import store
from engine import copy_format, migrate, policies, rig, settings, trial
from engine.columnstore import Columnstore
from engine.rows import Columns, take
from simulator.fleet import CHANNEL_SETS, Fleet, satellite_ids

BATCH = 50_000


def measure(channels: str, options: argparse.Namespace) -> dict[str, Any]:
    """Store a reading a second of every satellite, two days ago; return the bytes a point."""
    config = settings.load({"DATABASE_URL": options.database_url})
    home = rig.private_folder(Path("/tmp"), "orbitstream-bench")
    try:
        with trial.scratch_database(config, home) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
            edition = migrate.find_edition(connection)
            if edition.name != "timescale":
                raise SystemExit(f"this needs the timescale license, and here is {edition}")
            columnstore = Columnstore(connection)
            fleet = Fleet(0, options.satellites, seed=5, anomaly_rate=0.01, channels=channels)
            ids = satellite_ids(0, options.satellites, options.satellites)
            first = (time.time_ns() // 1_000 // 3_600_000_000 - 48) * 3_600_000_000
            for start in range(0, options.points, BATCH):
                number = np.arange(start, min(start + BATCH, options.points))
                readings = fleet.read(number % options.satellites, first + number * 1_000_000 // options.satellites)
                values = {
                    channel.name: column / 10.0**channel.decimals
                    for channel, column in zip(fleet.channels, readings.values, strict=True)
                }
                columns = Columns(readings.time_us, ids[readings.satellite], values, readings.anomaly > 0)
                store(connection, columnstore, take(columns, copy_format.order(columns)))
            written = _bytes(connection) / options.points
            connection.execute(
                f"CALL run_job({policies.job_of(connection, 'telemetry', 'policy_compression')})".encode()
            )
            rewritten = _bytes(connection) / options.points
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return {
        "server": str(edition),
        "channels": len(fleet.channels),
        "bytes_per_point": {"written": round(written, 1), "rewritten": round(rewritten, 1)},
    }


def _bytes(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT hypertable_size('telemetry')").fetchone()
    assert row is not None
    return int(row[0])


def main() -> int:
    """Measure each set of channels, write results/storage.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.storage", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--database-url", default=os.environ.get("DATABASE_URL"), help="the server (DATABASE_URL)")
    add("--points", type=int, default=5_000_000)
    add("--satellites", type=int, default=1000)
    add("--output", type=Path)
    options = parser.parse_args()
    figures = {channels: measure(channels, options) for channels in CHANNEL_SETS}
    for channels, found in figures.items():
        print(f"{channels:8} channels: {found['bytes_per_point']} bytes a point")
    configuration = {"points": options.points, "satellites": options.satellites}
    print(results.save("storage", configuration, figures, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
