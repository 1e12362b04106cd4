"""A lane: a single-producer single-consumer ring of records in a mapped file. It knows bytes and positions only.

The file is one header page and then `capacity` bytes of records (offsets in bytes, little endian):

       0  magic "ORBLANE1" | version u32 | header size u32     constant from creation on, with a CRC
      16  lane uuid 16s | boot id 16s                          boot id: the boot of the machine it was made in
      48  capacity u64 | created u64 (us since 1970)
      64  layout length u32 | CRC-32 of bytes 0..68 and layout
     128  head u64                                             the producer's cache line: it alone writes here
     136  counters A: position, points, records u64
     160  counters B: position, points, records u64
     184  synced u64                                           head that the last successful fdatasync covered
     256  tail u64                                             the consumer's cache line
     264  settled points u64                                   points behind `tail`, as the ledger counts them
     272  bound u64                                            points the next transaction may hold, 0 = no limit known
     320  database uuid 16s                                    zero until the first drain
     512  layout                                               text that says how payloads are to be read
    4096  records

Positions. A record is named by its absolute byte position, a count that never wraps; `position % capacity` is its
place. `head` and `tail` are raw record ends: a PAD or a skipped remainder belongs to the record after it.

A record, 8-aligned, never split over the end of the ring:

       0  length u32        whole record, header and padding included
       4  crc u32           CRC-32 of the lane uuid, bytes 8..32 and, unless it is a PAD, what follows
       8  position u64      its own, so that bytes of an earlier lap are never taken for a record
      16  time u64          reception, us since 1970
      24  points u32
      28  flags u16         1 = PAD: fills the end of the ring, holds nothing
      30  key length u16
      32  key, payload, zeros up to a multiple of 8

Publication. Firstly: the bytes between `tail` and `head` belong to the consumer, all others to the producer. Given
that, the producer writes payload and header beyond `head` and publishes them by one aligned store of `head`, last; the
consumer frees them by one aligned store of `tail`, last. A process killed between two stores leaves a lane that reads
as if the step had not begun. Counters lie twice: the pair whose position equals `head` is the true one.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

MAGIC: Final = b"ORBLANE1"
VERSION: Final = 1
HEADER_BYTES: Final = 4096
LAYOUT_OFFSET: Final = 512
MAX_LAYOUT_BYTES: Final = HEADER_BYTES - LAYOUT_OFFSET
MIN_CAPACITY: Final = 64 * 1024
RECORD_HEADER: Final = struct.Struct("<IIQQIHH")
RECORD_BODY: Final = struct.Struct("<QQIHH")  # the part of the header that the CRC covers
PAD: Final = 1

_STATIC = struct.Struct("<8sII16s16sQQ")
_STATIC_TAIL = struct.Struct("<II")
# Indices of 8-byte words in the header page.
_HEAD, _COUNTERS_A, _COUNTERS_B, _SYNCED = 16, 17, 20, 23
_TAIL, _SETTLED, _BOUND = 32, 33, 34
_DATABASE = 320


class LaneError(Exception):
    """A lane file that cannot be used, and why."""


class LaneFullError(LaneError):
    """No room for the record now; nothing was written."""


class RecordTooLargeError(LaneError):
    """The record is larger than a quarter of the lane; nothing was written."""


class LaneCorruptError(LaneError):
    """A record below `head` does not hold what was published; the lane must not be drained further."""


class Record(NamedTuple):
    """One record: `start` and `end` are raw positions, `payload` a view of the mapped file (valid until freed)."""

    start: int
    end: int
    points: int
    time_us: int
    key: bytes
    payload: memoryview


class Counters(NamedTuple):
    """What the producer published since the lane was made."""

    points: int
    records: int


def boot_id() -> bytes:
    """Return the 16 bytes that name this boot of the machine."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def _padded(length: int) -> int:
    return (length + 7) & ~7


