"""What a client sends on one connection, cut into requests: heads, bodies of known length, chunks. No I/O."""

from __future__ import annotations

import re
from enum import Enum
from io import BytesIO
from typing import Any, Final

from engine.body import Lent
from engine.http_head import CHUNKED, MAX_HEAD, MAX_REQUEST_LINE, Head, Heads, bad, is_field, named_path
from engine.problems import Problem

MAX_CHUNK_LINE: Final = 256
"""Size and extensions of a chunk; nobody uses extensions, and a chunk of one byte shall not cost a long line."""
MAX_TRAILER: Final = 8190

BODIES_AT_ONCE: Final = 8
"""So many bodies of the largest size may be under way in one worker, of all its connections together: 128 MiB by
default. Nobody is kept out whose request comes in one read, as up to 256 KiB do."""

LEND_BYTES: Final = 4096
"""Shorter bodies are copied: that costs less than to take care of what they lie in."""

_EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t\x20-\x7e\x80-\xff]*)?")


class Phase(Enum):
    """What is being read."""

    IDLE = "between requests"
    HEAD = "a head that began"
    BODY = "a body of known length"
    CHUNK_SIZE = "the size line of a chunk"
    CHUNK = "a chunk"
    CHUNK_END = "the line end behind a chunk"
    TRAILER = "the lines behind the last chunk"


_READING_BODY: Final = frozenset(Phase) - {Phase.IDLE, Phase.HEAD}


class Room:
    """The bytes that bodies under way may still take, of all connections of a worker; `max_body` is for one of them."""

    __slots__ = ("left", "max_body")

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self.left = BODIES_AT_ONCE * max_body


