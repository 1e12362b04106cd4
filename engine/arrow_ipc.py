"""Arrow IPC streams to columns. The stream is anybody's bytes: nothing is read that was not checked or bounded first.

Arrow verifies the framing; `_check_messages` sees to what would make reading dear (compressed buffers, dictionaries
that grow, thousands of batches); then the types are checked, each batch is read and validated in full (offsets,
dictionary indexes, UTF-8), and only then its buffers are looked at. Nothing is copied but nulls and narrow numbers.
A schema and a dictionary that came before are not read again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.channels import BY_NAME, CHANNELS, MAX_ID_BYTES
from engine.points import (
    ALLOWED,
    FUTURE_US,
    DecodeError,
    Instant,
    Rejects,
    Rules,
    by_column,
    extremes,
    has_control,
    inside,
)
from engine.rows import Columns, Floats, Ids, Times, concatenate

MAX_MESSAGES: Final = 256
"""Each record batch costs 0.1 ms, and refers to dictionaries that may be as large as the body."""
MAX_SCHEMA_BYTES: Final = 1 << 20
"""A field takes 50 bytes in the stream and ten times that once read; a schema with pandas' notes takes 5 KiB."""
MAX_SEEN_BYTES: Final = 4096
MAX_OPENINGS: Final = 64
MAX_OPENING_BYTES: Final = 16 << 10
"""The schema of a point takes 700 bytes, a dictionary of 1,000 ids of 9 characters 13 KiB."""

_IN_TURN: Final = pa.ipc.IpcReadOptions(use_threads=False)
_BROKEN: Final = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, struct.error)
_MICROSECONDS: Final = {"s": 1_000_000, "ms": 1_000, "us": 1}
_I32, _U32, _U16 = struct.Struct("<i").unpack_from, struct.Struct("<I").unpack_from, struct.Struct("<H").unpack_from


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


def decode(body: bytes, rules: Rules, now_us: int, rejects: Rejects | None) -> Columns:
    """Decode a stream whose columns are the fields of a point; see `Decoder` for the other arguments.

    satellite_id: text, also dictionary-encoded. timestamp: of any unit, with a time zone, or RFC 3339 text; optional,
    as are its values. Channels: numbers; nulls where a channel is optional.
    """
    try:
        opening, messages = _check_messages(body)
        known = _openings.get(opening)
        if known is not None:
            read = (pa.ipc.read_record_batch(message, known.schema) for message in messages)
            columns = _columns(_take(read, rules), known.ids, rules, now_us)
            if columns is not None:
                return columns
        batches = _read(body, rules, opening)
    except _BROKEN as error:
        raise DecodeError("malformed-arrow", "the body is no whole and valid Arrow IPC stream") from error
    columns = _columns(batches, None, rules, now_us)
    if columns is not None:
        return columns
    return rules.one_by_one([point for batch in batches for point in _points(batch)], now_us, by_column, rejects)


@dataclass(frozen=True, slots=True)
class _Opening:
    """What stands in a stream before its first record batch, once read and found good, without a column to leave out.

    A client sends the same each time, and to read it takes a third of what a batch of 1,000 points does. Where `ids`
    are those of a dictionary, `schema` says of satellite_id only what the indexes into it are.
    """

    schema: pa.Schema
    ids: Ids | None


_openings: Final[dict[bytes, _Opening]] = {}


def _remember(opening: bytes, batch: pa.RecordBatch) -> None:
    """Keep an opening, if it is of those that can be read by a record batch that followed it."""
    schema, ids = batch.schema, None
    place = schema.get_field_index("satellite_id")
    if schema.types[place].id in _DICTIONARY:
        dictionary = batch.column(place).dictionary
        ids = None if dictionary.null_count or not len(dictionary) else _text(dictionary)
        if ids is None:
            return
        schema = schema.set(place, pa.field("satellite_id", schema.types[place].index_type))
    if len(_openings) >= MAX_OPENINGS:
        _openings.clear()
    _openings[opening] = _Opening(schema, ids)


