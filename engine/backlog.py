"""One lane that a writer owns: what waits in it, and when a flush of it is due."""

from __future__ import annotations

from typing import Final

from engine import lanes
from engine.columnstore import MIN_POINTS
from engine.consumer import Consumer, SealedConsumer
from engine.drain import MAX_TRANSACTION_POINTS

GATHER_S: Final = 0.06
"""How long points may wait for a batch that goes to the columnstore, if at their rate it is there by then. Without it
a rate of some 200,000 points/s alternates between the two stores, and leaves chunks to be rewritten."""
GATHER_LOOK_S: Final = 0.01
"""How long to look at the rate before believing it."""
POLL_S: Final = 0.004
"""Between two looks at idle lanes: 250 looks a second cost 0.5 % of a core. What one of them finds may have come just
after the one before, so that its wait is counted from there."""


class Backlog:
    """The lane, its consumer end and its lock, and how the flushes before went."""

    def __init__(self, consumer: Consumer, lock: lanes.Lock) -> None:
        self.consumer, self.lock = consumer, lock
        self.lane = consumer.lane
        self.path = consumer.lane.path
        self.sealed = isinstance(consumer, SealedConsumer)
        self.attached = False
        self.blocked = False
        self.failures = 0
        self.tail_seen = self.lane.tail
        self.not_before = 0.0
        self.waiting_since: float | None = None

    @property
    def bound(self) -> int:
        return self.lane.bound or MAX_TRANSACTION_POINTS

    @property
    def empty(self) -> bool:
        return not self.sealed and self.lane.head <= self.lane.tail

    def due(self, now: float, batch_size: int, batch_timeout: float, compressing: bool) -> bool:
        """Tell whether a flush is worth its while, or a point has waited long enough.

        With `compressing`, points that come so fast that a batch for the columnstore will soon be there wait for it.
        """
        if now < self.not_before:
            return False
        if not self.attached:
            return True
        if self.empty:
            self.waiting_since = None
            return False
        if self.waiting_since is None:
            self.waiting_since = now
        queued, waited = self.lane.queued_points, now - self.waiting_since
        if compressing and batch_size <= queued < MIN_POINTS and waited < GATHER_S:
            return waited >= GATHER_LOOK_S and queued * GATHER_S < MIN_POINTS * waited
        return queued >= batch_size or waited + POLL_S >= batch_timeout

    def retirable(self, layout: bytes) -> bool:
        """Tell whether nobody will append to it again and nothing waits in it."""
        return self.attached and self.empty and (self.lane.layout != layout or self.lane.closed)

    def let_go(self) -> None:
        self.lane.close()
        self.lock.release()
