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
     192  closed u64                                           not 0: nobody appends to it any more
     200  answered u64                                         points in answers 202 that were handed to the edge
     208  refused u64                                          points in answers 503 for want of room
     256  tail u64                                             the consumer's cache line
     264  settled points u64                                   points behind `tail`, as the ledger counts them
     272  bound u64                                            points the next transaction may hold, 0 = no limit known
     280  resumed u64                                          not 0: an operator let it drain again from the ledger
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
import time
import uuid
import zlib
from pathlib import Path
from typing import Final, NamedTuple

from engine.failpoints import ARMED, hit

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
HEAD, COUNTERS_A, COUNTERS_B, SYNCED, CLOSED, ANSWERED, REFUSED = 16, 17, 20, 23, 24, 25, 26
TAIL, SETTLED, BOUND, RESUMED = 32, 33, 34, 35
DATABASE = 320


class LaneError(Exception):
    """A lane file that cannot be used, and why."""


class LaneFullError(LaneError):
    """No room for the record now; nothing was written."""


class RecordTooLargeError(LaneError):
    """The record is larger than a quarter of the lane; nothing was written."""


class LaneFailedError(LaneError):
    """The lane is fail-stopped: an fdatasync failed, and what the disk holds is not known; nothing was written."""


class LaneClosedError(LaneError):
    """Nobody may append to this lane any more; nothing was written. Take another one."""


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


def padded(length: int) -> int:
    return (length + 7) & ~7


def whole_pages(capacity: int) -> int:
    """Return the size that a lane asked for with `capacity` bytes has."""
    return capacity - capacity % mmap.PAGESIZE


def create(path: Path, capacity: int, layout: bytes, boot: bytes) -> None:
    """Make a lane file at `path`, which must not exist; complete and synced before its name appears.

    The caller holds the lane's producer lock, so that nobody else makes it meanwhile.

    `capacity` in bytes is rounded down to whole pages. Raises LaneError for a bad size, OSError (ENOSPC) when the
    file system has no room: the space is allocated here, so that no later store can end in SIGBUS.
    """
    capacity = whole_pages(capacity)
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
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)  # of a process that was killed here; it may be a second name of a lane in use
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, HEADER_BYTES + capacity)
        os.pwrite(fd, header, 0)
        os.fsync(fd)
        if ARMED:
            hit("create-before-link")
        os.link(temporary, path)
        if ARMED:
            hit("create-after-link")
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
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.map = mmap.mmap(self.fd, 0)
        except (ValueError, OSError) as error:
            os.close(self.fd)
            raise LaneError(f"{path} is empty or no file, not a lane: remove it") from error
        try:
            self._read_header()
        except LaneError:
            self.map.close()
            os.close(self.fd)
            raise
        view = memoryview(self.map)
        self.header = view[:HEADER_BYTES]
        self.words = self.header.cast("Q")
        self.data = view[HEADER_BYTES : HEADER_BYTES + self.capacity]
        self.seed = zlib.crc32(self.uuid.bytes)

    def _read_header(self) -> None:
        raw = self.map[:HEADER_BYTES]
        if len(raw) < HEADER_BYTES or raw[:8] != MAGIC:
            raise LaneError(f"{self.path} is not a lane: move it out of the lane directory")
        _, version, header_bytes, lane_uuid, boot, capacity, created = _STATIC.unpack_from(raw)
        layout_bytes, crc = _STATIC_TAIL.unpack_from(raw, _STATIC.size)
        if version != VERSION or header_bytes != HEADER_BYTES:
            raise LaneError(
                f"{self.path} has lane format {version}, this version reads {VERSION}: use the other version"
            )
        layout = raw[LAYOUT_OFFSET : LAYOUT_OFFSET + layout_bytes]
        if zlib.crc32(layout, zlib.crc32(raw[: _STATIC.size + 4])) != crc or len(self.map) < HEADER_BYTES + capacity:
            raise LaneError(f"{self.path} has a damaged header: keep the file and see the log of the crash")
        self.uuid = uuid.UUID(bytes=lane_uuid)
        self.boot: bytes = boot
        self.capacity: int = capacity
        self.created_us: int = created
        self.layout: bytes = layout

    def close(self) -> None:
        """Release the mapping; every payload view of it must have been released before."""
        self.data.release()
        self.words.release()
        self.header.release()
        self.map.close()
        os.close(self.fd)

    @property
    def head(self) -> int:
        return self.words[HEAD]

    @property
    def tail(self) -> int:
        return self.words[TAIL]

    @property
    def settled_points(self) -> int:
        return self.words[SETTLED]

    @property
    def bound(self) -> int:
        return self.words[BOUND]

    @property
    def synced(self) -> int:
        return self.words[SYNCED]

    @property
    def closed(self) -> bool:
        """Whether nobody appends to it any more, although it may be of this boot."""
        return self.words[CLOSED] != 0

    @property
    def resumed(self) -> bool:
        """Whether an operator said that it may drain again from where the ledger is."""
        return self.words[RESUMED] != 0

    @property
    def answered_points(self) -> int:
        return self.words[ANSWERED]

    @property
    def refused_points(self) -> int:
        return self.words[REFUSED]

    @property
    def database(self) -> uuid.UUID | None:
        """The database this lane drains into; None before its first drain."""
        raw = bytes(self.header[DATABASE : DATABASE + 16])
        return uuid.UUID(bytes=raw) if any(raw) else None

    @property
    def snapshot(self) -> tuple[int, Counters]:
        """The head, and the points and records published up to it: exact even after a kill between two stores.

        After a power loss the stored pair may be of another moment than the stored head; then the later one is given.
        """
        for _ in range(100):  # a live producer may pass twice between our loads; it does not do so a hundred times
            head = self.words[HEAD]
            for slot in (COUNTERS_A, COUNTERS_B):
                position, points, records = self.words[slot : slot + 3]
                if position == head and self.words[HEAD] == head:
                    return head, Counters(points, records)
        a, b = self.words[COUNTERS_A + 1 : COUNTERS_A + 3], self.words[COUNTERS_B + 1 : COUNTERS_B + 3]
        return self.words[HEAD], Counters(*max(tuple(a), tuple(b)))

    @property
    def published(self) -> Counters:
        """Points and records published since the lane was made."""
        return self.snapshot[1]

    @property
    def queued_points(self) -> int:
        """Points published and not yet settled (approximate while both sides run)."""
        settled = self.words[SETTLED]
        return max(0, self.published.points - settled)

    @property
    def fill(self) -> float:
        """Share of the ring in use, 0..1."""
        return (self.words[HEAD] - self.words[TAIL]) / self.capacity

    def record_at(self, start: int, raw_start: int) -> Record | None:
        """Read the record at position `start`; None if what lies there is not that record. A PAD has -1 points."""
        offset = start % self.capacity
        length, crc, position, time_us, points, flags, key_bytes = RECORD_HEADER.unpack_from(self.data, offset)
        body = offset + RECORD_HEADER.size
        if (
            position != start
            or length % 8
            or length < RECORD_HEADER.size + padded(key_bytes)
            or offset + length > self.capacity
        ):
            return None
        covered = body if flags & PAD else offset + length
        if zlib.crc32(self.data[offset + 8 : covered], self.seed) != crc:
            return None
        payload = self.data[body + padded(key_bytes) : offset + length]
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

    def points_between(self, position: int, head: int) -> int | None:
        """Count the points of the records from `position` to `head`, on a lane of this boot; None if one is gone."""
        points = 0
        while position < head:
            record = self.next_record(position)
            if record is None:
                return None
            record.payload.release()
            points, position = points + record.points, record.end
        return points
