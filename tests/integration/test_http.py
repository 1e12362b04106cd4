"""The HTTP side over real gunicorn: every answer, and that a refused request stores nothing."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from engine.problems import MEDIA_TYPE
from tests.service import POINT, Service, eventually


@pytest.fixture(scope="module", params=["eventloop", "gthread"])
def service(server: str, request: pytest.FixtureRequest) -> Iterator[Service]:
    """One service of each worker class for the module; tests tell their points apart by satellite id."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS test_http WITH (FORCE)")
        connection.execute("CREATE DATABASE test_http")
    parts = psycopg.conninfo.conninfo_to_dict(server)
    url = psycopg.conninfo.make_conninfo(**{**parts, "dbname": "test_http"})
    with tempfile.TemporaryDirectory(prefix="os-lanes-", dir="/dev/shm") as folder:
        environment = {
            "ORBITSTREAM_MAX_BODY_BYTES": "64KiB",
            "ORBITSTREAM_MAX_POINTS": "300",
            "ORBITSTREAM_NODE": "here",
            "ORBITSTREAM_WORKER_CLASS": request.param,
        }
        with Service(url, Path(folder)) as running:
            yield running.start(**environment)
            assert running.stop() == 0


def rows(service: Service, satellite_id: str) -> list[tuple[Any, ...]]:
    return service.query("SELECT * FROM telemetry WHERE satellite_id = %s", satellite_id)


