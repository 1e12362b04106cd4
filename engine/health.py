"""What the service says of itself, from the lanes' words and the writers' heartbeats alone."""

from __future__ import annotations

from typing import Any

from engine import heartbeat, lanes
from engine.heartbeat import State
from engine.settings import Settings
from engine.timestamps import now_us


def describe(config: Settings) -> dict[str, Any]:
    """Describe the service: the database as the writers see it, the queue, the writers themselves."""
    beats = heartbeat.read_all(config.lane_dir)
    alive = [beat for beat in beats if beat.alive]
    connected = [beat for beat in alive if beat.state is State.CONNECTED]
    points = used = capacity = 0
    oldest_us = None
    for lane in lanes.open_lanes(config.lane_dir):
        points += lane.queued_points
        used += lane.head - lane.tail
        capacity += lane.capacity
        waiting = lane.next_record(lane.tail) if lane.head > lane.tail else None
        if waiting is not None:
            oldest_us = min(oldest_us or waiting.time_us, waiting.time_us)
            waiting.payload.release()
        lane.close()
    stopped = sum(beat.stopped_lanes for beat in alive)
    report = {
        "status": "healthy" if len(connected) >= config.writer_count and not stopped else "degraded",
        "database": "connected" if connected else "away" if alive else "unknown",
        "edition": connected[0].edition if connected else "unknown",
        "writers": {"alive": len(alive), "expected": config.writer_count},
        "queue": {
            "points": points,
            "bytes": used,
            "capacity_bytes": capacity,
            "capacity_points": int(points * capacity / used) if used and points else None,
            "oldest_s": round(max(0, now_us() - oldest_us) / 1e6, 3) if oldest_us else 0.0,
        },
        "stopped_lanes": stopped,
        "committed_points": sum(beat.committed_points for beat in beats),
        "compressed_points": sum(beat.compressed_points for beat in beats),
        "dead_lettered_points": sum(beat.dead_lettered_points for beat in beats),
    }
    for beat in beats:
        beat.close()
    return report
