"""Readings to JSON text: n rows (or columns) of cells of fixed width; no Python per point, no I/O.

JSON allows white space before a number, so a number that is shorter than its cell is padded on the left and each cell
sits at a fixed offset. A row, cells in angle brackets:

    head {"satellite_id":"<id>","timestamp":"<date><clock><milli><micro>","battery_charge_percent":<whole><part>... tail
                                             2026-11-22T 00:10:00 .123   456Z                        ` 87`  `.31,`

Cells are filled by looking up ready-made text: a take from a table of a few thousand short strings and one strided
store a cell, where formatting digit by digit would cost a store a digit.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from simulator.anomalies import Scaled
from simulator.fleet import Channel, Readings
from simulator.traits import Int64s

DAY_US = 86_400_000_000
SECOND_US = 1_000_000

Text = npt.NDArray[Any]


def _texts(texts: list[bytes]) -> Text:
    """Return equally long texts as one array, as machine words where their length allows: those copy fastest."""
    width = len(texts[0])
    table = np.array(texts, dtype=f"S{width}")
    return table.view(f"u{width}") if width in (4, 8) else table


CLOCK = _texts([b"%02d:%02d:%02d" % (s // 3_600, s // 60 % 60, s % 60) for s in range(86_400)])
MILLI = _texts([b".%03d" % n for n in range(1_000)])
MICRO = _texts([b"%03dZ" % n for n in range(1_000)])
TIME_CELLS = [("date", np.dtype("S11")), ("clock", CLOCK.dtype), ("milli", MILLI.dtype), ("micro", MICRO.dtype)]


@lru_cache
def _whole_numbers(span: int, signed: bool) -> Text:
    """Return the numbers below `span` as texts of one width, then, if signed, the same with a minus sign."""
    numbers = [b"%d" % n for n in range(span)]
    # `-0` is an entry of its own, needed by values between -1 and 0.
    numbers += [b"-" + text for text in numbers] if signed else []
    width = max(map(len, numbers))
    return _texts([text.rjust(width) for text in numbers])


class NumberCells:
    """Print one channel: the integer part with its sign, padded, then the decimals and the character that follows.

    Values outside [low, high] of the channel raise IndexError: a table has no text for them.
    """

    def __init__(self, channel: Channel, follow: bytes) -> None:
        self._unit = np.int32(10**channel.decimals)
        self._signed = channel.low < 0
        span = max(abs(channel.low), abs(channel.high)) + 1
        self._span = np.int32(span)
        self.whole = _whole_numbers(span, self._signed)
        self.part = _texts([b".%0*d%s" % (channel.decimals, n, follow) for n in range(10**channel.decimals)])

    def write(self, rows: Text, index: int, values: Scaled) -> None:
        """Fill the two cells of channel `index` from values (n,) in units of the channel's resolution."""
        size = np.abs(values) if self._signed else values
        whole = size // self._unit
        part = size - whole * self._unit
        if self._signed:
            whole += self._span * (values < 0)
        rows[f"whole{index}"] = self.whole[whole]
        rows[f"part{index}"] = self.part[part]