class Connection:
    """Bytes in with `feed`, whole requests out with `next_request`, in order."""

    __slots__ = ("_body", "_data", "_head", "_heads", "_lent", "_missing", "_room", "_searched", "environ", "phase")

    def __init__(self, heads: Heads, environ: dict[str, Any], room: Room) -> None:
        """Make a connection whose bodies take of `room` until they are whole or forgotten; `environ` names its ends."""
        self._heads, self._room = heads, room
        self.environ = environ
        self.phase = Phase.IDLE
        self._data = b""
        self._lent: memoryview | None = None  # what came, in the server's buffer
        self._searched = 0  # bytes of `_data` that hold no end of a head
        self._head: Head | None = None
        self._body = BytesIO()
        self._missing = 0  # bytes of the body, or of the chunk

    @property
    def received(self) -> int:
        """Bytes of the body under way that are there."""
        return self._body.tell()

    @property
    def reads_body(self) -> bool:
        return self.phase in _READING_BODY

    def wants_continue(self) -> bool:
        """Tell, once a request, whether the client waits for `100 Continue` before it sends the body."""
        head = self._head
        if head is None or not head.expects_continue:
            return False
        self._head = head._replace(expects_continue=False)
        return not self.received and not self._data

    @property
    def has_more(self) -> bool:
        """Whether there are bytes that no request took."""
        return bool(self._data)

    @property
    def instance(self) -> str:
        """The path of the request under way, as far as it is known."""
        if self._head is not None:
            path: str = self._head.environ["PATH_INFO"]
            return path.encode("latin-1").decode("utf-8", "replace")
        return named_path(self._data)

    def feed(self, lent: memoryview) -> None:
        """Take bytes that came, in a buffer that is lent until `give_back`; call `next_request` until there is none
        before feeding more."""
        self._lent = lent

    def give_back(self) -> None:
        """Copy what no request took of the bytes that were lent."""
        if self._lent is not None:
            self._data = self._data + self._lent if self._data else bytes(self._lent)
            self._lent = None

    def next_request(self) -> tuple[dict[str, Any], bool] | None:
        """Return (environ, whether the client would keep the connection) of the next whole request, or None.

        The body of a request may lie in the buffer that was lent. Raises Problem for what is no request: answer it, and
        close.
        """
        if self._lent is not None:
            request = self._read_lent(self._lent)
            if request is not None:
                self._lent = None
                return request
            self.give_back()
        if self._head is None:
            found = self._read_head()
            if found is None:
                return None
            head, start = found
            data, end = self._data, start + head.length
            if start <= end <= len(data) and head.length <= self._room.max_body:  # the body is here too
                self._data = data[end:]
                self.phase = Phase.IDLE
                return self._request(head, data[start:end])  # the one copy that is made of it
            self._data = data[start:]
            self._begin_body(head)
        if self.phase is Phase.BODY:
            self._take()
            return None if self._missing else self._finish()
        return self._finish() if self._read_chunks() else None

    def _read_lent(self, lent: memoryview) -> tuple[dict[str, Any], bool] | None:
        """Return the request if it came in one piece, alone, under a head that came before, without a copy of its body.

        So do batches from a client in the neighbourhood. None says nothing about what is there.
        """
        if self._data or self._head is not None or len(lent) < LEND_BYTES:
            return None
        head, end = self._heads.known(bytes(lent[:LEND_BYTES]))
        if head is None or not LEND_BYTES <= head.length == len(lent) - end <= self._room.max_body:
            return None
        environ = head.environ | self.environ
        environ["wsgi.input"] = Lent(lent[end:])
        return environ, head.keep_alive

    def _read_head(self) -> tuple[Head, int] | None:
        """Return the head and where it ends in the data, once it is there."""
        data = self._data
        if data.startswith(b"\r\n"):  # empty lines before a request are to be let pass
            data = self._data = _EMPTY_LINES.sub(b"", data, 1)
        if not data:
            self.phase = Phase.IDLE
            return None
        end = data.find(b"\r\n\r\n", self._searched)
        if 0 <= end <= MAX_HEAD:
            head = self._heads.read(data[: end + 4])
            self._searched = 0
            return head, end + 4
        self.phase = Phase.HEAD
        self._searched = max(0, len(data) - 3)
        if b"\n\n" in data or data.startswith(b"\n"):
            raise bad("the lines of a head end with CR LF, not with LF alone")
        if len(data) > MAX_REQUEST_LINE + 2 and b"\r\n" not in data[: MAX_REQUEST_LINE + 2]:
            raise bad(f"the request line is over {MAX_REQUEST_LINE} bytes: shorten the path")
        if len(data) > MAX_HEAD:
            raise Problem("headers-too-large", f"the headers are over {MAX_HEAD} bytes in all")
        return None

    def _begin_body(self, head: Head) -> None:
        self._head = head
        self._body = BytesIO()
        if head.length == CHUNKED:
            self.phase = Phase.CHUNK_SIZE
            return
        self.phase, self._missing = Phase.BODY, head.length
        self._bound(head.length)

    def _bound(self, length: int) -> None:
        if length > self._room.max_body:
            raise Problem("too-large", f"the body is over {self._room.max_body} bytes: send fewer points a request")

    def _take(self) -> None:
        """Move what is there of the body, or of the chunk, from the data to the body."""
        piece = self._data[: self._missing]
        self._keep(piece)
        self._data = self._data[len(piece) :]

    def _keep(self, piece: bytes) -> None:
        """Add to the body, or to the chunk of it, what came of it."""
        if len(piece) > self._room.left:
            raise Problem(
                "overloaded", "too many large bodies arrive at once: send them again", headers={"Retry-After": "1"}
            )
        self._room.left -= len(piece)
        self._body.write(piece)
        self._missing -= len(piece)

    def forget(self) -> None:
        """Drop the body under way, which will not be asked for."""
        self._room.left += self.received
        self._body = BytesIO()

    def _finish(self) -> tuple[dict[str, Any], bool]:
        head, body = self._head, self._body.getvalue()
        assert head is not None
        self._head = None
        self.forget()
        self.phase = Phase.IDLE
        request = self._request(head, body)
        if head.length == CHUNKED:  # to the application it is a body like any other
            request[0]["CONTENT_LENGTH"] = str(len(body))
            del request[0]["HTTP_TRANSFER_ENCODING"]
        return request

    def _request(self, head: Head, body: bytes) -> tuple[dict[str, Any], bool]:
        environ = head.environ.copy()
        environ.update(self.environ)
        environ["wsgi.input"] = BytesIO(body)
        return environ, head.keep_alive

    def _read_chunks(self) -> bool:
        """Take chunks from the data as far as they are there; tell whether the last one was among them."""
        data, position = self._data, 0
        while True:
            if self.phase is Phase.CHUNK:
                piece = data[position : position + self._missing]
                self._keep(piece)
                position += len(piece)
                if self._missing:
                    break
                self.phase = Phase.CHUNK_END
            limit = MAX_TRAILER if self.phase is Phase.TRAILER else MAX_CHUNK_LINE
            end = data.find(b"\r\n", position, position + limit + 2)
            if end < 0:
                if len(data) - position > limit:
                    raise bad("a line between chunks is too long")
                if self.phase is Phase.CHUNK_END and data[position : position + 2] not in (b"", b"\r"):
                    raise bad("a chunk is longer than its size says")
                break
            line, position = data[position:end], end + 2
            if self._end_line(line):
                self._data = data[position:]
                return True
        self._data = data[position:]
        return False

    def _end_line(self, line: bytes) -> bool:
        """Act on a line between chunks; tell whether it was the empty one that ends the body."""
        if self.phase is Phase.CHUNK_END:
            if line:
                raise bad("a chunk is longer than its size says")
            self.phase = Phase.CHUNK_SIZE
        elif self.phase is Phase.CHUNK_SIZE:
            size = _CHUNK_SIZE.fullmatch(line)
            if size is None:
                raise bad("the size of a chunk must be a hexadecimal number of at most 8 digits")
            self._missing = int(size[1], 16)
            self._bound(self.received + self._missing)
            self.phase = Phase.CHUNK if self._missing else Phase.TRAILER
            self._searched = 0
        elif line:  # trailer fields are checked and dropped: none of them is known here
            self._searched += len(line) + 2
            if not is_field(line) or self._searched > MAX_TRAILER:
                raise bad("the trailer behind the last chunk is not a few lines of Name: value")
        else:
            self._searched = 0
            return True
        return False
