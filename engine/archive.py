"""Points to Parquet files and back: `orbitstream export` and `orbitstream import`.

    DIR/manifest.json                          the export's uuid, its range, and each file's rows and checksum
        day=2026-11-22/telemetry.parquet       one file a day (UTC), zstd, a row group an hour or less

A file is read back and compared with what the server sent, by count and checksum, before it gets its name. The checksum
is the sum over rows of a hash of all columns: the same whatever the order, and the same computed by SQL or from a file.

Each hour is read by a statement of its own, and its rows are counted before and after. One snapshot for all would leave
points out in silence: TimescaleDB tells by the state of a chunk now where its rows are, and if that was compressed
since the snapshot, they are not seen there (2.29.2). With the count before and after, that would be noticed of a
single statement too.

An import keeps its place in the delivery ledger, a lane for each file and a position for each row group, moved in the
transaction that copies the group. Given that, whoever starts again after a crash stores nothing twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
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
DAY: Final = timedelta(days=1)
LONG: Final = 3650 * DAY
SLICE: Final = timedelta(hours=1)
"""Sorted by the server at once, so that a day of any size takes no more than this."""
ATTEMPTS: Final = 5
"""Of a day whose points were moved or dropped while they were read."""
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
_LATEST: Final = (
    (
        "INSERT INTO satellite_latest AS known ({names}) SELECT DISTINCT ON (satellite_id) {names} FROM telemetry"
        " WHERE time >= %s AND time <= %s ORDER BY satellite_id, time DESC, received_at DESC"
        " ON CONFLICT (satellite_id) DO UPDATE SET ({names}) = ROW ({excluded})"
        " WHERE (known.time, known.received_at) < (excluded.time, excluded.received_at)"
    )
    .format(names=", ".join(SCHEMA.names), excluded=", ".join(f"excluded.{name}" for name in SCHEMA.names))
    .encode()
)
"""Moves satellite_latest on by the points of a span."""
_HASH: Final = "hash of the row"
_ABSENT: Final = 0x5A17
"""Stands for NULL in the hash of a row."""


class ArchiveError(Exception):
    """An export or import that cannot be done; the text says why and what to do."""


def export(
    connection: psycopg.Connection[Any], begin: datetime, end: datetime, out: Path, say: Callable[[str], None]
) -> int:
    """Write the points of [begin, end) to new files below `out` and return how many; raises ArchiveError.

    Of points that arrive meanwhile some are in, some are not.
    """
    if begin >= end:
        raise ArchiveError(f"--from {begin.isoformat()} is not before --to {end.isoformat()}")
    if (out / MANIFEST).exists():
        raise ArchiveError(f"{out} holds an export already: give another folder, or remove it")
    if any(out.glob("day=*")):
        raise ArchiveError(f"{out} holds files of an export that did not end: give another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    first, last = _within(connection, begin, end)
    for day, after in _spans(first, last, DAY):
        folder = out / f"day={day:%Y-%m-%d}"
        rows = _write_day(connection, day, after, folder)
        if rows is None:
            continue
        files.append({"file": f"{folder.name}/telemetry.parquet", **rows})
        say(f"{folder.name}: {rows['rows']} points")
    manifest = {"export": str(uuid.uuid4()), "from": begin.isoformat(), "to": end.isoformat(), "files": files}
    part = out / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=2) + "\n")
    _finish(part, out / MANIFEST)
    return sum(file["rows"] for file in files)


def _within(connection: psycopg.Connection[Any], begin: datetime, end: datetime) -> tuple[datetime, datetime]:
    """Return what of [begin, end) can hold points, where its days are too many to ask for each of them."""
    if end - begin < LONG:
        return begin, end
    row = connection.execute("SELECT min(time), max(time) + interval '1 us' FROM telemetry").fetchone()
    assert row is not None
    return (begin, begin) if row[0] is None else (max(begin, row[0]), min(end, row[1]))


def _finish(part: Path, path: Path) -> None:
    """Give a file its name, once it is on the disk."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)


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
    if not _count(connection, begin, end):
        return None
    folder.mkdir(exist_ok=True)
    part = folder / "telemetry.part"
    for _ in range(ATTEMPTS):
        sent = _write_part(connection, begin, end, part)
        if sent is not None:
            break
    else:
        raise ArchiveError(f"{folder.name}: points went while they were read, {ATTEMPTS} times: is it being dropped?")
    found = _file_checksum(part)
    if found != sent:
        raise ArchiveError(f"{part} reads back as {found}, the table says {sent}: nothing was kept of this day")
    if not found[0]:  # dropped meanwhile
        part.unlink()
        folder.rmdir()
        return None
    _finish(part, part.with_suffix(".parquet"))
    return {"rows": found[0], "checksum": str(found[1])}


def _write_part(
    connection: psycopg.Connection[Any], begin: datetime, end: datetime, part: Path
) -> tuple[int, int] | None:
    """Write one day; returns the rows and the checksum that the server sent, None if rows were not where they are."""
    rows = checksum = 0
    with pq.ParquetWriter(part, SCHEMA, compression="zstd") as writer:
        for start, after in _spans(begin, end, SLICE):
            least, before = _count(connection, start, after), rows
            for batch in _read_slice(connection, start, after):
                rows, checksum = rows + batch.num_rows, checksum + _sum(batch[_HASH].to_numpy())
                writer.write_table(batch.drop_columns(_HASH).cast(SCHEMA), row_group_size=GROUP_ROWS)
            if not least <= rows - before <= _count(connection, start, after):
                return None
    return rows, checksum


