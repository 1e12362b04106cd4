"""The balance of a lane, also where a writer died between the two stores that end a drain."""

from __future__ import annotations

from pathlib import Path

from engine import ring, rows, stats
from engine.lanes import claim_producer


def test_settled_points_ahead_of_the_tail_are_accounted_for_if_they_are_whole_records(lane_dir: Path) -> None:
    producer, lock = claim_producer(lane_dir, ring.MIN_CAPACITY, rows.layout())
    lane = producer.lane
    for points in (3, 4, 5):
        producer.publish([b"kept____"], points, 0)
    for settled, residual in ((0, 0), (3, 0), (7, 0), (12, 0), (1, -1), (4, -4), (13, -13)):
        lane.words[ring.SETTLED] = settled
        assert stats.residual(lane) == residual
    lane.words[ring.TAIL] = lane.head
    for settled, residual in ((12, 0), (9, 3), (15, -3)):
        lane.words[ring.SETTLED] = settled
        assert stats.residual(lane) == residual
    lock.release()
