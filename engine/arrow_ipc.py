"""Arrow IPC streams to columns. The stream is anybody's bytes: nothing is read that was not checked or bounded first.

Arrow verifies the framing; `_check_messages` sees to what would make reading dear (compressed buffers, dictionaries
that grow, thousands of batches); then the types are checked, each batch is read and validated in full (offsets,
dictionary indexes, UTF-8), and only then its buffers are looked at (arrow_columns.py). A schema and a dictionary that
came before are not read again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import pyarrow as pa

from engine.arrow_columns import check_schema, dictionary_ids, is_dictionary, to_columns, to_points
from engine.points import ALLOWED, DecodeError, Rejects, Rules, by_column
from engine.rows import Columns, Ids

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
_I32, _U32, _U16 = struct.Struct("<i").unpack_from, struct.Struct("<I").unpack_from, struct.Struct("<H").unpack_from


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
            columns = to_columns(_take(read, rules), known.ids, rules, now_us)
            if columns is not None:
                return columns
        batches = _read(body, rules, opening)
    except _BROKEN as error:
        raise DecodeError("malformed-arrow", "the body is no whole and valid Arrow IPC stream") from error
    columns = to_columns(batches, None, rules, now_us)
    if columns is not None:
        return columns
    return rules.one_by_one([point for batch in batches for point in to_points(batch)], now_us, by_column, rejects)


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
    if is_dictionary(schema.types[place]):
        ids = dictionary_ids(batch.column(place).dictionary)
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
        check_schema(schema, rules)
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
