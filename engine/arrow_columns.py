"""Columns of Arrow record batches to points: which types a column may have, and what its buffers hold.

The batches were validated in full (offsets, dictionary indexes, UTF-8) before they come here. Nothing is copied but
nulls and narrow numbers.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.channels import BY_NAME, CHANNELS, MAX_ID_BYTES
from engine.points import ALLOWED, FUTURE_US, DecodeError, Instant, Rules, extremes, has_control, inside
from engine.rows import Columns, Floats, Ids, Times, concatenate

_MICROSECONDS: Final = {"s": 1_000_000, "ms": 1_000, "us": 1}


def _ids_of(*kinds: pa.DataType) -> frozenset[int]:
    return frozenset(kind.id for kind in kinds)


_TEXT: Final = _ids_of(pa.string(), pa.large_string())
_LARGE: Final = pa.large_string().id
_DICTIONARY: Final = _ids_of(pa.dictionary(pa.int8(), pa.string()))
_NULL: Final = _ids_of(pa.null())
_TIMESTAMP: Final = _ids_of(pa.timestamp("us"))
_NUMBERS: Final = _ids_of(
    pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.int16(), pa.int32(), pa.int64(),
    pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
)  # fmt: skip
"""Types by their number: to ask `pa.types` about each column costs a tenth of what a batch of 1,000 points does."""


def check_schema(schema: pa.Schema, rules: Rules) -> None:
    """Raise DecodeError, naming the column, if the columns are not those of a point."""
    names = schema.names
    rules.check_names(names)
    for name, kind in zip(names, schema.types, strict=True):
        if name not in ALLOWED or name == "is_anomaly":
            continue
        if names.count(name) > 1:
            raise DecodeError.invalid(f"/{name}", "duplicate-column", f"{name} is there more than once")
        wanted = _mismatch(name, kind)
        if wanted:
            raise DecodeError.invalid(f"/{name}", "wrong-type", f"{name} must be {wanted}")


def _mismatch(name: str, kind: pa.DataType) -> str:
    """Return what a column must be, or nothing if it is of a type that can be taken."""
    if name == "satellite_id":
        text = kind.value_type if kind.id in _DICTIONARY else kind
        return "" if text.id in _TEXT else "a column of strings, plain or dictionary-encoded"
    if name == "timestamp":
        taken = kind.id in _TEXT or kind.id in _NULL or (kind.id in _TIMESTAMP and kind.tz)
        return "" if taken else "a timestamp with a time zone, or a column of RFC 3339 strings"
    taken = kind.id in _NUMBERS or (kind.id in _NULL and not BY_NAME[name].required)
    return "" if taken else "a column of floating-point numbers or integers"


def to_columns(batches: list[pa.RecordBatch], known: Ids | None, rules: Rules, now_us: int) -> Columns | None:
    """Return the columns of validated batches if every value is plainly valid, else None.

    satellite_id is a column of indexes where `known` ids are given, and those may be out of their range.
    """
    parts = []
    for batch in batches:
        columns = _columns_of(batch, known, rules, now_us)
        if columns is None:
            return None
        parts.append(columns)
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _columns_of(batch: pa.RecordBatch, known: Ids | None, rules: Rules, now_us: int) -> Columns | None:
    arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
    ids = _ids(arrays["satellite_id"]) if known is None else _known_ids(arrays["satellite_id"], known)
    if ids is None:
        return None
    values = {}
    for channel in CHANNELS:
        array = arrays.get(channel.name)
        if array is not None:
            if array.null_count == len(array) and not channel.required:
                continue
            column = _floats(array)
            gaps = array.null_count
            # NaN stands for null here; one that came as such is out of range.
            if (gaps and (channel.required or int(np.isnan(column).sum()) != gaps)) or not inside(
                column, channel, gaps=bool(gaps)
            ):
                return None
            values[channel.name] = column
    array = arrays.get("timestamp")
    times = np.full(len(batch), now_us, np.int64) if array is None else _times(array, rules, now_us)
    return None if times is None else Columns(times, ids, values, np.zeros(len(batch), np.bool_))


def _floats(array: pa.Array) -> Floats:
    """Return a column of numbers, NaN for null. No integer within a channel's range is rounded."""
    column: Floats = array.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return column