def create(path: Path, capacity: int, layout: bytes, boot: bytes) -> None:
    """Make a lane file at `path`, which must not exist; complete and synced before its name appears.

    `capacity` in bytes is rounded down to whole pages. Raises LaneError for a bad size, OSError (ENOSPC) when the
    file system has no room: the space is allocated here, so that no later store can end in SIGBUS.
    """
    capacity -= capacity % mmap.PAGESIZE
    if capacity < MIN_CAPACITY:
        raise LaneError(f"a lane of {capacity} bytes is too small: give at least {MIN_CAPACITY}")
    if len(layout) > MAX_LAYOUT_BYTES:
        raise LaneError(f"the row layout takes {len(layout)} bytes, a lane has room for {MAX_LAYOUT_BYTES}")
    static = _STATIC.pack(
        MAGIC, VERSION, HEADER_BYTES, uuid.uuid4().bytes, boot, capacity, time.time_ns() // 1000
    ) + struct.pack("<I", len(layout))
    header = bytearray(HEADER_BYTES)
    header[: len(static)] = static
    struct.pack_into("<I", header, len(static), zlib.crc32(layout, zlib.crc32(static)))
    header[LAYOUT_OFFSET : LAYOUT_OFFSET + len(layout)] = layout
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, HEADER_BYTES + capacity)
        os.pwrite(fd, header, 0)
        os.fsync(fd)
        os.link(temporary, path)
    finally:
        os.close(fd)
        os.unlink(temporary)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Lane:
    """A mapped lane file. Any process may read its words; see Producer and Consumer for who may write which."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, 0)
        except ValueError as error:
            raise LaneError(f"{path} is empty, not a lane: remove it") from error
        finally:
            os.close(fd)
        try:
            self._read_header()
        except LaneError:
            self._map.close()
            raise
        view = memoryview(self._map)
        self._header = view[:HEADER_BYTES]
        self._words = self._header.cast("Q")
        self.data = view[HEADER_BYTES : HEADER_BYTES + self.capacity]
        self._seed = zlib.crc32(self.uuid.bytes)

    def _read_header(self) -> None:
        raw = self._map[:HEADER_BYTES]
        if len(raw) < HEADER_BYTES or raw[:8] != MAGIC:
            raise LaneError(f"{self.path} is not a lane: move it out of the lane directory")
        _, version, header_bytes, lane_uuid, boot, capacity, created = _STATIC.unpack_from(raw)
        layout_bytes, crc = _STATIC_TAIL.unpack_from(raw, _STATIC.size)
        if version != VERSION or header_bytes != HEADER_BYTES:
            raise LaneError(
                f"{self.path} has lane format {version}, this version reads {VERSION}: use the other version"
            )
        layout = raw[LAYOUT_OFFSET : LAYOUT_OFFSET + layout_bytes]
        if zlib.crc32(layout, zlib.crc32(raw[: _STATIC.size + 4])) != crc or len(self._map) < HEADER_BYTES + capacity:
            raise LaneError(f"{self.path} has a damaged header: keep the file and see the log of the crash")
        self.uuid = uuid.UUID(bytes=lane_uuid)
        self.boot: bytes = boot
        self.capacity: int = capacity
        self.created_us: int = created
        self.layout: bytes = layout

    def close(self) -> None:
        """Release the mapping; every payload view of it must have been released before."""
        self.data.release()
        self._words.release()
        self._header.release()
        self._map.close()

    @property
    def head(self) -> int:
        return self._words[_HEAD]

    @property
    def tail(self) -> int:
        return self._words[_TAIL]

    @property
    def settled_points(self) -> int:
        return self._words[_SETTLED]

    @property
    def bound(self) -> int:
        return self._words[_BOUND]

    @property
    def database(self) -> uuid.UUID | None:
        """The database this lane drains into; None before its first drain."""
        raw = bytes(self._header[_DATABASE : _DATABASE + 16])
        return uuid.UUID(bytes=raw) if any(raw) else None

    @property
    def published(self) -> Counters:
        """Points and records published up to `head`, exact even after a kill between two stores.

        After a power loss the stored pair may be of another moment than the stored head; then the later one is given.
        """
        for _ in range(100):  # a live producer may pass twice between our loads; it does not do so a hundred times
            head = self._words[_HEAD]
            for slot in (_COUNTERS_A, _COUNTERS_B):
                position, points, records = self._words[slot : slot + 3]
                if position == head and self._words[_HEAD] == head:
                    return Counters(points, records)
        a, b = self._words[_COUNTERS_A + 1 : _COUNTERS_A + 3], self._words[_COUNTERS_B + 1 : _COUNTERS_B + 3]
        return Counters(*max(tuple(a), tuple(b)))

    @property
    def queued_points(self) -> int:
        """Points published and not yet settled (approximate while both sides run)."""
        settled = self._words[_SETTLED]
        return max(0, self.published.points - settled)

    @property
    def fill(self) -> float:
        """Share of the ring in use, 0..1."""
        return (self._words[_HEAD] - self._words[_TAIL]) / self.capacity

    def record_at(self, start: int, raw_start: int) -> Record | None:
        """Read the record at position `start`; None if what lies there is not that record. A PAD has -1 points."""
        offset = start % self.capacity
        length, crc, position, time_us, points, flags, key_bytes = RECORD_HEADER.unpack_from(self.data, offset)
        body = offset + RECORD_HEADER.size
        if (
            position != start
            or length % 8
            or length < RECORD_HEADER.size + _padded(key_bytes)
            or offset + length > self.capacity
        ):
            return None
        covered = body if flags & PAD else offset + length
        if zlib.crc32(self.data[offset + 8 : covered], self._seed) != crc:
            return None
        payload = self.data[body + _padded(key_bytes) : offset + length]
        key = bytes(self.data[body : body + key_bytes])
        return Record(raw_start, start + length, -1 if flags & PAD else points, time_us, key, payload)

    def next_record(self, raw_start: int) -> Record | None:
        """Read the record that follows raw position `raw_start`, over a PAD or a remainder too small for a header."""
        start = raw_start
        room = self.capacity - start % self.capacity
        if room < RECORD_HEADER.size:
            start += room
        record = self.record_at(start, raw_start)
        if record is not None and record.points < 0:
            record = self.record_at(record.end, raw_start)
        return None if record is None or record.points < 0 else record


class Producer:
    """The one writer of records. Who holds the lane's producer lock, and nobody else, may make and use one."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._mutex = threading.Lock()  # threads of this process; processes are kept apart by the producer lock
        self.largest_record = lane.capacity // 4

    def publish(self, payload: Sequence[bytes | memoryview], points: int, time_us: int, key: bytes = b"") -> int:
        """Commit one record and return the new head; all or nothing.

        `payload` is written piece after piece. Raises LaneFullError or RecordTooLargeError before the first byte is
        written; any other exception leaves the outcome unknown to the caller (the record is not published, but a
        caller must not say so: a later change may publish in batches).
        """
        with self._mutex:
            return self._publish(payload, points, time_us, key)

    def _publish(self, payload: Sequence[bytes | memoryview], points: int, time_us: int, key: bytes) -> int:
        lane = self.lane
        words, data, capacity = lane._words, lane.data, lane.capacity
        used = RECORD_HEADER.size + _padded(len(key)) + sum(map(len, payload))
        length = _padded(used)
        if length > self.largest_record:
            raise RecordTooLargeError(
                f"the request takes {length} bytes in the lane, at most {self.largest_record} fit: send fewer points"
            )
        head = words[_HEAD]
        room = capacity - head % capacity
        start = head if room >= length else head + room
        end = start + length
        if end - words[_TAIL] > capacity:
            raise LaneFullError(f"{lane.path.name} is full: {capacity} bytes wait for the database")
        counters = lane.published
        if start != head and room >= RECORD_HEADER.size:
            self._write_pad(head, room)
        offset = start % capacity
        place = offset + RECORD_HEADER.size
        body = RECORD_BODY.pack(start, time_us, points, 0, len(key))
        crc = zlib.crc32(body, lane._seed)
        pieces = [key, bytes(_padded(len(key)) - len(key)), *payload, bytes(length - used)] if key else [
            *payload, bytes(length - used)
        ]  # fmt: skip
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            data[place : place + len(piece)] = piece
            place += len(piece)
        data[offset : offset + RECORD_HEADER.size] = struct.pack("<II", length, crc) + body
        self._store_counters(end, counters.points + points, counters.records + 1)
        words[_HEAD] = end
        return end

    def _write_pad(self, position: int, length: int) -> None:
        lane = self.lane
        offset = position % lane.capacity
        body = RECORD_BODY.pack(position, 0, 0, PAD, 0)
        crc = zlib.crc32(body, lane._seed)  # the header alone: what lies behind it is of no account
        lane.data[offset : offset + RECORD_HEADER.size] = struct.pack("<II", length, crc) + body

    def _store_counters(self, position: int, points: int, records: int) -> None:
        """Write the pair that is not in force; the store of `head` that follows puts it in force."""
        words = self.lane._words
        slot = _COUNTERS_B if words[_COUNTERS_A] == words[_HEAD] else _COUNTERS_A
        words[slot] = (1 << 64) - 1  # matches no head while the pair is half written
        words[slot + 1] = points
        words[slot + 2] = records
        words[slot] = position


