"""The rule for one point, the faults it finds, and the fast forms of parts of it for whole columns.

`Checker` is the truth about a point. What works on columns (here and in the decoders) only ever accepts, and only what
the checker would accept; whatever it does not take is looked at again point by point, for the exact verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.channels import BY_NAME, CHANNELS, MAX_ID_BYTES, POINT_FIELDS, REQUIRED, Channel
from engine.rows import Columns, Floats, Times
from engine.timestamps import ZERO_TIME, parse, parse_all

FUTURE_US: Final = 5 * 60 * 1_000_000
"""How far ahead of our clock a generation time may lie: clocks drift, and chunks far in the future cost dearly."""
MAX_ERRORS: Final = 20
"""Details are given for this many faults of a request; the rest is counted."""
ALLOWED: Final = frozenset(POINT_FIELDS) | {"is_anomaly"}
NEEDED: Final = frozenset({"satellite_id", *REQUIRED})

_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]")
LONG: Final = 2000
"""Characters from which numpy's 4 us a call are less than what str.isprintable takes, 2 ns for each."""
_NUMBERS: Final = {float, int}
_ZERO_US: Final = parse(ZERO_TIME)


class Fault(NamedTuple):
    """One thing wrong with a body: where (JSON pointer), what kind, and in words. Input values are never echoed."""

    pointer: str
    code: str
    detail: str


