"""`orbitstream demo`: the whole engine on this machine, and a proof that it lost nothing.

Starts a private database, the service and the simulator, and then compares the set of points that the simulator sent
with the set of rows that the database has: sets, not counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psycopg
from psycopg import sql

from engine import heartbeat, rig
from engine.rig import RigError
from engine.settings import Settings

if TYPE_CHECKING:  # imported where it is used: 20 MB that a supervisor has no need of
    from datetime import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

SHOWN_KEYS: Final = 10
# Bounds the memory of a comparison to about 1 GB, whatever the length of the run.
SLICE_POINTS: Final = 1 << 22


@dataclass(slots=True)
class Comparison:
    """The set sent against the set stored. Keys are (satellite_id, time)."""

    sent: int = 0
    accepted: int = 0
    committed: int = 0
    lost: int = 0
    duplicated: int = 0
    invented: int = 0
    first_keys: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.invented)


def compare(sent_log: Path, connection: psycopg.Connection[Any]) -> Comparison:
    """Compare the simulator's log with the table, one slice of time after the other.

    Accepted points must be stored exactly once, points of unknown outcome at most once, refused ones not at all, and
    nothing may be stored that was not sent.
    """
    import pyarrow.parquet as pq

    found = Comparison()
    for begin, end in pairwise(_bounds(pq.ParquetFile(sent_log).metadata)):
        _add_slice(found, _sent(sent_log, begin, end), _stored(connection, begin, end))
    return found


def _bounds(log: pq.FileMetaData) -> list[datetime | None]:
    """Cut all time into slices of about SLICE_POINTS sent; the log is nearly sorted, its groups tell where."""
    column = log.schema.to_arrow_schema().get_field_index("time")
    groups = [log.row_group(number) for number in range(log.num_row_groups)]
    cuts: list[datetime | None] = []
    points = 0
    for earliest, group in sorted((group.column(column).statistics.min, group.num_rows) for group in groups):
        if points >= SLICE_POINTS:
            cuts.append(earliest)
            points = 0
        points += group
    return [None, *cuts, None]


def _add_slice(found: Comparison, sent: pa.Table, stored: pa.Table) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    stored = stored.group_by(["satellite_id", "time"]).aggregate([([], "count_all")])
    joined = sent.join(stored, ["satellite_id", "time"], join_type="full outer")
    rows = pc.fill_null(joined["count_all"], 0)
    outcome = pc.fill_null(joined["outcome"], "never sent")
    accepted = pc.equal(outcome, "accepted")
    lost = pc.and_(accepted, pc.equal(rows, 0))
    duplicated = pc.greater(rows, 1)
    unexpected = pc.and_(pc.is_in(outcome, pa.array(["refused", "never sent"])), pc.greater(rows, 0))
    wrong = joined.filter(pc.or_(pc.or_(lost, duplicated), unexpected)).slice(0, SHOWN_KEYS - len(found.first_keys))
    found.first_keys += [
        f"{row['satellite_id']} {np.datetime64(row['time'], 'us')}Z: {row['outcome'] or 'never sent'}, "
        f"{row['count_all'] or 0} rows"
        for row in wrong.to_pylist()
    ]
    found.sent += len(sent)
    found.accepted += _count(accepted)
    found.committed += int(pc.sum(rows).as_py() or 0)
    found.lost += _count(lost)
    found.duplicated += _count(duplicated)
    found.invented += _count(unexpected)


def _count(mask: Any) -> int:
    return int(mask.cast("int64").to_numpy().sum())


def _sent(sent_log: Path, begin: datetime | None, end: datetime | None) -> pa.Table:
    """Read the keys and outcomes of what was sent for a slice of time."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    inside = pa.compute.scalar(True)
    if begin is not None:
        inside &= ds.field("time") >= begin
    if end is not None:
        inside &= ds.field("time") < end
    keys = {
        "satellite_id": ds.field("satellite_id").cast(pa.string()),
        "time": ds.field("time").cast(pa.int64()),
        "outcome": ds.field("outcome").cast(pa.string()),
    }
    return ds.dataset(sent_log).to_table(keys, inside)


def _stored(connection: psycopg.Connection[Any], begin: datetime | None, end: datetime | None) -> pa.Table:
    """Read the keys of the rows in a slice of time."""
    import pyarrow as pa
    import pyarrow.csv

    keys = sql.SQL(
        "COPY (SELECT (extract(epoch FROM time) * 1000000)::bigint, satellite_id FROM telemetry"
        " WHERE time >= {} AND time < {}) TO STDOUT (FORMAT CSV)"
    ).format(begin or "-infinity", end or "infinity")
    with tempfile.TemporaryFile() as spool:
        with connection.cursor().copy(keys) as copy:
            for block in copy:
                spool.write(block)
        if spool.tell() == 0:
            return pa.table({"time": pa.array([], pa.int64()), "satellite_id": pa.array([], pa.string())})
        spool.seek(0)
        return pyarrow.csv.read_csv(
            spool,
            pyarrow.csv.ReadOptions(column_names=["time", "satellite_id"]),
            convert_options=pyarrow.csv.ConvertOptions(column_types={"time": pa.int64(), "satellite_id": pa.string()}),
        )


