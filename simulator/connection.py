"""One keep-alive HTTP/1.1 connection: a non-blocking socket, one request in flight, and what its answer means.

The rule that decides between "try again" and "unknown": once the first byte of an attempt has been handed to the
kernel, the service may have stored it. Given that, a connection that fails later tells nothing (unknown, never sent
again), and one that fails earlier tells that nothing arrived (not sent, tried again on a new connection).
"""

from __future__ import annotations

import enum
import errno
import selectors
import socket
from typing import Any, NamedTuple

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
MAX_ANSWER_BYTES = 1 << 20
UNTIL_CLOSE = -1
CHUNKED = -2


class Verdict(enum.IntEnum):
    """Say what became of one attempt to send a request. The first three settle it and are the codes of a sent log."""

    ACCEPTED = 1  # 200, 202
    REFUSED = 2  # nothing stored, and no use in trying again
    UNKNOWN = 3  # it may or may not be stored
    RETRY = 4  # nothing stored, the service said when to come back
    NOT_SENT = 5  # no byte left this process


class Answer(NamedTuple):
    """Hold the parsed head of a response; length is that of the body in bytes, or UNTIL_CLOSE or CHUNKED."""

    verdict: Verdict
    length: int
    keep_alive: bool
    retry_after: float
    interim: bool


class BadAnswer(Exception):
    """Report a response that is not HTTP/1.x as a client can read it."""


def judge(status: int, problem: bool, retry_after: bool) -> Verdict:
    """Apply the contract to a status; `problem`: the body is application/problem+json, the service's own words.

    A 503 that is not the service's own (a proxy's, say) does not tell that nothing was stored.
    """
    if status in (200, 202):
        return Verdict.ACCEPTED
    if retry_after and (status == 429 or (status == 503 and problem)):
        return Verdict.RETRY
    if 400 <= status < 500 or (status == 503 and problem):
        return Verdict.REFUSED
    return Verdict.UNKNOWN


def parse_head(head: bytes) -> Answer:
    """Parse a status line and header lines (without the blank line); raise BadAnswer on what is not HTTP/1.x."""
    status_line, *lines = head.split(b"\r\n")
    words = status_line.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not (len(words[1]) == 3 and words[1].isdigit()):
        raise BadAnswer(f"the answer starts with {status_line[:60]!r}, not with an HTTP/1.1 status line")
    status = int(words[1])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        length = CHUNKED
    elif status < 200 or status in (204, 304):
        length = 0
    else:
        text = headers.get(b"content-length", b"-1")
        length = int(text) if text.isdigit() else UNTIL_CLOSE
    tokens = headers.get(b"connection", b"").lower()
    keep_alive = b"close" not in tokens and (words[0] != b"HTTP/1.0" or b"keep-alive" in tokens)
    problem = headers.get(b"content-type", b"").lower().startswith(b"application/problem+json")
    after = headers.get(b"retry-after")
    # Only seconds are read; the other form, a date, becomes one second.
    seconds = float(after) if after is not None and after.isdigit() else 1.0
    return Answer(judge(status, problem, after is not None), length, keep_alive, seconds, 100 <= status < 200)


def chunked_end(data: bytes, start: int) -> int:
    """Return where the chunked body that starts at `start` ends, or -1 when more has to come."""
    while True:
        line_end = data.find(b"\r\n", start)
        if line_end < 0:
            return -1
        try:
            size = int(data[start:line_end].split(b";", 1)[0], 16)
        except ValueError:
            raise BadAnswer(f"chunk size {data[start:line_end][:20]!r} is not a hexadecimal number") from None
        if size == 0:
            # The trailer: header lines up to an empty one.
            if data[line_end : line_end + 4] == b"\r\n\r\n":
                return line_end + 4
            end = data.find(b"\r\n\r\n", line_end)
            return -1 if end < 0 else end + 4
        start = line_end + 2 + size + 2
        if start > len(data):
            return -1


