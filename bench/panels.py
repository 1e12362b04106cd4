"""How long each query of the boards and alerts takes on an hour of points: panel, rows, milliseconds.

python -m bench.panels --database-url postgresql://... [--rate 10000]

A scratch database is made on the server, filled and dropped. With --as-is the database itself is asked, and nothing is
stored in it: the panels of an installation as they are, the last hour of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg

from bench import boards, hour
from engine import migrate, policies, settings, trial

BOUND_MS = 200.0
EPISODES_A_POINT = 0.005
"""What a fleet with the simulator's 1 % of anomalous readings makes."""


def load(url: str, options: argparse.Namespace, end: datetime) -> None:
    """Migrate an empty database and fill it with an hour of `rate` points a second; policies have run once."""
    config = settings.load({})
    edition = migrate.migrate(config, url, lambda _: None)
    points = round(options.rate * 3600)
    with migrate.connect(url, "orbitstream-bench") as connection:
        if edition.name == "timescale":
            connection.execute("SELECT alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs")
        hour.copy_points(connection, end, options.satellites, points)
        hour.surround(connection, end, options.satellites, round(points * EPISODES_A_POINT))
        if edition.name == "timescale":
            for each in policies.AGGREGATES:
                job = policies.job_of(connection, each.name, "policy_refresh_continuous_aggregate")
                connection.execute(f"CALL run_job({job})".encode())
        connection.execute("VACUUM ANALYZE")


def ask(url: str, satellite: str, repeat: int, end: datetime) -> Iterator[dict[str, Any]]:
    """Yield for each query its name, the rows that it finds in the hour up to `end`, and its median milliseconds."""
    with migrate.connect(url, "orbitstream-bench") as connection:
        edition = migrate.find_edition(connection)
    with boards.opened(url, edition, end) as opened:
        for query in boards.all_queries():
            view = opened.view(interval=query.interval, satellites=(satellite,))
            found = len(opened.ask(query.sql, view)[1])
            # The lambda is called within the turn that makes it.
            taken = [boards.timed(lambda: opened.ask(query.sql, view)) for _ in range(repeat)]  # noqa: B023
            yield {"panel": query.name, "rows": found, "ms": round(statistics.median(taken), 1)}


def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    end = datetime.now(UTC).replace(microsecond=0)
    begun = time.monotonic()
    if not options.as_is:
        load(url, options, end)
        print(f"an hour is loaded, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    with psycopg.connect(url, autocommit=True) as connection:
        found = connection.execute("SELECT min(satellite_id) FROM satellite_latest").fetchone()
        edition = migrate.find_edition(connection)
        [(newest,)] = connection.execute("SELECT max(time) FROM satellite_latest").fetchall()
    satellite = options.satellite or (found and found[0]) or "-"
    end = newest or end
    return {"server": str(edition), "panels": list(ask(url, satellite, options.repeat, end))}


def main() -> int:
    """Print the table; exit code 1 when a query took longer than the bound."""
    parser = argparse.ArgumentParser(prog="bench.panels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL"), help="the server (DATABASE_URL)")
    parser.add_argument("--as-is", action="store_true", help="ask the last hour of the database itself; store nothing")
    parser.add_argument("--rate", type=float, default=10_000, help="points a second of the hour (%(default)s)")
    parser.add_argument("--satellites", type=int, default=1000, help="of the hour (%(default)s)")
    parser.add_argument("--satellite", help="whose board is asked for (the first)")
    parser.add_argument("--repeat", type=int, default=3, help="times that each query is timed (%(default)s)")
    parser.add_argument("--bound", type=float, default=BOUND_MS, help="milliseconds allowed (%(default)g)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.database_url is None:
        parser.error("--database-url or DATABASE_URL is needed")
    try:
        if options.as_is:
            result = measure(options.database_url, options)
        else:
            with trial.scratch(options.database_url) as url:
                result = measure(url, options)
    except psycopg.errors.InsufficientPrivilege as error:
        parser.error(f"{error}: give the account that owns the tables, which may become orbitstream_read")
    slow = [each for each in result["panels"] if each["ms"] > options.bound]
    if options.json:
        print(json.dumps({**result, "bound_ms": options.bound, "slow": len(slow)}))
    else:
        print(f"{'panel':62} {'rows':>6} {'ms':>8}")
        for each in sorted(result["panels"], key=lambda each: -each["ms"]):
            print(f"{each['panel']:62} {each['rows']:6} {each['ms']:8.1f}")
        print(f"{len(result['panels'])} queries, {len(slow)} over {options.bound:g} ms, {result['server']}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
