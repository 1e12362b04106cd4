"""The event loop over real sockets and a real lane, in this process, so that a test can stand at its fdatasync."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from engine import event_loop, lanes, rows, settings
from engine.app import Lane, build
from engine.event_loop import Bounds, Loop
from engine.http_connection import BODIES_AT_ONCE
from engine.ring import TAIL
from tests.service import POINT, eventually

BODY = json.dumps(POINT).encode()
BOUNDS = Bounds(max_body=1 << 20, max_connections=50, max_requests=1 << 40, keepalive=5.0, graceful=2.0)


def request(method: str = "POST", path: str = "/telemetry", body: bytes = BODY, headers: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


LIVE = request("GET", "/health/live", b"")


class Served:
    """A Loop in a thread, its lane, and clients."""

    def __init__(self, folder: Path, *, durable: bool, bounds: Bounds = BOUNDS) -> None:
        config = settings.load(
            {"ORBITSTREAM_LANE_DIR": str(folder), "ORBITSTREAM_DURABILITY": "disk" if durable else "process"}
        )
        self.app_lane = Lane(partial(lanes.claim_producer, folder, 1 << 20, rows.layout(), durable=durable))
        self.lane = self.app_lane._producer.lane
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.listener.setblocking(False)
        self.going = True
        self.clients: list[socket.socket] = []
        self.loop = Loop(build(config, self.app_lane), [self.listener], bounds)
        self.thread = threading.Thread(target=self.loop.run, args=(lambda: self.going,))
        self.thread.start()

    def connect(self) -> socket.socket:
        client = socket.create_connection(self.listener.getsockname(), timeout=5)
        self.clients.append(client)
        return client

    def stop(self) -> None:
        self.going = False
        for client in self.clients:
            client.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.listener.close()
        self.app_lane._lock.release()


@pytest.fixture
def served(lane_dir: Path) -> Iterator[Served]:
    it = Served(lane_dir, durable=False)
    yield it
    it.stop()


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Served]:
    it = Served(tmp_path, durable=True)
    yield it
    it.stop()


def statuses(client: socket.socket, count: int) -> list[int]:
    """Read until `count` answers are there; returns their statuses, and 0 for each that the end came before."""
    got = b""
    while got.count(b"HTTP/1.1 ") < count or not got.endswith((b"\r\n", b"}")):
        piece = client.recv(65536)
        if not piece:
            break
        got += piece
    found = [int(part[:3]) for part in got.split(b"HTTP/1.1 ")[1:]]
    return found + [0] * (count - len(found))


class Disk:
    """Stands in for os.fdatasync: the first call waits until it is let through; each is counted, and then done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.fail = 0, False
        self.entered, self.proceed = threading.Event(), threading.Event()
        self.sync: Callable[[int], None] = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        self.calls += 1
        self.entered.set()
        assert self.proceed.wait(10)
        if self.fail:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.sync(fd)


def readable(clients: list[socket.socket]) -> list[socket.socket]:
    return select.select(clients, [], [], 0)[0]


