"""The decoder: what is taken, what is refused, and that the columnar path agrees with the scalar rule."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import rows
from engine.channels import CHANNELS
from engine.decode import MANY, Decoder
from engine.points import DecodeError, Rejects
from engine.timestamps import now_us, parse, parse_all
from tests.service import POINT

DAY = 86_400_000_000
NOW = now_us()
DECODER = Decoder(max_points=1000, oldest_us=30 * DAY)


def point(**changes: Any) -> dict[str, Any]:
    changed = {**POINT, **changes}
    return {name: value for name, value in changed.items() if value is not ...}


def stamp(offset_us: int = 0) -> str:
    return f"{np.datetime64(NOW + offset_us, 'us')}Z"


def refusal(body: bytes, decode: Any = DECODER.point) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode(body, NOW)
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"", b"  \n", b"{", b'{"a":1,}', b'{"a":1}//x', b"{}{}", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":1e400}',
        b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'{"a":"\xff"}', b'{"a":"\\ud800"}', b'{"a":"\x01"}', b'{"a":01}',
        b'{"a":+1}', b'{"a":.5}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    for decode in (DECODER.point, DECODER.json_batch):
        assert refusal(body, decode).code == "malformed-json"


@pytest.mark.parametrize(
    ("changes", "pointer", "code"),
    [
        ({"satellite_id": ...}, "/satellite_id", "missing-field"),
        ({"battery_charge_percent": ...}, "/battery_charge_percent", "missing-field"),
        ({"colour": 1}, "/colour", "unknown-field"),
        ({"a/b~c": 1}, "/a~1b~0c", "unknown-field"),
        ({"battery_charge_percent": None}, "/battery_charge_percent", "null"),
        ({"battery_charge_percent": True}, "/battery_charge_percent", "wrong-type"),
        ({"storage_usage_mb": "12"}, "/storage_usage_mb", "wrong-type"),
        ({"storage_usage_mb": [1]}, "/storage_usage_mb", "wrong-type"),
        ({"battery_charge_percent": 100.01}, "/battery_charge_percent", "out-of-range"),
        ({"signal_strength_dbm": -201}, "/signal_strength_dbm", "out-of-range"),
        ({"storage_usage_mb": 1e308}, "/storage_usage_mb", "out-of-range"),
        ({"storage_usage_mb": 2**64}, "/storage_usage_mb", "out-of-range"),
        ({"latitude": 90.5}, "/latitude", "out-of-range"),
        ({"satellite_id": ""}, "/satellite_id", "invalid-id"),
        ({"satellite_id": "x" * 51}, "/satellite_id", "invalid-id"),
        ({"satellite_id": "é" * 26}, "/satellite_id", "invalid-id"),
        ({"satellite_id": "a\x00b"}, "/satellite_id", "invalid-id"),
        ({"satellite_id": "a\x7f"}, "/satellite_id", "invalid-id"),
        ({"satellite_id": 5}, "/satellite_id", "wrong-type"),
        ({"timestamp": 5}, "/timestamp", "wrong-type"),
        ({"timestamp": "2026-01-01T00:00:00"}, "/timestamp", "invalid-timestamp"),
        ({"timestamp": "2026-02-30T00:00:00Z"}, "/timestamp", "invalid-timestamp"),
        ({"timestamp": "2026-01-01T23:59:60Z"}, "/timestamp", "invalid-timestamp"),
        ({"timestamp": "0000-01-01T00:00:00Z"}, "/timestamp", "invalid-timestamp"),
        ({"timestamp": "10000-01-01T00:00:00Z"}, "/timestamp", "invalid-timestamp"),
        ({"timestamp": "2026-01-01"}, "/timestamp", "invalid-timestamp"),
        ({"timestamp": stamp(6 * 60 * 10**6)}, "/timestamp", "timestamp-in-future"),
        ({"timestamp": stamp(-31 * DAY)}, "/timestamp", "timestamp-too-old"),
    ],
)
def test_a_bad_point_is_refused_with_its_pointer(changes: dict[str, Any], pointer: str, code: str) -> None:
    bad = json.dumps(point(**changes)).encode()
    error = refusal(bad)
    assert error.code == "invalid-point"
    assert [(fault.pointer, fault.code) for fault in error.faults] == [(pointer, code)]
    good = json.dumps(point()).encode()
    in_batch = refusal(b"[" + good + b"," + bad + b"]", DECODER.json_batch)
    assert [(fault.pointer, fault.code) for fault in in_batch.faults] == [(f"/1{pointer}", code)]
    in_lines = refusal(good + b"\n" + bad + b"\n", DECODER.ndjson_batch)
    assert in_lines.faults == in_batch.faults


@pytest.mark.parametrize("body", [b"5", b'"x"', b"null", b"[]", b"{}"])
def test_a_wrong_root_is_an_invalid_point(body: bytes) -> None:
    if body != b"{}":
        assert refusal(body).faults[0].pointer == ""
    assert refusal(body, DECODER.json_batch).code == "invalid-point"


def test_input_values_are_never_echoed() -> None:
    error = refusal(json.dumps(point(satellite_id="s3cret" * 20, timestamp="s3cret", latitude="s3cret")).encode())
    assert "s3cret" not in str(error) + str(error.faults)
    assert len(error.faults) == 3


def test_details_stop_at_twenty_and_the_rest_is_counted() -> None:
    error = refusal(json.dumps([{}] * 30).encode(), DECODER.json_batch)
    assert len(error.faults) == 20
    assert "119 more" in error.detail


def test_too_many_points_are_told_apart() -> None:
    assert refusal(json.dumps([point()] * 1001).encode(), DECODER.json_batch).code == "too-many-points"


def test_what_is_accepted() -> None:
    now = DECODER.point(json.dumps(point()).encode(), NOW)
    assert now == (
        NOW,
        b"TEST-01",
        {"battery_charge_percent": 80.5, "storage_usage_mb": 1000, "signal_strength_dbm": -70},
    )
    assert DECODER.point(json.dumps(point(timestamp=None)).encode(), NOW).time_us == NOW
    assert DECODER.point(json.dumps(point(timestamp="0001-01-01T00:00:00Z")).encode(), NOW).time_us == NOW
    assert DECODER.point(json.dumps(point(is_anomaly=True, latitude=None)).encode(), NOW) == now
    assert DECODER.point(b'{"satellite_id":"x",' + json.dumps(point()).encode()[1:], NOW).satellite_id == b"TEST-01"
    lenient = Decoder(max_points=10, oldest_us=DAY, ignore_unknown=True)
    assert lenient.point(json.dumps(point(colour="red")).encode(), NOW) == now
    columns = lenient.json_batch(json.dumps([point(colour="red")]).encode(), NOW)
    assert columns.satellite_id.tolist() == [b"TEST-01"]


def test_a_line_is_one_point_and_blank_lines_are_none() -> None:
    line = json.dumps(point()).encode()
    assert len(DECODER.ndjson_batch(line + b"\r\n\n" + line + b"\n", NOW)) == 2
    assert "line 2" in refusal(line + b"\n" + line + b"," + line, DECODER.ndjson_batch).detail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1969-12-31t19:00:00-05:00", 0),
        ("2026-11-22 00:00:00.5Z", 1795305600500000),
        ("2026-11-22T00:00:00.123456789Z", 1795305600123456),
        ("2024-02-29T23:59:59.999999Z", 1709251199999999),
    ],
)
def test_timestamps(text: str, expected: int) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("zone", ["+24:00", "+00:60", "-99:00"])
def test_an_offset_that_does_not_exist_is_refused_in_a_batch_too(zone: str) -> None:
    text = stamp()[:-1] + zone
    assert parse_all([text]) is None
    assert refusal(orjson.dumps([point(timestamp=text)] * 2), DECODER.json_batch).faults[0].code == "invalid-timestamp"


@given(
    st.lists(st.integers(-62135596800 * 10**6 + DAY, 253402300799 * 10**6 - DAY), min_size=1, max_size=20),
    st.integers(0, 9),
    st.sampled_from(["Z", "z", "+00:00", "-07:30", "+23:59"]),
)
def test_many_timestamps_are_read_as_each_one_is(times: list[int], digits: int, zone: str) -> None:
    texts = []
    for time in times:
        whole, _, fraction = str(np.datetime64(time, "us")).partition(".")
        texts.append(whole + ("." + fraction.ljust(9, "7")[:digits] if digits else "") + zone)
    together = parse_all(texts)
    assert together is not None
    assert together.tolist() == [parse(text) for text in texts]


@given(
    st.text("0123456789-T:.Z+ t", min_size=18, max_size=30)
    | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", fullmatch=True)
)
def test_the_fast_timestamp_path_takes_nothing_that_the_rule_refuses(text: str) -> None:
    for texts in ([text], [text, "2024-02-29" + text[10:]]):  # of one day, and of more
        together = parse_all(texts)
        if together is not None:
            assert together.tolist() == [parse(each) for each in texts]


_TIMES = ["2026-11-22T23:59:58.123456Z", "2026-11-22T23:59:58+05:30", "2024-02-29T12:00:00.123456789Z"]


@given(
    st.sampled_from(_TIMES),
    st.lists(
        st.lists(st.tuples(st.integers(0, 29), st.sampled_from("0123456789-T:.Z+ t\n")), max_size=3),
        min_size=1,
        max_size=4,
    ),
)
def test_many_timestamps_that_differ_anywhere_are_read_by_the_rule_or_left_to_it(
    base: str, changes: list[list[tuple[int, str]]]
) -> None:
    texts = []
    for change in changes:
        text = list(base)
        for place, char in change:
            text[place % len(text)] = char
        texts.append("".join(text))
    together = parse_all(texts)
    if together is not None:
        assert together.tolist() == [parse(each) for each in texts]


@pytest.mark.parametrize("other", ["+06:30", "-05:30", "+05:31"])
def test_timestamps_of_two_zones_are_left_to_the_rule(other: str) -> None:
    text = "2026-11-22T23:59:58+05:30"
    assert parse_all([text, text[:-6] + other]) is None


_numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**63), 2**64 - 1),
    st.booleans(),
    st.none(),
    st.text(),
)
_values = st.fixed_dictionaries(
    {channel.name: st.floats(channel.low, channel.high) | st.integers(math.ceil(channel.low), math.floor(channel.high))
     for channel in CHANNELS if channel.required},
    optional={
        **{channel.name: st.none() | st.floats(channel.low, channel.high)
           for channel in CHANNELS if not channel.required},
        "timestamp": st.sampled_from([None, stamp(), stamp(-DAY), stamp(-5).replace("Z", "+00:00")]),
        "is_anomaly": st.booleans(),
    },
)  # fmt: skip
_good = st.builds(
    lambda values, name: {**values, "satellite_id": name},
    _values,
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12),
)
_any = st.dictionaries(
    st.sampled_from([*POINT, "timestamp", "latitude", "other"]), _numbers | st.sampled_from([stamp(), "SAT"])
)


_copies = st.sampled_from([1, MANY])
"""Of a list of points: columns of many values are looked at in another way than those of few."""


@given(st.lists(_good, min_size=1, max_size=8), _copies)
def test_the_columnar_path_reads_what_the_scalar_rule_reads(points: list[dict[str, Any]], copies: int) -> None:
    points = points * copies
    together = DECODER.json_batch(orjson.dumps(points), NOW)
    one_by_one = [DECODER.point(orjson.dumps(each), NOW) for each in points]
    assert together.time.tolist() == [each.time_us for each in one_by_one]
    assert together.satellite_id.tolist() == [each.satellite_id for each in one_by_one]
    for channel in CHANNELS:
        column = together.values.get(channel.name, np.full(len(points), np.nan))
        assert [None if math.isnan(value) else value for value in column.tolist()] == [
            each.values.get(channel.name) for each in one_by_one
        ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("battery_charge_percent", value) for value in (True, False, None, "1", [1])),
        *(("satellite_id", value) for value in ("A", "AB\nCDEF", "\nABCDEF", "ABCDE\x7f", "", "Ä" * 33, 7, None)),
        *(("timestamp", value) for value in ("NOW\n", "\nNOW", "NOWZ", "NOW\nZ", 7, True, ["NOW"])),
    ],
)
def test_one_value_among_many_is_looked_at_as_it_is_alone(field: str, value: Any) -> None:
    if isinstance(value, str):
        value = value.replace("NOW", stamp())
    plain = [point(satellite_id="SAT-001", timestamp=stamp(), battery_charge_percent=0) for _ in range(2 * MANY)]
    for place in (0, MANY, 2 * MANY - 1):
        points = [dict(each) for each in plain]
        points[place][field] = value
        try:
            expected: Any = DECODER.point(orjson.dumps(points[place]), NOW).satellite_id
        except DecodeError as error:
            expected = error.faults[0].code
        columns = {name: [each[name] for each in points] for name in points[0]}
        for body, pointer in ((points, f"/{place}/{field}"), (columns, f"/{field}/{place}")):
            try:
                found: Any = DECODER.json_batch(orjson.dumps(body), NOW).satellite_id.tolist()[place]
            except DecodeError as error:
                assert [fault.pointer for fault in error.faults] == [pointer]
                found = error.faults[0].code
            assert found == expected


@pytest.mark.parametrize("identity", ["", "A" * 65, "A\tB", "A\nB"])
def test_ids_of_one_width_are_looked_at_all_the_same(identity: str) -> None:
    error = refusal(orjson.dumps([point(satellite_id=identity)] * MANY), DECODER.json_batch)
    assert f"{MANY - 1} more" in error.detail


@given(st.lists(_good | _any, min_size=1, max_size=5), _copies)
def test_a_batch_is_taken_if_and_only_if_each_point_is(points: list[dict[str, Any]], copies: int) -> None:
    points = points * copies
    verdicts = []
    for each in points:
        try:
            DECODER.point(orjson.dumps(each), NOW)
            verdicts.append(True)
        except DecodeError:
            verdicts.append(False)
    try:
        DECODER.json_batch(orjson.dumps(points), NOW)
        taken = True
    except DecodeError as error:
        taken = False
        assert {int(fault.pointer.split("/")[1]) for fault in error.faults} <= {
            index for index, good in enumerate(verdicts) if not good
        }
    assert taken == all(verdicts)


@given(st.lists(_good | _any, min_size=1, max_size=5))
def test_a_lenient_batch_keeps_what_the_scalar_rule_keeps(points: list[dict[str, Any]]) -> None:
    good = []
    for index, each in enumerate(points):
        try:
            good.append((index, DECODER.point(orjson.dumps(each), NOW)))
        except DecodeError:
            continue
    lines = b"\n".join(map(orjson.dumps, points))
    for decode, body in ((DECODER.json_batch, orjson.dumps(points)), (DECODER.ndjson_batch, lines)):
        rejects = Rejects()
        try:
            columns = decode(body, NOW, rejects)
        except DecodeError:
            assert not good
            continue
        assert columns.satellite_id.tolist() == [each.satellite_id for _, each in good]
        assert rejects.indexes == sorted(set(range(len(points))) - {index for index, _ in good})


@given(st.lists(_good | _any, min_size=1, max_size=5), _copies)
def test_columns_are_taken_if_and_only_if_their_points_are(points: list[dict[str, Any]], copies: int) -> None:
    points = points * copies
    names = {name for each in points for name in each}
    points = [{name: each.get(name) for name in names} for each in points]  # a column has a value for each point
    try:
        expected = rows.pack(DECODER.json_batch(orjson.dumps(points), NOW))
    except DecodeError:
        expected = None
    try:
        found = rows.pack(DECODER.json_batch(orjson.dumps({n: [p[n] for p in points] for n in names}), NOW))
    except DecodeError as error:
        found = None
        assert error.faults[0].pointer.split("/")[1] in {*names, *POINT, "other"}
    assert found == expected


_json = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*POINT, "timestamp"]), inner),
    max_leaves=12,
)


@given(_json)
def test_no_json_raises_anything_but_a_decode_error(value: Any) -> None:
    body = orjson.dumps(value)
    for decode in (DECODER.json_batch, DECODER.ndjson_batch):
        for rejects in (None, Rejects()):
            try:
                decode(body, NOW, rejects)
            except DecodeError as error:
                assert error.detail
    try:
        DECODER.point(body, NOW)
    except DecodeError as error:
        assert error.faults


HOSTILE = """
import sys
sys.path.insert(0, {here!r})
from tests.memory import peak_mib
from engine.decode import MANY, Decoder
from engine.points import DecodeError
decoder = Decoder(max_points=100_000, oldest_us=10**18)
size = 16 << 20
bodies = [b"[" + item * (size // len(item)) + b"0]" for item in (b"[],", b"{{}},", b'{{"a":1}},', b"1.5,", b'"ab",')]
bodies.append(b"{{" + b",".join(b'"%x":1' % i for i in range(size // 10)) + b"}}")
bodies.append(b'{{"satellite_id":[' + b"0," * (size // 2 - 20) + b"0]}}")
bodies.append(b"\\n" * size)
base = peak_mib()
for body in bodies:
    for decode in (decoder.json_batch, decoder.ndjson_batch):
        try:
            decode(body, 0)
            raise SystemExit("taken")
        except DecodeError:
            pass
print(int(peak_mib() - base))
"""


def test_a_hostile_body_costs_little_more_memory_than_the_largest_good_one() -> None:
    """16 MiB of `[],[],...` were half a gigabyte once parsed."""
    code = HOSTILE.format(here=str(Path(__file__).resolve().parents[2]))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) < 150


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_body_raises_anything_but_a_decode_error(body: bytes) -> None:
    for decode in (DECODER.point, DECODER.json_batch, DECODER.ndjson_batch, DECODER.arrow_batch):
        try:
            decode(body, NOW)
        except DecodeError as error:
            assert error.detail


@given(st.lists(st.lists(_good, min_size=1, max_size=5), min_size=1, max_size=5))
def test_columns_survive_the_lane(batches: list[list[dict[str, Any]]]) -> None:
    """What `pack` writes, and `pack_point` for one point, `unpack` joins again."""
    payloads, expected = [], []
    for time, batch in enumerate(batches):
        columns = DECODER.json_batch(orjson.dumps(batch), NOW)
        if len(batch) == 1:
            single = DECODER.point(orjson.dumps(batch[0]), NOW)
            payload = b"".join(rows.pack_point(single.time_us, single.satellite_id, single.values, False))
        else:
            payload = b"".join(rows.pack(columns))
        payloads.append((len(batch), time, memoryview(payload + bytes(-len(payload) % 8))))
        expected += [(time, *_key(columns, index)) for index in range(len(columns))]
    joined, received = rows.unpack(rows.layout(), payloads)
    assert received.tolist() == sorted(received.tolist())
    found = [(received[index], *_key(joined, index)) for index in range(len(joined))]
    assert sorted(found, key=str) == sorted(expected, key=str)


def _key(columns: rows.Columns, index: int) -> tuple[Any, ...]:
    values = {name: column[index] for name, column in columns.values.items() if not math.isnan(column[index])}
    return columns.time[index], columns.satellite_id[index], sorted(values.items())
