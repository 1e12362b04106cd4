"""What was sent and what became of it, point by point: spool files while the run lasts, Parquet files afterwards.

A sender appends to its spool as requests are settled; a row is 15 bytes, little-endian, packed:

    0        4                8        12  13  14  15
    | satellite u4 | time_us i8          | o | a | b |

    o outcome   1 accepted, 2 refused, 3 unknown, 4 silent: the satellite sent nothing
    a anomaly   what is wrong with the point, see anomalies.Anomaly
    b beyond    1: it breaks a limit that the service watches

The sent log has the columns satellite_id (dictionary of string), time (timestamp[us, UTC]) and outcome (dictionary of
string), a row for each point that was sent. The truth has a row for each point with an anomaly, sent or silent: the
same columns, and anomaly (dictionary of string) and beyond_limit (bool). A simulator that is killed leaves its spools
beside the file: they hold what was settled up to then.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from simulator.anomalies import NAMES, Kinds
from simulator.traits import Int64s

if TYPE_CHECKING:
    import pyarrow as pa

ROW = np.dtype([("satellite", "<u4"), ("time_us", "<i8"), ("outcome", "u1"), ("anomaly", "u1"), ("beyond", "u1")])
OUTCOMES = ("accepted", "refused", "unknown", "silent")
SILENT = 4
# Bounds the memory of the merge to about 50 MB, whatever the length of the run.
ROWS_A_GROUP = 1 << 20


def spool_path(log: str, process: int) -> str:
    """Name the spool of a sender; with the simulator's process id, so that it never overwrites a killed run's."""
    return f"{log}.{os.getpid()}-{process}.spool"


class Points(Protocol):
    """Hold n settled points, column-wise; see load.Block."""

    satellite: Int64s
    time_us: Int64s
    anomaly: Kinds
    beyond: npt.NDArray[np.bool_]
    outcome: npt.NDArray[np.uint8]


class Spool:
    """Append settled points to a file; anomalies_only: leave out the others. Errors of the file system are OSError."""

    def __init__(self, path: str, *, anomalies_only: bool) -> None:
        self._file = open(path, "wb", buffering=1 << 18)  # noqa: SIM115 - closed by close()
        self._anomalies_only = anomalies_only

    def append(self, points: Points) -> None:
        """Add n points; an outcome of 0 (never sent) leaves the point out."""
        keep = points.outcome > 0
        if self._anomalies_only:
            keep &= points.anomaly > 0
        rows = np.empty(len(points.satellite), dtype=ROW)
        rows["satellite"] = points.satellite
        rows["time_us"] = points.time_us
        rows["outcome"] = points.outcome
        rows["anomaly"] = points.anomaly
        rows["beyond"] = points.beyond
        self._file.write((rows if keep.all() else rows[keep]).tobytes())

    def close(self) -> None:
        """Write what is buffered and close."""
        self._file.close()


def prepare(log: str) -> None:
    """Make sure that the log can be written, before anything is sent; raise OSError."""
    if os.path.isdir(log):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", log)
    with open(_unfinished(log), "wb"):
        pass


class Table:
    """Write rows of spools to a Parquet file, which appears under its name only when it is complete."""

    def __init__(self, path: str, names: npt.NDArray[np.bytes_], *, truth: bool) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self._path = path
        self._truth = truth
        text = pa.dictionary(pa.int32(), pa.string())
        fields = [("satellite_id", text), ("time", pa.timestamp("us", tz="UTC")), ("outcome", text)]
        fields += [("anomaly", text), ("beyond_limit", pa.bool_())] if truth else []
        self._schema = pa.schema(fields)
        self._names = pa.array(np.char.decode(names, "utf-8"), pa.string())
        # Nearly sorted times as differences: 0.03 instead of 9 bytes a point, and faster to write as well.
        encoding: dict[str, Any] = {
            "compression": "zstd",
            "use_dictionary": [field.name for field in self._schema if field.type == text],
            "column_encoding": {"time": "DELTA_BINARY_PACKED"},
        }
        self._writer = parquet.ParquetWriter(_unfinished(path), self._schema, **encoding)

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """Add the rows that belong here: what was sent, or what had an anomaly."""
        import pyarrow as pa

        rows = rows[rows["anomaly"] > 0] if self._truth else rows[rows["outcome"] != SILENT]
        if not len(rows):
            return
        columns = [
            pa.DictionaryArray.from_arrays(pa.array(rows["satellite"].astype(np.int32)), self._names),
            pa.array(rows["time_us"].astype(np.int64), self._schema.field("time").type),
            _named(rows["outcome"].astype(np.int32) - 1, OUTCOMES),
        ]
        if self._truth:
            columns += [_named(rows["anomaly"].astype(np.int32), NAMES), pa.array(rows["beyond"] > 0)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))

    def finish(self) -> None:
        """Close the file and give it its name."""
        self._writer.close()
        os.replace(_unfinished(self._path), self._path)


def _named(codes: npt.NDArray[np.int32], names: tuple[str, ...]) -> pa.DictionaryArray:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.string()))


def merge(spools: Iterable[str], names: npt.NDArray[np.bytes_], log: str | None, truth: str | None) -> None:
    """Write the spools' rows to the Parquet files `log` and `truth`, and remove the spools.

    names: of the satellites, by index. Errors of the file system come out as OSError.
    """
    spools = list(spools)
    tables = [Table(log, names, truth=False)] if log else []
    tables += [Table(truth, names, truth=True)] if truth else []
    for rows in _chunks(spools):
        for table in tables:
            table.add(rows)
    for table in tables:
        table.finish()
    for spool in spools:
        Path(spool).unlink(missing_ok=True)


def _chunks(spools: list[str]) -> Iterable[npt.NDArray[np.void]]:
    """Read the spools in pieces; a piece of a row at the end, left by a process that died, is passed over."""
    for spool in spools:
        if not os.path.exists(spool):
            continue
        with open(spool, "rb") as file:
            while len(data := file.read(ROWS_A_GROUP * ROW.itemsize)) >= ROW.itemsize:
                yield np.frombuffer(data, dtype=ROW, count=len(data) // ROW.itemsize)


def _unfinished(log: str) -> str:
    return f"{log}.unfinished"
