"""Every format, encoding and preference over a real socket, and every refusal of a body: status, pointer, no row."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest

from engine.problems import MEDIA_TYPE, TYPE_BASE
from tests.service import POINT, Service, eventually

BATCH = "/telemetry/batch"
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
NDJSON = {"Content-Type": "application/x-ndjson"}
LENIENT = {"Prefer": "handling=lenient"}


@pytest.fixture(scope="module")
def service(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the module; every test accounts for the rows that it makes by a satellite id of its own."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS test_formats WITH (FORCE)")
        connection.execute("CREATE DATABASE test_formats")
    url = psycopg.conninfo.make_conninfo(server, dbname="test_formats")
    with Service(url, tmp_path_factory.mktemp("formats")) as running:
        running.start(ORBITSTREAM_WORKERS="1")
        yield running
        assert running.stop() == 0


def named(name: str, **changes: Any) -> dict[str, Any]:
    return {**POINT, "satellite_id": name, **changes}


def columnar(name: str, count: int) -> dict[str, list[Any]]:
    return {field: [value] * count for field, value in named(name).items()}


def arrow(columns: dict[str, Any], **options: Any) -> bytes:
    table = pa.table(columns)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue()


def zstd(body: bytes) -> bytes:
    return bytes(pa.compress(body, "zstd", asbytes=True))


def rows(service: Service, name: str) -> int:
    return int(service.query("SELECT count(*) FROM telemetry WHERE satellite_id = %s", name)[0][0])


@pytest.mark.parametrize("encoding", [None, "identity", "gzip", "x-gzip", "zstd"])
@pytest.mark.parametrize("kind", ["array", "columnar", "ndjson", "arrow"])
def test_every_format_comes_in_every_encoding(service: Service, kind: str, encoding: str | None) -> None:
    name = f"{kind}-{encoding}"
    body, headers = {
        "array": (json.dumps([named(name)] * 5).encode(), {}),
        "columnar": (json.dumps(columnar(name, 5)).encode(), {}),
        "ndjson": (b"\n".join([json.dumps(named(name)).encode()] * 5), NDJSON),
        "arrow": (arrow(columnar(name, 5)), ARROW),
    }[kind]
    compress = {"gzip": gzip.compress, "x-gzip": gzip.compress, "zstd": zstd}.get(encoding or "")
    if compress is not None:
        cut = len(body) // 2
        body = compress(body[:cut]) + compress(body[cut:])  # several members, or frames, are one body
    headers = {**headers, **({"Content-Encoding": encoding} if encoding else {})}
    assert service.post(BATCH, body, headers)[:2] == (202, {"status": "accepted", "count": 5})
    eventually(lambda: rows(service, name) == 5)


def stamp(**shift: float) -> str:
    return (datetime.now(UTC) + timedelta(**shift)).isoformat()


GOOD = json.dumps(POINT).encode()
PACKED = gzip.compress(GOOD)
MALFORMED = {
    "empty": b"", "whitespace": b" \n\t", "truncated": GOOD[:-1], "trailing comma": GOOD[:-1] + b",}",
    "comment": GOOD + b"// note", "two documents": GOOD * 2, "NaN": b'{"latitude":NaN}',
    "Infinity": b'{"latitude":Infinity}', "1e400": b'{"latitude":1e400}', "BOM": b"\xef\xbb\xbf" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"), "bad UTF-8": b'{"satellite_id":"\xff"}',
    "lone surrogate": b'{"satellite_id":"\\ud800"}', "raw control": b'{"satellite_id":"\x01"}',
    "01": b'{"latitude":01}', "+1": b'{"latitude":+1}', ".5": b'{"latitude":.5}', "too deep": b"[" * 60_000,
}  # fmt: skip
INVALID: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown field": ({"colour": 1}, "/colour", "unknown-field"),
    "null": ({"battery_charge_percent": None}, "/battery_charge_percent", "null"),
    "bool": ({"battery_charge_percent": True}, "/battery_charge_percent", "wrong-type"),
    "numeric string": ({"storage_usage_mb": "12"}, "/storage_usage_mb", "wrong-type"),
    "out of range": ({"signal_strength_dbm": -201}, "/signal_strength_dbm", "out-of-range"),
    "1e308": ({"storage_usage_mb": 1e308}, "/storage_usage_mb", "out-of-range"),
    "over 2^64-1": ({"storage_usage_mb": 2**64}, "/storage_usage_mb", "out-of-range"),
    "NUL in id": ({"satellite_id": "a\0"}, "/satellite_id", "invalid-id"),
    "control in id": ({"satellite_id": "a\x85"}, "/satellite_id", "invalid-id"),
    "empty id": ({"satellite_id": ""}, "/satellite_id", "invalid-id"),
    "long id": ({"satellite_id": "é" * 26}, "/satellite_id", "invalid-id"),
    "naive time": ({"timestamp": stamp()[:-6]}, "/timestamp", "invalid-timestamp"),
    "30 February": ({"timestamp": "2026-02-30T00:00:00Z"}, "/timestamp", "invalid-timestamp"),
    "leap second": ({"timestamp": "2026-06-30T23:59:60Z"}, "/timestamp", "invalid-timestamp"),
    "year 0": ({"timestamp": "0000-01-01T00:00:00Z"}, "/timestamp", "invalid-timestamp"),
    "year 10000": ({"timestamp": "10000-01-01T00:00:00Z"}, "/timestamp", "invalid-timestamp"),
    "future": ({"timestamp": stamp(days=1)}, "/timestamp", "timestamp-in-future"),
    "old": ({"timestamp": stamp(days=-31)}, "/timestamp", "timestamp-too-old"),
}
SINGLE = "/telemetry"
Case = tuple[str, bytes, dict[str, str], int, str, str | None]
CASES: dict[str, Case] = {
    **{f"{name}, one point": (SINGLE, body, {}, 400, "malformed-json", None) for name, body in MALFORMED.items()},
    **{f"{name}, array": (BATCH, b"[" + body + b"]" if body.strip() else body, {}, 400, "malformed-json", None)
       for name, body in MALFORMED.items() if name != "two documents"},
    **{name: (SINGLE, json.dumps({**POINT, **changes}).encode(), {}, 422, "invalid-point", pointer)
       for name, (changes, pointer, _) in INVALID.items()},
    **{f"{name}, array": (BATCH, json.dumps([POINT, {**POINT, **changes}]).encode(), {}, 422, "invalid-point",
                          f"/1{pointer}") for name, (changes, pointer, _) in INVALID.items()},
    **{f"{name}, columns": (BATCH, json.dumps({key: [value] for key, value in {**POINT, **changes}.items()}).encode(),
                            {}, 422, "invalid-point", pointer if name == "unknown field" else f"{pointer}/0")
       for name, (changes, pointer, _) in INVALID.items()},
    "missing field": (SINGLE, b'{"satellite_id":"A"}', {}, 422, "invalid-point", "/battery_charge_percent"),
    "missing column": (BATCH, b'{"satellite_id":["A"]}', {}, 422, "invalid-point", "/battery_charge_percent"),
    "wrong root": (SINGLE, b"[]", {}, 422, "invalid-point", ""),
    "wrong root, batch": (BATCH, b'"x"', {}, 422, "invalid-point", ""),
    "empty batch": (BATCH, b"[]", {}, 422, "invalid-point", ""),
    "empty lines": (BATCH, b"\n\n", NDJSON, 422, "invalid-point", ""),
    "empty columns": (BATCH, json.dumps(columnar("A", 0)).encode(), {}, 422, "invalid-point", ""),
    "one point as columns": (BATCH, GOOD, {}, 422, "invalid-point", "/satellite_id"),
    "unequal columns": (BATCH, json.dumps({**columnar("A", 3), "latitude": [1]}).encode(), {}, 422, "invalid-point",
                        "/latitude"),
    "a broken line": (BATCH, GOOD + b"\n{\n", NDJSON, 400, "malformed-json", None),
    "Arrow: a column of another type": (BATCH, arrow({**columnar("A", 2), "latitude": ["1", "2"]}), ARROW, 422,
                                        "invalid-point", "/latitude"),
    "Arrow: null in a required column": (BATCH, arrow({**columnar("A", 2), "storage_usage_mb": [1, None]}), ARROW, 422,
                                         "invalid-point", "/storage_usage_mb/1"),
    "Arrow: compressed inside": (BATCH, arrow(columnar("A", 2), compression="zstd"), ARROW, 422, "invalid-point", ""),
    "Arrow: cut short": (BATCH, arrow(columnar("A", 2))[:-60], ARROW, 400, "malformed-arrow", None),
    "Arrow: something else": (BATCH, GOOD, ARROW, 400, "malformed-arrow", None),
    "gzip: corrupt": (SINGLE, PACKED[:20] + b"\xff\xff" + PACKED[22:], {"Content-Encoding": "gzip"}, 400, "bad-request",
                      None),
    "gzip: cut short": (SINGLE, PACKED[:-1], {"Content-Encoding": "gzip"}, 400, "bad-request", None),
    "gzip: empty": (SINGLE, b"", {"Content-Encoding": "gzip"}, 400, "bad-request", None),
    "gzip: bytes after the end": (SINGLE, PACKED + b"tail", {"Content-Encoding": "gzip"}, 400, "bad-request", None),
    "zstd: not zstd": (SINGLE, PACKED, {"Content-Encoding": "zstd"}, 400, "bad-request", None),
    "zstd: cut short": (SINGLE, zstd(GOOD)[:-1], {"Content-Encoding": "zstd"}, 400, "bad-request", None),
    "unknown encoding": (SINGLE, GOOD, {"Content-Encoding": "br"}, 415, "unsupported-media-type", None),
    "two encodings": (SINGLE, PACKED, {"Content-Encoding": "gzip, gzip"}, 415, "unsupported-media-type", None),
    "media type": (BATCH, GOOD, {"Content-Type": "text/csv"}, 415, "unsupported-media-type", None),
    "a batch where one point goes": (SINGLE, GOOD, NDJSON, 415, "unsupported-media-type", None),
    "too many points": (BATCH, b"[" + b",".join([b"{}"] * 100_001) + b"]", {}, 413, "too-many-points", None),
    "too many lists": (BATCH, b"[" + b"[]," * 400_000 + b"[]]", {}, 413, "too-many-points", None),
    "over the limit, one point": (SINGLE, b" " * ((64 << 10) + 1), {}, 413, "too-large", None),
    "over the limit, decompressed": (SINGLE, zstd(b" " * (65 << 10)), {"Content-Encoding": "zstd"}, 413, "too-large",
                                     None),
    "empty key": (SINGLE, GOOD, {"Idempotency-Key": ""}, 400, "bad-request", None),
    "long key": (SINGLE, GOOD, {"Idempotency-Key": "x" * 201}, 400, "bad-request", None),
    "key outside ASCII": (SINGLE, GOOD, {"Idempotency-Key": "\xe9"}, 400, "bad-request", None),
    "key with lenient": (BATCH, b"[" + GOOD + b"]", {"Idempotency-Key": "k", **LENIENT}, 400, "bad-request", None),
    "lenient, all bad": (BATCH, b"[{},1]", LENIENT, 422, "invalid-point", "/0/satellite_id"),
}  # fmt: skip


@pytest.fixture(scope="module")
def accounts(service: Service) -> Iterator[None]:
    """Whatever the refusals were sent, the number of points published did not change."""
    yield
    assert service.get("/health")[1]["status"] == "healthy"
    assert rows(service, POINT["satellite_id"]) == 0  # type: ignore[arg-type]
    assert rows(service, "A") == 0


@pytest.mark.parametrize("name", CASES)
def test_a_bad_body_is_one_problem_and_stores_nothing(service: Service, accounts: None, name: str) -> None:
    path, body, headers, status, code, pointer = CASES[name]
    got, problem, names = service.post(path, body, headers)
    assert (got, names["content-type"]) == (status, MEDIA_TYPE), problem
    assert (problem["type"], problem["status"], problem["accepted"]) == (TYPE_BASE + code, status, 0)
    assert problem["detail"] and "\n" not in problem["detail"]
    errors = problem.get("errors", [])
    assert (errors[0]["pointer"] if errors else None) == pointer
    plain = name.partition(",")[0]
    if plain in INVALID:
        assert errors[0]["code"] == INVALID[plain][2]


def test_refusals_published_nothing(service: Service, accounts: None) -> None:
    """A point sent after bad ones lies behind them in the one lane: when it is a row, they would be."""
    for path, body, headers, *_ in CASES.values():
        if len(body) < 1 << 16:
            assert service.post(path, body, headers)[0] >= 400
    before = json.loads(service.run("status", "--json").stdout)["lanes"][0]["published_points"]
    assert service.post(SINGLE, named("LAST"))[0] == 202
    eventually(lambda: rows(service, "LAST") == 1)
    after = json.loads(service.run("status", "--json").stdout)["lanes"][0]["published_points"]
    assert after == before + 1
    assert after == service.count()


def test_the_last_of_equal_keys_wins(service: Service) -> None:
    body = b'{"satellite_id":"FIRST",' + json.dumps(named("TWICE")).encode()[1:]
    assert service.post(SINGLE, body)[:2] == (202, {"status": "accepted", "satellite_id": "TWICE"})
    eventually(lambda: rows(service, "TWICE") == 1)


@pytest.mark.parametrize("kind", ["array", "ndjson", "columnar", "arrow"])
def test_a_lenient_batch_takes_the_good_points(service: Service, kind: str) -> None:
    name = f"lenient-{kind}"
    points = [named(name), named(name, latitude=91), named(name), named(name, satellite_id=""), named(name)]
    points = [{"latitude": None, **point} for point in points]
    table = {field: [point[field] for point in points] for field in points[0]}
    body, headers = {
        "array": (json.dumps([*points, 5]).encode(), {}),
        "ndjson": ("\n".join(map(json.dumps, points)).encode() + b"\nnot json", NDJSON),
        "columnar": (json.dumps(table).encode(), {}),
        "arrow": (arrow(table), ARROW),
    }[kind]
    status, answer, names = service.post(BATCH, body, {**headers, "Prefer": 'respond-async, Handling="lenient"'})
    assert (status, names["preference-applied"]) == (202, "handling=lenient")
    assert (answer["status"], answer["count"], answer["accepted"]) == ("accepted", 3, 3)
    by_point = kind in ("array", "ndjson")
    assert answer["rejected"] == ([1, 3, 5] if by_point else [1, 3])
    pointers = [error["pointer"] for error in answer["errors"]]
    assert pointers == (["/1/latitude", "/3/satellite_id", "/5"] if by_point else ["/latitude/1", "/satellite_id/3"])
    assert all(error["retryable"] is False and error["detail"] for error in answer["errors"])
    eventually(lambda: rows(service, name) == 3)


def test_a_lenient_answer_names_every_bad_point_and_details_twenty(service: Service) -> None:
    status, answer, _ = service.post(BATCH, [named("many-bad")] + [named("many-bad", latitude=91)] * 50, LENIENT)
    assert (status, answer["accepted"], answer["rejected"]) == (202, 1, list(range(1, 51)))
    assert len(answer["errors"]) == 20
    strict = service.post(BATCH, [named("strict")], {"Prefer": "handling=strict, handling=lenient"})
    assert "preference-applied" not in strict[2] and strict[1] == {"status": "accepted", "count": 1}


def peak_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_bomb_stops_early_and_costs_little_memory(service: Service, encoding: str) -> None:
    """10 MB of gzip that are 10 GB."""
    if encoding == "gzip":
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        member = b"".join(packer.compress(bytes(1 << 24)) for _ in range(6)) + packer.flush()
        bomb = member * (10**7 // len(member))
    else:
        bomb = zstd(bytes(1 << 26)) * 1000
    (worker,) = service.workers()
    before = peak_kib(worker)
    status, problem, _ = service.post(BATCH, bomb, {"Content-Encoding": encoding})
    assert (status, problem["type"]) == (413, TYPE_BASE + "too-large")
    assert peak_kib(worker) - before < 50 << 10
