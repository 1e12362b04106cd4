"""Request bodies to columns: bytes in, points out, or one DecodeError that says what to mend. Knows nothing of HTTP.

The scalar rule (`_Checker`) is the truth about a point. The columnar path only ever accepts, and only what the scalar
rule would accept; whatever it does not take is looked at again point by point, for the exact verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from engine.channels import BY_NAME, CHANNELS, MAX_ID_BYTES, POINT_FIELDS
from engine.rows import Columns, Floats, Ids, Times
from engine.timestamps import ZERO_TIME, parse, parse_all

FUTURE_US: Final = 5 * 60 * 1_000_000
"""How far ahead of our clock a generation time may lie: clocks drift, and chunks far in the future cost dearly."""
MAX_ERRORS: Final = 20
"""Details are given for this many faults of a request; the rest is counted."""

_ALLOWED: Final = frozenset(POINT_FIELDS) | {"is_anomaly"}
_NUMBERS: Final = {float, int}


class Fault(NamedTuple):
    """One thing wrong with a body: where (JSON pointer), what kind, and in words. Input values are never echoed."""

    pointer: str
    code: str
    detail: str


class DecodeError(Exception):
    """A body that cannot be taken. `code` is `malformed-json`, `invalid-point` or `too-many-points`."""

    def __init__(self, code: str, detail: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.faults = list(faults)


class Point(NamedTuple):
    """One checked point; `values` holds the channels it has, `time_us` counts from 1970."""

    time_us: int
    satellite_id: bytes
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decode bodies under the given rules; `oldest_us` is the age beyond which retention would drop a point."""

    max_points: int
    oldest_us: int
    ignore_unknown: bool = False

    def point(self, body: bytes, now_us: int) -> Point:
        """Decode one JSON object; `now_us` is its reception time, and its time if it names none."""
        checker = _Checker(self, now_us)
        point = checker.check(_loads(body), "")
        checker.raise_faults()
        assert point is not None
        return point

    def json_batch(self, body: bytes, now_us: int) -> Columns:
        """Decode a JSON array of points."""
        points = _loads(body)
        if type(points) is not list:
            fault = Fault("", "wrong-type", "the body must be an array of points")
            raise DecodeError("invalid-point", fault.detail, [fault])
        return self._batch(points, now_us)

    def ndjson_batch(self, body: bytes, now_us: int) -> Columns:
        """Decode one JSON object a line; blank lines are skipped."""
        points: list[Any] = []
        for number, line in enumerate(body.split(b"\n"), 1):
            if line and not line.isspace():
                if len(points) > self.max_points:
                    break
                try:
                    points.append(orjson.loads(line))
                except orjson.JSONDecodeError as error:
                    raise DecodeError("malformed-json", f"line {number} is not JSON: {_reason(line, error)}") from error
        return self._batch(points, now_us)

    def _batch(self, points: list[Any], now_us: int) -> Columns:
        if not points:
            fault = Fault("", "empty", "the batch holds no point")
            raise DecodeError("invalid-point", fault.detail, [fault])
        if len(points) > self.max_points:
            raise DecodeError(
                "too-many-points", f"more points in one request than the {self.max_points} that are taken"
            )
        columns = self._columns(points, now_us)
        return self._one_by_one(points, now_us) if columns is None else columns

    def _columns(self, points: list[Any], now_us: int) -> Columns | None:
        """Turn points into columns if every one is plainly valid, else None."""
        if set(map(type, points)) != {dict} or not (
            self.ignore_unknown or _ALLOWED.issuperset(chain.from_iterable(points))
        ):
            return None
        try:
            ids = _ids([point["satellite_id"] for point in points])
            if ids is None:
                return None
            values = {}
            for channel in CHANNELS:
                if channel.required:
                    raw = [point[channel.name] for point in points]
                else:
                    raw = [point.get(channel.name) for point in points]
                    if raw.count(None) == len(raw):
                        continue
                column = _floats(raw, channel.low, channel.high, channel.required)
                if column is None:
                    return None
                values[channel.name] = column
        except KeyError:
            return None
        times = self._times([point.get("timestamp") for point in points], now_us)
        return None if times is None else Columns(times, ids, values, np.zeros(len(points), np.bool_))

    def _times(self, texts: list[Any], now_us: int) -> Times | None:
        if texts.count(None) == len(texts):
            return np.full(len(texts), now_us, np.int64)
        if set(map(type, texts)) != {str}:
            return None
        times = parse_all(texts)
        if times is None or times.max() > now_us + FUTURE_US or times.min() < now_us - self.oldest_us:
            return None
        return times

    def _one_by_one(self, points: list[Any], now_us: int) -> Columns:
        checker = _Checker(self, now_us)
        good = [checker.check(point, f"/{index}") for index, point in enumerate(points)]
        checker.raise_faults()
        checked = [point for point in good if point is not None]
        names = [name for name in BY_NAME if any(name in point.values for point in checked)]
        return Columns(
            time=np.array([point.time_us for point in checked], np.int64),
            satellite_id=np.array([point.satellite_id for point in checked]),
            values={name: np.array([point.values.get(name, np.nan) for point in checked]) for name in names},
            is_anomaly=np.zeros(len(checked), np.bool_),
        )


