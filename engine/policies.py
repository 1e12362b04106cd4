"""What TimescaleDB does by itself, as the settings say it: chunk interval, refresh, compression, retention.

Settled at each migration and each hour by maintenance, so that a setting that was changed takes hold. Jobs keep their
number and history: what differs is altered, what is missing is added.

Firstly: a refresh computes a bucket anew from the points that are there. Given that, one that reaches into dropped
points would erase what the aggregates remember of them, also after the retention was made longer again. So the
refresh windows begin where no point was ever dropped (`aggregate_floor`), with a margin for the time until the next
settling.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import psycopg

from engine.settings import Settings

DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A continuous aggregate: width of its buckets, how often it is refreshed, when compressed, how long kept."""

    name: str
    bucket: timedelta
    every: timedelta
    compress_after: timedelta
    keep: timedelta


AGGREGATES: Final = (
    Aggregate("satellite_stats", timedelta(minutes=5), timedelta(minutes=5), 3 * DAY, 90 * DAY),
    Aggregate("satellite_stats_hourly", timedelta(hours=1), timedelta(minutes=15), 30 * DAY, 182 * DAY),
    Aggregate("satellite_stats_daily", DAY, timedelta(hours=1), 365 * DAY, 730 * DAY),
)
"""From fine to coarse, each made of the one before it."""

LAG: Final = timedelta(hours=2)
"""A refresh window grows only once it is so much too short."""
RETENTION_EVERY: Final = timedelta(hours=1)
COMPRESSION_EVERY: Final = timedelta(minutes=30)

_REFRESH, _COMPRESSION, _RETENTION = "policy_refresh_continuous_aggregate", "policy_compression", "policy_retention"


def settle(connection: psycopg.Connection[Any], config: Settings, edition: str) -> None:
    """Bring the policies of a `timescale` database, and the chunk interval of any hypertable, to the settings.

    `connection` is the owner's. In one transaction, in which the refresh windows shrink before points are dropped.
    """
    with connection.transaction():
        _settle_chunk_interval(connection, timedelta(seconds=config.chunk_interval))
        if edition != "timescale":
            return
        retention = timedelta(seconds=config.retention)
        reach = _reach(connection, retention)
        for aggregate in AGGREGATES:
            reach = _settle_refresh(connection, aggregate, reach)
            _settle_compression(connection, aggregate.name, aggregate.compress_after)
            _settle_retention(connection, aggregate.name, aggregate.keep)
        _settle_compression(connection, "telemetry", timedelta(seconds=config.compress_after))
        _settle_retention(connection, "telemetry", retention)


def _settle_chunk_interval(connection: psycopg.Connection[Any], interval: timedelta) -> None:
    connection.execute(
        "SELECT set_chunk_time_interval('telemetry', %(interval)s::interval)"
        " FROM timescaledb_information.dimensions WHERE hypertable_name = 'telemetry'"
        " AND hypertable_schema = current_schema() AND time_interval <> %(interval)s::interval",
        {"interval": interval},
    )


def _reach(connection: psycopg.Connection[Any], retention: timedelta) -> timedelta:
    """Return how far back the points are whole, less a margin, and note it for when the retention grows."""
    row = connection.execute(
        "UPDATE aggregate_floor SET raw_whole_from = greatest(raw_whole_from, now() - %s::interval)"
        " RETURNING now() - raw_whole_from",
        [retention],
    ).fetchone()
    assert row is not None
    whole: timedelta = row[0]
    return whole - min(timedelta(hours=1), whole / 4)


