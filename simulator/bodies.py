"""What a request says: readings as the body of a batch in each format, packed, and the head before it.

format      media type                              a body of n points
json        application/json                        an array of n objects
columnar    application/json                        an object of arrays of n values
ndjson      application/x-ndjson                    n lines of one object each
arrow       application/vnd.apache.arrow.stream     one record batch
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from simulator.fleet import Channel, Readings
from simulator.settings import Job
from simulator.wire import JsonColumns, JsonRows

Buffer = bytes | memoryview

MEDIA_TYPES: Final = {
    "json": "application/json",
    "columnar": "application/json",
    "ndjson": "application/x-ndjson",
    "arrow": "application/vnd.apache.arrow.stream",
}
KEY_DIGITS: Final = 12
END_OF_STREAM: Final = b"\xff\xff\xff\xff\0\0\0\0"
# Messages of as many lengths are kept: a full batch, and what is left of a block.
LENGTHS_KEPT: Final = 4


class Body(Protocol):
    """Print readings as the bodies of batches."""

    def bodies(self, readings: Readings, size: int) -> Iterator[Sequence[Buffer]]:
        """Yield the bodies of n > 0 readings, `size` in each: pieces of one dimension, good until the next call."""


class RowBody:
    """Print a JSON array, or one object a line."""

    def __init__(self, rows: JsonRows, *, array: bool) -> None:
        self._rows = rows
        self._open, self._separator, self._close = (b"[", b",", b"]") if array else (b"", b"\n", b"\n")

    def bodies(self, readings: Readings, size: int) -> Iterator[Sequence[Buffer]]:
        """Yield the opening bracket and the rows, of which the last ends with the closing one."""
        matrix = self._rows.write(readings)
        matrix[:, -1] = self._separator[0]
        matrix[size - 1 :: size, -1] = matrix[-1, -1] = self._close[0]
        for first in range(0, len(matrix), size):
            yield self._open, matrix[first : first + size].data.cast("B")


class ColumnBody:
    """Print a JSON object of arrays."""

    def __init__(self, columns: JsonColumns) -> None:
        self._columns = columns

    def bodies(self, readings: Readings, size: int) -> Iterator[Sequence[Buffer]]:
        """Yield names, brackets and columns."""
        columns = self._columns.write(readings)
        for first in range(0, len(readings.satellite), size):
            pieces: list[Buffer] = []
            for opening, cells in columns:
                # Without the comma after the last value.
                pieces += (opening, cells[first : first + size].reshape(-1)[:-1].data)
            yield [*pieces, b"]}"]


class ArrowBody:
    """Write an Arrow IPC stream: satellite_id utf8, timestamp[us, UTC], a double a channel.

    Ids are of one width and nothing is null: streams of as many points differ in their values alone. One of each length
    is made by pyarrow and kept, and the values of the next are written over it.
    """

    def __init__(self, ids: npt.NDArray[np.bytes_], first: int, channels: tuple[Channel, ...]) -> None:
        import pyarrow as pa

        self._pa = pa
        self._ids = ids
        self._first = first
        self._scale = [10.0**channel.decimals for channel in channels]
        self._time = pa.timestamp("us", tz="UTC")
        fields = [("satellite_id", pa.string()), ("timestamp", self._time)]
        self._schema = pa.schema(fields + [(channel.name, pa.float64()) for channel in channels])
        self._opening = memoryview(self._schema.serialize())
        self._made: dict[int, tuple[memoryview, list[npt.NDArray[Any]]]] = {}

    def bodies(self, readings: Readings, size: int) -> Iterator[Sequence[Buffer]]:
        """Yield streams: schema, one record batch, end."""
        total = len(readings.satellite)
        for first in range(0, total, size):
            run = slice(first, min(first + size, total))
            count = run.stop - first
            message, (ids, times, *values) = self._made.get(count) or self._make(count)
            np.take(self._ids, readings.satellite[run] - self._first, out=ids)
            times[:] = readings.time_us[run]
            for column, scale, cells in zip(readings.values, self._scale, values, strict=True):
                # Divided, not multiplied by 0.01: 8731 / 100 is the double next to 87.31, as in the JSON formats.
                np.divide(column[run], scale, out=cells)
            yield self._opening, message, END_OF_STREAM

    def _make(self, count: int) -> tuple[memoryview, list[npt.NDArray[Any]]]:
        """Make the message of a batch of `count` points; return it with the places of its values, column by column."""
        pa = self._pa
        width = self._ids.itemsize
        offsets = np.arange(0, (count + 1) * width, width, dtype=np.int32)
        # A column of A's, one of B's, ...: each place is found by what stands there.
        kinds = [self._ids.dtype, np.dtype(np.int64), *(np.dtype(np.float64) for _ in self._scale)]
        marks = [np.frombuffer(bytes([65 + index]) * (count * kind.itemsize), kind) for index, kind in enumerate(kinds)]
        arrays: list[Any] = [
            pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(marks[0])),
            pa.Array.from_buffers(self._time, count, [None, pa.py_buffer(marks[1])]),
        ]
        arrays += [pa.Array.from_buffers(pa.float64(), count, [None, pa.py_buffer(mark)]) for mark in marks[2:]]
        message = bytearray(pa.RecordBatch.from_arrays(arrays, schema=self._schema).serialize())
        cells: list[npt.NDArray[Any]] = []
        at = 0
        for mark, kind in zip(marks, kinds, strict=True):
            at = message.index(mark.tobytes(), at)
            cells.append(np.frombuffer(message, kind, count, at))
            at += mark.nbytes
        if len(self._made) == LENGTHS_KEPT:
            self._made.clear()
        made = self._made[count] = memoryview(message), cells
        return made


def stream(opening: Buffer, batch: Any) -> Sequence[Buffer]:
    """Return an Arrow IPC stream of one pyarrow record batch: its schema's message, its own, and the end's."""
    return opening, memoryview(batch.serialize()), END_OF_STREAM


def make_body(kind: str, ids: npt.NDArray[np.bytes_], first: int, channels: tuple[Channel, ...], capacity: int) -> Body:
    """Return the writer of a format's bodies; ids[i] is the name of satellite first + i."""
    if kind == "arrow":
        return ArrowBody(ids, first, channels)
    if kind == "columnar":
        return ColumnBody(JsonColumns(ids, first, channels, capacity=capacity))
    return RowBody(JsonRows(ids, first, channels, capacity=capacity, tail=b" "), array=kind == "json")