def _loads(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise DecodeError("malformed-json", f"the body is not JSON: {_reason(body, error)}") from error


def _reason(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body or body.isspace():
        return "it is empty"
    if not error.doc:  # the text could not be made at all
        return "it is not UTF-8"
    return f"{error.msg} (line {error.lineno}, column {error.colno})"


def _ids(ids: list[Any]) -> Ids | None:
    if set(map(type, ids)) != {str}:
        return None
    joined = "".join(ids)
    widths = set(map(len, ids))
    if not joined.isprintable() or not joined.isascii() or min(widths) == 0 or max(widths) > MAX_ID_BYTES:
        return None
    if len(widths) == 1:
        return np.frombuffer(joined.encode(), f"S{widths.pop()}")
    return np.array(ids, np.bytes_)


def _floats(raw: list[Any], low: float, high: float, required: bool) -> Floats | None:
    kinds = set(map(type, raw))
    if not kinds <= _NUMBERS and (required or not kinds <= {float, int, type(None)}):
        return None
    column = np.array(raw, np.float64)  # None becomes NaN, which JSON itself cannot bring
    inside = (column >= low) & (column <= high)
    if not (inside if required else inside | np.isnan(column)).all():
        return None
    return column


@dataclass(slots=True)
class _Checker:
    """The rule for one point, and the faults found so far in a request."""

    decoder: Decoder
    now_us: int
    faults: list[Fault] = field(default_factory=list)
    count: int = 0

    def fault(self, pointer: str, code: str, detail: str) -> None:
        self.count += 1
        if len(self.faults) < MAX_ERRORS:
            self.faults.append(Fault(pointer, code, detail))

    def raise_faults(self) -> None:
        if self.count:
            first = self.faults[0]
            rest = f" (and {self.count - 1} more)" if self.count > 1 else ""
            where = f"{first.pointer}: " if first.pointer else ""
            raise DecodeError("invalid-point", f"{where}{first.detail}{rest}", self.faults)

    def check(self, point: Any, pointer: str) -> Point | None:
        """Return the point if it is valid; otherwise note its faults and return what is of no use."""
        if type(point) is not dict:
            self.fault(pointer, "wrong-type", "a point must be an object")
            return None
        before = self.count
        if not self.decoder.ignore_unknown:
            for name in point.keys() - _ALLOWED:
                self.fault(f"{pointer}/{_escape(name)}", "unknown-field", f"known fields are {', '.join(POINT_FIELDS)}")
        satellite_id = self._satellite_id(point.get("satellite_id"), f"{pointer}/satellite_id", "satellite_id" in point)
        time_us = self._time(point.get("timestamp"), f"{pointer}/timestamp")
        values = self._values(point, pointer)
        return Point(time_us, satellite_id, values) if self.count == before else None

    def _satellite_id(self, value: Any, pointer: str, present: bool) -> bytes:
        if not present:
            self.fault(pointer, "missing-field", "satellite_id is required")
        elif type(value) is not str:
            self.fault(pointer, "wrong-type", "satellite_id must be a string")
        elif not value:
            self.fault(pointer, "invalid-id", "satellite_id is empty")
        else:
            encoded = value.encode()
            if len(encoded) > MAX_ID_BYTES:
                self.fault(pointer, "invalid-id", f"satellite_id is over {MAX_ID_BYTES} bytes")
            elif any(character < " " or "\x7f" <= character < "\xa0" for character in value):
                self.fault(pointer, "invalid-id", "satellite_id has a control character")
            return encoded
        return b""

    def _time(self, value: Any, pointer: str) -> int:
        if value is None or value == ZERO_TIME:
            return self.now_us
        if type(value) is not str:
            self.fault(pointer, "wrong-type", "timestamp must be a string")
            return 0
        try:
            time_us = parse(value)
        except ValueError as error:
            self.fault(pointer, "invalid-timestamp", f"timestamp {error}")
            return 0
        if time_us > self.now_us + FUTURE_US:
            self.fault(pointer, "timestamp-in-future", "timestamp is more than 5 minutes in the future")
        elif time_us < self.now_us - self.decoder.oldest_us:
            self.fault(pointer, "timestamp-too-old", "timestamp is older than the retention of the database")
        return time_us

    def _values(self, point: dict[str, Any], pointer: str) -> dict[str, float]:
        values = {}
        for channel in CHANNELS:
            value = point.get(channel.name)
            if value is None:
                if channel.name in point and channel.required:
                    self.fault(f"{pointer}/{channel.name}", "null", f"{channel.name} is required and cannot be null")
                elif channel.required:
                    self.fault(f"{pointer}/{channel.name}", "missing-field", f"{channel.name} is required")
            elif type(value) not in _NUMBERS:
                self.fault(f"{pointer}/{channel.name}", "wrong-type", f"{channel.name} must be a number")
            elif not channel.low <= value <= channel.high:
                self.fault(
                    f"{pointer}/{channel.name}",
                    "out-of-range",
                    f"{channel.name} must lie between {channel.low:g} and {channel.high:g} {channel.unit}",
                )
            else:
                values[channel.name] = float(value)
        return values


def _escape(name: str) -> str:
    return name[:64].replace("~", "~0").replace("/", "~1")
