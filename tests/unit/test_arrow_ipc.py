"""Arrow streams: what is taken, what is refused with the column's name, and that hostile bytes do no harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from engine import arrow_ipc, rows
from engine.decode import Decoder
from engine.points import DecodeError, Rejects
from engine.timestamps import now_us
from tests.memory import forget_peak, peak_mib
from tests.service import POINT

DAY = 86_400_000_000
NOW = now_us()
DECODER = Decoder(max_points=1000, oldest_us=30 * DAY)
UTC_US = pa.timestamp("us", "UTC")


def stream(columns: dict[str, Any] | pa.Table, *, batches: int = 1, **options: Any) -> bytes:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for part in np.array_split(np.arange(len(table)), batches):
            writer.write_table(table.slice(part[0] if len(part) else 0, len(part)))
    return bytes(sink.getvalue())


def points(count: int = 3, **changes: Any) -> dict[str, Any]:
    columns = {name: pa.array([value] * count) for name, value in POINT.items()}
    return {name: column for name, column in {**columns, **changes}.items() if column is not ...}


def refusal(body: bytes) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        DECODER.arrow_batch(body, NOW)
    return caught.value


IDS = ["A", "longer-id", "é"]
TIMES = [NOW, NOW - 1_500_000, NOW - DAY]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(IDS),
        pa.array(IDS, pa.large_string()),
        pa.array(IDS).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([2, 3, 0], pa.int8()), pa.array(["é", "unused", "A", "longer-id"])),
        pa.DictionaryArray.from_arrays(pa.array([2, 3, 0], pa.uint16()), pa.array(["é", "x" * 60, "A", "longer-id"])),
        pa.DictionaryArray.from_arrays(pa.array([1, 2, 0], pa.int64()), pa.array(["é", "A", "longer-id", ""])),
    ],
)
@pytest.mark.parametrize("batches", [1, 2])
def test_ids_are_read_from_every_kind_of_string_column(ids: pa.Array, batches: int) -> None:
    columns = DECODER.arrow_batch(stream(points(satellite_id=ids), batches=batches), NOW)
    assert [value.decode() for value in columns.satellite_id.tolist()] == IDS
    assert columns.values["battery_charge_percent"].tolist() == [80.5] * 3


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (pa.array(TIMES, UTC_US), TIMES),
        (pa.array([time * 1000 + 999 for time in TIMES], pa.timestamp("ns", "Europe/Berlin")), TIMES),
        (pa.array([time // 1000 for time in TIMES], pa.timestamp("ms", "+02:00")), [t // 1000 * 1000 for t in TIMES]),
        (pa.array([time // 10**6 for time in TIMES], pa.timestamp("s", "UTC")), [t // 10**6 * 10**6 for t in TIMES]),
        (pa.array([TIMES[0], None, TIMES[2]], UTC_US), [TIMES[0], NOW, TIMES[2]]),
        (pa.array([TIMES[0], -62135596800 * 10**6, TIMES[2]], UTC_US), [TIMES[0], NOW, TIMES[2]]),
        (pa.array([f"{np.datetime64(time, 'us')}789Z" for time in TIMES]), TIMES),
        (pa.array([f"{np.datetime64(TIMES[0], 'us')}Z", None, "0001-01-01T00:00:00Z"]), [TIMES[0], NOW, NOW]),
        (pa.nulls(3), [NOW] * 3),
        (..., [NOW] * 3),
    ],
)
def test_times_are_read_in_every_unit(times: Any, expected: list[int]) -> None:
    assert DECODER.arrow_batch(stream(points(timestamp=times)), NOW).time.tolist() == expected


@pytest.mark.parametrize(
    "kind",
    [pa.float64(), pa.float32(), pa.float16(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64()],
)
def test_numbers_of_every_width_are_taken(kind: pa.DataType) -> None:
    values = pa.array(np.array([1, 2, 100])).cast(kind)
    optional = pa.array([1, None, 3], pa.int64()).cast(kind)
    columns = DECODER.arrow_batch(stream(points(battery_charge_percent=values, altitude_km=optional)), NOW)
    assert columns.values["battery_charge_percent"].tolist() == [1, 2, 100]
    assert str(columns.values["altitude_km"].tolist()) == "[1.0, nan, 3.0]"


def test_an_arrow_stream_and_json_make_the_same_record() -> None:
    table = pa.table(points(500, timestamp=pa.array([NOW - i for i in range(500)], UTC_US)))
    texts = [{**row, "timestamp": f"{np.datetime64(row['timestamp'].replace(tzinfo=None), 'us')}Z"}
             for row in table.to_pylist()]  # fmt: skip
    columnar = {name: [row[name] for row in texts] for name in texts[0]}
    expected = rows.pack(DECODER.json_batch(orjson.dumps(texts), NOW))
    assert rows.pack(DECODER.json_batch(orjson.dumps(columnar), NOW)) == expected
    assert rows.pack(DECODER.arrow_batch(stream(table), NOW)) == expected


@pytest.mark.parametrize(
    ("changes", "pointer", "code"),
    [
        ({"battery_charge_percent": ...}, "/battery_charge_percent", "missing-field"),
        ({"satellite_id": ...}, "/satellite_id", "missing-field"),
        ({"colour": pa.array([1, 2, 3])}, "/colour", "unknown-field"),
        ({"satellite_id": pa.array([1, 2, 3])}, "/satellite_id", "wrong-type"),
        ({"satellite_id": pa.array([b"a", b"b", b"c"])}, "/satellite_id", "wrong-type"),
        ({"battery_charge_percent": pa.array(["1", "2", "3"])}, "/battery_charge_percent", "wrong-type"),
        ({"battery_charge_percent": pa.array([True, True, True])}, "/battery_charge_percent", "wrong-type"),
        ({"battery_charge_percent": pa.nulls(3)}, "/battery_charge_percent", "wrong-type"),
        ({"timestamp": pa.array(TIMES, pa.timestamp("us"))}, "/timestamp", "wrong-type"),
        ({"timestamp": pa.array(TIMES)}, "/timestamp", "wrong-type"),
        ({"battery_charge_percent": pa.array([1, None, 2])}, "/battery_charge_percent/1", "null"),
        ({"battery_charge_percent": pa.array([1.0, 2.0, 100.5])}, "/battery_charge_percent/2", "out-of-range"),
        ({"battery_charge_percent": pa.array([1.0, float("nan"), 2.0])}, "/battery_charge_percent/1", "out-of-range"),
        ({"altitude_km": pa.array([1.0, None, float("nan")])}, "/altitude_km/2", "out-of-range"),
        ({"storage_usage_mb": pa.array([1, 2**63, 3], pa.uint64())}, "/storage_usage_mb/1", "out-of-range"),
        ({"satellite_id": pa.array(["A", None, "B"])}, "/satellite_id/1", "wrong-type"),
        ({"satellite_id": pa.array(["A", "", "B"])}, "/satellite_id/1", "invalid-id"),
        ({"satellite_id": pa.array(["A", "B", "a\x00"])}, "/satellite_id/2", "invalid-id"),
        ({"satellite_id": pa.array(["A", "B", "é" * 26]).dictionary_encode()}, "/satellite_id/2", "invalid-id"),
        ({"timestamp": pa.array([NOW, NOW + 6 * 60 * 10**6, NOW], UTC_US)}, "/timestamp/1", "timestamp-in-future"),
        ({"timestamp": pa.array([-(2**63), NOW // 1000, NOW // 1000], pa.timestamp("ms", "UTC"))},
         "/timestamp/0", "timestamp-too-old"),
        ({"timestamp": pa.array(["2026-01-01T00:00:00"] * 3)}, "/timestamp/0", "invalid-timestamp"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_column(changes: dict[str, Any], pointer: str, code: str) -> None:
    error = refusal(stream(points(**changes)))
    assert error.code == "invalid-point"
    assert (error.faults[0].pointer, error.faults[0].code) == (pointer, code)


def test_a_lenient_stream_leaves_the_bad_rows_out() -> None:
    rejects = Rejects()
    body = stream(points(satellite_id=pa.array(["A", None, "B"]), altitude_km=pa.array([-5.0, 1.0, 2.0])), batches=3)
    columns = DECODER.arrow_batch(body, NOW, rejects)
    assert columns.satellite_id.tolist() == [b"B"]
    assert rejects.indexes == [0, 1]
    assert [fault.pointer for fault in rejects.faults] == ["/altitude_km/0", "/satellite_id/1"]


def test_unknown_columns_are_skipped_where_they_are_ignored() -> None:
    lax = Decoder(max_points=10, oldest_us=DAY, ignore_unknown=True)
    nested = pa.array([[{"a": 1}], [], None])
    assert len(lax.arrow_batch(stream(points(other=nested, is_anomaly=pa.array([True] * 3))), NOW)) == 3


@pytest.mark.parametrize(
    ("body", "code", "fault"),
    [
        (b"", "malformed-arrow", None),
        (b"not arrow at all, but long enough", "malformed-arrow", None),
        (stream(points())[:-40], "malformed-arrow", None),
        (stream(points()) + b"tail", "malformed-arrow", None),
        (stream(pa.table(points()).slice(0, 0)), "invalid-point", "empty"),
        (stream(points(1001)), "too-many-points", None),
        (stream(points(), compression="zstd"), "invalid-point", "compressed-buffers"),
        (stream(points(), compression="lz4"), "invalid-point", "compressed-buffers"),
        (stream(points(300), batches=300), "invalid-point", "too-many-batches"),
        (stream(pa.table([pa.array(["a"])] * 2, names=["satellite_id"] * 2)), "invalid-point", "missing-field"),
    ],
)
def test_a_stream_that_is_broken_or_dear_is_refused(body: bytes, code: str, fault: str | None) -> None:
    error = refusal(body)
    assert (error.code, error.faults[0].code if error.faults else None) == (code, fault)


def test_a_dictionary_that_grows_is_refused() -> None:
    ids = [pa.array(values).dictionary_encode() for values in (["A"], ["A", "B"])]
    sink = pa.BufferOutputStream()
    schema = pa.table(points(1, satellite_id=ids[0])).schema
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)) as writer:
        for each in ids:
            writer.write_batch(pa.record_batch(points(len(each), satellite_id=each)))
    assert refusal(bytes(sink.getvalue())).faults[0].code == "dictionary-delta"


def test_a_column_twice_is_refused() -> None:
    table = pa.table(points()).append_column("satellite_id", pa.array(["a", "b", "c"]))
    assert refusal(stream(table)).faults[0][:2] == ("/satellite_id", "duplicate-column")


def test_many_rows_of_long_texts_cost_no_memory() -> None:
    """One text of 8 MiB, named by every row: 8 GB if it were copied."""
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * 900 + [1] * 100), pa.array(["x" * (8 << 20), "fine"]))
    body = stream(points(1000, satellite_id=ids))
    forget_peak()
    before = peak_mib()
    assert refusal(body).faults[0].code == "invalid-id"
    assert peak_mib() - before < 100


FUZZ = """
import random, sys
sys.path.insert(0, {here!r})
from tests.unit.test_arrow_ipc import *
from tests.unit import test_arrow_ipc
chance = random.Random(20260131)
ids = pa.array(["A", "B", "é"])
seeds = [stream(points(satellite_id=each, timestamp=times, altitude_km=pa.array([1.0, None, 2.0])))
         for each in (ids, ids.dictionary_encode(), ids.cast(pa.large_string()))
         for times in (pa.array(TIMES, UTC_US), pa.array(["2026-01-01T00:00:00Z", None, "x"]))]