def raw(service: Service, request: bytes) -> bytes:
    """Send bytes and return all that comes back until the service closes or has answered."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_a_point_is_accepted_and_becomes_a_row(service: Service) -> None:
    status, body, _ = service.post("/telemetry", {**POINT, "satellite_id": "ONE", "temperature_c": 20.25})
    assert (status, body) == (202, {"status": "accepted", "satellite_id": "ONE"})
    found = eventually(lambda: rows(service, "ONE"))
    assert len(found) == 1
    (values,) = service.query(
        "SELECT battery_charge_percent, storage_usage_mb, signal_strength_dbm, is_anomaly, temperature_c, latitude,"
        " time = received_at, now() - received_at < '10 s' FROM telemetry WHERE satellite_id = 'ONE'"
    )
    assert values == (80.5, 1000, -70, False, 20.25, None, True, True)


def test_a_batch_is_accepted_as_array_and_as_lines(service: Service) -> None:
    points = [{**POINT, "satellite_id": "ARRAY", "timestamp": None} for _ in range(250)]
    assert service.post("/telemetry/batch", points)[:2] == (202, {"status": "accepted", "count": 250})
    lines = "\n".join(json.dumps({**POINT, "satellite_id": "LINES"}) for _ in range(3))
    answer = service.post("/telemetry/batch", lines, {"Content-Type": "application/x-ndjson; charset=utf-8"})
    assert answer[:2] == (202, {"status": "accepted", "count": 3})
    eventually(lambda: len(rows(service, "ARRAY")) == 250 and len(rows(service, "LINES")) == 3)


def test_a_timestamp_is_kept_to_the_microsecond(service: Service) -> None:
    stamp = service.query("SELECT to_char(now() AT TIME ZONE 'UTC' - '1 h'::interval, 'YYYY-MM-DD\"T\"HH24:MI:SS.US')")[
        0
    ][0]
    service.post("/telemetry", {**POINT, "satellite_id": "TIMED", "timestamp": stamp + "999+00:00"})
    eventually(lambda: rows(service, "TIMED"))
    query = "SELECT time = (%s || 'Z')::timestamptz FROM telemetry WHERE satellite_id = 'TIMED'"
    assert service.query(query, stamp) == [(True,)]


def test_what_can_be_got_has_a_head(service: Service) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/metrics", "/openapi.json"):
        status, body, headers = service.request("HEAD", path)
        assert (status, body, headers["content-length"] != "0") == (200, b"", True), path
    assert service.request("HEAD", "/telemetry")[0] == 405


def test_a_chunked_body_is_taken(service: Service) -> None:
    body = json.dumps({**POINT, "satellite_id": "CHUNKED"}).encode()
    answer = raw(
        service,
        b"POST /telemetry HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
    )
    assert answer.startswith(b"HTTP/1.1 202")
    eventually(lambda: rows(service, "CHUNKED"))


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("POST", "/telemetry", b"", {}, 400, "malformed-json"),
        ("POST", "/telemetry", b'{"satellite_id":', {}, 400, "malformed-json"),
        ("POST", "/telemetry/batch", b'[{"a":1},]', {}, 400, "malformed-json"),
        ("POST", "/telemetry", b"[]", {}, 422, "invalid-point"),
        ("POST", "/telemetry/batch", b"[]", {}, 422, "invalid-point"),
        ("POST", "/telemetry/batch", b"{}", {}, 422, "invalid-point"),
        ("POST", "/telemetry", json.dumps({**POINT, "battery_charge_percent": 101}), {}, 422, "invalid-point"),
        ("POST", "/telemetry/batch", json.dumps([POINT, {**POINT, "colour": 1}]), {}, 422, "invalid-point"),
        ("POST", "/telemetry/batch", json.dumps([POINT] * 301), {}, 413, "too-many-points"),
        ("POST", "/telemetry/batch", b" " * (64 << 10) + b"[]", {}, 413, "too-large"),
        ("POST", "/telemetry", json.dumps(POINT), {"Content-Type": "text/plain"}, 415, "unsupported-media-type"),
        (
            "POST",
            "/telemetry",
            json.dumps(POINT),
            {"Content-Type": "application/x-ndjson"},
            415,
            "unsupported-media-type",
        ),
        ("POST", "/telemetry", json.dumps(POINT), {"Content-Encoding": "br"}, 415, "unsupported-media-type"),
        ("POST", "/nowhere", json.dumps(POINT), {}, 404, "not-found"),
        ("GET", "/telemetry", None, {}, 405, "method-not-allowed"),
        ("DELETE", "/telemetry/batch", None, {}, 405, "method-not-allowed"),
    ],
)
def test_a_bad_request_is_one_problem_and_stores_nothing(
    service: Service, method: str, path: str, body: Any, headers: dict[str, str], status: int, code: str
) -> None:
    committed = service.get("/health")[1]["committed_points"]
    got, problem, names = service.request(method, path, body, headers)
    assert (got, names["content-type"]) == (status, MEDIA_TYPE)
    assert problem["type"].rpartition(":")[2] == code
    assert problem["status"] == status
    assert problem["instance"] == path
    assert problem["accepted"] == 0
    assert problem["retryable"] is False
    assert problem["detail"] and "\n" not in problem["detail"]
    if status == 405:
        assert "POST" in names["allow"]
    if code == "invalid-point":
        assert problem["errors"][0].keys() == {"pointer", "code", "detail", "retryable"}
    # A point sent afterwards comes through alone: nothing of the refused one lies before it.
    service.post("/telemetry", {**POINT, "satellite_id": "AFTER"})
    eventually(lambda: service.get("/health")[1]["committed_points"] > committed)
    assert service.get("/health")[1]["committed_points"] == committed + 1


def test_a_chunked_body_over_the_limit_is_refused(service: Service) -> None:
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    answer = raw(
        service,
        b"POST /telemetry HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n" + chunk * 4 + b"0\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"too-large" in answer


@pytest.mark.parametrize("chunks", [b"zz\r\n{}\r\n0\r\n\r\n", b"5\r\n{}", b"2\r\n{}XX0\r\n\r\n"])
def test_broken_chunks_are_a_bad_request(service: Service, chunks: bytes) -> None:
    head = (
        b"POST /telemetry HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert raw(service, head + chunks).startswith(b"HTTP/1.1 400")


def test_an_id_outside_ascii_is_stored_as_it_was_sent(service: Service) -> None:
    assert service.post("/telemetry", {**POINT, "satellite_id": "é" * 25})[0] == 202
    assert service.post("/telemetry/batch", [{**POINT, "satellite_id": "спутник"}] * 2)[0] == 202
    eventually(lambda: len(rows(service, "é" * 25)) == 1 and len(rows(service, "спутник")) == 2)


def test_a_body_cut_short_is_refused_and_not_stored(service: Service) -> None:
    body = json.dumps({**POINT, "satellite_id": "SHORT"}).encode()
    head = b"POST /telemetry HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    answer = raw(service, head % (len(body) + 10) + body)
    assert not answer or answer.startswith(b"HTTP/1.1 400")
    assert rows(service, "SHORT") == []


def test_a_record_larger_than_the_lane_takes_is_413(database: str, lane_dir: Path) -> None:
    with Service(database, lane_dir) as service:
        service.start(ORBITSTREAM_LANE_BYTES="64KiB", ORBITSTREAM_WORKERS="1")
        status, problem, _ = service.post("/telemetry/batch", [POINT] * 1000)
        assert (status, problem["type"].rpartition(":")[2]) == (413, "too-large")
        assert service.post("/telemetry/batch", [POINT] * 100)[0] == 202


def test_health_tells_what_it_sees(service: Service) -> None:
    assert service.get("/health/live")[:2] == (200, {"status": "live"})
    assert service.get("/health/ready")[:2] == (200, {"status": "ready"})
    status, report, _ = service.get("/health")
    assert (status, report["status"], report["database"]) == (200, "healthy", "connected")
    assert report["writers"] == {"alive": 1, "expected": 1}
    assert report["queue"]["capacity_bytes"] == 2 * 16 << 20
    assert report["edition"] in ("plain", "apache", "timescale")
    printed = service.run("status")
    assert printed.returncode == 0
    assert printed.stdout.startswith("healthy: database connected")
    assert json.loads(service.run("status", "--json").stdout)["lanes"][0]["name"] == "lane-0000.ring"


def test_the_ledger_says_which_node_and_how_many(service: Service) -> None:
    service.post("/telemetry", {**POINT, "satellite_id": "LEDGER"})
    eventually(lambda: rows(service, "LEDGER"))
    ledger = service.query(
        "SELECT sum(committed_points), min(node), bool_and(position > 0) FROM ingest_progress WHERE position > 0"
    )
    assert ledger == [(service.count(), "here", True)]
