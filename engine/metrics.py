"""`GET /metrics`: a sample in Prometheus' text format 0.0.4.

The counters are those of the lanes' headers and the heartbeats: every worker gives the same answer, and recycling a
worker takes nothing away. Counters of a lane end with its file: use `rate()` per lane, then `sum()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from engine import __version__
from engine.heartbeat import FLUSH_EDGES, LATENCY_EDGES, Bins, Floats
from engine.stats import LaneSample, Sample, WriterSample

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_STEP: Final = 8
"""Every 8th edge is a bucket of the exposition: 1.07**8 = 1.7 apart, 32 buckets."""
FLUSH_STEP: Final = 4

Value = tuple[str, float]
"""Labels, as written between braces, and a number."""


def render(sample: Sample) -> bytes:
    """Return the exposition of a sample."""
    families = [*_of_lanes(sample), *_of_writers(sample.writers), *_of_processes(sample)]
    return ("\n".join(line for family in families for line in family) + "\n").encode()


def _of_lanes(sample: Sample) -> Iterator[list[str]]:
    def each(read: str) -> list[Value]:
        return [(_lane(lane), float(value)) for lane in sample.lanes if (value := getattr(lane, read)) is not None]

    yield _family("build_info", "gauge", "The version that runs.", [(f'version="{__version__}"', 1)])
    yield _family("accepted_points_total", "counter", "Points committed in a lane.", each("accepted"))
    yield _family("accepted_requests_total", "counter", "Requests committed in a lane.", each("requests"))
    yield _family("answered_points_total", "counter", "Points whose 202 was handed to the edge.", each("answered"))
    yield _family("refused_points_total", "counter", "Points answered 503 for want of room.", each("refused"))
    yield _family("settled_points_total", "counter", "Points behind the tail, by the ledger.", each("settled"))
    yield _family("queue_points", "gauge", "Points that wait in a lane.", each("queue_points"))
    yield _family("queue_bytes", "gauge", "Bytes that wait in a lane.", each("queue_bytes"))
    yield _family("queue_capacity_bytes", "gauge", "Size of a lane.", each("capacity_bytes"))
    yield _family(
        "residual_points", "gauge", "Published - settled - queued: not 0 is a lost or invented point.", each("residual")
    )


def _of_writers(writers: Iterable[WriterSample]) -> Iterator[list[str]]:
    writers = list(writers)

    def each(read: str) -> list[Value]:
        return [(_writer(writer), float(getattr(writer, read))) for writer in writers]

    yield _family("writer_up", "gauge", "Whether the writer beats.", each("alive"))
    yield _family(
        "database_up", "gauge", "Whether the writer has its database.",
        [(_writer(writer), float(writer.alive and writer.state == "connected")) for writer in writers],
    )  # fmt: skip
    yield _family("writer_beat_age_seconds", "gauge", "Time since the last heartbeat.", each("age_s"))
    yield _family("committed_points_total", "counter", "Points committed in the database.", each("committed"))
    yield _family("dead_lettered_points_total", "counter", "Points set aside in dead_letter.", each("dead_lettered"))
    yield _family("anomalous_points_total", "counter", "Committed points that are anomalies.", each("anomalies"))
    yield _family("write_failures_total", "counter", "Attempts that the database did not settle.", each("failures"))
    yield _family("stopped_lanes", "gauge", "Lanes that wait for a mend or an operator.", each("stopped_lanes"))
    yield _family("last_commit_timestamp_seconds", "gauge", "When the last commit was.",
                  [(_writer(writer), writer.last_commit_us / 1e6) for writer in writers])  # fmt: skip
    yield _histogram("commit_latency_seconds", "Time of a point from arrival to commit.", LATENCY_EDGES, LATENCY_STEP,
                     [(_writer(writer), writer.latency, writer.waited_s) for writer in writers])  # fmt: skip
    yield _histogram("flush_duration_seconds", "Duration of a transaction.", FLUSH_EDGES, FLUSH_STEP,
                     [(_writer(writer), writer.durations, writer.busy_s) for writer in writers])  # fmt: skip


def _of_processes(sample: Sample) -> Iterator[list[str]]:
    found = [(f'process="worker",name="{lane.name}"', lane.usage) for lane in sample.lanes]
    found += [(f'process="writer",name="{writer.name}"', writer.usage) for writer in sample.writers]
    known = [(labels, usage) for labels, usage in found if usage is not None]
    yield _family("cpu_seconds_total", "counter", "CPU time of a process.", [(it, used.cpu_s) for it, used in known])
    yield _family("memory_bytes", "gauge", "Memory of a process, without what it shares.",
                  [(it, float(used.memory_bytes)) for it, used in known])  # fmt: skip


def _lane(lane: LaneSample) -> str:
    return f'lane="{lane.name}",uuid="{lane.uuid}"'


def _writer(writer: WriterSample) -> str:
    return f'writer="{writer.name}"'


def _family(name: str, kind: str, help: str, values: Iterable[Value]) -> list[str]:
    lines = [f"# HELP orbitstream_{name} {help}", f"# TYPE orbitstream_{name} {kind}"]
    return [*lines, *(f"orbitstream_{name}{{{labels}}} {_number(value)}" for labels, value in values)]


def _histogram(name: str, help: str, edges: Floats, step: int, values: Iterable[tuple[str, Bins, float]]) -> list[str]:
    lines = [f"# HELP orbitstream_{name} {help}", f"# TYPE orbitstream_{name} histogram"]
    shown = np.arange(step - 1, len(edges) - 1, step)  # the last bin holds what is beyond every edge
    for labels, bins, total in values:
        cumulated = np.cumsum(bins)
        for index in shown.tolist():
            lines.append(f'orbitstream_{name}_bucket{{{labels},le="{edges[index] / 1e6:.6g}"}} {int(cumulated[index])}')
        lines.append(f'orbitstream_{name}_bucket{{{labels},le="+Inf"}} {int(cumulated[-1])}')
        lines.append(f"orbitstream_{name}_sum{{{labels}}} {_number(total)}")
        lines.append(f"orbitstream_{name}_count{{{labels}}} {int(cumulated[-1])}")
    return lines


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
