"""RFC 3339 timestamps to microseconds since 1970.

`parse` is the rule; `parse_all` is the same rule for many texts of one shape at once, and passes when they are not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Final

import numpy as np
from numpy.typing import NDArray

ZERO_TIME: Final = "0001-01-01T00:00:00Z"
"""What a Go client sends for a time it never set (time.Time's zero value); read as absent."""

_SHAPE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:([Zz])|([+-])(\d\d):(\d\d))", re.ASCII
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


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


def parse_all(texts: Sequence[str]) -> NDArray[np.int64] | None:
    """Return the times of `texts`, in us since 1970, if all have one common shape and are valid; else None.

    The shape is YYYY-MM-DDTHH:MM:SS, up to 9 fractional digits, and Z or one offset. None says nothing about which
    text is at fault, or whether one is: ask `parse`.
    """
    width = len(texts[0])
    if not 20 <= width <= 35 or set(map(len, texts)) != {width}:
        return None
    joined = "".join(texts)
    if not joined.isascii():
        return None
    chars = np.frombuffer(joined.encode(), np.uint8).reshape(-1, width)
    first = texts[0]
    zone = width - 1 if first[-1] in "Zz" else width - 6
    separators = [4, 7, 10, 13, 16, *([19] if zone > 19 else []), *range(zone, width)]
    expected = np.frombuffer(first.encode(), np.uint8)
    if _SHAPE.fullmatch(first) is None or not (chars[:, separators] == expected[separators]).all():
        return None
    digits = chars[:, :zone] - np.uint8(48)
    digits[:, [column for column in separators if column < zone]] = 0
    if digits.max() > 9:
        return None
    offset_us = _offset_us(first[zone:])
    return None if offset_us is None else _combine(digits, zone, offset_us)


def _offset_us(zone: str) -> int | None:
    if zone in "Zz":
        return 0
    hours, minutes = int(zone[1:3]), int(zone[4:6])
    if hours > 23 or minutes > 59:
        return None
    return (hours * 60 + minutes) * (60_000_000 if zone[0] == "+" else -60_000_000)


def _combine(digits: NDArray[np.uint8], zone: int, offset_us: int) -> NDArray[np.int64] | None:
    """Turn a matrix of digits (n, zone) into us since 1970; None if a field is out of its range."""

    def number(*columns: int) -> NDArray[np.int64]:
        value = digits[:, columns[0]].astype(np.int64)
        for column in columns[1:]:
            value = value * 10 + digits[:, column]
        return value

    year, month, day = number(0, 1, 2, 3), number(5, 6), number(8, 9)
    hour, minute, second = number(11, 12), number(14, 15), number(17, 18)
    if (
        year.min() < 1 or month.min() < 1 or month.max() > 12 or day.min() < 1
        or hour.max() > 23 or minute.max() > 59 or second.max() > 59
    ):  # fmt: skip
        return None
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]").astype(np.int64) + day - 1
    if (days >= (months + 1).astype("datetime64[D]").astype(np.int64)).any():
        return None
    micros = np.zeros(len(digits), np.int64)
    for place, column in zip((100_000, 10_000, 1_000, 100, 10, 1), range(20, zone), strict=False):
        micros += digits[:, column].astype(np.int64) * place
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second
    return seconds * 1_000_000 + micros - offset_us
