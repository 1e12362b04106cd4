"""Bytes to requests: whatever pieces they come in, and although the buffer they come in is used again at once."""

from __future__ import annotations

import random

import pytest

from engine.body import Lent
from engine.http_connection import LEND_BYTES, Connection, Room
from engine.http_head import Heads

HEAD = b"POST /telemetry/batch HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST /telemetry/batch HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"


def body(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def request(length: int) -> bytes:
    return HEAD % length + body(length)


class Reader:
    """A connection fed as the event loop does: from one buffer, of which nothing is left once it was given back."""

    def __init__(self) -> None:
        self.connection = Connection(Heads(), {"REMOTE_ADDR": "127.0.0.1"}, Room(1 << 20))
        self._buffer = bytearray(1 << 18)
        self.lent = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the bodies of the requests that are whole with `data`."""
        self._buffer[: len(data)] = data
        self.connection.feed(memoryview(self._buffer)[: len(data)])
        bodies = []
        while (found := self.connection.next_request()) is not None:
            stream = found[0]["wsgi.input"]
            self.lent += type(stream) is Lent
            bodies.append(bytes(stream.view) if type(stream) is Lent else stream.read())
        self.connection.give_back()
        self._buffer[: len(data)] = bytes(len(data))
        return bodies


def test_requests_are_the_same_whatever_pieces_they_come_in() -> None:
    lengths = [LEND_BYTES, 0, 20_000, LEND_BYTES - 1, 20_000, 20_000]
    stream = b"".join(map(request, lengths)) + CHUNKED % (5_000, body(5_000)) + request(20_000)
    expected = [*map(body, lengths), body(5_000), body(20_000)]
    dice = random.Random(1)
    for _ in range(300):
        reader, found, rest = Reader(), [], stream
        while rest:
            size = dice.choice([1, 7, len(HEAD), LEND_BYTES, 20_000, len(request(20_000)), len(stream)])
            found += reader.feed(rest[:size])
            rest = rest[size:]
        assert found == expected


def test_a_batch_that_comes_alone_under_a_head_seen_before_is_not_copied() -> None:
    reader = Reader()
    for _ in range(3):
        assert reader.feed(request(20_000)) == [body(20_000)]
    assert reader.lent == 2
    assert reader.feed(request(20_000) * 2) == [body(20_000)] * 2
    assert reader.feed(request(LEND_BYTES - 1)) == reader.feed(request(LEND_BYTES - 1)) == [body(LEND_BYTES - 1)]
    assert reader.lent == 2


def test_what_was_lent_and_not_asked_for_is_kept() -> None:
    reader = Reader()
    reader.feed(request(20_000))
    buffer = bytearray(request(20_000))
    reader.connection.feed(memoryview(buffer))
    reader.connection.give_back()
    buffer[:] = bytes(len(buffer))
    assert reader.feed(b"") == [body(20_000)]


@pytest.mark.parametrize("sizes", [[-1], [3, 3, -1], [100, 100], [0, -1]])
def test_a_lent_body_reads_like_a_file(sizes: list[int]) -> None:
    lent = Lent(memoryview(b"0123456789"))
    assert b"".join(lent.read(size) for size in sizes) == b"0123456789"
    assert lent.read() == lent.read(5) == b""
