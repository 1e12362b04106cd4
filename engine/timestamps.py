"""RFC 3339 timestamps to microseconds since 1970.

`parse` is the rule; `parse_all` is the same rule for many texts of one shape at once, and passes when they are not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
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
_PLACES: Final = len("2026-11-22T00:00:00.123456789")
_WORTH_US: Final = np.zeros(_PLACES, np.int64)
_WORTH_US[[11, 12, 14, 15, 17, 18, *range(20, 26)]] = [36e9, 3.6e9, 6e8, 6e7, 1e7, 1e6, 1e5, 1e4, 1e3, 100, 10, 1]
"""How many us the digit in each place of a time is worth: nothing in a date, or behind the sixth of a fraction."""
_WORD: Final = 8
"""Texts are compared so many bytes at a time."""
_LARGEST: Final = np.full(_PLACES, 9, np.uint8)
_LARGEST[[14, 17]] = 5


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

    The shape is that of the first of them: its time is parsed, the others are told by the digits that differ from it.
    None says nothing about which text is at fault, or whether one is: ask `parse`.
    """
    try:
        width = len(texts[0])
        gap = "\n" * (_WORD - width % _WORD)
        lines = gap.join(texts) + gap
    except TypeError:
        return None
    stride = width + len(gap)
    if len(lines) != stride * len(texts) or not lines.isascii():
        return None
    try:
        first_us = parse(texts[0])
    except ValueError:
        return None
    encoded = lines.encode()
    words = np.ascontiguousarray(np.frombuffer(encoded, np.uint64).reshape(len(texts), -1).T)
    moving = np.bitwise_or.reduce(words ^ words[:, :1], axis=1).view(np.uint8).nonzero()[0]
    if not len(moving):
        return np.full(len(texts), first_us)
    if moving[-1] >= width - (1 if texts[0][-1] in "Zz" else 6):  # of more than one zone
        return None
    # What is no digit in one text is in all, line ends too, which the first has at its end alone: all are of its width.
    chars = np.frombuffer(encoded, np.uint8).reshape(len(texts), -1).T  # a row a place
    digits = chars[moving] - np.uint8(48)
    if (digits > _LARGEST[moving, None]).any():
        return None
    times: NDArray[np.int64] = np.einsum("i,ij->j", _WORTH_US[moving], digits)
    if moving[0] <= 12 and ((chars[11] - np.uint8(48)) * 10 + (chars[12] - np.uint8(48))).max() > 23:
        return None
    if moving[0] < 10:
        days = _days(chars[:10] - np.uint8(48))
        if days is None:
            return None
        times += days * _DAY_US
    times += first_us - times[0]
    return times


def _days(digits: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """Return days since 1970 of the dates in rows of digits (place, n); None if one is not of the calendar."""
    wide = digits.astype(np.int64)
    year = ((wide[0] * 10 + wide[1]) * 10 + wide[2]) * 10 + wide[3]
    month, day = wide[5] * 10 + wide[6], wide[8] * 10 + wide[9]
    if year.min() < 1 or month.min() < 1 or month.max() > 12 or day.min() < 1:
        return None
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]").astype(np.int64) + day - 1
    return None if (days >= (months + 1).astype("datetime64[D]").astype(np.int64)).any() else days
