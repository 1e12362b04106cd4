"""The chores that need the tables' owner; one process per database does them, whichever node it runs on.

An advisory lock elects it; the others wait their turn. Today: retention, where the server has no policy for it.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from typing import Any, Final

import psycopg

from engine import logs, migrate, process, samples, settings
from engine.settings import Settings

ADVISORY_LOCK: Final = 0x6F726269745F6D74  # "orbit_mt"
INTERVAL_S: Final = 60.0
RETRY_S: Final = 5.0
DELETE_ROWS: Final = 20_000
"""Rows deleted in one statement: a few hundred ms, so that autovacuum and the writers are never held up."""

log = logging.getLogger("orbitstream.maintenance")


def drop_old(connection: psycopg.Connection[Any], edition: migrate.Edition, retention_s: float) -> int:
    """Drop points older than the retention; returns rows deleted, or chunks dropped where there are chunks."""
    if edition.timescaledb is not None:
        dropped = connection.execute(
            "SELECT drop_chunks('telemetry', older_than => make_interval(secs => %s))", [retention_s]
        ).fetchall()
        return len(dropped)
    deleted = 0
    while True:
        cursor = connection.execute(
            "DELETE FROM telemetry WHERE ctid = ANY(ARRAY(SELECT ctid FROM telemetry"
            " WHERE time < now() - make_interval(secs => %s) LIMIT %s))",
            [retention_s, DELETE_ROWS],
        )
        deleted += cursor.rowcount
        if cursor.rowcount < DELETE_ROWS:
            return deleted


def thin_stats(connection: psycopg.Connection[Any]) -> None:
    """Keep of engine_stats every second for a day, then the first of each minute, and nothing after 30 days.

    Its counters are cumulative: rows that go take resolution with them, and nothing else.
    """
    connection.execute(
        "DELETE FROM engine_stats WHERE ctid = ANY(ARRAY(SELECT ctid FROM engine_stats"
        " WHERE time < now() - interval '30 days' OR (time < now() - interval '1 day' AND NOT first_of_minute)"
        " ORDER BY time LIMIT %s))",
        [DELETE_ROWS],
    )


def run(config: Settings, url: str, stopping: threading.Event) -> None:
    """Do the chores each minute while elected; come back after a failure."""
    while not stopping.is_set():
        pause = RETRY_S
        try:
            with migrate.connect(url, "orbitstream-maintenance") as connection:
                edition = migrate.find_edition(connection)
                while not stopping.is_set() and _elected(connection):
                    count = drop_old(connection, edition, config.retention)
                    if count:
                        log.info("dropped %d %s past retention", count, "rows" if edition.name == "plain" else "chunks")
                    thin_stats(connection)
                    samples.take(connection)
                    stopping.wait(INTERVAL_S)
                pause = INTERVAL_S
        except psycopg.Error as error:
            log.warning("chores put off for %.0f s: %s", pause, " ".join(str(error).split())[:300])
        stopping.wait(pause)


def _elected(connection: psycopg.Connection[Any]) -> bool:
    # Session locks nest: held already, the call only counts one up.
    row = connection.execute("SELECT pg_try_advisory_lock(%s)", [ADVISORY_LOCK]).fetchone()
    return bool(row and row[0])


def main(argv: list[str] | None = None) -> int:
    """Run the chores; started by a supervisor, which is its parent."""
    parser = argparse.ArgumentParser(prog="engine.maintenance")
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    process.die_with_parent(options.parent, signal.SIGKILL)
    config = settings.load()
    logs.configure(config.log_level, "maintenance")
    assert config.owner_url is not None, "the supervisor sets DATABASE_URL, also for the embedded server"
    stopping = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    run(config, config.owner_url, stopping)
    return 0


if __name__ == "__main__":
    sys.exit(main())