class Consumer:
    """The one reader that frees records. Who holds the lane's consumer lock, and nobody else, may make and use one.

    For a lane of this boot: `head` and `tail` are true, since the page cache outlives every process. A lane of an
    earlier boot wants a SealedConsumer.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    @property
    def end(self) -> int:
        """Where the lane ends."""
        return self.lane.head

    def read(self, position: int, max_points: int, max_bytes: int) -> list[Record]:
        """Return records from raw `position` on, in order, up to either bound but at least one if there is one.

        Raises LaneCorruptError if a record below the end is damaged.
        """
        lane, head = self.lane, self.lane.head
        records: list[Record] = []
        points, start = 0, position
        while start < head and points < max_points and start - position < max_bytes:
            record = lane.next_record(start)
            if record is None or record.end > head:
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
        words = self.lane._words
        words[_SETTLED] = settled_points
        words[_TAIL] = position

    def set_bound(self, points: int) -> None:
        """Remember how many points the next transaction may hold, over a restart of the writer."""
        self.lane._words[_BOUND] = points

    def set_database(self, database: uuid.UUID) -> None:
        """Mark the lane as belonging to `database`; durable before the first drain (delivery contract)."""
        self.lane._header[_DATABASE : _DATABASE + 16] = database.bytes
        self.lane._map.flush(0, HEADER_BYTES)