def _read(body: bytes, rules: Rules, opening: bytes) -> list[pa.RecordBatch]:
    """Return the record batches, validated, with the columns that are known; they share the memory of `body`."""
    with pa.ipc.open_stream(body, options=_IN_TURN) as reader:
        schema = reader.schema
        _check_schema(schema, rules)
        wanted = [index for index, name in enumerate(schema.names) if name in ALLOWED and name != "is_anomaly"]
        plain = len(wanted) == len(schema)
        if plain:
            batches = _take(reader, rules)
    if not plain:
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=wanted)
        with pa.ipc.open_stream(body, options=options) as reader:
            batches = _take(reader, rules)
    if plain and opening:
        _remember(opening, batches[0])
    return batches


def _take(read: Iterable[pa.RecordBatch], rules: Rules) -> list[pa.RecordBatch]:
    """Return the batches that hold a point, validated in full; raises DecodeError for none, or for too many."""
    batches, points = [], 0
    for batch in read:
        points += batch.num_rows
        if points > rules.max_points:  # a column of nulls takes no bytes: the number alone says how large a batch is
            break
        if batch.num_rows:
            batch.validate(full=True)
            batches.append(batch)
    rules.check_count(points)
    return batches


def _check_messages(body: bytes) -> tuple[bytes, list[pa.Message]]:
    """Walk the messages without reading what is in them; raises DecodeError for what is not taken.

    Returns what stands before the first record batch as it came, and the messages from there on. Of a stream that has
    anything but record batches there, or too much before them, the first is empty.
    """
    messages: list[pa.Message] = []
    count = end = 0
    usual = True
    source = pa.BufferReader(body)
    for message in pa.ipc.MessageReader.open_stream(source):
        count += 1
        kind, metadata = message.type, message.metadata
        if count > MAX_MESSAGES:
            raise DecodeError.invalid("", "too-many-batches", f"over {MAX_MESSAGES} messages: send larger batches")
        if kind == "schema" and metadata.size > MAX_SCHEMA_BYTES:
            raise DecodeError.invalid("", "large-schema", f"the schema is over {MAX_SCHEMA_BYTES} bytes")
        if kind == "record batch" or messages:
            messages.append(message)
            usual = usual and kind == "record batch"
        else:
            end = source.tell()
        if kind == "schema":
            continue
        if message.body.size and message.body.address % 8:
            raise DecodeError("malformed-arrow", "the messages of the stream are not padded to 8 bytes")
        features = _features_seen if metadata.size <= MAX_SEEN_BYTES else _features
        compressed, is_delta = features(metadata.to_pybytes(), kind)
        if compressed:
            raise DecodeError.invalid(
                "", "compressed-buffers", "the buffers are compressed: send them plain, with Content-Encoding: zstd"
            )
        if is_delta:
            raise DecodeError.invalid("", "dictionary-delta", "a dictionary grows by deltas: send it whole")
    if source.tell() != source.size():
        raise DecodeError("malformed-arrow", "there are bytes after the end of the stream")
    return (body[:end] if usual and messages and end <= MAX_OPENING_BYTES else b""), messages


def _features(metadata: bytes, kind: str) -> tuple[bool, bool]:
    """Return whether a message has compressed buffers, and whether it is a dictionary's delta.

    Reads the flatbuffer (format/Message.fbs) that Arrow has verified already, so that its offsets hold. Before its
    format knew of compression, Arrow 0.17 marked it in the message's own metadata.
    """

    def member(table: int, index: int) -> int:
        """Return the place of a member of a table, 0 if it is absent."""
        vtable = table - int(_I32(metadata, table)[0])
        entry = 4 + 2 * index
        offset = int(_U16(metadata, vtable + entry)[0]) if entry < _U16(metadata, vtable)[0] else 0
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return place + int(_U32(metadata, place)[0])

    batch = follow(member(follow(0), 2))
    is_delta = False
    if kind == "dictionary":
        flag = member(batch, 2)
        is_delta = bool(flag and metadata[flag])
        batch = follow(member(batch, 1))
    return bool(member(batch, 3)) or b"experimental_compression" in metadata, is_delta


_features_seen: Final = lru_cache(maxsize=256)(_features)
"""A client's batches of one size differ in what they hold, not in how they say it."""


def _check_schema(schema: pa.Schema, rules: Rules) -> None:
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


# -- whole columns


def _columns(batches: list[pa.RecordBatch], known: Ids | None, rules: Rules, now_us: int) -> Columns | None:
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


# -- one by one


def _points(batch: pa.RecordBatch) -> list[dict[str, Any]]:
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