def _count(connection: psycopg.Connection[Any], begin: datetime, end: datetime) -> int:
    row = connection.execute("SELECT count(*) FROM telemetry WHERE time >= %s AND time < %s", [begin, end]).fetchone()
    assert row is not None
    return int(row[0])


def _read_slice(connection: psycopg.Connection[Any], begin: datetime, end: datetime) -> Iterator[pa.Table]:
    """Yield the points of [begin, end), by satellite and time, with the hash of each, in tables of GROUP_ROWS or so."""
    columns = ", ".join(('"time"', "received_at", "is_anomaly", "satellite_id", *CHANNEL_NAMES))
    micros = "(extract(epoch FROM {0}) * 1000000)::bigint AS {0}"
    chosen = columns.replace('"time"', micros.format("time")).replace("received_at", micros.format("received_at"))
    query = (
        f"COPY (SELECT {chosen}, {_hash_sql()} FROM telemetry"
        f" WHERE time >= '{begin.isoformat()}' AND time < '{end.isoformat()}'"
        " ORDER BY satellite_id, telemetry.time) TO STDOUT (FORMAT CSV)"
    )
    types = {field.name: pa.int64() if field.type == _TIME else field.type for field in SCHEMA} | {_HASH: pa.int64()}
    with connection.cursor() as cursor, cursor.copy(query.encode()) as copy:
        stream = io.BufferedReader(_Stream(copy), 1 << 20)
        if not stream.peek(1):
            return
        reader = pa.csv.open_csv(
            stream,
            pa.csv.ReadOptions(column_names=[*SCHEMA.names, _HASH], block_size=16 << 20),
            pa.csv.ParseOptions(newlines_in_values=True),
            pa.csv.ConvertOptions(column_types=types, true_values=["t"], false_values=["f"], null_values=[""]),
        )
        for batch in reader:
            yield pa.Table.from_batches([batch])


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


def _sum(hashes: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """Return the sum of hashes, which 64 bits do not hold."""
    return (int((hashes >> 32).sum()) << 32) + int((hashes & 0xFFFFFFFF).sum())


def _file_checksum(path: Path) -> tuple[int, int]:
    """Return rows and checksum of a file."""
    rows = total = 0
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            rows, total = rows + group.num_rows, total + _sum(_hashes(group))
    return rows, total


def restore(
    connection: psycopg.Connection[Any],
    folder: Path,
    say: Callable[[str], None],
    keep: timedelta,
    *,
    beside: bool = False,
    again: bool = False,
) -> tuple[int, int]:
    """Store what an export holds; returns the points stored now, and those that an earlier import had stored.

    A file with points older than `keep`, which the database would drop, is refused; unless `beside`, so is one whose
    span has points already that it did not bring. With `again`, a file that was imported and has no point left in the
    table is imported anew. Raises ArchiveError.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        export = uuid.UUID(str(manifest["export"]))
        files = [(str(entry["file"]), int(entry["rows"]), int(entry["checksum"])) for entry in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"{folder} holds no finished export: {error!r}") from error
    stored = before = 0
    columnstore = Columnstore(connection)
    for name, rows, checksum in files:
        path, lane = folder / name, uuid.uuid5(export, name)
        try:
            sound = _file_checksum(path) == (rows, checksum)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise ArchiveError(f"{path} cannot be read: {error}") from error
        if not sound:
            raise ArchiveError(f"{path} is not what was exported: its rows or checksum differ from {MANIFEST}")
        if again and not _any(connection, path):
            connection.execute("DELETE FROM ingest_progress WHERE lane = %s", [lane])
        now = _restore_file(connection, path, lane, columnstore, keep, beside=beside)
        connection.execute(_LATEST, _span(path))
        gone = "" if now or not rows or _any(connection, path) else ", and are there no more: --again stores them anew"
        say(f"{name}: {now} points stored, {rows - now} were imported before{gone}")
        stored, before = stored + now, before + rows - now
    return stored, before


def _restore_file(
    connection: psycopg.Connection[Any],
    path: Path,
    lane: uuid.UUID,
    columnstore: Columnstore,
    keep: timedelta,
    *,
    beside: bool,
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
                if not stored:
                    _refuse_old(path, keep)
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


def _span(path: Path) -> tuple[datetime, datetime]:
    """Return the times of the first and the last point of a file."""
    span = pa.compute.min_max(pq.read_table(path, columns=["time"])["time"]).as_py()
    return span["min"], span["max"]


def _any(connection: psycopg.Connection[Any], path: Path) -> bool:
    """Tell whether the table has points in the span of a file."""
    row = connection.execute("SELECT 1 FROM telemetry WHERE time >= %s AND time <= %s LIMIT 1", _span(path))
    return row.fetchone() is not None


def _refuse_old(path: Path, keep: timedelta) -> None:
    """Raise ArchiveError if a file has points that the database would drop again."""
    first, _ = _span(path)
    age = datetime.now(UTC) - first
    if age > keep:
        raise ArchiveError(
            f"{path} has points of {first}, and the database drops what is older than {keep}: set ORBITSTREAM_RETENTION"
            f" to {age // DAY + 1}d or more for the service, run `orbitstream migrate` with it, and import then"
        )


def _refuse_points(connection: psycopg.Connection[Any], path: Path) -> None:
    """Raise ArchiveError if the table has points in the span of a file that was not imported yet."""
    if _any(connection, path):
        first, last = _span(path)
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
