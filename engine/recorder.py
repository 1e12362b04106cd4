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

import psycopg

from engine import stats
from engine.heartbeat import FLUSH_EDGES, LATENCY_EDGES, Bins, quantiles_ms
from engine.stats import LaneSample, Sample, WriterSample

INTERVAL_S: Final = 1.0
REST_S: Final = 60.0
"""After a refusal (a table that is not there, a right that is missing) the next attempt is so much later."""

Row = dict[str, Any]

# The row is JSON so that a column added later is NULL for a writer of an earlier version. What is written each second
# need not be on the disk at once.
_STORE_STATS: Final = (
    "INSERT INTO engine_stats SELECT entry.* FROM set_config('synchronous_commit', 'off', true),"
    " jsonb_populate_recordset(NULL::engine_stats, %s::jsonb) AS entry"
)

log = logging.getLogger("orbitstream.writer")


class Recorder:
    """Writes the stats of this node, once a second, over whatever connection it is given."""

    def __init__(self, folder: Path, node: str) -> None:
        self._folder, self._node = folder, node
        self._next = 0.0
        self._minute = -1
        self._before: Sample | None = None

    def tick(self, now: float, connection: psycopg.Connection[Any]) -> None:
        """Store what is due. Raises psycopg.OperationalError when the connection is gone."""
        if now < self._next:
            return
        self._next = now + INTERVAL_S
        sample = stats.take(self._folder)
        moment = datetime.now(UTC)
        minute = int(moment.timestamp() // 60)
        found = list(rows(sample, self._before))
        shared = {"time": moment.isoformat(), "node": self._node, "first_of_minute": minute != self._minute}
        self._before, self._minute = sample, minute
        try:
            connection.execute(_STORE_STATS, [json.dumps([shared | row for row in found])])
        except psycopg.Error as error:
            if connection.closed or error.sqlstate is None:
                raise
            self._next = now + REST_S
            log.warning("no stats for %.0f s: %s", REST_S, " ".join(str(error).split())[:300])


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
