"""The chores that need the tables' owner; one process per database does them, whichever node it runs on.

An advisory lock elects it; the others wait their turn. Each minute: the chunks of the present and of the next interval,
or without chunks the index on time; retention where the server has no policy for it, keys that are past their time, a
sample of the storage. Each hour the policies are settled anew.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, Final

import psycopg

from engine import logs, migrate, policies, process, samples, settings, settlement
from engine.settings import Settings

ADVISORY_LOCK: Final = 0x6F726269745F6D74  # "orbit_mt"
INTERVAL_S: Final = 60.0
RETRY_S: Final = 5.0
SETTLE_S: Final = 3600.0
DELETE_ROWS: Final = 20_000
"""Rows deleted in one statement: a few hundred ms, so that autovacuum and the writers are never held up."""
SAMPLES_KEPT: Final = "90 days"
_CHUNKS: Final = (
    "FROM timescaledb_information.chunks WHERE hypertable_schema = current_schema() AND hypertable_name = 'telemetry'"
)
LOCK_WAIT: Final = "500ms"
"""Shorter than the server's deadlock_timeout (1 s), after which whoever waits for an autovacuum has it cancelled."""

log = logging.getLogger("orbitstream.maintenance")


def summarize(connection: psycopg.Connection[Any], edition: migrate.Edition) -> int:
    """Bring the block range index on time up to date, where there are no chunks; returns ranges summarized.

    The server's own `autosummarize` is off: it remembers 256 ranges from one round of autovacuum to the next, as many
    as 9,000 points/s fill in a minute. What is in no range is read by whoever asks for a span of time, retention among
    them. A vacuum that is at work does the same meanwhile.
    """
    if edition.timescaledb is not None:
        return 0
    try:
        with connection.transaction():
            connection.execute("SELECT set_config('lock_timeout', %s, true)", [LOCK_WAIT])
            row = connection.execute("SELECT brin_summarize_new_values('telemetry_time_range')").fetchone()
    except psycopg.errors.LockNotAvailable:
        return 0
    return int(row[0]) if row else 0


def drop_old(connection: psycopg.Connection[Any], edition: migrate.Edition, retention_s: float) -> int:
    """Drop points older than the retention; returns rows deleted, or chunks dropped where there are chunks.

    With the timescale license a policy does it.
    """
    if edition.name == "timescale":
        return 0
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


def make_chunks(connection: psycopg.Connection[Any], edition: migrate.Edition, interval_s: float) -> int:
    """Make the chunks of now and of the next interval, so that no writer waits for another to make one.

    A row that is gone within its transaction leaves the chunk behind. Where writers COPY into compressed chunks, an
    empty row store beside one would count as a part that is not compressed yet: then the chunk is compressed empty.
    Returns how many were made.
    """
    if edition.timescaledb is None:
        return 0
    made = 0
    for ahead in (0.0, interval_s):
        with connection.transaction():
            at = connection.execute(
                f"SELECT now() + make_interval(secs => %(ahead)s) WHERE NOT EXISTS (SELECT {_CHUNKS}"
                " AND now() + make_interval(secs => %(ahead)s) >= range_start"
                " AND now() + make_interval(secs => %(ahead)s) < range_end)",
                {"ahead": ahead},
            ).fetchone()
            if at is None:
                continue
            connection.execute(
                "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb,"
                " signal_strength_dbm, received_at, is_anomaly) VALUES (%s, '-', 0, 0, 0, now(), false)",
                at,
            )
            connection.execute("DELETE FROM telemetry WHERE time = %s AND satellite_id = '-'", at)
            if edition.name == "timescale":
                connection.execute(
                    f"SELECT compress_chunk(format('%%I.%%I', chunk_schema, chunk_name)::regclass) {_CHUNKS}"
                    " AND NOT is_compressed AND %s >= range_start AND %s < range_end"
                    " AND EXISTS (SELECT FROM pg_settings WHERE name = 'timescaledb.enable_direct_compress_copy')",
                    [*at, *at],
                )
            made += 1
    return made


def sample_storage(connection: psycopg.Connection[Any], edition: migrate.Edition) -> None:
    """Note the sizes of the moment in `storage_stats`, and forget samples that are past their time."""
    if edition.timescaledb is None:
        sizes = "pg_total_relation_size('telemetry'), 0"
        points = "(SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'telemetry'::regclass)"
        chunks = "NULL, NULL"
    else:
        aggregates = " + ".join(f"hypertable_size('{each.name}')" for each in policies.AGGREGATES)
        sizes = f"hypertable_size('telemetry'), {aggregates if edition.name == 'timescale' else 0}"
        points = "approximate_row_count('telemetry')"
        chunks = f"(SELECT count(*) {_CHUNKS}), (SELECT count(*) {_CHUNKS} AND is_compressed)"
    connection.execute(
        "INSERT INTO storage_stats (database_bytes, telemetry_bytes, aggregate_bytes, points, chunks,"
        " compressed_chunks, disk_total_bytes, disk_free_bytes)"
        f" SELECT pg_database_size(current_database()), {sizes}, {points}, {chunks}, %s, %s"
        " ON CONFLICT (sampled_at) DO NOTHING".encode(),
        _disk(connection),
    )
    connection.execute("DELETE FROM storage_stats WHERE sampled_at < now() - %s::interval", [SAMPLES_KEPT])


def _disk(connection: psycopg.Connection[Any]) -> tuple[int | None, int | None]:
    """Return size and free bytes of the database's disk; None where it is not of this machine, or not to be seen."""
    row = connection.execute(
        "SELECT setting FROM pg_settings WHERE name = 'data_directory'"  # no row without the right to see it
    ).fetchone()
    if row is None or not migrate.on_this_machine(connection):
        return None, None
    try:
        disk = os.statvfs(row[0])
    except OSError:
        return None, None
    return disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize


def run(config: Settings, url: str, stopping: threading.Event) -> None:
    """Do the chores each minute while elected; come back after a failure."""
    settle_at = time.monotonic() + SETTLE_S  # a migration has just settled them
    while not stopping.is_set():
        pause = RETRY_S
        try:
            with migrate.connect(url, "orbitstream-maintenance") as connection:
                edition = migrate.find_edition(connection)
                while not stopping.is_set() and _elected(connection):
                    summarize(connection, edition)
                    count = drop_old(connection, edition, config.retention)
                    if count:
                        log.info("dropped %d %s past retention", count, "rows" if edition.name == "plain" else "chunks")
                    make_chunks(connection, edition, config.chunk_interval)
                    connection.execute(
                        "DELETE FROM idempotency_key WHERE created_at < now() - %s::interval", [settlement.KEPT]
                    )
                    sample_storage(connection, edition)
                    thin_stats(connection)
                    samples.take(connection)
                    if time.monotonic() >= settle_at and edition.timescaledb is not None:
                        policies.settle(connection, config, edition.name)
                        settle_at = time.monotonic() + SETTLE_S
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
