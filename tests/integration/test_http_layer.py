"""HTTP itself, over raw sockets, with both worker classes: what is refused is refused in words, and stores nothing."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from engine import lanes
from engine.problems import MEDIA_TYPE
from tests.service import POINT, Service, eventually

BODY = json.dumps(POINT).encode()
JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module", params=["eventloop", "gthread"])
def service(server: str, request: pytest.FixtureRequest) -> Iterator[Service]:
    """One service for the tests of each worker class."""
    name = f"test_layer_{request.param}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
        connection.execute(f"CREATE DATABASE {name}".encode())
    url = psycopg.conninfo.make_conninfo(server, dbname=name)
    with tempfile.TemporaryDirectory(prefix="os-lanes-", dir="/dev/shm") as folder, Service(url, Path(folder)) as it:
        environment = {"ORBITSTREAM_WORKER_CLASS": request.param, "ORBITSTREAM_MAX_BODY_BYTES": "64KiB"}
        yield it.start(ORBITSTREAM_WORKERS="1", **environment)
        assert it.stop() == 0
        assert "Traceback" not in it.output()


class Wire:
    """One connection; answers are parsed by Content-Length, as a client would."""

    def __init__(self, service: Service) -> None:
        self.socket = socket.create_connection(("127.0.0.1", service.port), timeout=15)
        self.got = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _until(self, enough: Any) -> None:
        while not enough():
            piece = self.socket.recv(65536)
            assert piece, f"closed after {self.got!r}"
            self.got += piece

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        self._until(lambda: b"\r\n\r\n" in self.got)
        head, _, rest = self.got.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        names = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        length = int(names.get("content-length", 0))
        self.got = rest
        self._until(lambda: len(self.got) >= length)
        body, self.got = self.got[:length], self.got[length:]
        return int(lines[0].split()[1]), names, body

    def closed(self) -> bool:
        """Wait for the end of the connection; tell whether nothing came before it."""
        rest = self.got
        while piece := self.socket.recv(65536):
            rest += piece
        return rest == b""


def post(
    body: bytes = BODY, headers: bytes = b"", path: bytes = b"/telemetry", *, length: bool = True, host: bytes = b"x"
) -> bytes:
    counted = b"Content-Length: %d\r\n" % len(body) if length else b""
    return b"POST %b HTTP/1.1\r\nHost: %b\r\n%b%b%b\r\n%b" % (path, host, JSON, headers, counted, body)


def published(service: Service) -> int:
    """Return the points that ever got into a lane, from the lanes' own words."""
    points = 0
    for lane in lanes.open_lanes(service.lane_dir):
        points += lane.published.points
        lane.close()
    return points


CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = b"POST /telemetry HTTP/1.1\r\nHost: x\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def chunked(body: bytes = BODY) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


