"""Replay: points from a file instead of a fleet, in the file's own rhythm."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from simulator.bodies import MEDIA_TYPES, Buffer, Envelope, stream
from simulator.flags import UsageError, cores, load_settings
from simulator.load import GRACE_S, MAX_WAIT_S, Block, Request
from simulator.schedule import Start
from simulator.settings import Job, Settings, default_processes
from simulator.traits import Floats, Int64s

TIME_NAMES: Final = ("time", "timestamp")
PASSED_OVER: Final = ("is_anomaly", "received_at", "outcome")
BLOCK: Final = 4_096


class RecordingError(Exception):
    """Report a file that cannot be replayed; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Hold a file's n points, sorted by time.

    names: (satellites,) sorted; satellite: (n,) index into names; time_us: (n,) microseconds since 1970 UTC; channels:
    by name, (n,) each, NaN where the file has nothing.
    """

    names: npt.NDArray[np.bytes_]
    satellite: Int64s
    time_us: Int64s
    channels: dict[str, Floats]


def read_recording(path: str) -> Recording:
    """Read a Parquet, CSV or NDJSON file; raise RecordingError."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        table = _read_table(path)
        time_name = next((name for name in TIME_NAMES if name in table.column_names), None)
        if time_name is None or "satellite_id" not in table.column_names or not len(table):
            raise RecordingError(f"{path} has no points with satellite_id and time; see replay --help")
        moments = table[time_name]
        for name in (time_name, "satellite_id"):
            if missing := table[name].null_count:
                raise RecordingError(f"{path}: {missing} of {len(table)} rows have no {name}; leave them out")
        if pa.types.is_timestamp(moments.type) and moments.type.tz is None:
            raise RecordingError(f"{path}: {time_name} has no time zone; store it as UTC")
        if (
            pa.types.is_string(moments.type)
            and not pc.all(pc.match_substring_regex(moments, "(Z|[+-]..:?..)$")).as_py()
        ):
            raise RecordingError(f"{path}: a {time_name} has no offset; write 2026-11-22T12:00:00Z, say")
        time_us = moments.cast(pa.timestamp("us", tz="UTC"), safe=False).cast(pa.int64()).to_numpy()
        names, satellite = np.unique(table["satellite_id"].cast(pa.string()).to_numpy(), return_inverse=True)
        channels = {
            name: table[name].cast(pa.float64()).to_numpy()
            for name in table.column_names
            if name not in (time_name, "satellite_id", *PASSED_OVER)
        }
    except (OSError, pa.ArrowException) as error:
        raise RecordingError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    order = np.argsort(time_us, kind="stable")
    encoded = np.char.encode(names.astype(str), "utf-8")
    sorted_channels = {name: values[order] for name, values in channels.items()}
    return Recording(encoded, satellite[order].astype(np.int64), time_us[order], sorted_channels)


