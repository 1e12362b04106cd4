"""`orbitstream capacity`: how much this machine and this database take, stage by stage, and what comes first.

A service of its own, with lanes of its own, on a scratch database: made on the server of DATABASE_URL and dropped
afterwards, or on a private embedded server when that is not set. In one run, so that ratios hold:

    ceiling      the same rows by COPY alone, before each trial: the most that the database takes
    saturation   as many points as the edge takes: CPU a point of each stage
    knee         the highest rate with nothing refused and the p99 from arrival to commit under the bound
    overload     twice the knee: how fast the lanes drain while they fill, and when they are full
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psycopg

from engine import rig
from engine.rig import RigError
from engine.settings import Settings
from engine.trial import Bench, Ceiling, Overload, Trial, find_knee, scratch_database

CORES_SHOWN: Final = (1, 2, 4, 8, 16)
OVERLOADS: Final = 3
"""Their medians count: for a moment any machine is slow."""


def add_command(commands: Any) -> None:
    """Add `capacity` to the command line."""
    command = commands.add_parser(
        "capacity",
        help="measure how much this machine and database take, and what limits it (three minutes)",
        description="Load a service of its own on a scratch database of DATABASE_URL's server (or of a private one), "
        "find the knee, and store it in the capacity table of DATABASE_URL. Telemetry and lanes are not touched.",
    )
    command.set_defaults(run=run)
    add = command.add_argument
    add("--satellites", type=positive(int), default=1000, help="fleet size (default: %(default)s)")
    add("--batch", type=positive(int), default=1000, help="points a request (default: %(default)s)")
    add("--workers", type=positive(int), default=2, help="web workers (default: %(default)s)")
    add("--writers", type=positive(int), default=1, help="writers (default: %(default)s)")
    add("--bound", type=positive(float), default=500.0, help="p99 from arrival to commit in ms (default: %(default)s)")
    add("--seconds", type=positive(float), default=4.0, help="length of a trial (default: %(default)s)")
    add("--trials", type=positive(int), default=10, help="steps of the search for the knee (default: %(default)s)")
    add("--output", type=Path, metavar="DIR", help="write capacity.json and, with matplotlib, capacity.png there")
    add("--json", action="store_true", help="print the result as one JSON object")


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return a parser of numbers above 0 for argparse."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = "number"  # argparse's word for what is no number at all
    return parse


def run(config: Settings, options: argparse.Namespace) -> int:
    """Measure; exit code 1 if a trial could not run, or the result could not be stored."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    if config.log_level == "info":  # each connection that COPYs tells where its rows go: of use in a service's log
        logging.getLogger("orbitstream").setLevel(logging.WARNING)
    home = rig.private_folder(config.home, "capacity")
    lane_dir = rig.private_folder(Path("/dev/shm"), "orbitstream-capacity", 0o700)
    try:
        check_table(config)
        with scratch_database(config, home) as dsn:
            result = {**measure(dsn, lane_dir, options), "node": config.node}
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "capacity.json").write_text(json.dumps(result, indent=1) + "\n")
            _plot(result, options.output / "capacity.png")
        print(json.dumps(result) if options.json else to_words(result), flush=True)
        store(config, result)
    except (RigError, psycopg.Error) as error:
        print(f"orbitstream capacity: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
    return 0


def measure(dsn: str, lane_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure ceiling, saturation and knee on an empty database; return the result, JSON-ready."""
    _say("COPY alone")
    ceiling = Ceiling(dsn, options.satellites, options.writers, seconds=options.seconds / 4)
    with (
        rig.service(rig.overrides(dsn, lane_dir, options.workers, options.writers), lane_dir) as (service, url),
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        bench = Bench(service.pid, url, lane_dir, connection, options)
        _say("saturation")
        full = replace(bench.trial(0.0), copy=ceiling.measure())
        _say(f"saturation: accepted {full.accepted:,.0f}/s, committed {full.committed:,.0f}/s; looking for the knee")
        knee, trials = find_knee(bench, full, options, ceiling.measure)
        _say(f"the knee: {knee.offered:,.0f}/s; twice as much")
        overloads = [bench.overload(2 * knee.offered) for _ in range(OVERLOADS)]
        over = Overload(*(statistics.median(rates) for rates in zip(*overloads, strict=True)))
        return describe(knee, full, trials, over, options) | {"lane_points": round(bench.lane_points())}


def describe(
    knee: Trial, full: Trial, trials: list[Trial], over: Overload, options: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    """Put the result together: what was measured, and what follows from it."""
    ours = {stage: full.cpu_us[stage] for stage in ("edge", "writer", "database")}
    serial = max(ours["writer"], ours["database"])
    predicted = {}
    for cores in CORES_SHOWN:
        rate = cores / max(sum(ours.values()), 1e-9) * 1e6
        predicted[str(cores)] = {"points_per_second": round(rate), "writers": math.ceil(rate * serial / 1e6)}
    until = over.seconds_until_full
    return {
        "knee_points_per_second": round(knee.offered),
        "knee_p99_ms": round(knee.p99_ms, 1),
        "edge_points_per_second": round(full.accepted),
        "copy_points_per_second": round(knee.copy),
        "knee_to_copy": round(knee.share, 3),
        "committed_at_saturation_to_copy": round(full.committed / full.copy, 3),
        "cpu_us_per_point": {stage: round(value, 3) for stage, value in full.cpu_us.items()},
        "predicted": predicted,
        "arriving_at_twice_the_knee": round(over.arriving),
        "drain_points_per_second": round(over.draining),
        "seconds_until_full_at_twice_the_knee": until and round(until, 1),
        "cores": len(os.sched_getaffinity(0)),
        "configuration": {
            name: getattr(options, name)
            for name in ("satellites", "batch", "workers", "writers", "bound", "seconds", "trials")
        },
        "trials": [
            {"offered": round(t.offered), "share": round(t.share, 3), "p99_ms": round(t.p99_ms, 1),
             "refused": t.refused, "behind_s": round(t.behind_s, 3)} for t in trials
        ],
    }  # fmt: skip


def check_table(config: Settings) -> None:
    """Raise RigError if the database that serves could not store the result: better now than after minutes."""
    if url := config.migration_database_url or config.database_url:
        with psycopg.connect(url, autocommit=True) as connection:
            if connection.execute("SELECT to_regclass('capacity')").fetchone() == (None,):
                raise RigError(
                    "the database of DATABASE_URL has no table capacity yet: run `orbitstream migrate` first"
                )


def store(config: Settings, result: dict[str, Any]) -> None:
    """Add the result to the capacity table of the database that serves, if one was given."""
    url = config.migration_database_url or config.database_url
    if url is None:
        return
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO capacity (node, knee_points_per_second, drain_points_per_second, copy_points_per_second,"
            " seconds_until_full, cores, report) VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [
                result["node"],
                result["knee_points_per_second"],
                result["drain_points_per_second"],
                result["copy_points_per_second"],
                result["seconds_until_full_at_twice_the_knee"],
                result["cores"],
                json.dumps(result),
            ],
        )


def to_words(result: dict[str, Any]) -> str:
    """Return the result as one line."""
    full = result["seconds_until_full_at_twice_the_knee"]
    until = f"lanes full after {full:.0f} s at twice that" if full else "lanes never full at twice that"
    cpu = ", ".join(f"{stage} {result['cpu_us_per_point'][stage]:.2f}" for stage in ("edge", "writer", "database"))
    return (
        f"knee {result['knee_points_per_second']:,} points/s (p99 {result['knee_p99_ms']:.0f} ms), "
        f"{result['knee_to_copy']:.2f} of COPY alone ({result['copy_points_per_second']:,}/s), {until}; "
        f"CPU us a point: {cpu}"
    )


def _plot(result: dict[str, Any], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _say("no plot: install orbitstream[bench] for matplotlib")
        return
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    trials = sorted(result["trials"], key=lambda trial: trial["offered"])
    axes.plot([t["offered"] for t in trials], [t["p99_ms"] for t in trials], "o-", label="p99, arrival to commit")
    axes.axhline(result["configuration"]["bound"], color="grey", linestyle=":", label="bound")
    axes.axvline(result["knee_points_per_second"], color="tab:green", label="knee")
    axes.axvline(result["copy_points_per_second"], color="tab:red", linestyle="--", label="COPY alone")
    axes.set(xlabel="points/s", ylabel="ms", yscale="log", title=to_words(result).split(";")[0])
    axes.title.set_fontsize(8)
    axes.legend()
    figure.savefig(path, dpi=120)


def _say(message: str) -> None:
    rig.say("capacity", message)