def _times(array: pa.Array, rules: Rules, now_us: int) -> Times | None:
    if array.null_count == len(array):
        return np.full(len(array), now_us, np.int64)
    if array.type.id in _TEXT:
        return rules.times(array.to_pylist(), now_us)
    unit = array.type.unit
    raw = _integers(array)
    gaps = array.null_count > 0
    valid = array.is_valid().to_numpy(zero_copy_only=False) if gaps else slice(None)
    earliest, latest = now_us - rules.oldest_us, now_us + FUTURE_US
    # The comparison comes first and in the column's own unit: what passes cannot overflow.
    if unit == "ns":
        low, high = earliest * 1000, latest * 1000 + 999
    else:
        low, high = -(-earliest // _MICROSECONDS[unit]), latest // _MICROSECONDS[unit]
    given = raw[valid]
    first, last = extremes(given)
    if first < low or last > high:
        return None
    scaled = given // 1000 if unit == "ns" else given if unit == "us" else given * _MICROSECONDS[unit]
    if not gaps:
        return scaled
    times = np.full(len(array), now_us, np.int64)
    times[valid] = scaled
    return times


def _integers(array: pa.Array) -> NDArray[np.int64]:
    """Return the values of a timestamp column as they are in memory; what stands in place of a null is undefined."""
    return np.frombuffer(array.buffers()[1], np.int64, len(array), 8 * array.offset)


def is_dictionary(kind: pa.DataType) -> bool:
    """Tell whether a type is dictionary-encoded."""
    return kind.id in _DICTIONARY


def dictionary_ids(dictionary: pa.Array) -> Ids | None:
    """Turn the texts of a dictionary into an array of bytes if each is plainly valid, else None."""
    return None if dictionary.null_count or not len(dictionary) else _text(dictionary)


def _ids(array: pa.Array) -> Ids | None:
    """Turn satellite ids into an array of bytes if every one is plainly valid, else None."""
    if array.null_count:
        return None
    if array.type.id not in _DICTIONARY:
        return _text(array)
    dictionary, indices = array.dictionary, array.indices
    if not len(dictionary) or dictionary.null_count:
        return None
    if len(dictionary) > len(indices):  # that of a whole fleet, for a few points
        offsets = _offsets(dictionary)
        long = (offsets[1:] - offsets[:-1]).max() > MAX_ID_BYTES  # to take it many times would make gigabytes of it
        return None if long else _text(dictionary.take(indices))
    values = _text(dictionary)
    return None if values is None else values.take(indices.to_numpy())


def _known_ids(indices: pa.Array, known: Ids) -> Ids | None:
    if indices.null_count:
        return None
    places = indices.to_numpy()
    low, high = extremes(places)
    if low < 0 or high >= len(known):
        return None
    ids: Ids = known.take(places, mode="clip")  # which only says that they need not be looked at again
    return ids


def _offsets(array: pa.Array) -> NDArray[Any]:
    kind, size = (np.int64, 8) if array.type.id == _LARGE else (np.int32, 4)
    return np.frombuffer(array.buffers()[1], kind, len(array) + 1, size * array.offset)


def _text(array: pa.Array) -> Ids | None:
    """Turn a column of strings without nulls into an array of bytes, if it holds ids and nothing else."""
    offsets = _offsets(array)
    widths = offsets[1:] - offsets[:-1]
    narrowest, width = map(int, extremes(widths))
    if width > MAX_ID_BYTES or narrowest == 0:
        return None
    data = memoryview(array.buffers()[2])[offsets[0] : offsets[-1]]
    flat = np.frombuffer(data, np.uint8)
    low, high = extremes(flat)
    if not (low >= 0x20 and high < 0x7F) and has_control(str(data, "utf-8")):
        return None
    if narrowest == width:
        return flat.view(f"S{width}")
    matrix = np.zeros((len(array), width), np.uint8)
    matrix[np.arange(width) < widths[:, np.newaxis]] = flat
    return matrix.view(f"S{width}").reshape(-1)


def to_points(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a validated batch for the scalar rule; equal ids share one text."""
    columns: dict[str, list[Any]] = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_dictionary(array.type):
            codes, first = np.unique(array.indices.drop_null().to_numpy(), return_inverse=True)
            texts = array.dictionary.take(pa.array(codes)).to_pylist()
            known = iter(first.tolist())
            columns[name] = [texts[next(known)] if valid else None for valid in array.is_valid().to_pylist()]
        elif pa.types.is_timestamp(array.type):
            factor = _MICROSECONDS.get(array.type.unit)
            columns[name] = [
                None if not valid else Instant(raw // 1000 if factor is None else raw * factor)
                for valid, raw in zip(array.is_valid().to_pylist(), _integers(array).tolist(), strict=True)
            ]
        elif name in BY_NAME and not pa.types.is_null(array.type):
            numbers = _floats(array).tolist()
            columns[name] = [
                number if valid else None for valid, number in zip(array.is_valid().to_pylist(), numbers, strict=True)
            ]
        else:
            columns[name] = array.to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