def _settle_refresh(connection: psycopg.Connection[Any], aggregate: Aggregate, reach: timedelta) -> timedelta:
    """Set the window of a refresh, which sees what changed within `reach`; returns the reach of the next coarser one.

    A bucket that begins before its window is left out. Of points, which are dropped by and by, no more can be seen;
    what is made of a finer aggregate reaches a whole bucket further back, into what is kept much longer than points.

    All that changed is refreshed in one transaction: in batches, servers before 2.29 may leave out a late point that
    lies at the very start of a bucket until the next refresh (timescaledb#10221).
    """
    bucket = aggregate.bucket
    # A window has to hold two buckets. Newer ones are computed on the fly, so the latest one may wait for its end.
    whole = timedelta(0) if aggregate is AGGREGATES[0] else bucket + LAG
    start = max(min(reach + whole, aggregate.keep - DAY), 3 * bucket)
    wanted = {"start_offset": start, "end_offset": bucket}
    if _alter(connection, aggregate.name, _REFRESH, aggregate.every, wanted, within=LAG):
        connection.execute(
            "SELECT add_continuous_aggregate_policy(%s::regclass, start_offset => %s::interval,"
            " end_offset => %s::interval, schedule_interval => %s::interval)",
            [aggregate.name, start, bucket, aggregate.every],
        )
    connection.execute(
        "SELECT alter_job(job_id, config => config || '{\"buckets_per_batch\": 0}')"
        " FROM timescaledb_information.jobs WHERE job_id = %s AND config->>'buckets_per_batch' IS DISTINCT FROM '0'",
        [job_of(connection, aggregate.name, _REFRESH)],
    )
    return start + 2 * bucket


def _settle_compression(connection: psycopg.Connection[Any], table: str, after: timedelta) -> None:
    if _alter(connection, table, _COMPRESSION, COMPRESSION_EVERY, {"compress_after": after}):
        connection.execute(
            "SELECT add_compression_policy(%s::regclass, compress_after => %s::interval,"
            " schedule_interval => %s::interval)",
            [table, after, COMPRESSION_EVERY],
        )


def _settle_retention(connection: psycopg.Connection[Any], table: str, keep: timedelta) -> None:
    if _alter(connection, table, _RETENTION, RETENTION_EVERY, {"drop_after": keep}):
        connection.execute(
            "SELECT add_retention_policy(%s::regclass, drop_after => %s::interval, schedule_interval => %s::interval)",
            [table, keep, RETENTION_EVERY],
        )


def retention(connection: psycopg.Connection[Any]) -> timedelta | None:
    """Return the age at which the server itself drops points; None if it does not."""
    row = connection.execute(
        "SELECT (config->>'drop_after')::interval FROM timescaledb_information.jobs WHERE job_id = %s",
        [job_of(connection, "telemetry", _RETENTION)],
    ).fetchone()
    return None if row is None else row[0]


def _alter(
    connection: psycopg.Connection[Any],
    table: str,
    procedure: str,
    every: timedelta,
    wanted: dict[str, timedelta],
    within: timedelta = timedelta(0),
) -> bool:
    """Give the table's job the intervals `wanted`, if it differs by more than `within`; True if there is no job."""
    job = job_of(connection, table, procedure)
    if job is None:
        return True
    # An interval shrinks at once, and grows when it is worth a change: a window must never reach too far.
    differs = " OR ".join(
        f"NOT ((config->>'{name}')::interval BETWEEN %({name})s::interval - %(within)s::interval"
        f" AND %({name})s::interval)"
        for name in wanted
    )
    config = ", ".join(f"'{name}', %({name})s::interval" for name in wanted)
    connection.execute(
        f"SELECT alter_job(job_id, schedule_interval => %(every)s::interval,"
        f" config => config || jsonb_build_object({config})) FROM timescaledb_information.jobs"
        f" WHERE job_id = %(job)s AND (schedule_interval <> %(every)s::interval OR {differs})",
        {"job": job, "every": every, "within": within, **wanted},
    )
    return False


def job_of(connection: psycopg.Connection[Any], table: str, procedure: str) -> int | None:
    """Return the number of the job that runs a policy's `procedure` on a table or continuous aggregate."""
    row = connection.execute(
        "SELECT job_id FROM timescaledb_information.jobs WHERE proc_name = %(procedure)s"
        " AND (hypertable_schema, hypertable_name) IN (SELECT current_schema(), %(table)s::name UNION ALL"
        " SELECT materialization_hypertable_schema, materialization_hypertable_name"
        " FROM timescaledb_information.continuous_aggregates"
        " WHERE view_schema = current_schema() AND view_name = %(table)s)",
        {"table": table, "procedure": procedure},
    ).fetchone()
    return None if row is None else int(row[0])
