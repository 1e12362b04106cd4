"""What a writer writes beside the points: a row of engine_stats a second for each process, and episodes of anomalies.

None of it is part of the delivery promise: it goes over the writer's connection between two transactions, coalesced,
and when the database refuses it the points go on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import psycopg

from engine import stats
from engine.episodes import Episode
from engine.heartbeat import FLUSH_EDGES, LATENCY_EDGES, Bins, quantiles_ms
from engine.limits import SEVERITIES
from engine.stats import LaneSample, Sample, WriterSample

INTERVAL_S: Final = 1.0
REFRESH_S: Final = 10.0
"""So often the peak of an episode that lasts is written again."""
REST_S: Final = 60.0
"""After a refusal (a table that is not there, a right that is missing) the next attempt is so much later."""
MAX_EPISODES: Final = 10_000
"""Episodes kept while the database is away; then the oldest go."""

Row = dict[str, Any]

# The row is JSON so that a column added later is NULL for a writer of an earlier version. What is written each second
# need not be on the disk at once.
_STORE_STATS: Final = (
    "INSERT INTO engine_stats SELECT entry.* FROM set_config('synchronous_commit', 'off', true),"
    " jsonb_populate_recordset(NULL::engine_stats, %s::jsonb) AS entry"
)

# Episodes under way: the open row of a satellite's channel is widened if another writer has made it.
_OPEN: Final = """
    INSERT INTO anomaly_event (satellite_id, channel, severity, kind, limit_value, onset, peak, peak_at, points)
    SELECT satellite_id, channel, severity, kind, limit_value, onset, peak, peak_at, points
    FROM jsonb_populate_recordset(NULL::anomaly_event, %s::jsonb)
    ON CONFLICT (satellite_id, channel) WHERE cleared_at IS NULL DO UPDATE SET
        severity = CASE WHEN excluded.severity = 'critical' THEN 'critical' ELSE anomaly_event.severity END,
        peak = excluded.peak, peak_at = excluded.peak_at, points = excluded.points"""
# Those that are over: their open row is closed, or they make a row of their own if there is none.
_CLOSE: Final = """
    WITH over AS (
        SELECT satellite_id, channel, severity, kind, limit_value, onset, cleared_at, peak, peak_at, points
        FROM jsonb_populate_recordset(NULL::anomaly_event, %s::jsonb)
    ), closed AS (
        UPDATE anomaly_event AS kept
        SET cleared_at = over.cleared_at, severity = over.severity, peak = over.peak, peak_at = over.peak_at,
            points = over.points
        FROM over
        WHERE kept.satellite_id = over.satellite_id AND kept.channel = over.channel AND kept.cleared_at IS NULL
            AND kept.onset <= over.cleared_at
        RETURNING kept.satellite_id, kept.channel, over.onset
    )
    INSERT INTO anomaly_event (satellite_id, channel, severity, kind, limit_value, onset, cleared_at, peak, peak_at,
        points)
    SELECT satellite_id, channel, severity, kind, limit_value, onset, cleared_at, peak, peak_at, points
    FROM over
    WHERE NOT EXISTS (
        SELECT FROM closed
        WHERE closed.satellite_id = over.satellite_id AND closed.channel = over.channel AND closed.onset = over.onset
    )"""
_FORGET: Final = (
    "UPDATE anomaly_event SET cleared_at = greatest(onset, peak_at) WHERE cleared_at IS NULL"
    " AND (satellite_id, channel) IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
)

log = logging.getLogger("orbitstream.writer")


class Recorder:
    """Writes episodes, and with `stats` the stats of this node, over whatever connection it is given."""

    def __init__(self, folder: Path, node: str, *, stats: bool) -> None:
        self._folder, self._node, self._stats = folder, node, stats
        self._next = 0.0
        self._minute = -1
        self._before: Sample | None = None
        self._next_refresh = 0.0
        self._episodes: dict[tuple[bytes, str, int], Episode] = {}
        self._lasting: dict[tuple[bytes, str], Episode] = {}

    def add(self, changed: list[Episode]) -> None:
        """Take note of episodes that began, became worse or ended."""
        for episode in changed:
            self._episodes[episode.satellite, episode.channel, episode.onset] = episode
            if episode.cleared:
                self._lasting.pop((episode.satellite, episode.channel), None)
            else:
                self._lasting[episode.satellite, episode.channel] = episode
        while len(self._episodes) > MAX_EPISODES:
            del self._episodes[next(iter(self._episodes))]

    def tick(self, now: float, connection: psycopg.Connection[Any]) -> None:
        """Store what is due; raises psycopg.Error when the connection cannot be used any more."""
        if now < self._next:
            return
        self._next = now + INTERVAL_S
        if now >= self._next_refresh:
            self._next_refresh = now + REFRESH_S
            self.add(list(self._lasting.values()))
        try:
            if self._stats:
                self._store_stats(connection)
            self._store_episodes(connection)
        except psycopg.Error as error:
            if connection.closed or error.sqlstate is None:
                raise
            self._next = now + REST_S
            log.warning("no stats and episodes for %.0f s: %s", REST_S, " ".join(str(error).split())[:300])

    def lasting(self, connection: psycopg.Connection[Any]) -> list[Episode]:
        """Return the episodes that neither the database nor this writer knows as over; none when it cannot tell."""
        over = {(each.satellite, each.channel) for each in self._episodes.values() if each.cleared}
        try:
            found = connection.execute(
                "SELECT satellite_id, channel, kind, severity, (extract(epoch FROM onset) * 1000000)::bigint, peak,"
                " (extract(epoch FROM peak_at) * 1000000)::bigint, limit_value, points"
                " FROM anomaly_event WHERE cleared_at IS NULL LIMIT %s",
                [MAX_EPISODES],
            ).fetchall()
        except psycopg.Error as error:
            log.warning("episodes of an earlier writer are not known: %s", " ".join(str(error).split())[:300])
            return []
        return [
            Episode(satellite.encode(), channel, kind, SEVERITIES.index(severity), *rest)
            for satellite, channel, kind, severity, *rest in found
            if (satellite.encode(), channel) not in over
        ]

    def forget(self, connection: psycopg.Connection[Any], episodes: list[Episode]) -> None:
        """End episodes of which nothing more will be seen, where their peak was."""
        if not episodes:
            return
        satellites, channels = [each.satellite.decode() for each in episodes], [each.channel for each in episodes]
        try:
            connection.execute(_FORGET, [satellites, channels])
        except psycopg.Error as error:
            log.warning("episodes without a limit stay open: %s", " ".join(str(error).split())[:300])

    def _store_stats(self, connection: psycopg.Connection[Any]) -> None:
        sample = stats.take(self._folder)
        moment = datetime.now(UTC)
        minute = int(moment.timestamp() // 60)
        shared = {"time": moment.isoformat(), "node": self._node, "first_of_minute": minute != self._minute}
        found = [shared | row for row in rows(sample, self._before)]
        self._before, self._minute = sample, minute
        connection.execute(_STORE_STATS, [json.dumps(found)])

    def _store_episodes(self, connection: psycopg.Connection[Any]) -> None:
        if not self._episodes:
            return
        over = [_as_row(episode) for episode in self._episodes.values() if episode.cleared]
        under_way = {
            (episode.satellite, episode.channel): _as_row(episode)
            for episode in self._episodes.values()
            if not episode.cleared
        }
        if over:
            connection.execute(_CLOSE, [json.dumps(over)])
        if under_way:
            connection.execute(_OPEN, [json.dumps(list(under_way.values()))])
        self._episodes.clear()


def _as_row(episode: Episode) -> Row:
    return {
        "satellite_id": episode.satellite.decode(),
        "channel": episode.channel,
        "severity": SEVERITIES[episode.severity],
        "kind": episode.kind,
        "limit_value": episode.limit,
        "onset": _rfc3339(episode.onset),
        "cleared_at": _rfc3339(episode.cleared) if episode.cleared else None,
        "peak": episode.peak,
        "peak_at": _rfc3339(episode.peak_at),
        "points": episode.points,
    }


def _rfc3339(time_us: int) -> str:
    return f"{np.datetime64(time_us, 'us')}Z"


def rows(sample: Sample, before: Sample | None) -> Iterator[Row]:
    """Yield the rows of engine_stats for a sample; quantiles are of what came since the sample before."""
    for lane in sample.lanes:
        yield _of_lane(lane)
    earlier = {writer.name: writer for writer in before.writers} if before is not None else {}
    for writer in sample.writers:
        yield _of_writer(writer, earlier.get(writer.name))


def _of_lane(lane: LaneSample) -> Row:
    return {
        "process": "worker",
        "name": lane.name,
        "alive": lane.usage is not None,
        "accepted": lane.accepted,
        "refused": lane.refused,
        "settled": lane.settled,
        "residual": lane.residual,
        "queue_points": lane.queue_points,
        "queue_bytes": lane.queue_bytes,
        "capacity_bytes": lane.capacity_bytes,
        "cpu_s": lane.usage.cpu_s if lane.usage else None,
        "memory_bytes": lane.usage.memory_bytes if lane.usage else None,
    }


def _of_writer(writer: WriterSample, before: WriterSample | None) -> Row:
    row: Row = {
        "process": "writer",
        "name": writer.name,
        "alive": writer.alive,
        "committed": writer.committed,
        "dead_lettered": writer.dead_lettered,
        "anomalies": writer.anomalies,
        "flushes": writer.flushes,
        "failures": writer.failures,
        "stopped_lanes": writer.stopped_lanes,
        "busy_s": writer.busy_s,
        "cpu_s": writer.usage.cpu_s if writer.usage else None,
        "memory_bytes": writer.usage.memory_bytes if writer.usage else None,
    }
    if before is not None and writer.flushes > before.flushes:
        row["flush_p50_ms"], row["flush_p99_ms"] = quantiles_ms(
            since(writer.durations, before.durations), FLUSH_EDGES, (0.5, 0.99)
        )
        row["arrival_p50_ms"], row["arrival_p99_ms"] = quantiles_ms(
            since(writer.latency, before.latency), LATENCY_EDGES, (0.5, 0.99)
        )
    return row


def since(now: Bins, before: Bins) -> Bins:
    """Return what a histogram counted since an earlier look at it; all of it if it was begun anew meanwhile."""
    return now - before if (now >= before).all() else now