def test_one_sync_answers_for_all_that_came_while_another_was_under_way(
    durable: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    first, reader, *others = [durable.connect() for _ in range(18)]
    first.sendall(request())
    assert disk.entered.wait(5)
    for client in others:
        client.sendall(request() * 3)
    eventually(lambda: durable.lane.published.points == 49, what="requests taken while the disk is at work")
    first.sendall(request())
    reader.sendall(LIVE)
    assert statuses(reader, 1) == [200]
    assert readable([first, *others]) == []
    assert durable.lane.synced < durable.lane.head
    assert durable.lane.published.points == 49, "what is sent behind a held answer waits"
    disk.proceed.set()
    assert statuses(first, 2) == [202, 202]
    assert [statuses(client, 3) for client in others] == [[202] * 3] * 16
    assert disk.calls in (2, 3)
    assert durable.lane.synced == durable.lane.head
    assert durable.lane.answered_points == durable.lane.published.points == 50


def test_more_requests_than_a_turn_takes_are_all_answered_behind_their_syncs(durable: Served) -> None:
    client = durable.connect()
    count = 3 * event_loop.REQUESTS_A_TURN
    client.sendall((LIVE + request()) * (count // 2))
    client.shutdown(socket.SHUT_WR)
    assert statuses(client, count) == [200, 202] * (count // 2)
    assert client.recv(1) == b""
    assert durable.lane.answered_points == count // 2


def test_after_a_failed_sync_what_it_was_for_is_unknown_and_the_lane_stopped(
    durable: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    first, mixed, late = [durable.connect() for _ in range(3)]
    first.sendall(request() + LIVE)
    assert disk.entered.wait(5)
    mixed.sendall(LIVE + request() + LIVE)
    eventually(lambda: durable.lane.published.points == 2)
    disk.fail = True
    disk.proceed.set()
    assert statuses(first, 2) == [500, 0]
    assert statuses(mixed, 3) == [200, 500, 0]
    late.sendall(request() + LIVE)
    assert statuses(late, 2) == [503, 200]
    assert (disk.calls, durable.lane.published.points, durable.lane.answered_points) == (1, 2, 0)
    assert durable.lane.synced == 0


def test_wait_is_answered_when_the_tail_passes(served: Served) -> None:
    waiting, other = served.connect(), served.connect()
    waiting.sendall(request(headers="Prefer: wait=30\r\n") + request())
    eventually(lambda: served.lane.published.points == 1)
    other.sendall(request())
    assert statuses(other, 1) == [202]
    assert readable([waiting]) == []
    assert served.lane.answered_points == 1
    assert served.lane.published.points == 2, "what is pipelined behind a parked request waits"
    served.lane.words[TAIL] = served.lane.head
    assert statuses(waiting, 2) == [200, 202]
    assert served.lane.answered_points == 3


def test_wait_ends_with_202_when_its_time_is_over_or_the_lane_is_closed(served: Served) -> None:
    client = served.connect()
    client.sendall(request(headers="Prefer: wait=1\r\n"))
    assert statuses(client, 1) == [202]
    client.sendall(request(headers="Prefer: wait=30\r\n"))
    eventually(lambda: served.lane.published.points == 2)
    served.app_lane._producer.close()
    assert statuses(client, 1) == [202]


def test_a_stop_answers_who_waits_and_what_is_under_way(served: Served) -> None:
    waiting, idle, under_way = (served.connect() for _ in range(3))
    waiting.sendall(request(headers="Prefer: wait=30\r\n"))
    idle.sendall(LIVE)
    assert statuses(idle, 1) == [200]
    under_way.sendall(request()[:-10])
    eventually(lambda: served.lane.published.points == 1 and len(served.loop._clients) == 3)
    served.going = False
    eventually(lambda: served.loop.stopping)
    under_way.sendall(request()[-10:])
    answer = under_way.recv(65536)
    assert answer.startswith(b"HTTP/1.1 202")
    assert b"Connection: close" in answer
    assert statuses(waiting, 1) == [202]
    assert idle.recv(1) == b""
    served.thread.join(5)
    assert not served.thread.is_alive()


def test_overdue_clients_are_told_or_dropped(lane_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "HEAD_S", 0.3)
    monkeypatch.setattr(event_loop, "BODY_S", 0.3)
    bounds = Bounds(max_body=1 << 20, max_connections=50, max_requests=1 << 40, keepalive=0.3, graceful=1.0)
    served = Served(lane_dir, durable=False, bounds=bounds)
    try:
        silent, head, body, kept = (served.connect() for _ in range(4))
        head.sendall(b"POST /telemetry HTTP/1.1\r\nHo")
        body.sendall(request()[:-1])
        kept.sendall(LIVE)
        assert statuses(kept, 1) == [200]
        assert statuses(head, 2) == [408, 0]
        assert statuses(body, 2) == [408, 0]
        assert kept.recv(1) == b""
        assert silent.recv(1) == b""
        assert served.lane.published.points == 0
    finally:
        served.stop()


def test_a_client_that_takes_no_answers_is_not_read_from(served: Served) -> None:
    """It sends requests until both kernels' buffers are full; the loop keeps one turn's answers and serves others."""
    served.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # connections inherit it
    deaf = served.connect()
    deaf.setblocking(False)
    sent, batch = 0, LIVE * 100

    def blocked() -> list[event_loop.Client]:
        nonlocal sent
        with suppress(BlockingIOError):
            sent += deaf.send(batch[sent % len(batch) :])
        return [each for each in served.loop._clients.values() if each.unsent]

    (client,) = eventually(blocked, 20)
    assert len(client.unsent) < 16 * 1024
    other = served.connect()
    other.sendall(request())
    assert statuses(other, 1) == [202]
    deaf.settimeout(5)
    whole = sent // len(LIVE)
    got = 0
    while got < whole:
        got += deaf.recv(1 << 20).count(b"HTTP/1.1 200")


def test_bodies_under_way_are_bounded_in_all(lane_dir: Path) -> None:
    bounds = Bounds(max_body=1 << 16, max_connections=50, max_requests=1 << 40, keepalive=5.0, graceful=1.0)
    served = Served(lane_dir, durable=False, bounds=bounds)
    try:
        room = served.loop._room.left
        large, padded = request(body=b" " * (1 << 16)), request(body=BODY + b" " * 1000)
        holders = [served.connect() for _ in range(BODIES_AT_ONCE)]
        for client in holders:
            client.sendall(large[:-1])
        eventually(lambda: served.loop._room.left == BODIES_AT_ONCE)
        late = served.connect()
        late.sendall(padded[:-1])
        answer = late.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1\r\n" in answer
        assert b"urn:orbitstream:problem:overloaded" in answer
        whole = served.connect()
        whole.sendall(request())
        assert statuses(whole, 1) == [202]
        holders[0].close()
        eventually(lambda: served.loop._room.left > 1 << 15)
        again = served.connect()
        again.sendall(padded[:-1])
        eventually(lambda: served.loop._room.left < 1 << 16)
        again.sendall(padded[-1:])
        assert statuses(again, 1) == [202]
        for client in holders[1:]:
            client.sendall(large[-1:])
            assert statuses(client, 1) == [400]
        assert served.loop._room.left == room
    finally:
        served.stop()


def test_connections_are_bounded_and_others_wait_their_turn(lane_dir: Path) -> None:
    bounds = Bounds(max_body=1 << 20, max_connections=3, max_requests=1 << 40, keepalive=5.0, graceful=1.0)
    served = Served(lane_dir, durable=False, bounds=bounds)
    try:
        clients = [served.connect() for _ in range(5)]
        for client in clients:
            client.sendall(request())
        assert [statuses(client, 1) for client in clients[:3]] == [[202]] * 3
        assert readable(clients[3:]) == []
        assert len(served.loop._clients) == 3
        for client in clients[:2]:
            client.close()
        assert [statuses(client, 1) for client in clients[3:]] == [[202]] * 2
    finally:
        served.stop()


def test_after_max_requests_the_loop_ends_by_itself(lane_dir: Path) -> None:
    bounds = Bounds(max_body=1 << 20, max_connections=50, max_requests=5, keepalive=5.0, graceful=1.0)
    served = Served(lane_dir, durable=False, bounds=bounds)
    client = served.connect()
    for _ in range(4):
        client.sendall(request())
        assert statuses(client, 1) == [202]
    client.sendall(request())
    answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 202")
    assert b"Connection: close" in answer
    assert client.recv(1) == b""
    served.thread.join(5)
    assert served.lane.published.points == 5
    served.stop()