class JsonRows:
    """Print readings as JSON objects of one fixed width.

    ids: the satellites' names, ids[i] being that of satellite first + i. Every row starts with `head` and ends with
    `tail` (a separator, or nothing). The matrix is reused: what `write` returned is good until the next call.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.bytes_],
        first: int,
        channels: tuple[Channel, ...],
        *,
        capacity: int,
        head: bytes = b"",
        tail: bytes = b"",
    ) -> None:
        self._ids = ids
        self._first = first
        ends = [b","] * (len(channels) - 1) + [b"}"]
        self._numbers = [NumberCells(channel, end) for channel, end in zip(channels, ends, strict=True)]
        self._template, cells = self._lay_out(channels, head, tail)
        self.width = len(self._template)
        self._cells = np.dtype(cells)
        self._matrix = np.empty((0, self.width), dtype=np.uint8)
        self._grow(capacity)

    def _lay_out(self, channels: tuple[Channel, ...], head: bytes, tail: bytes) -> tuple[bytes, Any]:
        """Return the row with its cells blank, and their names, formats and offsets as numpy.dtype takes them."""
        cells: dict[str, Any] = {"names": [], "formats": [], "offsets": []}
        row = head

        def cell(name: str, kind: np.dtype[Any]) -> None:
            nonlocal row
            cells["names"].append(name)
            cells["formats"].append(kind)
            cells["offsets"].append(len(row))
            row += b" " * kind.itemsize

        row += b'{"satellite_id":"'
        cell("id", self._ids.dtype)
        row += b'","timestamp":"'
        for name, kind in TIME_CELLS:
            cell(name, kind)
        row += b'",'
        for index, (channel, number) in enumerate(zip(channels, self._numbers, strict=True)):
            row += b'"%s":' % channel.name.encode()
            cell(f"whole{index}", number.whole.dtype)
            cell(f"part{index}", number.part.dtype)
        row += tail
        return row, {**cells, "itemsize": len(row)}

    def _grow(self, count: int) -> None:
        self._matrix = np.empty((count, self.width), dtype=np.uint8)
        self._matrix[:] = np.frombuffer(self._template, dtype=np.uint8)

    def write(self, readings: Readings) -> npt.NDArray[np.uint8]:
        """Print n readings; return their rows, (n, width) bytes."""
        count = len(readings.satellite)
        if count > len(self._matrix):
            self._grow(count)
        matrix = self._matrix[:count]
        rows = matrix.view(self._cells)[:, 0]
        rows["id"] = np.take(self._ids, readings.satellite - self._first)
        write_time(rows, readings.time_us)
        for index, number in enumerate(self._numbers):
            number.write(rows, index, readings.values[index])
        return matrix


class JsonColumns:
    """Print readings as a JSON object of arrays: one matrix of cells a column. ids and first as for JsonRows.

    The matrices are reused: what `write` returned is good until the next call.
    """

    def __init__(
        self, ids: npt.NDArray[np.bytes_], first: int, channels: tuple[Channel, ...], *, capacity: int
    ) -> None:
        self._ids = np.array([b'"%s",' % name for name in ids.tolist()])
        self._first = first
        self._numbers = [NumberCells(channel, b",") for channel in channels]
        self._names = [b'{"satellite_id":[', b'],"timestamp":[', *(b'],"%s":[' % c.name.encode() for c in channels)]
        self._kinds = [
            np.dtype([("open", "S1"), *TIME_CELLS, ("close", "S2")]),
            *(np.dtype([("whole0", n.whole.dtype), ("part0", n.part.dtype)]) for n in self._numbers),
        ]
        self._columns: list[Text] = []
        self._grow(capacity)

    def _grow(self, count: int) -> None:
        times, *_ = self._columns = [np.empty(count, kind) for kind in self._kinds]
        times["open"], times["close"] = b'"', b'",'

    def write(self, readings: Readings) -> list[tuple[bytes, npt.NDArray[np.uint8]]]:
        """Print n readings; return what goes before each column, and its cells, (n, width) bytes, commas included."""
        count = len(readings.satellite)
        if count > len(self._columns[0]):
            self._grow(count)
        times, *values = [cells[:count] for cells in self._columns]
        write_time(times, readings.time_us)
        for index, number in enumerate(self._numbers):
            number.write(values[index], 0, readings.values[index])
        columns = (np.take(self._ids, readings.satellite - self._first), times, *values)
        texts = (cells.view(np.uint8).reshape(count, -1) for cells in columns)
        return list(zip(self._names, texts, strict=True))


def write_time(rows: Text, time_us: Int64s) -> None:
    """Fill date and time of day; the date is looked up row by row only in a batch that crosses midnight."""
    first, last = (int(t) // DAY_US for t in (time_us.min(), time_us.max()))
    within = time_us - first * DAY_US
    if first != last:
        day = within // DAY_US
        within -= day * DAY_US
        rows["date"] = np.array([_date(first + n) for n in range(last - first + 1)], dtype="S11")[day]
    else:
        rows["date"] = _date(first)
    second = within // SECOND_US
    micros = (within - second * SECOND_US).astype(np.int32)
    millis = micros // np.int32(1_000)
    rows["clock"] = CLOCK[second]
    rows["milli"] = MILLI[millis]
    rows["micro"] = MICRO[micros - millis * np.int32(1_000)]


def _date(day: int) -> bytes:
    """Return the date of a day since 1970, with the T that follows it."""
    return str(np.datetime64(day, "D")).encode() + b"T"


def split_rows(matrix: npt.NDArray[np.uint8]) -> list[memoryview]:
    """Return each row as bytes of its own, views of one copy."""
    text = memoryview(matrix.tobytes())
    edges = range(0, len(text) + 1, matrix.shape[1])
    return [text[start:end] for start, end in pairwise(edges)]
