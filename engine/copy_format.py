"""Columns to PostgreSQL's binary COPY format, column-wise and without I/O.

The format: a signature, then for each row a count of fields and for each field its length (-1 = NULL) and its bytes,
all big endian, then a trailer (PostgreSQL documentation, "COPY", Binary Format).

Fixed-width columns come first and the id last, so that a row is a packed structure of one dtype, filled column by
column. Rows that differ in width (ids of several lengths, NULLs) are made as the full-width matrix of bytes, kept
through a boolean mask: one vector operation for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engine.rows import Columns, Times

Buffer = bytes | memoryview

SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER: Final = b"\xff\xff"
POSTGRES_EPOCH_US: Final = 946_684_800_000_000
"""2000-01-01, from which PostgreSQL counts timestamps, in us since 1970."""

PIECE: Final = 256 << 10
"""Bytes of rows made at a time, in one buffer that stays in the cache: 35 ns a point, and 400 when 50,000 rows are made
as one. The server begins to work on the first rows while the last are not made yet."""

_FIXED: Final = ("time", "received_at", "is_anomaly")


@lru_cache(maxsize=256)
def _template(channels: tuple[str, ...], width: int) -> NDArray[Any]:
    """Return one row with all lengths set, of the dtype that rows of these channels and this id width have."""
    fields: list[tuple[str, str]] = [("fields", ">i2")]
    for name in ("time", "received_at"):
        fields += [(f"{name} length", ">i4"), (name, ">i8")]
    fields += [("is_anomaly length", ">i4"), ("is_anomaly", "u1")]
    for name in channels:
        fields += [(f"{name} length", ">i4"), (name, ">f8")]
    fields += [("satellite_id length", ">i4"), ("satellite_id", f"S{width}")]
    row = np.zeros(1, np.dtype(fields))
    row["fields"] = len(_FIXED) + len(channels) + 1
    for name in (*_FIXED, *channels, "satellite_id"):
        row[f"{name} length"] = row.dtype[name].itemsize
    return row


def column_names(columns: Columns) -> list[str]:
    """Return the names of the COPY columns in the order that `encode` writes them."""
    return [*_FIXED, *columns.values, "satellite_id"]


def pieces(columns: Columns, received_at: Times) -> Iterator[Buffer]:
    """Yield the rows in binary COPY format, piece by piece; `received_at` in us since 1970, NaN becomes NULL.

    A piece is good until the next one is asked for: they share one buffer.
    """
    yield SIGNATURE
    count, width = len(columns), columns.satellite_id.dtype.itemsize
    template = _template(tuple(columns.values), width)
    row_bytes = template.dtype.itemsize
    step = max(1, PIECE // row_bytes)
    buffer = np.repeat(template, min(step, count))
    lengths = id_lengths(columns)
    absent = {name: gaps for name, values in columns.values.items() if (gaps := np.isnan(values)).any()}
    for start in range(0, count, step):
        span = slice(start, min(start + step, count))
        rows = buffer[: span.stop - start]
        rows["time"] = columns.time[span] - POSTGRES_EPOCH_US
        rows["received_at"] = received_at[span] - POSTGRES_EPOCH_US
        rows["is_anomaly"] = columns.is_anomaly[span]
        rows["satellite_id"] = columns.satellite_id[span]
        for name, values in columns.values.items():
            rows[name] = values[span]
        if lengths is None and not absent:
            yield rows.data.cast("B")
            continue
        keep = np.ones((len(rows), row_bytes), np.bool_)
        for name, gaps in absent.items():
            rows[f"{name} length"] = np.where(gaps[span], -1, 8)
            offset = _offset(template.dtype, name)
            keep[:, offset : offset + 8] = ~gaps[span, None]
        if lengths is not None:
            rows["satellite_id length"] = lengths[span]
            keep[:, row_bytes - width :] = np.arange(width) < lengths[span, None]
        yield rows.view(np.uint8).reshape(len(rows), row_bytes)[keep].data
    yield TRAILER


def encode(columns: Columns, received_at: Times) -> bytes:
    """Return all `pieces` as one."""
    return b"".join(map(bytes, pieces(columns, received_at)))


def _offset(dtype: np.dtype[Any], name: str) -> int:
    assert dtype.fields is not None
    return int(dtype.fields[name][1])


def _id_bytes(columns: Columns) -> NDArray[np.uint8]:
    ids = np.ascontiguousarray(columns.satellite_id)
    return ids.view(np.uint8).reshape(len(ids), -1)


def id_lengths(columns: Columns) -> NDArray[np.intp] | None:
    """Return the length of each id in bytes, None if all are full; ids hold no NUL, so the padding is what is zero."""
    chars = _id_bytes(columns)
    return None if chars[:, -1].all() else np.count_nonzero(chars, axis=1)


def order(columns: Columns) -> NDArray[np.intp]:
    """Return the permutation that sorts points by (satellite_id, time), ids by memcmp as COLLATE "C" does.

    Sorted rows fill the pages of the (satellite_id, time) index one after the other: about 1.4 times the COPY rate.
    """
    # A row for each place in the ids: looking along them costs an eighth of looking across. Places where all ids agree
    # say nothing about their order.
    chars = np.ascontiguousarray(_id_bytes(columns).T)
    low, high = chars.min(axis=1), chars.max(axis=1)
    differ = low != high
    chars = chars[differ]
    key = _packed(columns.time, chars, low[differ], high[differ])
    if key is not None:
        return np.argsort(key, kind="stable")  # records are in some order each: merged in a tenth of a sort's time
    padded = np.zeros((chars.shape[1], -(-len(chars) // 8) * 8), np.uint8)
    padded[:, : len(chars)] = chars.T
    words = padded.view(">u8").astype(np.uint64)
    return np.lexsort((columns.time, *(words[:, index] for index in reversed(range(words.shape[1])))))


def _packed(
    time: Times, chars: NDArray[np.uint8], low: NDArray[np.uint8], high: NDArray[np.uint8]
) -> NDArray[np.int64] | None:
    """Return id and time as one integer of the same order, if they differ in no more than 63 bits; else None.

    A fleet's ids differ in a few digits, and a batch spans seconds: one key sorts several times as fast as two.
    """
    first = time.min()
    used = int(time.max() - first).bit_length()
    widths = [int(span).bit_length() for span in high - low]
    if used + sum(widths) > 63:
        return None
    key: NDArray[np.int64] = time - first
    for index in reversed(range(len(widths))):
        key |= (chars[index] - low[index]).astype(np.int64) << used
        used += widths[index]
    return key
