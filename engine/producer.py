"""The producer's end of a lane: publish a record, all or nothing, and bring it to the disk when that was promised."""

from __future__ import annotations

import math
import os
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from engine.failpoints import ARMED, hit
from engine.ring import (
    ANSWERED,
    CLOSED,
    COUNTERS_A,
    COUNTERS_B,
    HEAD,
    PAD,
    RECORD_BODY,
    RECORD_HEADER,
    REFUSED,
    SYNCED,
    TAIL,
    Lane,
    LaneClosedError,
    LaneFailedError,
    LaneFullError,
    RecordTooLargeError,
    padded,
)

UNKNOWN_S: Final = 1
AWAY_S: Final = 5
"""What a client is told to wait while nothing is known of the drain rate yet, and while nothing drains."""


class Receipt(NamedTuple):
    """A published record that is not answered for yet."""

    producer: Producer
    end: int
    points: int

    def sync(self) -> None:
        """Make the record as durable as its lane promises; raises OSError if that is not known to be so."""
        if self.producer.durable:
            self.producer.sync(self.end)

    @property
    def settled(self) -> bool:
        """Whether the database has what is to be had of it: rows, or dead letters."""
        return self.producer.lane.tail >= self.end

    @property
    def given_up(self) -> bool:
        """Whether it may take long, since the lane was closed under it."""
        return self.producer.lane.closed

    def answered(self) -> None:
        """Count its points as answered: the 202 is on its way."""
        self.producer.answered(self.points)


class Producer:
    """The one writer of records. Who holds the lane's producer lock, and nobody else, may make and use one."""

    def __init__(self, lane: Lane, *, durable: bool = False) -> None:
        self.lane = lane
        self.durable = durable
        self.largest_record = lane.capacity // 4
        self._mutex = threading.Lock()  # threads of this process; processes are kept apart by the producer lock
        self._sync_mutex = threading.Lock()
        self._failed = False
        self._mark = (time.monotonic(), lane.tail)
        self._drain_rate: float | None = None

    def publish(self, payload: Sequence[bytes | memoryview], points: int, time_us: int, key: bytes = b"") -> Receipt:
        """Commit one record, all or nothing; with `durable` it is answered for only after the receipt's `sync`.

        `payload` is written piece after piece. Raises LaneFullError, LaneFailedError, LaneClosedError or
        RecordTooLargeError before the first byte is written; after any other exception the record may be stored or
        not, and must not be denied.
        """
        with self._mutex:
            if self._failed:
                raise LaneFailedError(
                    f"{self.lane.path.name} is stopped: a write to its disk failed; restart the service"
                )
            if self.lane.closed:
                raise LaneClosedError(f"{self.lane.path.name} is closed")
            return Receipt(self, self._publish(payload, points, time_us, key), points)

    def sync(self, end: int) -> None:
        """Bring the ring to the disk up to `end` and beyond: one sync covers all that was published before it.

        A failed fdatasync is never repeated: the kernel may have dropped the pages and would report success. The lane
        is stopped then, and whether its last records are stored is not known.
        """
        words = self.lane.words
        with self._sync_mutex:
            if words[SYNCED] >= end:
                return
            if self._failed:
                raise OSError("an earlier fdatasync of this lane failed")
            target = words[HEAD]
            if ARMED:
                hit("publish-before-sync")
            try:
                os.fdatasync(self.lane.fd)
            except OSError:
                self._failed = True
                raise
            words[SYNCED] = target

    def close(self) -> None:
        """Let nobody append to this lane any more; what it holds is still drained."""
        self.lane.words[CLOSED] = 1

    def answered(self, points: int) -> None:
        """Count points whose 202 is on its way."""
        with self._mutex:
            self.lane.words[ANSWERED] += points

    def retry_after(self) -> int:
        """Return in how many seconds a record of the largest size will have room, at the rate that was seen last."""
        with self._mutex:
            self._note_drain()
            lane, rate = self.lane, self._drain_rate
            missing = self.largest_record - (lane.capacity - (lane.head - lane.tail))
        if rate is None:
            return UNKNOWN_S
        return AWAY_S if rate <= 0 else max(1, min(60, math.ceil(missing / rate)))

    def _note_drain(self) -> None:
        """Measure the drain rate (bytes/s) over the last second or more, as far as there was something to drain."""
        now, (since, tail) = time.monotonic(), self._mark
        if now - since >= 1.0:
            self._drain_rate = (self.lane.tail - tail) / (now - since)
            self._mark = (now, self.lane.tail)

    def _publish(self, payload: Sequence[bytes | memoryview], points: int, time_us: int, key: bytes) -> int:
        lane = self.lane
        words, data, capacity = lane.words, lane.data, lane.capacity
        used = RECORD_HEADER.size + padded(len(key)) + sum(map(len, payload))
        length = padded(used)
        if length > self.largest_record:
            raise RecordTooLargeError(
                f"the request takes {length} bytes in the lane, at most {self.largest_record} fit: send fewer points"
            )
        head = words[HEAD]
        if head == words[TAIL]:  # so it does drain, and from here on there is something to drain again
            self._mark, self._drain_rate = (time.monotonic(), head), self._drain_rate or None
        room = capacity - head % capacity
        start = head if room >= length else head + room
        end = start + length
        if end - words[TAIL] > capacity:
            self._note_drain()
            words[REFUSED] += points
            raise LaneFullError(f"{lane.path.name} is full: {capacity} bytes wait for the database")
        if start != head and room >= RECORD_HEADER.size:
            self._write_pad(head, room)
        offset = start % capacity
        place = offset + RECORD_HEADER.size
        body = RECORD_BODY.pack(start, time_us, points, 0, len(key))
        crc = zlib.crc32(body, lane.seed)
        pieces = [key, bytes(padded(len(key)) - len(key)), *payload] if key else [*payload]
        if length > used:
            pieces.append(bytes(length - used))
        if ARMED:
            hit("publish-before-payload")
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            data[place : place + len(piece)] = piece
            place += len(piece)
        data[offset : offset + RECORD_HEADER.size] = struct.pack("<II", length, crc) + body
        if ARMED:
            hit("publish-before-counters")
        self._store_counters(end, points)
        if ARMED:
            hit("publish-before-head")
        words[HEAD] = end
        if ARMED:
            hit("publish-after-head")
        return end

    def _write_pad(self, position: int, length: int) -> None:
        lane = self.lane
        offset = position % lane.capacity
        body = RECORD_BODY.pack(position, 0, 0, PAD, 0)
        crc = zlib.crc32(body, lane.seed)  # the header alone: what lies behind it is of no account
        lane.data[offset : offset + RECORD_HEADER.size] = struct.pack("<II", length, crc) + body

    def _store_counters(self, position: int, points: int) -> None:
        """Write the pair that is not in force, for one record more; the store of `head` that follows puts it in force.

        The pair whose position equals `head` is in force. That holds from the lane's creation on, where both are 0.
        """
        words = self.lane.words
        old, new = (COUNTERS_A, COUNTERS_B) if words[COUNTERS_A] == words[HEAD] else (COUNTERS_B, COUNTERS_A)
        words[new] = (1 << 64) - 1  # matches no head while the pair is half written
        words[new + 1] = words[old + 1] + points
        words[new + 2] = words[old + 2] + 1
        words[new] = position