def _gzip(parts: Sequence[Buffer]) -> bytes:
    """Pack at the fastest level: a sender on a small computer would."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(part) for part in parts), packer.flush()])


def _zstd(parts: Sequence[Buffer]) -> bytes:
    import pyarrow as pa

    packed: bytes = pa.Codec("zstd", compression_level=1).compress(b"".join(parts), asbytes=True)
    return packed


ENCODINGS: Final[dict[str, Callable[[Sequence[Buffer]], bytes] | None]] = {
    "identity": None,
    "gzip": _gzip,
    "zstd": _zstd,
}


class Envelope:
    """Put bodies into requests: packs them, writes the head, numbers the Idempotency-Keys.

    A key is the run's random word, the number of the sender and that of the request: no two requests share one.
    """

    def __init__(self, job: Job, path: str, media_type: str, encoding: str = "identity") -> None:
        self._pack = ENCODINGS[encoding]
        lines = [f"POST {job.path}{path} HTTP/1.1", f"Host: {job.host}", "User-Agent: orbitstream-simulator"]
        if job.token is not None:
            lines.append(f"Authorization: Bearer {job.token}")
        lines.append(f"Content-Type: {media_type}")
        if self._pack is not None:
            lines.append(f"Content-Encoding: {encoding}")
        self._keyed = job.settings.idempotency_keys
        self._next = 0
        kind = "b" if path.endswith("batch") else "s"
        self._key = f"Idempotency-Key: {job.run}-{job.number}{kind}-" if self._keyed else ""
        self._start = ("\r\n".join(lines) + "\r\n").encode("latin-1")

    def head(self, length: int) -> bytes:
        """Return the request line and headers before a body of `length` bytes, blank line included."""
        key = b""
        if self._keyed:
            key = f"{self._key}{self._next:0{KEY_DIGITS}d}\r\n".encode()
            self._next += 1
        return b"%bContent-Length: %d\r\n%b\r\n" % (self._start, length, key)

    def wrap(self, parts: Sequence[Buffer]) -> memoryview:
        """Return a whole request."""
        if self._pack is not None:
            parts = (self._pack(parts),)
        return memoryview(b"".join((self.head(sum(len(part) for part in parts)), *parts)))

    def number(self, matrix: npt.NDArray[np.uint8], head_length: int) -> None:
        """Give each row of (n, width) bytes, which begins with a head of this envelope, a key of its own."""
        if self._keyed:
            numbers = range(self._next, self._next + len(matrix))
            self._next += len(matrix)
            digits = b"".join([b"%0*d" % (KEY_DIGITS, number) for number in numbers])
            # The key is the last header: its digits end before two line ends.
            end = head_length - 4
            matrix[:, end - KEY_DIGITS : end] = np.frombuffer(digits, dtype=np.uint8).reshape(-1, KEY_DIGITS)