REFUSED = {
    "length and chunked": (post(chunked(), CHUNKED), 400),
    "chunked and length": (post(chunked(), CHUNKED + b"Content-Length: 4\r\n", length=False), 400),
    "length twice": (post(headers=b"Content-Length: %d\r\n" % len(BODY)), 400),
    "two lengths": (post(headers=b"Content-Length: 1\r\n"), 400),
    "list of lengths": (post(headers=b"Content-Length: 5, 5\r\n", length=False), 400),
    "signed length": (post(headers=b"Content-Length: +5\r\n", length=False), 400),
    "hexadecimal length": (post(headers=b"Content-Length: 0x5\r\n", length=False), 400),
    "length with a space": (post(headers=b"Content-Length: 1 2\r\n", length=False), 400),
    "empty length": (post(headers=b"Content-Length: \r\n", length=False), 400),
    "unknown coding": (post(chunked(), b"Transfer-Encoding: xchunked\r\n", length=False), 501),
    "coding with a tab": (post(chunked(), b"Transfer-Encoding:\x0bchunked\r\n", length=False), 400),
    "folded header": (post(headers=b"X-A: 1\r\n 2\r\n"), 400),
    "folded coding": (post(chunked(), b"Transfer-Encoding:\r\n chunked\r\n", length=False), 400),
    "long request line": (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "101 headers": (b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
    "large header": (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 8200 + b"\r\n\r\n", 431),
    "two hosts": (post(headers=b"Host: y\r\n"), 400),
    "space before the colon": (post(headers=b"X-A : 1\r\n"), 400),
    "space before the colon of a coding": (post(chunked(), b"Transfer-Encoding : chunked\r\n", length=False), 400),
    "bad name": (post(headers=b"X(A): 1\r\n"), 400),
    "no name": (post(headers=b": 1\r\n"), 400),
    "no colon": (post(headers=b"X-A\r\n"), 400),
    "NUL": (post(headers=b"X-A: 1\x002\r\n"), 400),
    "CR": (post(headers=b"X-A: 1\r2\r\n"), 400),
    "LF": (post(headers=b"X-A: 1\nContent-Length: 4\r\n"), 400),
    "no version": (b"POST /telemetry\r\n\r\n", 400),
    "lower-case version": (b"GET /health/live http/1.1\r\nHost: x\r\n\r\n", 400),
    "two spaces": (b"GET  /health/live HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "unknown expectation": (post(headers=b"Expect: magic\r\n"), 417),
    "TLS": (bytes.fromhex("16030100c8010000c40303") + b"\r\n\r\n", 400),
}
CHUNKS = {
    "size with 0x": b"0x5\r\n",
    "signed size": b"+5\r\n",
    "size with an underscore": b"1_0\r\n",
    "size with a space": b" 5\r\n",
    "size past 64 bits": b"10000000000000005\r\n",
    "no size": b"\r\n",
    "line feed alone": b"5\n",
    "longer than its size": b"2\r\n" + BODY + b"\r\n",
    "shorter than its size": b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY) + 2, BODY),
}
LOOP_ONLY = {  # gunicorn's own parser lets these pass, or answers them otherwise
    "no host": (b"GET /health/live HTTP/1.1\r\n\r\n", 400),
    "host with a path": (post(host=b"x/y"), 400),
    "HTTP/1.0 and chunked": (post(chunked(), CHUNKED, length=False).replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    "line feeds alone": (b"GET /health/live HTTP/1.1\nHost: x\n\n", 400),
    "size with an extension that ends in a line feed": (
        post(b"5;a\n\r\n{}\r\n0\r\n\r\n", CHUNKED, length=False),
        400,
    ),
    "a body cut short": (post(headers=b"Content-Length: 999\r\n", length=False), 400),
    "key twice": (post(headers=b"Idempotency-Key: a\r\nIdempotency-Key: b\r\n"), 400),
}


def refuse(service: Service, data: bytes, status: int) -> dict[str, Any]:
    """Send and expect a problem, the end of the connection, and no point stored, smuggled ones neither."""
    before = published(service)
    with Wire(service) as wire:
        wire.send(data)
        wire.socket.shutdown(socket.SHUT_WR)
        got, names, body = wire.answer()
        assert (got, names["content-type"]) == (status, MEDIA_TYPE), body
        assert wire.closed()
    problem: dict[str, Any] = json.loads(body)
    assert (problem["status"], problem["accepted"]) == (status, 0)
    assert problem["detail"] and "\n" not in problem["detail"]
    assert published(service) == before
    return problem


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_request_is_refused_in_words(service: Service, case: str) -> None:
    data, status = REFUSED[case]
    refuse(service, data + SMUGGLED, status)


@pytest.mark.parametrize("case", CHUNKS)
def test_a_trick_with_chunks_is_refused(service: Service, case: str) -> None:
    data = post(CHUNKS[case], CHUNKED, length=False)
    refuse(service, data + SMUGGLED, 400)


@pytest.mark.parametrize("case", LOOP_ONLY)
def test_the_event_loop_refuses_more(service: Service, case: str) -> None:
    """gthread has gunicorn's parser, which takes these or closes without a word; neither stores what was smuggled."""
    data, status = LOOP_ONLY[case]
    if service_class(service) == "eventloop":
        refuse(service, data, status)
    else:
        before = published(service)
        with Wire(service) as wire:
            wire.send(data)
            wire.socket.shutdown(socket.SHUT_WR)
            wire.closed()
        assert published(service) <= before + 1


def service_class(service: Service) -> str:
    return "gthread" if "gthread" in service.database else "eventloop"


# -- what is taken


def test_a_connection_is_kept_and_pipelined_requests_are_answered_in_order(service: Service) -> None:
    before = published(service)
    with Wire(service) as wire:
        for round_number in range(2):
            names = [f"P{round_number}-{index}" for index in range(40)]
            wire.send(b"".join(post(json.dumps({**POINT, "satellite_id": name}).encode()) for name in names))
            answers = [wire.answer() for _ in names]
            assert [json.loads(body)["satellite_id"] for _, _, body in answers] == names
            assert {status for status, _, _ in answers} == {202}
    assert published(service) == before + 80


def test_a_bad_request_among_pipelined_ones_ends_the_connection_behind_the_good_ones(service: Service) -> None:
    before = published(service)
    with Wire(service) as wire:
        wire.send(post() + post() + b"nonsense\r\n\r\n" + SMUGGLED)
        assert [wire.answer()[0] for _ in range(3)] == [202, 202, 400]
        assert wire.closed()
    assert published(service) == before + 2


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_bytes_may_come_in_any_pieces(service: Service, size: int) -> None:
    before = published(service)
    request = post() + post(b"5;name=value\r\n" + BODY[:5] + b"\r\n" + chunked(BODY[5:]), CHUNKED, length=False)
    with Wire(service) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(request), size):
            wire.send(request[start : start + size])
        assert [wire.answer()[0] for _ in range(2)] == [202, 202]
    assert published(service) == before + 2


def test_a_trailer_is_let_pass_and_sets_nothing(service: Service) -> None:
    with Wire(service) as wire:
        body = b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\nPrefer: wait=5\r\n\r\n" % (len(BODY), BODY)
        wire.send(post(body, CHUNKED, length=False) + post())
        assert [wire.answer()[0] for _ in range(2)] == [202, 202]


def test_a_half_closed_connection_is_answered(service: Service) -> None:
    with Wire(service) as wire:
        wire.send(post() * 3)
        wire.socket.shutdown(socket.SHUT_WR)
        assert [wire.answer()[0] for _ in range(3)] == [202] * 3
        assert wire.closed()


def test_the_body_is_asked_for_before_it_is_sent(service: Service) -> None:
    head, _, _ = post(headers=b"Expect: 100-Continue\r\n").partition(b"{")
    with Wire(service) as wire:
        wire.send(head)
        assert wire.answer()[0] == 100
        wire.send(BODY)
        assert wire.answer()[0] == 202
        wire.send(post())
        assert wire.answer()[0] == 202


def test_a_body_over_the_limit_is_refused_while_it_is_read(service: Service) -> None:
    """The event loop does not wait for the rest, nor does it invite it; gthread hands it to the application to read."""
    large = 70_000
    with Wire(service) as wire:
        wire.send(post(b"", b"Content-Length: %d\r\nExpect: 100-continue\r\n" % large, length=False))
        status, _, _ = wire.answer()
        assert status == (413 if service_class(service) == "eventloop" else 100)
    with Wire(service) as wire:
        wire.send(post(b"8000\r\n" + b" " * 0x8000 + b"\r\n" + b"8001\r\n" + b" " * 0x8001, CHUNKED, length=False))
        status, _, body = wire.answer()
        assert (status, json.loads(body)["type"].rpartition(":")[2]) == (413, "too-large")
        assert json.loads(body)["instance"] == "/telemetry"


@pytest.mark.parametrize(
    ("request_bytes", "status", "connection"),
    [
        (b"GET /health/live HTTP/1.0\r\n\r\n", 200, "close"),
        (b"GET /health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200, "keep-alive"),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200, "close"),
        (b"GET http://x/health/live?a=b HTTP/1.1\r\nHost: x\r\n\r\n", 200, None),
        (b"\r\n\r\nGET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", 200, None),
        (b"GET /health/liv%65 HTTP/1.1\r\nhost:x\r\nX-Token:\t a \r\n\r\n", 200, None),
    ],
    ids=["1.0", "1.0 kept", "close", "absolute", "empty lines", "escapes"],
)
def test_forms_of_a_request(service: Service, request_bytes: bytes, status: int, connection: str | None) -> None:
    if request_bytes.startswith(b"\r\n") and service_class(service) == "gthread":
        status = 400  # gunicorn's parser takes no empty lines before a request
    with Wire(service) as wire:
        wire.send(request_bytes)
        got, names, _ = wire.answer()
        assert got == status
        if connection is not None:
            assert names["connection"].lower() == connection
        if connection == "close":
            assert wire.closed()


def test_a_header_with_an_underscore_stands_for_no_other(service: Service) -> None:
    """Idempotency_Key becomes the same name in a WSGI environ: it must neither be taken nor joined."""
    bad_key = "x" * 500
    with Wire(service) as wire:
        wire.send(post(headers=f"Idempotency_Key: {bad_key}\r\n".encode()))
        assert wire.answer()[0] == 202
        wire.send(post(headers=f"Idempotency-Key: {bad_key}\r\n".encode()))
        assert wire.answer()[0] == 400


# -- Prefer: wait


def test_wait_answers_200_once_the_points_are_rows(service: Service) -> None:
    point = {**POINT, "satellite_id": "WAIT"}
    rows = "SELECT count(*) FROM telemetry WHERE satellite_id = 'WAIT'"
    with Wire(service) as wire:
        wire.send(post(json.dumps(point).encode(), b"Prefer: handling=strict, wait=20\r\n"))
        status, names, body = wire.answer()
        assert (status, names["preference-applied"]) == (200, "wait=20")
        assert json.loads(body) == {"status": "committed", "count": 1, "satellite_id": "WAIT"}
        assert service.query(rows) == [(1,)]
        batch = json.dumps([point] * 3).encode()
        wire.send(post(batch, b"Prefer: wait=20\r\n", path=b"/telemetry/batch") + post())
        assert json.loads(wire.answer()[2]) == {"status": "committed", "count": 3}
        assert service.query(rows) == [(4,)]
        assert wire.answer()[0] == 202


def test_wait_holds_its_own_connection_only_and_ends_with_202(service: Service) -> None:
    """A row lock on the ledger keeps the points from being settled."""
    with psycopg.connect(service.database) as blocker:
        blocker.execute("SELECT * FROM ingest_progress FOR UPDATE")
        with Wire(service) as waiting, Wire(service) as other:
            begun = time.monotonic()
            waiting.send(post(headers=b"Prefer: wait=1\r\n") + post(b"{}"))
            for _ in range(20):
                other.send(post())
                assert other.answer()[0] == 202
            assert time.monotonic() - begun < 0.9
            status, names, body = waiting.answer()
            assert 0.9 < time.monotonic() - begun < 3
            assert (status, names["preference-applied"]) == (202, "wait=1")
            assert json.loads(body) == {"status": "accepted", "satellite_id": "TEST-01"}
            assert waiting.answer()[0] == 422
    eventually(lambda: service.get("/health")[1]["queue"]["points"] == 0, 20)


# -- slow clients, on the event loop alone: gthread has no deadlines, a proxy before it must have them


def test_slow_clients_cost_a_good_one_nothing_and_are_closed(service: Service) -> None:
    """100 send a head byte by byte, 100 a body; each is told 408 after its deadline."""
    if service_class(service) == "gthread":
        return
    slow = [Wire(service) for _ in range(200)]
    stop = threading.Event()

    def trickle() -> None:
        for index, wire in enumerate(slow):
            wire.send(b"POST /telemetry HT" if index % 2 else post(headers=b"X: y\r\n")[:-60])
        while not stop.wait(0.5):
            for wire in slow:
                with suppress(OSError):  # it was closed
                    wire.send(b"x")

    trickling = threading.Thread(target=trickle)
    try:
        with Wire(service) as good:
            alone = max(latency(good, 0.7) for _ in range(3))
            begun = time.monotonic()
            trickling.start()
            among = min(latency(good, 0.7) for _ in range(3))  # another process may disturb one, slow clients all
            for wire in slow:
                status, _, body = wire.answer()
                assert (status, json.loads(body)["type"].rpartition(":")[2]) == (408, "request-timeout")
            seconds = time.monotonic() - begun
    finally:
        stop.set()
        trickling.join()
        for wire in slow:
            wire.socket.close()
    print(
        f"a good client's p99: {alone * 1e3:.1f} ms alone, {among * 1e3:.1f} ms among 200; told after {seconds:.1f} s"
    )
    assert among <= max(2 * alone, alone + 0.005)
    assert 9 < seconds < 15


def latency(wire: Wire, seconds: float) -> float:
    """Return the 99th percentile of one request after the other."""
    taken = []
    end = time.monotonic() + seconds
    while (begun := time.monotonic()) < end:
        wire.send(post())
        assert wire.answer()[0] == 202
        taken.append(time.monotonic() - begun)
    return sorted(taken)[int(len(taken) * 0.99)]