class AnswerReader:
    """Cut answers out of what a connection receives.

    Heads repeat byte for byte within a second (then the Date changes), so they are parsed once: `known` maps a head to
    its answer and is shared by the connections of a process.
    """

    def __init__(self, known: dict[bytes, Answer]) -> None:
        self._known = known
        self._pending = b""

    def feed(self, data: bytes) -> Answer | None:
        """Take received bytes; return the answer once it is complete; raise BadAnswer."""
        if self._pending:
            data = self._pending + data
            self._pending = b""
        head_end = data.find(b"\r\n\r\n")
        if head_end < 0:
            return self._wait(data)
        head = data[:head_end]
        answer = self._known.get(head) or self._learn(head)
        start = head_end + 4
        if answer.interim:
            return self.feed(data[start:])
        if answer.length == UNTIL_CLOSE:
            return self._wait(data)
        end = chunked_end(data, start) if answer.length == CHUNKED else start + answer.length
        if end < 0 or end > len(data):
            return self._wait(data)
        # Bytes beyond the answer were not asked for; whatever they are, the next answer cannot be told from them.
        return answer if end == len(data) else answer._replace(keep_alive=False)

    def end(self) -> Answer | None:
        """Take the end of the stream; return the answer that it completes, if any."""
        head_end = self._pending.find(b"\r\n\r\n")
        answer = self._known.get(self._pending[:head_end]) if head_end >= 0 else None
        self._pending = b""
        return answer if answer and answer.length == UNTIL_CLOSE else None

    def _wait(self, data: bytes) -> Answer | None:
        if len(data) > MAX_ANSWER_BYTES:
            raise BadAnswer(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        self._pending = data
        return None

    def _learn(self, head: bytes) -> Answer:
        if len(self._known) > 256:
            self._known.clear()
        answer = self._known[head] = parse_head(head)
        return answer


class Connection:
    """Carry one request at a time; connect when there is something to send.

    The owner calls `submit` on a free connection, `on_ready` when the selector (which maps the socket to this object)
    reports it, `give_up` at the deadline. Each returns a verdict, after which the connection is free again, or None
    while the request is under way. `retry_after` (s) belongs to the last RETRY.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        family: int,
        address: tuple[Any, ...],
        known: dict[bytes, Answer],
    ) -> None:
        self._selector = selector
        self._family = family
        self._address = address
        self._reader = AnswerReader(known)
        self._socket: socket.socket | None = None
        self._connecting = False
        self._interest = READ
        self._busy = False
        self._touched = False
        self._rest = memoryview(b"")
        self.retry_after = 0.0

    def submit(self, data: memoryview) -> Verdict | None:
        """Start an attempt to send a request."""
        self._busy = True
        self._touched = False
        self._rest = data
        if self._socket is None:
            return self._connect()
        return self._send(self._socket)

    def on_ready(self, mask: int) -> Verdict | None:
        """Go on with what the socket is ready for."""
        sock = self._socket
        if sock is None:
            return None
        if self._connecting:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return self._finish(Verdict.NOT_SENT)
            self._connecting = False
            return self._send(sock)
        verdict = self._receive(sock) if mask & READ else None
        if verdict is None and mask & WRITE and self._socket is not None:
            return self._send(sock)
        return verdict

    def give_up(self) -> Verdict:
        """Abandon the attempt under way and close."""
        return self._finish(Verdict.UNKNOWN if self._touched else Verdict.NOT_SENT)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is None:
            return
        self._selector.unregister(self._socket)
        self._socket.close()
        self._socket = None
        self._connecting = False
        self._reader.end()

    def _connect(self) -> Verdict | None:
        sock = socket.socket(self._family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._interest = READ | WRITE
        self._selector.register(sock, self._interest, self)
        code = sock.connect_ex(self._address)
        if code not in (0, errno.EINPROGRESS):
            return self._finish(Verdict.NOT_SENT)
        self._connecting = True
        return None

    def _send(self, sock: socket.socket) -> Verdict | None:
        try:
            count = sock.send(self._rest)
        except BlockingIOError:
            count = 0
        except OSError:
            # The service may have answered (413, say) before it closed: that answer still counts.
            return self._receive(sock) or self._finish(Verdict.UNKNOWN if self._touched else Verdict.NOT_SENT)
        if count:
            self._touched = True
            self._rest = self._rest[count:]
        interest = READ | WRITE if self._rest else READ
        if interest != self._interest:
            self._selector.modify(sock, interest, self)
            self._interest = interest
        return None

    def _receive(self, sock: socket.socket) -> Verdict | None:
        try:
            data = sock.recv(65_536)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not self._busy:
            # Closed while idle, or bytes nobody asked for: either way not to be used again.
            self.close()
            return None
        try:
            answer = self._reader.feed(data) if data else self._reader.end()
        except BadAnswer:
            return self._finish(Verdict.UNKNOWN)
        if answer is not None and self._touched:
            self.retry_after = answer.retry_after
            reusable = answer.keep_alive and not self._rest and bool(data)
            return self._finish(answer.verdict, reusable=reusable)
        if data and answer is None:
            return None
        return self._finish(Verdict.UNKNOWN if self._touched else Verdict.NOT_SENT)

    def _finish(self, verdict: Verdict, *, reusable: bool = False) -> Verdict:
        self._busy = False
        self._rest = memoryview(b"")
        if not reusable:
            self.close()
        return verdict
