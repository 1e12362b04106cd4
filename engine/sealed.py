"""Reading a lane of an earlier boot: after a power loss neither its head nor its tail can be trusted.

What the file system wrote back before the power went may be any mix of old and new pages. Firstly: a record's CRC
covers the lane's uuid, its own position and its bytes. Given that, every place of the ring that reads as a valid
record holds one that was published there, or was being published; the ledger says from which position on records are
still to be drained. So we look at every place, and take what is valid in order of position, across holes.
"""

from __future__ import annotations

import numpy as np

from engine.ring import RECORD_HEADER, Consumer, Lane, LaneCorruptError, Record


class SealedConsumer(Consumer):
    """A Consumer for a lane that nobody appends to any more; `head` and `tail` play no part in what it reads."""

    def __init__(self, lane: Lane) -> None:
        super().__init__(lane)
        self._found = self._scan()

    def _scan(self) -> list[tuple[int, int]]:
        """Find every valid record, (start, end) by position; once, since its bytes never change."""
        lane = self.lane
        words = np.frombuffer(lane.data, "<u8")
        places = np.arange(0, lane.capacity - RECORD_HEADER.size + 1, 8, dtype=np.uint64)
        positions = words[1 : len(places) + 1]  # the position word, if a record begins at that place
        found = []
        for index in np.flatnonzero(positions % np.uint64(lane.capacity) == places).tolist():
            start = int(positions[index])
            record = lane.record_at(start, start)
            if record is not None and record.points >= 0:
                found.append((start, record.end))
        return sorted(found)

    @property
    def end(self) -> int:
        """Where the last valid record ends."""
        return self._found[-1][1] if self._found else 0

    def read(self, position: int, max_points: int, max_bytes: int) -> list[Record]:
        """Return valid records with position >= `position`, in order, across holes; bounds as in Consumer.read."""
        records: list[Record] = []
        points, end = 0, position
        for start, _ in self._found:
            if start < end:
                continue
            record = self.lane.record_at(start, end)
            if record is None:
                raise LaneCorruptError(f"{self.lane.path}: the record at {start} changed while it was read")
            if records and (points + record.points > max_points or record.end - position > max_bytes):
                break
            records.append(record)
            points += record.points
            end = record.end
        return records

    def holes(self, position: int) -> bool:
        """Tell whether a record is missing between `position` and the end, or the end lies below the stored head."""
        end = position
        for start, stop in self._found:
            if start < end:
                continue
            following = self.lane.next_record(end)
            if following is None or following.end != stop:
                return True
            end = stop
        return end < self.lane.head
