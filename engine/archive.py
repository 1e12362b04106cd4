"""Points to Parquet files and back: `orbitstream export` and `orbitstream import`.

    DIR/manifest.json                          the export's uuid, its range, and each file's rows and checksum
        day=2026-11-22/telemetry.parquet       one file a day (UTC), zstd, a row group an hour or less

A file is read back and compared with the table, by count and checksum, before it gets its name. The checksum is the sum
over rows of a hash of all columns: the same whatever the order, and the same computed by SQL or from a file.

An import keeps its place in the delivery ledger, a lane for each file and a position for each row group, moved in the
transaction that copies the group. Given that, whoever starts again after a crash stores nothing twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from engine import copy_format
from engine.columnstore import Columnstore
from engine.rows import CHANNEL_NAMES, Columns

MANIFEST: Final = "manifest.json"
SLICE: Final = timedelta(hours=1)
"""Sorted by the server at once, so that a day of any size takes no more than this."""
GROUP_ROWS: Final = 100_000
"""Rows of a group: what one transaction of an import stores."""

_TIME: Final = pa.timestamp("us", tz="UTC")
SCHEMA: Final = pa.schema(
    [
        pa.field("time", _TIME, nullable=False),
        pa.field("received_at", _TIME, nullable=False),
        pa.field("is_anomaly", pa.bool_(), nullable=False),
        pa.field("satellite_id", pa.string(), nullable=False),
        *(pa.field(name, pa.float64()) for name in CHANNEL_NAMES),
    ]
)
_ABSENT: Final = 0x5A17
"""Stands for NULL in the hash of a row."""


class ArchiveError(Exception):
    """An export or import that cannot be done; the text says why and what to do."""


def export(
    connection: psycopg.Connection[Any], begin: datetime, end: datetime, out: Path, say: Callable[[str], None]
) -> int:
    """Write the points of [begin, end) to new files below `out` and return how many; one snapshot of the table."""
    if begin >= end:
        raise ArchiveError(f"--from {begin.isoformat()} is not before --to {end.isoformat()}")
    if (out / MANIFEST).exists():
        raise ArchiveError(f"{out} holds an export already: give another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        for day, after in _spans(begin, end, timedelta(days=1)):
            folder = out / f"day={day:%Y-%m-%d}"
            rows = _write_day(connection, day, after, folder)
            if rows is None:
                continue
            files.append({"file": f"{folder.name}/telemetry.parquet", **rows})
            say(f"{folder.name}: {rows['rows']} points")
    manifest = {"export": str(uuid.uuid4()), "from": begin.isoformat(), "to": end.isoformat(), "files": files}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return sum(file["rows"] for file in files)


def _spans(begin: datetime, end: datetime, width: timedelta) -> Iterator[tuple[datetime, datetime]]:
    """Cut [begin, end) where a multiple of `width` since 1970 lies."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    while begin < end:
        after = min(epoch + ((begin - epoch) // width + 1) * width, end)
        yield begin, after
        begin = after


def _write_day(
    connection: psycopg.Connection[Any], begin: datetime, end: datetime, folder: Path
) -> dict[str, Any] | None:
    """Write one day and return its rows and checksum; None, and no file, if there are no points."""
    expected = connection.execute(
        f"SELECT count(*), coalesce(sum(({_hash_sql()})::numeric), 0)::text FROM telemetry"
        " WHERE time >= %s AND time < %s".encode(),
        [begin, end],
    ).fetchone()
    assert expected is not None
    if expected[0] == 0:
        return None
    folder.mkdir(exist_ok=True)
    part = folder / "telemetry.part"
    with pq.ParquetWriter(part, SCHEMA, compression="zstd") as writer:
        for start, after in _spans(begin, end, SLICE):
            for batch in _read_slice(connection, start, after):
                writer.write_table(batch, row_group_size=GROUP_ROWS)
    found = _file_checksum(part)
    if found != (expected[0], int(expected[1])):
        raise ArchiveError(f"{part} reads back as {found}, the table says {expected}: nothing was kept of this day")
    part.rename(part.with_suffix(".parquet"))
    return {"rows": found[0], "checksum": str(found[1])}


def _read_slice(connection: psycopg.Connection[Any], begin: datetime, end: datetime) -> Iterator[pa.Table]:
    """Yield the points of [begin, end), by satellite and time, in tables of about GROUP_ROWS rows."""
    columns = ", ".join(('"time"', "received_at", "is_anomaly", "satellite_id", *CHANNEL_NAMES))
    micros = "(extract(epoch FROM {0}) * 1000000)::bigint AS {0}"
    chosen = columns.replace('"time"', micros.format("time")).replace("received_at", micros.format("received_at"))
    query = (
        f"COPY (SELECT {chosen} FROM telemetry WHERE time >= '{begin.isoformat()}' AND time < '{end.isoformat()}'"
        " ORDER BY satellite_id, telemetry.time) TO STDOUT (FORMAT CSV)"
    )
    types = {field.name: pa.int64() if field.type == _TIME else field.type for field in SCHEMA}
    with connection.cursor() as cursor, cursor.copy(query.encode()) as copy:
        stream = io.BufferedReader(_Stream(copy), 1 << 20)
        if not stream.peek(1):
            return
        reader = pa.csv.open_csv(
            stream,
            pa.csv.ReadOptions(column_names=SCHEMA.names, block_size=16 << 20),
            pa.csv.ParseOptions(newlines_in_values=True),
            pa.csv.ConvertOptions(column_types=types, true_values=["t"], false_values=["f"], null_values=[""]),
        )
        for batch in reader:
            yield pa.Table.from_batches([batch]).cast(SCHEMA)


class _Stream(io.RawIOBase):
    """The bytes of a COPY as a file."""

    def __init__(self, copy: psycopg.Copy) -> None:
        self._blocks, self._left = iter(copy), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def _hash_sql() -> str:
    """Return SQL for the hash of a row, a bigint; `_hashes` computes the same."""
    parts = ["('x' || left(md5(satellite_id), 15))::bit(60)::bigint", "is_anomaly::integer::bigint"]
    parts += [f"(extract(epoch FROM {name}) * 1000000)::bigint << {shift}" for name, shift in _SHIFTED_TIMES]
    parts += [
        f"coalesce(('x' || encode(float8send({name}), 'hex'))::bit(64)::bigint, {_ABSENT}) << {shift}"
        for shift, name in enumerate(CHANNEL_NAMES, 3)
    ]
    return " # ".join(f"({part})" for part in parts)


_SHIFTED_TIMES: Final = (("time", 1), ("received_at", 2))


def _hashes(batch: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    ids = batch["satellite_id"].combine_chunks().dictionary_encode()
    digests = [int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:15], 16)
               for text in ids.dictionary.to_pylist()]  # fmt: skip
    result = np.array(digests, np.uint64)[ids.indices.to_numpy()]
    result ^= batch["is_anomaly"].to_numpy().astype(np.uint64)
    for name, shift in _SHIFTED_TIMES:
        result ^= batch[name].cast(pa.int64()).to_numpy().view(np.uint64) << np.uint64(shift)
    for shift, name in enumerate(CHANNEL_NAMES, 3):
        column = batch[name]
        bits = column.fill_null(0.0).to_numpy().view(np.uint64)
        bits = np.where(column.is_null().to_numpy(), np.uint64(_ABSENT), bits)
        result ^= bits << np.uint64(shift)
    signed: np.ndarray[Any, np.dtype[np.int64]] = result.view(np.int64)
    return signed


def _checksum(batch: pa.Table) -> int:
    hashes = _hashes(batch)
    return (int((hashes >> 32).sum()) << 32) + int((hashes & 0xFFFFFFFF).sum())


def _file_checksum(path: Path) -> tuple[int, int]:
    """Return rows and checksum of a file."""
    rows = total = 0
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            rows, total = rows + group.num_rows, total + _checksum(group)
    return rows, total


def restore(
    connection: psycopg.Connection[Any], folder: Path, say: Callable[[str], None], *, beside: bool = False
) -> tuple[int, int]:
    """Store what an export holds; returns the points stored now, and those that an earlier import had stored.

    Unless `beside`, a file whose span has points already that it did not bring is refused. Raises ArchiveError.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        export = uuid.UUID(manifest["export"])
        files = [(entry["file"], entry["rows"], int(entry["checksum"])) for entry in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"{folder} holds no finished export: {error!r}") from error
    stored = before = 0
    columnstore = Columnstore(connection)
    for name, rows, checksum in files:
        path = folder / name
        try:
            sound = _file_checksum(path) == (rows, checksum)
        except (OSError, pa.ArrowException) as error:
            raise ArchiveError(f"{path} cannot be read: {error}") from error
        if not sound:
            raise ArchiveError(f"{path} is not what was exported: its rows or checksum differ from {MANIFEST}")
        now = _restore_file(connection, path, uuid.uuid5(export, name), columnstore, beside)
        say(f"{name}: {now} points stored, {rows - now} were there")
        stored, before = stored + now, before + rows - now
    return stored, before


def _restore_file(
    connection: psycopg.Connection[Any], path: Path, lane: uuid.UUID, columnstore: Columnstore, beside: bool
) -> int:
    stored = 0
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            with connection.transaction():
                connection.execute(
                    "INSERT INTO ingest_progress (lane, node) VALUES (%s, 'import') ON CONFLICT DO NOTHING", [lane]
                )
                row = connection.execute(
                    "SELECT position FROM ingest_progress WHERE lane = %s FOR UPDATE", [lane]
                ).fetchone()
                assert row is not None
                if row[0] > number:
                    continue
                group = file.read_row_group(number)
                if number == 0 and not beside:
                    _refuse_points(connection, path)
                _copy(connection, group, columnstore)
                connection.execute(
                    "UPDATE ingest_progress SET position = %s, committed_points = committed_points + %s,"
                    " flushes = flushes + 1, updated_at = now() WHERE lane = %s",
                    [number + 1, group.num_rows, lane],
                )
            stored += group.num_rows
    return stored


def _refuse_points(connection: psycopg.Connection[Any], path: Path) -> None:
    """Raise ArchiveError if the table has points in the day of a file that was not imported yet."""
    span = pa.compute.min_max(pq.read_table(path, columns=["time"])["time"]).as_py()
    first, last = span["min"], span["max"]
    row = connection.execute("SELECT 1 FROM telemetry WHERE time >= %s AND time <= %s LIMIT 1", [first, last])
    if row.fetchone() is not None:
        raise ArchiveError(
            f"telemetry has points between {first} and {last} already, which {path} would store again: import into a "
            "database without them, or say --beside if they are others"
        )


def _copy(connection: psycopg.Connection[Any], group: pa.Table, columnstore: Columnstore) -> None:
    ids = np.array([text.encode() for text in group["satellite_id"].to_pylist()], np.bytes_)
    values = {name: group[name].fill_null(np.nan).to_numpy() for name in CHANNEL_NAMES}
    values = {name: column for name, column in values.items() if not np.isnan(column).all()}
    times, received = (group[name].cast(pa.int64()).to_numpy() for name in ("time", "received_at"))
    columns = Columns(times, ids, values, group["is_anomaly"].to_numpy())
    with connection.cursor() as cursor:
        columnstore.copy(cursor, columns, copy_format.encode(columns, received))
