"""The JSON text: parses back to exactly the readings, every row of one width."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime, timedelta

import numpy as np
import orjson
import pyarrow as pa
import pytest

from simulator.bodies import ENCODINGS, MEDIA_TYPES, Envelope, make_body
from simulator.control import make_jobs
from simulator.flags import build_parser, settings_from
from simulator.fleet import CHANNEL_SETS, Channel, Fleet, Readings, satellite_ids
from simulator.wire import JsonRows, split_rows

MIDNIGHT_US = 1_795_305_600_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rows_for(channels: tuple[Channel, ...], *, head: bytes = b"", tail: bytes = b"", capacity: int = 10) -> JsonRows:
    return JsonRows(satellite_ids(0, 1_000, 1_000), 0, channels, capacity=capacity, head=head, tail=tail)


def points_of(readings: Readings, channels: tuple[Channel, ...]) -> list[dict[str, object]]:
    """Return what the readings are as JSON objects, computed one by one."""
    points = []
    for i, (satellite, time_us) in enumerate(zip(readings.satellite, readings.time_us, strict=True)):
        time = EPOCH + timedelta(microseconds=int(time_us))
        point: dict[str, object] = {"satellite_id": f"SAT-{satellite:05d}"}
        point["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        for channel, values in zip(channels, readings.values, strict=True):
            point[channel.name] = int(values[i]) / 10**channel.decimals
        points.append(point)
    return points


def some_readings(channels: str, count: int, *, start_us: int = MIDNIGHT_US) -> Readings:
    dice = np.random.default_rng(9)
    fleet = Fleet(0, 1_000, seed=1, anomaly_rate=0.2, channels=channels)
    return fleet.read(dice.integers(0, 1_000, count), start_us + dice.integers(0, 10**10, count))


def parse(kind: str, text: bytes) -> list[dict[str, object]]:
    """Return the points of a body as JSON objects."""
    if kind == "ndjson":
        return [orjson.loads(line) for line in text.splitlines()]
    if kind == "json":
        return list(orjson.loads(text))
    if kind == "columnar":
        columns = orjson.loads(text)
    else:
        table = pa.ipc.open_stream(text).read_all()
        assert [str(field.type) for field in table.schema][:3] == ["string", "timestamp[us, tz=UTC]", "double"]
        table.validate(full=True)
        columns = table.to_pydict()
        columns["timestamp"] = [time.strftime("%Y-%m-%dT%H:%M:%S.%fZ") for time in columns["timestamp"]]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("channels", CHANNEL_SETS)
@pytest.mark.parametrize("kind", MEDIA_TYPES)
def test_a_batch_parses_back_to_exactly_the_readings(channels: str, kind: str) -> None:
    readings = some_readings(channels, 500)
    body = make_body(kind, satellite_ids(0, 1_000, 1_000), 0, CHANNEL_SETS[channels], 100)
    for part in (readings, readings.pick(np.arange(7)), readings.pick(np.array([3, 9, 300])), readings):
        for size in (1_000, 200, 4):
            texts = []
            for pieces in body.bodies(part, size):
                texts.append(b"".join(pieces))
                assert len(texts[-1]) == sum(len(piece) for piece in pieces)
            batches = [parse(kind, text) for text in texts]
            assert [point for batch in batches for point in batch] == points_of(part, CHANNEL_SETS[channels])
            assert all(len(batch) == size for batch in batches[:-1])


UNPACK = {
    "identity": bytes,
    "gzip": gzip.decompress,
    "zstd": lambda data: pa.CompressedInputStream(pa.BufferReader(data), "zstd").read(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_envelope_tells_type_encoding_length_and_a_new_key_each_time(encoding: str) -> None:
    settings = settings_from(build_parser().parse_args(["--batch", "10", "--idempotency-keys", "--processes", "2"]))
    jobs = make_jobs(settings, 2, ("h", 1), host="h:1", path="", token=None)
    keys = set()
    envelopes = [Envelope(job, "/telemetry/batch", "a/b", encoding) for job in jobs]
    for envelope in envelopes * 2:
        head, _, body = bytes(envelope.wrap([b"one ", b"two"])).partition(b"\r\n\r\n")
        headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        assert UNPACK[encoding](body) == b"one two"
        assert headers[b"Content-Type"] == b"a/b" and int(headers[b"Content-Length"]) == len(body)
        assert headers.get(b"Content-Encoding", b"identity").decode() == encoding
        keys.add(headers[b"Idempotency-Key"])
    assert len(keys) == 4


@pytest.mark.parametrize("channel", CHANNEL_SETS["all"], ids=lambda channel: channel.name)
def test_the_ends_of_a_range_and_the_values_around_zero_print_right(channel: Channel) -> None:
    unit = 10**channel.decimals
    low, high = channel.low * unit, channel.high * unit
    scaled = [
        v for v in (low, low + 1, -unit - 1, -unit, 1 - unit, -1, 0, 1, unit - 1, unit, high - 1, high) if v >= low
    ]
    values = np.array([scaled], dtype=np.int32)
    index = np.arange(len(scaled))
    readings = Readings(index, MIDNIGHT_US + index, values, np.zeros(len(index), np.uint8))
    texts = split_rows(rows_for((channel,)).write(readings))
    assert [orjson.loads(text)[channel.name] for text in texts] == [value / unit for value in scaled]


def test_a_value_beyond_the_range_is_an_error_not_a_wrong_number() -> None:
    one = np.array([0])
    readings = Readings(one, one + MIDNIGHT_US, np.array([[10_100]], dtype=np.int32), one.astype(np.uint8))
    with pytest.raises(IndexError):
        rows_for((Channel("battery_charge_percent", 2, 0, 100),)).write(readings)


def test_timestamps_are_right_before_across_and_after_midnight() -> None:
    channels = CHANNEL_SETS["required"]
    rows = rows_for(channels)
    # One writer for all: a batch that crosses midnight must not leave its dates behind for the next.
    for offsets in ([-3, -2, -1], [-1, 0, 1, -86_400_000_000], [0, 1, 999_999], [-1, -1], [10**6, 59_999_999]):
        times = MIDNIGHT_US + np.array(offsets)
        index = np.arange(len(times))
        readings = Fleet(0, 10, seed=1, anomaly_rate=0).read(index, times)
        texts = split_rows(rows.write(readings))
        assert [orjson.loads(text) for text in texts] == points_of(readings, channels)


def test_a_batch_larger_than_the_capacity_is_printed_whole() -> None:
    readings = some_readings("required", 37)
    texts = split_rows(rows_for(CHANNEL_SETS["required"], capacity=5).write(readings))
    assert [orjson.loads(text) for text in texts] == points_of(readings, CHANNEL_SETS["required"])


def test_single_rows_carry_their_head() -> None:
    texts = split_rows(
        rows_for(CHANNEL_SETS["required"], head=b"POST / HTTP/1.1\r\n\r\n").write(some_readings("required", 3))
    )
    assert all(bytes(text).startswith(b"POST / HTTP/1.1\r\n\r\n{") and text[-1:] == b"}" for text in texts)
