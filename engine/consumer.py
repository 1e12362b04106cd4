"""The consumer's end of a lane: read records in order, and free their room once they are settled.

A lane of an earlier boot is read another way, since after a power loss neither its head nor its tail can be trusted:
what the file system wrote back may be any mix of old and new pages. Firstly: a record's CRC covers the lane's uuid, its
own position and its bytes. Given that, every place of the ring that reads as a valid record holds one that was
published there, or was being published; the ledger says from which position on records are still to be drained. So
SealedConsumer looks at every place, and takes what is valid in order of position, across holes.
"""

from __future__ import annotations

import uuid

import numpy as np

from engine.failpoints import ARMED, hit
from engine.ring import (
    BOUND,
    CLOSED,
    DATABASE,
    HEADER_BYTES,
    RECORD_HEADER,
    RESUMED,
    SETTLED,
    TAIL,
    Lane,
    LaneCorruptError,
    Record,
)


class Consumer:
    """The one reader that frees records. Who holds the lane's consumer lock, and nobody else, may make and use one.

    For a lane of this boot: `head` and `tail` are true, since the page cache outlives every process. A lane of an
    earlier boot wants a SealedConsumer.
    """

    sealed = False

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    @property
    def end(self) -> int:
        """Where the lane ends."""
        return self.lane.head

    def read(self, position: int, max_points: int, max_bytes: int) -> list[Record]:
        """Return records from raw `position` on, in order, up to either bound but at least one if there is one.

        Raises LaneCorruptError if the first of them is damaged; those before a damaged one can still be drained.
        """
        lane, head = self.lane, self.lane.head
        records: list[Record] = []
        points, start = 0, position
        while start < head and points < max_points and start - position < max_bytes:
            record = lane.next_record(start)
            if record is None or record.end > head:
                if records:
                    break
                del record  # a view of the lane, which could not be closed as long as somebody holds the error
                raise LaneCorruptError(
                    f"{lane.path}: no valid record at position {start} below head {head}; keep the file"
                )
            if records and points + record.points > max_points:
                break
            records.append(record)
            points += record.points
            start = record.end
        return records

    def free(self, position: int, settled_points: int) -> None:
        """Give the room up to raw `position` back to the producer: only after the database said COMMIT."""
        words = self.lane.words
        words[SETTLED] = settled_points
        if ARMED:
            hit("drain-before-tail")
        words[TAIL] = position

    def close(self) -> None:
        """Let nobody append to this lane any more: its producer takes another one."""
        self.lane.words[CLOSED] = 1

    def set_bound(self, points: int) -> None:
        """Remember how many points the next transaction may hold, over a restart of the writer."""
        self.lane.words[BOUND] = points

    def resume(self) -> None:
        """Let the lane drain again from where the ledger is, although it was drained further once (operator).

        For a lane that nobody appends to; it is marked so.
        """
        self.close()
        self.lane.words[RESUMED] = 1

    def set_database(self, database: uuid.UUID) -> None:
        """Mark the lane as belonging to `database`; durable before the first drain (delivery contract)."""
        self.lane.header[DATABASE : DATABASE + 16] = database.bytes
        self.lane.map.flush(0, HEADER_BYTES)


class SealedConsumer(Consumer):
    """A Consumer for a lane that nobody appends to any more; `head` and `tail` play no part in what it reads."""

    sealed = True

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