class DecodeError(Exception):
    """A body that cannot be taken. `code` is that of a problem: `malformed-json`, `invalid-point`, ..."""

    def __init__(self, code: str, detail: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.faults = list(faults)

    @classmethod
    def invalid(cls, pointer: str, code: str, detail: str) -> DecodeError:
        """Return the error of a body with one fault."""
        return cls("invalid-point", f"{pointer}: {detail}" if pointer else detail, [Fault(pointer, code, detail)])


class Point(NamedTuple):
    """One checked point; `values` holds the channels it has, `time_us` counts from 1970."""

    time_us: int
    satellite_id: bytes
    values: dict[str, float]


class Instant(NamedTuple):
    """A timestamp that came as a number of microseconds since 1970, with its time zone settled."""

    us: int


class Unreadable(NamedTuple):
    """In place of a point whose text could not be read at all."""

    detail: str


@dataclass(slots=True)
class Rejects:
    """The points that a lenient request leaves out: every index, and the first faults."""

    indexes: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


Place = Callable[[int, str], str]


def alone(_: int, name: str) -> str:
    """Return the pointer to a field of the one point that the body is."""
    return f"/{name}" if name else ""


def by_point(index: int, name: str) -> str:
    """Return the pointer to a field of point `index` of an array."""
    return f"/{index}/{name}" if name else f"/{index}"


def by_column(index: int, name: str) -> str:
    """Return the pointer to value `index` of a column."""
    return f"/{name}/{index}"


def escape(name: str) -> str:
    """Return a name as a JSON pointer writes it, cut where it is long."""
    return name[:64].replace("~", "~0").replace("/", "~1")


def has_control(text: str) -> bool:
    """Tell whether a text has a control character."""
    if not text.isascii():
        return _CONTROL.search(text) is not None
    if len(text) < LONG:
        return not text.isprintable()
    low, high = extremes(np.frombuffer(text.encode(), np.uint8))
    return bool(low < 0x20 or high == 0x7F)


def extremes(column: NDArray[Any]) -> tuple[Any, Any]:
    """Return the least and the largest value of a column that is not empty: NaN where one value is.

    For 1,000 values in half the time of min and max.
    """
    return column[column.argmin()], column[column.argmax()]


def inside(column: Floats, channel: Channel, *, gaps: bool) -> bool:
    """Tell whether every value lies in the channel's range; with `gaps`, NaN is none. The column is not empty."""
    low, high = (np.fmin.reduce(column), np.fmax.reduce(column)) if gaps else extremes(column)
    return bool(low >= channel.low and high <= channel.high)


@dataclass(frozen=True, slots=True)
class Rules:
    """What is taken besides the channels' ranges; `oldest_us` is the age beyond which retention would drop a point."""

    max_points: int
    oldest_us: int
    ignore_unknown: bool = False

    def check_count(self, points: int) -> None:
        """Raise DecodeError for a batch of none, or of too many."""
        if not points:
            raise DecodeError.invalid("", "empty", "the batch holds no point")
        if points > self.max_points:
            raise DecodeError(
                "too-many-points", f"more points in one request than the {self.max_points} that are taken"
            )

    def check_names(self, names: Sequence[str]) -> None:
        """Raise DecodeError if a body of columns lacks one that is required, or has an unknown one."""
        given = set(names)
        if ALLOWED >= given >= NEEDED:
            return
        checker = Checker(self, 0, lambda _, name: f"/{name}")
        if not self.ignore_unknown:
            checker.note_unknown(0, given)
        for name in ("satellite_id", *REQUIRED):
            if name not in given:
                checker.fault(0, name, "missing-field", f"{name} is required")
        checker.raise_faults()

    def times(self, texts: Sequence[Any], now_us: int) -> Times | None:
        """Return the times of many timestamps if each is plainly valid, else None."""
        if texts[0] is None and all(text is None for text in texts):
            return np.full(len(texts), now_us, np.int64)
        times = parse_all(texts)
        if times is None:
            return None
        first, last = extremes(times)
        return times if now_us - self.oldest_us <= first and last <= now_us + FUTURE_US else None

    def one_by_one(self, points: Sequence[Any], now_us: int, place: Place, rejects: Rejects | None) -> Columns:
        """Check each point; raises DecodeError if one is bad, or with `rejects` only if all are, noting the bad."""
        checker = Checker(self, now_us, place)
        verdicts = [checker.check(point, index) for index, point in enumerate(points)]
        good = [point for point in verdicts if point is not None]
        if rejects is None or not good:
            checker.raise_faults()
        else:
            rejects.indexes += [index for index, point in enumerate(verdicts) if point is None]
            rejects.faults += checker.faults
        names = [name for name in BY_NAME if any(name in point.values for point in good)]
        return Columns(
            time=np.array([point.time_us for point in good], np.int64),
            satellite_id=np.array([point.satellite_id for point in good]),
            values={name: np.array([point.values.get(name, np.nan) for point in good]) for name in names},
            is_anomaly=np.zeros(len(good), np.bool_),
        )


@dataclass(slots=True)
class Checker:
    """The rule for one point, and the faults found so far in a request; `place` says how its pointers are written."""

    rules: Rules
    now_us: int
    place: Place
    faults: list[Fault] = field(default_factory=list)
    count: int = 0

    def fault(self, index: int, name: str, code: str, detail: str) -> None:
        """Note a fault of a field of point `index`, or of the point itself without a name."""
        self.count += 1
        if len(self.faults) < MAX_ERRORS:
            self.faults.append(Fault(self.place(index, name), code, detail))

    def raise_faults(self) -> None:
        """Raise DecodeError if a fault was noted."""
        if self.count:
            first = self.faults[0]
            rest = f" (and {self.count - 1} more)" if self.count > 1 else ""
            where = f"{first.pointer}: " if first.pointer else ""
            raise DecodeError("invalid-point", f"{where}{first.detail}{rest}", self.faults)

    def note_unknown(self, index: int, names: set[str]) -> None:
        """Note each name that is no field of a point."""
        for name in names - ALLOWED:
            self.fault(index, escape(name), "unknown-field", f"known fields are {', '.join(POINT_FIELDS)}")

    def check(self, point: Any, index: int) -> Point | None:
        """Return the point if it is valid; otherwise note its faults and return None."""
        if type(point) is not dict:
            if type(point) is Unreadable:
                self.fault(index, "", "malformed-json", point.detail)
            else:
                self.fault(index, "", "wrong-type", "a point must be an object")
            return None
        before = self.count
        if not self.rules.ignore_unknown and not ALLOWED.issuperset(point):
            self.note_unknown(index, set(point))
        satellite_id = self._satellite_id(point.get("satellite_id"), index, "satellite_id" in point)
        time_us = self._time(point.get("timestamp"), index)
        values = self._values(point, index)
        return Point(time_us, satellite_id, values) if self.count == before else None

    def _satellite_id(self, value: Any, index: int, present: bool) -> bytes:
        if type(value) is str:
            encoded = value.encode()
            if not encoded:
                self.fault(index, "satellite_id", "invalid-id", "satellite_id is empty")
            elif len(encoded) > MAX_ID_BYTES:
                self.fault(index, "satellite_id", "invalid-id", f"satellite_id is over {MAX_ID_BYTES} bytes")
            elif has_control(value):
                self.fault(index, "satellite_id", "invalid-id", "satellite_id has a control character")
            return encoded
        if present:
            self.fault(index, "satellite_id", "wrong-type", "satellite_id must be a string")
        else:
            self.fault(index, "satellite_id", "missing-field", "satellite_id is required")
        return b""

    def _time(self, value: Any, index: int) -> int:
        if value is None or value == ZERO_TIME:
            return self.now_us
        if type(value) is str:
            try:
                time_us = parse(value)
            except ValueError as error:
                self.fault(index, "timestamp", "invalid-timestamp", f"timestamp {error}")
                return 0
        elif type(value) is Instant:
            time_us = value.us
            if time_us == _ZERO_US:
                return self.now_us
        else:
            self.fault(index, "timestamp", "wrong-type", "timestamp must be a string")
            return 0
        if time_us > self.now_us + FUTURE_US:
            self.fault(index, "timestamp", "timestamp-in-future", "timestamp is more than 5 minutes in the future")
        elif time_us < self.now_us - self.rules.oldest_us:
            self.fault(index, "timestamp", "timestamp-too-old", "timestamp is older than the retention of the database")
        return time_us

    def _values(self, point: dict[str, Any], index: int) -> dict[str, float]:
        values = {}
        for channel in CHANNELS:
            name = channel.name
            value = point.get(name)
            if value is None:
                if channel.required and name in point:
                    self.fault(index, name, "null", f"{name} is required and cannot be null")
                elif channel.required:
                    self.fault(index, name, "missing-field", f"{name} is required")
            elif type(value) not in _NUMBERS:
                self.fault(index, name, "wrong-type", f"{name} must be a number")
            elif not channel.low <= value <= channel.high:
                self.fault(
                    index,
                    name,
                    "out-of-range",
                    f"{name} must lie between {channel.low:g} and {channel.high:g} {channel.unit}",
                )
            else:
                values[name] = float(value)
        return values