seeds.append(stream(points(), compression="zstd"))
taken = refused = 0
for _ in range({rounds}):
    body = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(body))
        kind = chance.randrange(4)
        if kind == 0:
            body[place] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        elif kind == 1:
            place &= ~7
            word = chance.choice((-1, 0, 1, 2**31 - 1, 2**40, 2**62))
            body[place:place + 8] = word.to_bytes(8, "little", signed=True)
        elif kind == 2:
            del body[place:place + chance.randrange(1, 9)]
        else:
            place &= ~3
            body[place:place + 4] = chance.choice((-1, -2**31, 2**30, 64)).to_bytes(4, "little", signed=True)
    try:
        DECODER.arrow_batch(bytes(body), NOW, Rejects() if chance.random() < 0.5 else None)
        taken += 1
    except DecodeError:
        refused += 1
print(taken, refused, int(peak_mib()))
"""


@pytest.mark.timeout(3100)
def test_mutated_streams_raise_decode_errors_and_nothing_else() -> None:
    """In a process of its own: a crash in native code would take the tests with it."""
    code = FUZZ.format(
        here=str(Path(__file__).resolve().parents[2]), rounds=os.environ.get("ORBITSTREAM_FUZZ_ROUNDS", "8000")
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=3000)
    assert ran.returncode == 0, ran.stderr[-2000:]
    taken, refused, peak_mib = map(int, ran.stdout.split())
    assert taken > 100 and refused > 1000
    assert peak_mib < 300


def test_a_schema_that_was_good_once_does_not_vouch_for_another() -> None:
    good = stream(points())
    for _ in range(2):  # the second time it is known
        assert len(DECODER.arrow_batch(good, NOW)) == 3
    bad = stream(points(battery_charge_percent=pa.array(["text"] * 3)))
    for body in (bad, bad + good, bad[:-8] + good):  # the last without its end mark: one stream with two schemas
        with pytest.raises(DecodeError):
            DECODER.arrow_batch(body, NOW)
    assert refusal(bad).faults[0].code == "wrong-type"


def with_indexes(indexes: pa.Array, **changes: Any) -> bytes:
    """Make a stream whose dictionary is the same whatever the indexes into it, unsafe ones as well."""
    ids = pa.DictionaryArray.from_arrays(indexes, pa.array(["B", "A", "é"]), safe=False)
    return stream(points(len(indexes), satellite_id=ids, **changes))


def test_a_dictionary_that_was_good_once_names_the_ids_of_another_batch() -> None:
    for indexes, expected in ([0, 1, 2], "BAé"), ([2, 2, 0], "ééB"), ([1], "A"):
        columns = DECODER.arrow_batch(with_indexes(pa.array(indexes, pa.int32())), NOW)
        assert [each.decode() for each in columns.satellite_id.tolist()] == list(expected)
    for wrong in [0, 3, 0], [0, -1, 0], [2**31 - 1]:
        assert refusal(with_indexes(pa.array(wrong, pa.int32()))).code == "malformed-arrow"
    assert refusal(with_indexes(pa.array([0, None, 1], pa.int32()))).faults[0][:2] == ("/satellite_id/1", "wrong-type")
    wrong_value = with_indexes(pa.array([2, 1, 0], pa.int32()), battery_charge_percent=pa.array([1.0, 2.0, 101.0]))
    assert refusal(wrong_value).faults[0][:2] == ("/battery_charge_percent/2", "out-of-range")


def test_openings_that_are_kept_are_bounded() -> None:
    for number in range(2 * arrow_ipc.MAX_OPENINGS):
        ids = pa.array([f"S{number}", "A"]).dictionary_encode()
        assert DECODER.arrow_batch(stream(points(2, satellite_id=ids)), NOW).satellite_id[0] == b"S%d" % number
    long = pa.array([f"SAT-{number:040}" for number in range(1000)]).dictionary_encode()
    assert len(DECODER.arrow_batch(stream(points(1000, satellite_id=long)), NOW)) == 1000
    assert 0 < len(arrow_ipc._openings) <= arrow_ipc.MAX_OPENINGS
    assert max(map(len, arrow_ipc._openings)) <= arrow_ipc.MAX_OPENING_BYTES
