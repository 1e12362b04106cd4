"""RFC 3339 timestamps to microseconds since 1970.

`parse` is the rule; `parse_all` is the same rule for many texts of one shape at once, and passes when they are not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ZERO_TIME: Final = "0001-01-01T00:00:00Z"
"""What a Go client sends for a time it never set (time.Time's zero value); read as absent."""

_SHAPE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:([Zz])|([+-])(\d\d):(\d\d))", re.ASCII
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_DAY_US: Final = 86_400_000_000
_TIME_PLACES: Final = [11, 12, 14, 15, 17, 18, 20, 21, 22, 23, 24, 25]
_TIME_US: Final = np.array([36e9, 3.6e9, 6e8, 6e7, 1e7, 1e6, 1e5, 1e4, 1e3, 100, 10, 1])
"""Where the digits of a time stand, and how many us each is worth."""


def now_us() -> int:
    """Return the wall clock in us since 1970."""
    return time.time_ns() // 1000


def parse(text: str) -> int:
    """Return the time that `text` names, in us since 1970; further digits are cut off.

    RFC 3339 with an offset and 0 to 9 fractional digits. Raises ValueError with the reason, in words for the sender.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError("is not an RFC 3339 timestamp with an offset, such as 2026-01-31T12:00:00.123Z")
    year, month, day, hour, minute, second, fraction, zulu, sign, offset_h, offset_m = match.groups()
    if second == "60":
        raise ValueError("is a leap second, which the database has no place for: send second 59")
    zone = UTC
    if not zulu:
        if int(offset_h) > 23 or int(offset_m) > 59:
            raise ValueError("has an offset that does not exist")
        offset = timedelta(hours=int(offset_h), minutes=int(offset_m))
        zone = timezone(offset if sign == "+" else -offset)
    try:
        moment = datetime(
            int(year),
            int(month),
            int(day),
            int(hour),
            int(minute),
            int(second),
            int((fraction or "0").ljust(6, "0")[:6]),
            zone,
        )
        return (moment - _EPOCH) // _MICROSECOND
    except (ValueError, OverflowError) as error:
        raise ValueError(f"is no date or time of the calendar ({error})") from error


def parse_all(texts: Sequence[Any]) -> NDArray[np.int64] | None:
    """Return the times of `texts`, in us since 1970, if all are texts of one common shape and valid; else None.

    The shape is YYYY-MM-DDTHH:MM:SS, up to 9 fractional digits, and Z or one offset. None says nothing about which
    text is at fault, or whether one is: ask `parse`.
    """
    try:
        lines = "\n".join(texts) + "\n"
    except TypeError:
        return None
    first = texts[0]
    width = len(first)
    if len(lines) != (width + 1) * len(texts) or not lines.isascii() or _SHAPE.fullmatch(first) is None:
        return None
    zone = width - 1 if first[-1] in "Zz" else width - 6
    offset_us = _offset_us(first[zone:])
    chars = np.ascontiguousarray(np.frombuffer(lines.encode(), np.uint8).reshape(-1, width + 1).T)  # a row a place
    # A line end passes neither for a separator nor for a digit: where each is in its place, all texts are of one width.
    separators = [4, 7, 10, 13, 16, *([19] if zone > 19 else []), *range(zone, width)]
    if offset_us is None or (chars[separators] != chars[separators, :1]).any():
        return None
    digits = chars[:zone] - np.uint8(48)
    digits[[place for place in separators if place < zone]] = 0
    return _combine(digits, first, offset_us)


def _offset_us(zone: str) -> int | None:
    if zone in "Zz":
        return 0
    hours, minutes = int(zone[1:3]), int(zone[4:6])
    if hours > 23 or minutes > 59:
        return None
    return (hours * 60 + minutes) * (60_000_000 if zone[0] == "+" else -60_000_000)


def _combine(digits: NDArray[np.uint8], first: str, offset_us: int) -> NDArray[np.int64] | None:
    """Turn rows of digits (place, n) into us since 1970; None if one is no digit, or a field is out of its range."""
    largest = digits.max(axis=1)
    if largest.max() > 9 or largest[14] > 5 or largest[17] > 5:
        return None
    if largest[11] > 1 and (digits[11] * 10 + digits[12]).max() > 23:
        return None
    days = _days(digits[:10], first)
    if days is None:
        return None
    places = [place for place in _TIME_PLACES if place < len(digits)]
    # Whole numbers under 2^53, exact in float64. Not as a product of matrices, for which OpenBLAS may start threads.
    since_midnight = np.einsum("i,ij->j", _TIME_US[: len(places)], digits[places].astype(np.float64))
    micros: NDArray[np.int64] = since_midnight.astype(np.int64) + (days * _DAY_US - offset_us)
    return micros


def _days(digits: NDArray[np.uint8], first: str) -> int | NDArray[np.int64] | None:
    """Return days since 1970 of the dates in rows of digits, one for all if it is one; None: not of the calendar."""
    if (digits == digits[:, :1]).all():  # all of one day, as the readings of one request mostly are
        try:
            return date.fromisoformat(first[:10]).toordinal() - _EPOCH.toordinal()
        except ValueError:
            return None
    wide = digits.astype(np.int64)
    year = ((wide[0] * 10 + wide[1]) * 10 + wide[2]) * 10 + wide[3]
    month, day = wide[5] * 10 + wide[6], wide[8] * 10 + wide[9]
    if year.min() < 1 or month.min() < 1 or month.max() > 12 or day.min() < 1:
        return None
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]").astype(np.int64) + day - 1
    return None if (days >= (months + 1).astype("datetime64[D]").astype(np.int64)).any() else days
