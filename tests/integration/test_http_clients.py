"""The clients people have, over both worker classes with lanes on a disk: each stores what it sends, and once."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import psycopg
import pytest
import requests

from tests.service import POINT, Service, eventually, folder_on_disk

BATCH = "/telemetry/batch"


@pytest.fixture(scope="module", params=["eventloop", "gthread"])
def service(server: str, request: pytest.FixtureRequest) -> Iterator[Service]:
    """One service of each worker class; every test knows its rows by a satellite id of its own."""
    name = f"test_clients_{request.param}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
        connection.execute(f"CREATE DATABASE {name}".encode())
    url = psycopg.conninfo.make_conninfo(server, dbname=name)
    with folder_on_disk() as folder, Service(url, folder) as running:
        environment = {"ORBITSTREAM_WORKER_CLASS": request.param, "ORBITSTREAM_DURABILITY": "disk"}
        running.start(ORBITSTREAM_WORKERS="1", **environment)
        yield running
        assert running.stop() == 0


def named(name: str, **changes: Any) -> dict[str, Any]:
    return {**POINT, "satellite_id": name, **changes}


def stored(service: Service, name: str, count: int) -> None:
    """Wait until a satellite has so many rows."""
    query = "SELECT count(*) FROM telemetry WHERE satellite_id = %s"
    eventually(lambda: service.query(query, name) == [(count,)], what=f"{count} rows of {name}")


def test_curl(service: Service) -> None:
    sent = gzip.compress(json.dumps([named("curl")] * 2).encode())
    ran = subprocess.run(
        ["curl", "-sS", "--fail-with-body", "-H", "Content-Type: application/json", "-H", "Content-Encoding: gzip",
         "-H", "Transfer-Encoding: chunked", "--data-binary", "@-", f"http://127.0.0.1:{service.port}{BATCH}"],
        input=sent, capture_output=True, timeout=20,
    )  # fmt: skip
    assert json.loads(ran.stdout) == {"status": "accepted", "count": 2}
    stored(service, "curl", 2)


def test_go(service: Service) -> None:
    """What net/http sends for a body of unknown length, with time.Time as encoding/json writes it."""
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "789Z"
    body = json.dumps([named("go", timestamp=time), named("go", timestamp="0001-01-01T00:00:00Z")]).encode()
    request = (
        b"POST /telemetry/batch HTTP/1.1\r\nHost: x\r\nUser-Agent: Go-http-client/1.1\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n"
        + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]))
        + b"0\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(request)
        assert connection.recv(4096).startswith(b"HTTP/1.1 202")
    stored(service, "go", 2)


def test_requests(service: Service) -> None:
    """A session: JSON, a generator (chunked), a compressed body, and an error that it parses."""
    url = f"http://127.0.0.1:{service.port}"
    lines = (json.dumps(named("requests")).encode() + b"\n" for _ in range(3))
    with requests.Session() as session:
        answers = [
            session.post(f"{url}/telemetry", json=named("requests"), timeout=10),
            session.post(url + BATCH, data=lines, headers={"Content-Type": "application/x-ndjson"}, timeout=10),
            session.post(
                url + BATCH,
                data=gzip.compress(json.dumps([named("requests")] * 4).encode()),
                headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
                timeout=10,
            ),
        ]
        refused = session.post(url + BATCH, json=[named("requests", latitude=91)], timeout=10)
    assert [(answer.status_code, answer.headers["OrbitStream-Durability"]) for answer in answers] == [(202, "disk")] * 3
    assert [answer.json().get("count") for answer in answers] == [None, 3, 4]
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/0/latitude")
    stored(service, "requests", 8)


def test_aiohttp(service: Service) -> None:
    """Forty posts at once on eight connections, and a body from an async generator that waits for 100 Continue."""

    async def parts() -> AsyncIterator[bytes]:
        for part in json.dumps([named("aiohttp")] * 5).partition(","):
            yield part.encode()

    async def converse() -> list[tuple[int, int | None]]:
        connector = aiohttp.TCPConnector(limit=8)
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{service.port}", connector=connector, timeout=timeout
        ) as session:

            async def post(path: str, **body: Any) -> tuple[int, int | None]:
                async with session.post(path, **body) as answer:
                    return answer.status, (await answer.json()).get("count")

            singles = [post("/telemetry", json=named("aiohttp")) for _ in range(40)]
            batch = post(BATCH, data=parts(), headers={"Content-Type": "application/json"}, expect100=True)
            return list(await asyncio.gather(*singles, batch))

    assert asyncio.run(converse()) == [(202, None)] * 40 + [(202, 5)]
    stored(service, "aiohttp", 45)


def test_pipelining(service: Service) -> None:
    """As wrk's pipeline.lua: sixteen requests in one send, again once all are answered; more than a turn takes, too."""
    body = json.dumps(named("pipeline")).encode()
    head = b"POST /telemetry HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for count in (16, 16, 50):
            connection.sendall((head % len(body) + body) * count)
            got = b""
            while got.count(b'{"status":"accepted","satellite_id":"pipeline"}') < count:
                piece = connection.recv(1 << 16)
                assert piece, got[-500:]
                got += piece
            assert got.count(b"HTTP/1.1 202 Accepted\r\n") == count
    stored(service, "pipeline", 82)