def _read_table(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    # Left to itself pyarrow reads a time in JSON without its offset.
    texts = pa.schema([(name, pa.string()) for name in TIME_NAMES])
    options = pyarrow.json.ParseOptions(explicit_schema=texts)
    readers = {
        ".parquet": pyarrow.parquet.read_table,
        ".csv": pyarrow.csv.read_csv,
        ".ndjson": lambda path: pyarrow.json.read_json(path, parse_options=options),
        ".jsonl": lambda path: pyarrow.json.read_json(path, parse_options=options),
    }
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise RecordingError(f"{path} is none of {', '.join(readers)}; convert it")
    table = reader(path)
    return table.drop_columns([name for name in table.column_names if table[name].null_count == len(table)])


def replay_settings(arguments: argparse.Namespace) -> tuple[Settings, npt.NDArray[np.bytes_]]:
    """Return the settings of a replay and the names of its satellites; raise UsageError, RecordingError."""
    a = arguments
    if a.batch == 1 and (a.format != "json" or a.encoding != "identity"):
        raise UsageError("--format and --encoding are for batches; add --batch 1000, say")
    if a.batch > 1 and a.single_share:
        raise UsageError("a replay sends single posts or batches: leave out --single-share or --batch")
    recording = read_recording(a.replay)
    seconds = max(float(np.ptp(recording.time_us)) / 1e6 / a.speed, 0.001)
    satellites = len(recording.names)
    rate = len(recording.time_us) / seconds / satellites
    processes = a.processes or default_processes(
        satellites=satellites, rate=rate, batch=a.batch, single_share=0.0, cores=cores()
    )
    settings = Settings(
        satellites=satellites,
        rate=rate,
        duration=seconds,
        points=None,
        anomaly_rate=0.0,
        channels="file",
        processes=min(processes, satellites),
        seed=0,
        start_us=int(recording.time_us[0]) if a.keep_times else None,
        replay=a.replay,
        speed=a.speed,
        **load_settings(a),
    )
    return settings, recording.names


class ReplayPlan:
    """Give a sender the requests of its satellites' points; as load.Plan does for a fleet."""

    closed = False

    def __init__(self, job: Job) -> None:
        settings = job.settings
        assert settings.replay is not None
        recording = read_recording(settings.replay)
        mine = np.flatnonzero((recording.satellite >= job.first) & (recording.satellite < job.last))
        self._recording = Recording(
            recording.names,
            recording.satellite[mine],
            recording.time_us[mine],
            {name: values[mine] for name, values in recording.channels.items()},
        )
        self._offsets = (self._recording.time_us - recording.time_us[0]) / 1e6 / settings.speed
        self._keep_times = settings.start_us is not None
        self._batch = settings.batch
        self._format = settings.format
        path = "/telemetry" if settings.batch == 1 else "/telemetry/batch"
        self._envelope = Envelope(job, path, MEDIA_TYPES[settings.format], settings.encoding)
        self._duration = settings.duration or 0.0
        self._next = 0
        self.begin(Start(time.monotonic(), time.time_ns() // 1_000))

    def begin(self, start: Start) -> None:
        """Set the moment at which the run starts."""
        self.start = start
        self.end = start.monotonic + self._duration
        self.last_start = self.end + GRACE_S

    def scheduled(self, now: float) -> int:
        """Return how many points were due by `now`."""
        return int(np.searchsorted(self._offsets, now - self.start.monotonic, "right"))

    def next_block(self, now: float) -> tuple[Block, list[Request]] | None:
        """Make the next points and their requests; None: no more points."""
        rows = np.arange(self._next, min(self._next + max(BLOCK, self._batch), len(self._offsets)))
        if not len(rows) or now >= self.last_start:
            return None
        offsets = self._offsets[rows]
        # Made no more than MAX_WAIT_S ahead, and no batch waits longer for its last point.
        count = max(1, int(np.searchsorted(offsets, offsets[0] + MAX_WAIT_S, "right")))
        rows, offsets = rows[:count], offsets[:count]
        self._next += count
        time_us = self._recording.time_us[rows]
        if not self._keep_times:
            time_us = self.start.time_us + (offsets * 1e6).astype(np.int64)
        nothing = np.zeros(count, dtype=np.uint8)
        block = Block(self._recording.satellite[rows], time_us, nothing, nothing.astype(bool), nothing.copy(), open=0)
        requests = []
        for first in range(0, count, self._batch):
            part = np.arange(first, min(first + self._batch, count))
            data = self._envelope.wrap(self._parts(rows[part], time_us[part]))
            requests.append(Request(data, self.start.monotonic + float(offsets[part[-1]]), block, part, len(part)))
        block.open = len(requests)
        return block, requests

    def _parts(self, rows: Int64s, time_us: Int64s) -> Sequence[Buffer]:
        """Return the body of the points at `rows`, stamped `time_us`."""
        recording = self._recording
        ids = np.char.decode(recording.names[recording.satellite[rows]], "utf-8").tolist()
        channels = {name: values[rows] for name, values in recording.channels.items()}
        if self._format == "arrow":
            return _arrow(ids, time_us, channels)
        times = [f"{text}Z" for text in np.datetime_as_string(time_us.view("M8[us]")).tolist()]
        columns = {"satellite_id": ids, "timestamp": times}
        if self._format == "columnar":
            columns |= {name: _with_nulls(values) for name, values in channels.items()}
            return (
                orjson.dumps({name: column for name, column in columns.items() if any(v is not None for v in column)}),
            )
        points = [dict(zip(("satellite_id", "timestamp"), pair, strict=True)) for pair in zip(ids, times, strict=True)]
        for name, values in channels.items():
            for index in np.flatnonzero(~np.isnan(values)).tolist():
                points[index][name] = float(values[index])
        if self._batch == 1:
            return (orjson.dumps(points[0]),)
        if self._format == "ndjson":
            return (b"".join([orjson.dumps(point, option=orjson.OPT_APPEND_NEWLINE) for point in points]),)
        return (orjson.dumps(points),)


def _with_nulls(values: Floats) -> list[Any]:
    return [None if value != value else value for value in values.tolist()]


def _arrow(ids: list[str], time_us: Int64s, channels: dict[str, Floats]) -> Sequence[Buffer]:
    import pyarrow as pa

    columns: dict[str, Any] = {
        "satellite_id": pa.array(ids, pa.string()),
        "timestamp": pa.array(time_us, pa.timestamp("us", tz="UTC")),
    }
    columns |= {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in channels.items()}
    batch = pa.RecordBatch.from_pydict(columns)
    return stream(memoryview(batch.schema.serialize()), batch)