def add_command(commands: Any) -> None:
    """Add `demo` to the command line."""
    command = commands.add_parser(
        "demo",
        help="run everything here for a few seconds and prove that nothing was lost",
        description="Start a private database, the service and the simulator, stop them all, and compare the set of "
        "points sent with the set stored. DATABASE_URL and a running service are not touched.",
    )
    command.set_defaults(run=run)
    command.add_argument("--satellites", type=int, default=100, help="fleet size (default: %(default)s)")
    command.add_argument(
        "--rate", type=float, default=100.0, help="points/s per satellite, 0 = all it takes (%(default)s)"
    )
    command.add_argument("--duration", type=float, default=10.0, help="seconds of load (default: %(default)s)")
    command.add_argument("--batch", type=int, default=100, help="points a request (default: %(default)s)")
    command.add_argument(
        "--single-share", type=float, help="share of points sent one a request (0.05; 0 with --rate 0)"
    )
    command.add_argument("--workers", type=int, default=2, help="web workers (default: %(default)s)")
    command.add_argument("--writers", type=int, default=1, help="writers (default: %(default)s)")
    command.add_argument("--processes", type=int, help="simulator processes (default: the simulator's choice)")
    command.add_argument("--seed", type=int, default=1, help="seed of the fleet (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(config: Settings, options: argparse.Namespace) -> int:
    """Run the demo; exit code 1 if a point was lost, duplicated or invented."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    home, lane_dir = rig.private_folder(config.home), rig.private_folder(Path("/dev/shm"), "orbitstream-demo", 0o700)
    try:
        result = _run_in(home, lane_dir, options)
    except RigError as error:
        print(f"orbitstream demo: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
    comparison: Comparison = result.pop("comparison")
    for key in comparison.first_keys:
        print(f"  {key}", file=sys.stderr)
    if options.json:
        print(json.dumps(result))
    else:
        invented = f", {comparison.invented} never sent or refused" if comparison.invented else ""
        if result["silent"]:  # a satellite in an episode of silence: its readings were due, and nobody lost them
            print(f"{result['silent']} points were never sent: their satellites fell silent")
        print(
            f"committed {comparison.committed} points in {result['seconds']:.1f} s "
            f"({result['points_per_second']}/s), {comparison.lost} lost, {comparison.duplicated} duplicated{invented}"
        )
    return 0 if comparison.clean and comparison.accepted else 1


def _run_in(home: Path, lane_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    _say("starting a private database")
    with rig.private_database(home, _say) as database:
        overrides = rig.overrides(database.dsn, lane_dir, options.workers, options.writers)
        with rig.service(overrides, lane_dir) as (service, url):
            _say(f"the service answers on {url}; sending for {options.duration:g} s")
            sent_log = lane_dir / "sent.parquet"
            report = _simulate(url, sent_log, options)
            _say("stopping the service: it drains its lanes")
            rig.stop(service)
        bins = sum(beat.latency_bins for beat in heartbeat.read_all(lane_dir))
        _say("comparing what was sent with what is stored")
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            comparison = compare(sent_log, connection)
            seconds = _seconds(connection)
    p50, p99 = heartbeat.latency_ms(np.asarray(bins, np.uint64), (0.5, 0.99))
    return {
        "sent": comparison.sent,
        "silent": report["silent"],
        "accepted": comparison.accepted,
        "committed": comparison.committed,
        "lost": comparison.lost,
        "duplicated": comparison.duplicated,
        "invented": comparison.invented,
        "seconds": round(seconds, 3),
        "points_per_second": round(comparison.committed / seconds) if seconds else 0,
        "commit_latency_ms": {"p50": round(p50, 2), "p99": round(p99, 2)},
        "simulator": report,
        "comparison": comparison,
    }


def _seconds(connection: psycopg.Connection[Any]) -> float:
    """Return the time from the first point's reception to the last commit."""
    row = connection.execute(
        "SELECT extract(epoch FROM (SELECT max(updated_at) FROM ingest_progress) - min(received_at)) FROM telemetry"
    ).fetchone()
    return float(row[0]) if row and row[0] is not None else 0.0


def _simulate(url: str, sent_log: Path, options: argparse.Namespace) -> dict[str, Any]:
    share = options.single_share if options.single_share is not None else (0.05 if options.rate else 0.0)
    flags = {
        "--satellites": options.satellites,
        "--rate": options.rate,
        "--duration": options.duration,
        "--batch": options.batch,
        "--single-share": share,
        "--seed": options.seed,
        "--sent-log": sent_log,
    }
    if options.processes:
        flags["--processes"] = options.processes
    return rig.simulate(url, flags)


def _say(message: str) -> None:
    rig.say("demo", message)
