"""Request bodies to columns: bytes in, points out, or one DecodeError that says what to mend. Knows nothing of HTTP."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from operator import itemgetter
from typing import Any, Final

import numpy as np
import orjson

from engine import arrow_ipc
from engine.channels import CHANNELS, MAX_ID_BYTES, Channel
from engine.points import (
    ALLOWED,
    NEEDED,
    Checker,
    DecodeError,
    Point,
    Rejects,
    Rules,
    Unreadable,
    alone,
    by_column,
    by_point,
    extremes,
    has_control,
    inside,
)
from engine.rows import Columns, Floats, Ids

LARGE: Final = 1 << 20
"""A body over so many bytes is looked at before it is parsed: what parsing it costs must be bounded first."""
VALUES_A_POINT: Final = 16
"""A point has 12 fields at most; those few more are left to commas in ids, and to unknown fields that are ignored."""

Content = bytes | memoryview
"""A body. What a view shows may change once it is decoded."""

MANY: Final = 50
"""Values of a column from which on some calls of numpy are less than a look at the type or the length of each."""
_NUMBERS_AND_NULL: Final = {float, int, type(None)}


@dataclass(frozen=True, slots=True)
class Decoder(Rules):
    """Decode bodies under the rules given.

    `now_us` is the reception time of the body, and the time of a point that names none. A batch with `rejects` is
    lenient: its bad points are noted there and left out, and only a batch without a good one is an error.
    """

    def point(self, body: Content, now_us: int) -> Point:
        """Decode one JSON object."""
        checker = Checker(self, now_us, alone)
        point = checker.check(_loads(body), 0)
        checker.raise_faults()
        assert point is not None
        return point

    def json_batch(self, body: Content, now_us: int, rejects: Rejects | None = None) -> Columns:
        """Decode a JSON array of points, or an object of columns: arrays of equal length."""
        self._bound(body)
        parsed = _loads(body)
        if type(parsed) is dict:
            return self._columnar(parsed, now_us, rejects)
        if type(parsed) is not list:
            raise DecodeError.invalid("", "wrong-type", "the body must be an array of points, or an object of columns")
        return self._batch(parsed, now_us, rejects)

    def ndjson_batch(self, body: Content, now_us: int, rejects: Rejects | None = None) -> Columns:
        """Decode one JSON object a line; blank lines are skipped."""
        self._bound(body)
        points: list[Any] = []
        for number, line in enumerate(BytesIO(body), 1):
            if not line.isspace():
                if len(points) > self.max_points:
                    break
                try:
                    points.append(orjson.loads(line))
                except orjson.JSONDecodeError as error:
                    reason = f"line {number} is not JSON: {_reason(line, error)}"
                    if rejects is None:
                        raise DecodeError("malformed-json", reason) from error
                    points.append(Unreadable(reason))
        return self._batch(points, now_us, rejects)

    def arrow_batch(self, body: Content, now_us: int, rejects: Rejects | None = None) -> Columns:
        """Decode an Arrow IPC stream whose columns are the fields of a point."""
        return arrow_ipc.decode(bytes(body), self, now_us, rejects)  # what is remembered of it lies in its bytes

    def _bound(self, body: Content) -> None:
        """Refuse what would cost far more memory than the most points that are taken: `[],[],...`, say.

        An object or array takes 60 to 230 bytes once parsed, another value 60, a dictionary's entry 150, against two
        to eight in the body.
        """
        if len(body) <= LARGE:
            return
        text = bytes(body)
        if (
            text.count(b"{") + text.count(b"[") > 2 * self.max_points + VALUES_A_POINT
            or text.count(b",") > VALUES_A_POINT * self.max_points
        ):
            raise DecodeError(
                "too-many-points", f"more values in one request than the {self.max_points} points that are taken have"
            )

    def _batch(self, points: list[Any], now_us: int, rejects: Rejects | None) -> Columns:
        self.check_count(len(points))
        columns = self._transpose(points, now_us)
        return self.one_by_one(points, now_us, by_point, rejects) if columns is None else columns

    def _transpose(self, points: list[Any], now_us: int) -> Columns | None:
        """Turn points into columns if every one is plainly valid, else None."""
        names = points[0]
        if type(names) is not dict:
            return None
        try:  # the points of one client mostly have the same fields; only an object can be asked for one by its name
            table = {name: list(map(itemgetter(name), points)) for name in names}
            alike = sum(map(len, points)) == len(names) * len(points)
        except KeyError:
            alike = False
        except TypeError:
            return None
        if alike:
            if not NEEDED.issubset(names) or not (self.ignore_unknown or ALLOWED.issuperset(names)):
                return None
            return self._columns(table, len(points), now_us)
        if set(map(type, points)) != {dict}:
            return None
        if not (self.ignore_unknown or ALLOWED.issuperset(chain.from_iterable(points))):
            return None
        try:
            table = {"satellite_id": [point["satellite_id"] for point in points]}
            for channel in CHANNELS:
                if channel.required:
                    table[channel.name] = [point[channel.name] for point in points]
                else:
                    table[channel.name] = [point.get(channel.name) for point in points]
        except KeyError:
            return None
        table["timestamp"] = [point.get("timestamp") for point in points]
        return self._columns(table, len(points), now_us)

    def _columnar(self, table: dict[str, Any], now_us: int, rejects: Rejects | None) -> Columns:
        self.check_names(list(table))
        known = {name: values for name, values in table.items() if name in ALLOWED and name != "is_anomaly"}
        checker = Checker(self, now_us, lambda _, name: f"/{name}")
        length = len(known["satellite_id"]) if type(known["satellite_id"]) is list else None
        for name, values in known.items():
            if type(values) is not list:
                checker.fault(0, name, "wrong-type", f"{name} must be an array: a value for each point")
            elif length is not None and len(values) != length:
                detail = f"{name} has {len(values)} values and satellite_id has {length}"
                checker.fault(0, name, "unequal-length", detail)
        checker.raise_faults()
        assert length is not None
        self.check_count(length)
        columns = self._columns(known, length, now_us)
        if columns is None:
            points = [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
            return self.one_by_one(points, now_us, by_column, rejects)
        return columns

    def _columns(self, table: Mapping[str, Sequence[Any]], length: int, now_us: int) -> Columns | None:
        """Turn a list a field into columns if every value is plainly valid, else None."""
        ids = _ids(table["satellite_id"])
        if ids is None:
            return None
        values = {}
        for channel in CHANNELS:
            raw = table.get(channel.name)
            if raw is None or (not channel.required and raw.count(None) == length):
                continue
            column = _floats(raw, length, channel)
            if column is None:
                if channel.required or not set(map(type, raw)) <= _NUMBERS_AND_NULL:
                    return None
                column = np.array(raw, np.float64)  # None becomes NaN, which JSON itself cannot bring
                if not inside(column, channel, gaps=True):
                    return None
            values[channel.name] = column
        texts = table.get("timestamp")
        times = np.full(length, now_us, np.int64) if texts is None else self.times(texts, now_us)
        return None if times is None else Columns(times, ids, values, np.zeros(length, np.bool_))


def _loads(body: Content) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise DecodeError("malformed-json", f"the body is not JSON: {_reason(bytes(body), error)}") from error


def _reason(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body or body.isspace():
        return "it is empty"
    if not error.doc:  # the text could not be made at all
        return "it is not UTF-8"
    return f"{error.msg} (line {error.lineno}, column {error.colno})"


def _floats(raw: Sequence[Any], length: int, channel: Channel) -> Floats | None:
    """Turn numbers in the channel's range into an array, in a third of the time of np.array; None if one is not."""
    try:
        column = np.frombuffer(struct.pack(f"{length}d", *raw))
    except (struct.error, OverflowError):
        return None
    low, high = extremes(column)
    if not (channel.low <= low and high <= channel.high):
        return None
    if low <= 1 and high >= 0:  # false and true pass for 0 and 1
        doubtful = length < MANY or ((column == 0) | (column == 1)).any()
        if doubtful and bool in set(map(type, raw)):
            return None
    return column


def _ids(ids: Sequence[Any]) -> Ids | None:
    """Turn satellite ids into an array of bytes if every one is plainly valid, else None."""
    try:
        lines = "\n".join(ids) + "\n"
    except TypeError:
        return None
    width = len(ids[0]) + 1
    if len(ids) >= MANY and lines.isascii() and len(lines) == width * len(ids) and 1 < width <= MAX_ID_BYTES + 1:
        texts = np.frombuffer(lines.encode(), np.uint8).reshape(-1, width)[:, :-1].copy()
        low, high = extremes(texts.reshape(-1))
        if low >= 0x20 and high < 0x7F:  # no line ends but where they belong: all are of one width
            return texts.view(f"S{width - 1}").reshape(-1)
    if has_control("".join(ids)):
        return None
    encoded = ids if lines.isascii() else [each.encode() for each in ids]
    widths = set(map(len, encoded))
    return np.array(encoded, np.bytes_) if min(widths) and max(widths) <= MAX_ID_BYTES else None
