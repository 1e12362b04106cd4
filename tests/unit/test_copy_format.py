"""Binary COPY: the bytes are what PostgreSQL's documentation says, whatever is absent and however long the ids are."""

from __future__ import annotations

import struct
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine import copy_format
from engine.copy_format import POSTGRES_EPOCH_US, SIGNATURE, TRAILER
from engine.rows import Columns, take


def read(body: bytes, names: list[str]) -> list[dict[str, Any]]:
    """Parse binary COPY as the server does, field by field."""
    assert body.startswith(SIGNATURE)
    position, found = len(SIGNATURE), []
    while body[position : position + 2] != TRAILER:
        (fields,) = struct.unpack_from(">h", body, position)
        assert fields == len(names)
        position += 2
        row: dict[str, Any] = {}
        for name in names:
            (length,) = struct.unpack_from(">i", body, position)
            raw = body[position + 4 : position + 4 + max(length, 0)]
            position += 4 + max(length, 0)
            kind = {"time": ">q", "received_at": ">q", "is_anomaly": ">?"}.get(name, ">d")
            row[name] = None if length < 0 else raw if name == "satellite_id" else struct.unpack(kind, raw)[0]
        found.append(row)
    assert position + 2 == len(body)
    return found


_ids = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12).map(str.encode)
_points = st.lists(
    st.tuples(
        _ids, st.integers(0, 2**50), st.booleans(), st.floats(allow_nan=False), st.none() | st.floats(allow_nan=False)
    ),
    min_size=1,
    max_size=30,
)


def columns_of(points: list[tuple[Any, ...]]) -> Columns:
    ids, times, flags, battery, latitude = zip(*points, strict=True)
    return Columns(
        time=np.array(times, np.int64),
        satellite_id=np.array(ids),
        is_anomaly=np.array(flags, np.bool_),
        values={"battery_charge_percent": np.array(battery), "latitude": np.array(latitude, np.float64)},
    )


@given(_points)
def test_every_row_reads_back(points: list[tuple[Any, ...]]) -> None:
    columns = columns_of(points)
    received = columns.time + 5
    body = copy_format.encode(columns, received)
    assert read(body, copy_format.column_names(columns)) == [
        {
            "time": time - POSTGRES_EPOCH_US,
            "received_at": time + 5 - POSTGRES_EPOCH_US,
            "is_anomaly": flag,
            "battery_charge_percent": battery,
            "latitude": latitude,
            "satellite_id": name,
        }
        for name, time, flag, battery, latitude in points
    ]


@given(_points, st.integers(1, 400))
def test_rows_are_the_same_in_whatever_pieces_they_are_made(points: list[tuple[Any, ...]], size: int) -> None:
    columns = columns_of(points)
    whole = copy_format.encode(columns, columns.time)
    with mock.patch.object(copy_format, "PIECE", size):
        assert copy_format.encode(columns, columns.time) == whole


@given(_points)
def test_the_order_is_that_of_the_index(points: list[tuple[Any, ...]]) -> None:
    columns = columns_of(points)
    ordered = take(columns, copy_format.order(columns))
    keys = list(zip(ordered.satellite_id.tolist(), ordered.time.tolist(), strict=True))
    assert keys == sorted((name, time) for name, time, *_ in points)


def test_one_row_by_hand() -> None:
    columns = Columns(
        time=np.array([POSTGRES_EPOCH_US + 1]),
        satellite_id=np.array([b"AB"]),
        values={"battery_charge_percent": np.array([1.5])},
        is_anomaly=np.array([True]),
    )
    assert copy_format.encode(columns, np.array([POSTGRES_EPOCH_US])) == (
        b"PGCOPY\n\xff\r\n\0" + bytes(8) + b"\x00\x05"
        b"\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x01"
        b"\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00"
        b"\x00\x00\x00\x01\x01"
        b"\x00\x00\x00\x08\x3f\xf8\x00\x00\x00\x00\x00\x00"
        b"\x00\x00\x00\x02AB"
        b"\xff\xff"
    )
