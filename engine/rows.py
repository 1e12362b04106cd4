"""Points as columns, and as the payload of a lane record.

A payload is its columns one after the other, so that both sides move whole columns and a point takes only the room of
the channels it has (n points, ids padded to `width` bytes):

       0  mask u32      bit i: channel i of the lane's layout is present
       4  width u16 | zero u16
       8  time i64[n]             generation time, us since 1970
          float64[n]              for each present channel, in the order of the layout; NaN = the point has no value
          is_anomaly u8[n]
          satellite_id S[width][n]

For one point this is also the layout of a packed structured row: thousands of single-point records are read at once.
The layout text in the lane's header names the channels in the order of the mask's bits, so that a backlog written
before a change of channels is still read rightly.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engine.channels import CHANNELS

Floats = NDArray[np.float64]
Times = NDArray[np.int64]
Flags = NDArray[np.bool_]
Ids = NDArray[np.bytes_]

_PREFIX = struct.Struct("<IHH")
_FORMAT: Final = 1
CHANNEL_NAMES: Final = tuple(channel.name for channel in CHANNELS)
_BITS: Final = tuple((name, 1 << bit) for bit, name in enumerate(CHANNEL_NAMES))


@dataclass(slots=True)
class Columns:
    """Points as columns of equal length n.

    `time` in us since 1970; `satellite_id` UTF-8 bytes padded with NUL; `values` holds the channels that at least one
    point has, NaN where a point has none.
    """

    time: Times
    satellite_id: Ids
    values: dict[str, Floats]
    is_anomaly: Flags

    def __len__(self) -> int:
        return len(self.time)


class LayoutError(ValueError):
    """A row layout that this version cannot read."""


def layout(names: Sequence[str] = CHANNEL_NAMES) -> bytes:
    """Describe the rows of a lane, for its header."""
    return json.dumps({"format": _FORMAT, "channels": list(names)}, separators=(",", ":")).encode()


@lru_cache(maxsize=64)
def channels_of(description: bytes) -> tuple[str, ...]:
    """Return the channel names of a layout; raises LayoutError for one of another format."""
    try:
        parsed = json.loads(description)
        if parsed["format"] != _FORMAT:
            raise LayoutError(f"row format {parsed['format']} is not known here, only {_FORMAT}")
        return tuple(parsed["channels"])
    except (ValueError, KeyError, TypeError) as error:
        raise LayoutError(f"the row layout of the lane cannot be read: {error}") from error


def pack(columns: Columns) -> list[bytes]:
    """Return the payload of one record as pieces, in the current layout."""
    mask, pieces = 0, []
    for bit, name in enumerate(CHANNEL_NAMES):
        values = columns.values.get(name)
        if values is not None:
            mask |= 1 << bit
            pieces.append(values.tobytes())
    prefix = _PREFIX.pack(mask, columns.satellite_id.dtype.itemsize, 0)
    return [
        prefix,
        columns.time.tobytes(),
        *pieces,
        columns.is_anomaly.tobytes(),
        columns.satellite_id.tobytes(),
    ]


def pack_point(time_us: int, satellite_id: bytes, values: Mapping[str, float], is_anomaly: bool) -> list[bytes]:
    """Return the payload of a record of one point; the same bytes as `pack` makes, without the cost of arrays."""
    mask, floats = 0, []
    for name, bit in _BITS:
        value = values.get(name)
        if value is not None:
            mask |= bit
            floats.append(value)
    width = len(satellite_id)
    return [_point_struct(len(floats), width).pack(mask, width, 0, time_us, *floats, is_anomaly, satellite_id)]


@lru_cache(maxsize=256)
def _point_struct(floats: int, width: int) -> struct.Struct:
    return struct.Struct(f"<IHHq{floats}d?{width}s")


@lru_cache(maxsize=256)
def _point_dtype(description: bytes, mask: int, width: int) -> np.dtype[Any]:
    names = [name for bit, name in enumerate(channels_of(description)) if mask >> bit & 1]
    return np.dtype(
        [
            ("prefix", "V8"),
            ("time", "<i8"),
            *((name, "<f8") for name in names),
            ("is_anomaly", "?"),
            ("satellite_id", f"S{width}"),
        ]
    )


def _unpack_many(description: bytes, payload: memoryview, points: int) -> Columns:
    mask, width, _ = _PREFIX.unpack_from(payload)
    offset = _PREFIX.size
    time = np.frombuffer(payload, "<i8", points, offset)
    values = {}
    for bit, name in enumerate(channels_of(description)):
        if mask >> bit & 1:
            offset += 8 * points
            values[name] = np.frombuffer(payload, "<f8", points, offset)
    offset += 8 * points
    is_anomaly = np.frombuffer(payload, "?", points, offset)
    ids = np.frombuffer(payload, f"S{width}", points, offset + points)
    return Columns(time, ids, values, is_anomaly)


def _unpack_singles(description: bytes, mask: int, width: int, payloads: list[memoryview]) -> Columns:
    dtype = _point_dtype(description, mask, width)
    rows = np.frombuffer(b"".join([payload[: dtype.itemsize] for payload in payloads]), dtype)
    values = {name: rows[name] for name in dtype.names or () if name in channels_of(description)}
    return Columns(rows["time"], rows["satellite_id"], values, rows["is_anomaly"])


def unpack(description: bytes, payloads: Sequence[tuple[int, int, memoryview]]) -> tuple[Columns, Times]:
    """Join the payloads of many records, (points, reception time in us, payload) each, into columns.

    Returns the columns and each point's reception time. The order of points is by record, or by reception time where
    records of one point are of several shapes, or among others: those come grouped, and of two points of one time the
    one received last has to be last. The columns own their memory: the payloads may be freed afterwards.
    """
    parts: list[Columns] = []
    received: list[Times] = []
    singles: dict[bytes, list[tuple[int, memoryview]]] = {}
    for points, time_us, payload in payloads:
        if points == 1:
            singles.setdefault(bytes(payload[:6]), []).append((time_us, payload))
        else:
            parts.append(_unpack_many(description, payload, points))
            received.append(np.full(points, time_us, np.int64))
    for shape, group in singles.items():
        mask, width = struct.unpack("<IH", shape)
        parts.append(_unpack_singles(description, mask, width, [payload for _, payload in group]))
        received.append(np.fromiter((time_us for time_us, _ in group), np.int64, len(group)))
    columns, times = concatenate(parts), np.concatenate(received)
    if singles and len(parts) > 1:
        order = np.argsort(times, kind="stable")
        columns, times = take(columns, order), times[order]
    return columns, times


def concatenate(parts: Sequence[Columns]) -> Columns:
    """Join columns one after the other; a channel that only some parts have is NaN in the others."""
    names = [name for name in dict.fromkeys(name for part in parts for name in part.values)]
    return Columns(
        time=np.concatenate([part.time for part in parts]),
        satellite_id=np.concatenate([part.satellite_id for part in parts]),
        values={name: np.concatenate([_values(part, name) for part in parts]) for name in names},
        is_anomaly=np.concatenate([part.is_anomaly for part in parts]),
    )


def _values(part: Columns, name: str) -> Floats:
    found = part.values.get(name)
    return found if found is not None else np.full(len(part), np.nan)


def take(columns: Columns, indices: NDArray[np.intp]) -> Columns:
    """Return the points at `indices`, in that order."""
    return Columns(
        time=columns.time[indices],
        satellite_id=columns.satellite_id[indices],
        values={name: values[indices] for name, values in columns.values.items()},
        is_anomaly=columns.is_anomaly[indices],
    )
