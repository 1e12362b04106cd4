"""One event loop over many connections: read, call the WSGI application, answer. No threads, and nothing of gunicorn.

A turn of the loop is a commit group. Whatever requests are there are all given to the application, which publishes
their points; an answer that must not leave before the disk has its record is held (`answers.Held`); then one sync
covers them all, and they leave. `Prefer: wait` parks its connection and no other: the lane's tail is looked at between
turns. What a client sends is bounded in size (http_head, http_connection) and in time, here.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from engine import http_answer
from engine.answers import HELD, HOLDS, POLL_S, Held
from engine.http_connection import Connection, Phase
from engine.http_head import Heads
from engine.problems import Problem

HEAD_S: Final = 10.0
"""For a head, from its first byte (or the connect) to its last: it fits into a packet or two, on any link."""
BODY_S: Final = 10.0
BODY_RATE: Final = 8192
"""For a body: BODY_S, and a second more for each BODY_RATE bytes of it that came. A slower link than 64 kbit/s has
time for 80 kB, some 500 points; who sends a byte now and then is gone after BODY_S."""
SEND_S: Final = 30.0
"""For an answer that the client does not take; it is not read from meanwhile, so no other answer piles up."""
LINGER_S: Final = 2.0
"""After a refusal what the client still sends is read and dropped, or the kernel would reset the connection and with
it the answer on its way. Also how long a stopping loop waits for a request on a kept connection."""
TICK_S: Final = 0.25
REQUESTS_A_TURN: Final = 16
"""Of one connection, so that a client that pipelines thousands leaves room for others."""
ACCEPT_PAUSE_S: Final = 20e-6
MAX_ACCEPT_PAUSE_S: Final = 2e-3
"""After each accept the listener is left to the other workers for ACCEPT_PAUSE_S per connection already held, so that
who has fewer takes the next one. Without it one of two workers got all of 64 connections, and half of the rate."""
READ_BYTES: Final = 256 << 10

_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT

log = logging.getLogger("orbitstream.http")

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
AccessLog = Callable[[dict[str, Any], str, list[tuple[str, str]], int, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much, how many, how long (seconds)."""

    max_body: int
    max_connections: int
    max_requests: int
    keepalive: float
    graceful: float


class Client:
    """A connection and what is to be sent on it."""

    __slots__ = (
        "behind", "closed", "closing", "connection", "deadline", "eof", "fd", "holding", "interest", "lingering", "out",
        "refused", "socket", "stage", "unsent", "waiting",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, connection: Connection, deadline: float) -> None:
        self.socket, self.fd, self.connection = sock, sock.fileno(), connection
        self.interest = _IN
        self.deadline = deadline
        self.stage: tuple[Phase | None, float] = (None, 0.0)  # what is being read, and since when
        self.out: list[bytes] = []  # answers in order; not more than one turn's
        self.unsent = b""  # what the kernel did not take
        self.holding = False  # `out` has an answer that waits for the sync
        self.waiting = False  # parked
        self.behind = False  # it sent more requests than one turn takes: they come first, then more is read
        self.eof = False  # it sends no more
        self.closing = False  # it gets no more after `out`
        self.refused = False
        self.lingering = False
        self.closed = False


class _Pending(NamedTuple):
    """A held answer: `client.out[place]`, and what is sent instead once it is settled."""

    client: Client
    held: Held
    place: int
    settled: bytes


class _Parked(NamedTuple):
    client: Client
    held: Held
    deadline: float
    accepted: bytes
    settled: bytes


class Loop:
    """Serve `application` on `listeners` until stopped; `wake` is a descriptor that a signal writes to."""

    def __init__(
        self,
        application: Application,
        listeners: Sequence[socket.socket],
        bounds: Bounds,
        *,
        wake: int = -1,
        access_log: AccessLog | None = None,
    ) -> None:
        self._application, self._bounds, self._wake, self._access_log = application, bounds, wake, access_log
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._environs = {fd: _ends(listener) for fd, listener in self._listeners.items()}
        self._epoll = select.epoll()
        self._accepting = False
        self._accept_at = 0.0
        self._clients: dict[int, Client] = {}
        self._heads = Heads()
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._again: list[Client] = []  # they have requests left over from the last turn
        self._pending: list[_Pending] = []
        self._parked: list[_Parked] = []
        self._status = ""
        self._headers: list[tuple[str, str]] = []
        self._written: list[bytes] = []
        self._now = time.monotonic()
        self._date, self._date_until = b"", 0.0
        self._next_tick = 0.0
        self.stopping = False
        self._stop_at = float("inf")
        self._idle_until = float("inf")
        self.requests = 0

    def stop(self) -> None:
        """Take no more connections, finish the requests that are there, and end."""
        if not self.stopping:
            self.stopping = True
            self._stop_at = self._now + self._bounds.graceful
            self._idle_until = self._now + min(LINGER_S, self._bounds.graceful)
            for client in self._clients.values():
                if client.connection.phase is Phase.IDLE:
                    client.deadline = min(client.deadline, self._idle_until)
            self._set_accepting(False)

    def run(self, keep_going: Callable[[], bool]) -> None:
        """Serve until `keep_going`, asked every TICK_S, says no or `stop` was called, and the last answer has left."""
        if self._wake >= 0:
            self._epoll.register(self._wake, _IN)
        self._set_accepting(True)
        try:
            while not (self.stopping and (not self._clients or self._now >= self._stop_at)):
                self._turn()
                if self._now >= self._next_tick:
                    self._next_tick = self._now + TICK_S
                    if not keep_going():
                        self.stop()
                    self._tick()
        finally:
            for client in list(self._clients.values()):
                self._drop(client)
            self._epoll.close()

    # -- a turn

    def _turn(self) -> None:
        events = self._epoll.poll(self._timeout())
        self._now = time.monotonic()
        if self._now >= self._date_until:
            self._date, self._date_until = http_answer.http_date(), self._now + 0.5
        again, self._again = self._again, []
        for fd, mask in events:
            client = self._clients.get(fd)
            if client is not None:
                if mask & _IN:
                    self._read(client)
                elif mask & _OUT:
                    self._send(client)
                else:  # reset by the client
                    self._drop(client)
            elif fd in self._listeners:
                self._accept(fd)
            else:
                os.read(fd, 4096)
                self._next_tick = 0.0
        for client in again:
            self._serve(client)
        if self._pending:
            self._commit()
        if self._parked:
            self._look_at_parked()

    def _timeout(self) -> float:
        """Return for how long there may be nothing to do, and accept again if it is time to."""
        may_accept = not self.stopping and len(self._clients) < self._bounds.max_connections
        self._set_accepting(may_accept and self._now >= self._accept_at)
        if self._again:
            return 0.0
        until = min(self._next_tick, self._accept_at) if may_accept and not self._accepting else self._next_tick
        return max(0.0, min(until - time.monotonic(), POLL_S if self._parked else TICK_S))

    def _tick(self) -> None:
        """Close what is overdue."""
        for client in list(self._clients.values()):
            if self._now < client.deadline or client.waiting:
                continue
            if client.stage[0] in (None, Phase.IDLE) or client.unsent or client.closing:
                self._drop(client)
            else:
                what = "head" if client.stage[0] is Phase.HEAD else "body"
                self._refuse(client, Problem("request-timeout", f"the {what} of the request took too long to arrive"))
                self._send(client)

    # -- connections

    def _set_accepting(self, accepting: bool) -> None:
        if accepting != self._accepting:
            self._accepting = accepting
            for fd in self._listeners:
                if accepting:
                    self._epoll.register(fd, _IN)
                else:
                    self._epoll.unregister(fd)

    def _accept(self, fd: int) -> None:
        try:
            sock, address = self._listeners[fd].accept()
        except BlockingIOError:  # another worker was faster
            return
        except OSError as error:
            if error.errno == errno.EINVAL:  # the supervisor shut the listener down: it wants us to end
                self.stop()
            elif error.errno in _OUT_OF_RESOURCES:
                log.error("cannot accept connections: %s; raise the limit of open files (ulimit -n)", error)
                self._pause_accepting(TICK_S)
            return  # any other: the client left before it was accepted
        sock.setblocking(False)
        ends = self._environs[fd]
        if isinstance(address, tuple):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ends = {**ends, "REMOTE_ADDR": address[0], "REMOTE_PORT": str(address[1])}
        self._pause_accepting(min(len(self._clients) * ACCEPT_PAUSE_S, MAX_ACCEPT_PAUSE_S))
        client = Client(sock, Connection(self._heads, ends, self._bounds.max_body), self._now + HEAD_S)
        self._clients[client.fd] = client
        self._epoll.register(client.fd, _IN)

    def _pause_accepting(self, seconds: float) -> None:
        if seconds:
            self._accept_at = self._now + seconds
            self._set_accepting(False)

    def _drop(self, client: Client) -> None:
        if not client.closed:
            client.closed = client.closing = True
            del self._clients[client.fd]
            client.socket.close()

    def _listen_for(self, client: Client, interest: int) -> None:
        if client.interest != interest and not client.closed:
            client.interest = interest
            self._epoll.modify(client.fd, interest)

    # -- reading

    def _read(self, client: Client) -> None:
        if client.behind:
            return
        try:
            count = client.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if client.lingering:
            if not count:
                self._drop(client)
            return
        if count:
            client.connection.feed(bytes(self._buffer[:count]))
        else:
            client.eof = True
            self._listen_for(client, 0)
        self._serve(client)

    def _serve(self, client: Client) -> None:
        """Answer the whole requests that are there, and send unless an answer is held."""
        client.behind = False
        if client.closing or client.waiting or client.unsent:
            return
        connection = client.connection
        try:
            for _ in range(REQUESTS_A_TURN):
                request = connection.next_request()
                if request is None:
                    self._await_more(client)
                    break
                self._answer(client, *request)
                if client.closing or client.waiting:
                    break
                if not connection.has_more and not client.eof:
                    client.deadline = min(self._now + self._bounds.keepalive, self._idle_until)
                    break
            else:
                self._continue(client)
        except Problem as problem:
            self._refuse(client, problem)
        if not client.holding:
            self._send(client)

    def _continue(self, client: Client) -> None:
        """Serve the client in the next turn whether more comes from it or not."""
        client.behind = True
        client.deadline = self._now + SEND_S
        self._again.append(client)

    def _await_more(self, client: Client) -> None:
        """See what is being read, and until when."""
        connection = client.connection
        phase = connection.phase
        if client.eof:
            if phase is Phase.BODY:
                raise Problem("bad-request", "the body is shorter than its Content-Length")
            if phase is not Phase.IDLE:
                raise Problem("bad-request", "the connection ended before the request did")
            client.closing = True
        elif phase is Phase.IDLE:
            client.stage = (phase, self._now)
            client.deadline = min(self._now + self._bounds.keepalive, self._idle_until)
        elif phase is Phase.HEAD:
            if client.stage[0] is not phase:
                client.stage = (phase, self._now)
                client.deadline = self._now + HEAD_S
        else:
            if client.stage[0] is not Phase.BODY:
                client.stage = (Phase.BODY, self._now)
            client.deadline = client.stage[1] + BODY_S + connection.received / BODY_RATE
            if connection.wants_continue():
                client.out.append(http_answer.CONTINUE)

    # -- answering

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        self._status, self._headers = status, headers
        return self._written.append

    def _answer(self, client: Client, environ: dict[str, Any], keep_alive: bool) -> None:
        """Call the application and put its answer into `out`."""
        self.requests += 1
        if self.requests >= self._bounds.max_requests:
            self.stop()
        begun = time.monotonic() if self._access_log is not None else 0.0
        client.stage = (Phase.IDLE, self._now)
        closing = client.closing = not keep_alive or self.stopping
        try:
            body = self._call(environ)
            old = environ["SERVER_PROTOCOL"] == "HTTP/1.0"
            connection = "close" if closing else "keep-alive" if old else ""
            head_only = environ["REQUEST_METHOD"] == "HEAD"
            answer = http_answer.render(self._status, self._headers, body, self._date, connection, head_only)
            held: Held | None = environ.get(HELD)
            if held is not None:
                settled = b""
                if held.wait_s:
                    client.waiting = True
                    uncounted = [pair for pair in self._headers if pair[0].lower() != "content-length"]
                    status, committed = held.settled
                    settled = http_answer.render(status, uncounted, committed, self._date, connection, head_only)
                client.holding = True
                self._pending.append(_Pending(client, held, len(client.out), settled))
            client.out.append(answer)
        except Exception:
            log.exception("%s %s failed", environ["REQUEST_METHOD"], environ["PATH_INFO"])
            client.closing = True
            client.out.append(http_answer.unknown(self._date))
            return
        if self._access_log is not None:
            self._access_log(environ, self._status, self._headers, len(body), time.monotonic() - begun)

    def _call(self, environ: dict[str, Any]) -> bytes:
        self._written.clear()
        result = self._application(environ, self._start_response)
        if type(result) is list and len(result) == 1 and not self._written:
            piece: bytes = result[0]
            return piece
        try:
            return b"".join([*self._written, *result])
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def _refuse(self, client: Client, problem: Problem) -> None:
        """Answer what is no request, and close."""
        client.out.append(http_answer.refusal(problem, client.connection.instance, self._date))
        client.closing = client.refused = True

    def _commit(self) -> None:
        """Let the held answers of this turn go: the first sync covers the records of all."""
        pending, self._pending = self._pending, []
        for client, held, place, settled in pending:
            try:
                held.receipt.sync()
            except OSError as error:
                if len(client.out) > place:
                    log.error("whether requests were stored is not known, the lane is stopped: %s", error)
                    client.out[place:] = [http_answer.unknown(self._date)]
                    client.closing, client.waiting = True, False
                continue
            if held.wait_s:
                self._listen_for(client, 0)
                accepted = client.out.pop()
                self._parked.append(_Parked(client, held, self._now + held.wait_s, accepted, settled))
            else:
                held.receipt.answered()
        for client, *_ in pending:
            if client.holding:
                client.holding = False
                self._send(client)

    def _look_at_parked(self) -> None:
        """Answer who waited for a record that is settled now, or long enough."""
        parked, self._parked = self._parked, []
        for each in parked:
            client, held, deadline, accepted, settled = each
            if client.closed:
                continue
            if held.receipt.settled:
                client.out.append(settled)
            elif held.receipt.given_up or self._now >= min(deadline, self._idle_until):
                client.out.append(accepted)
            else:
                self._parked.append(each)
                continue
            held.receipt.answered()
            client.waiting = False
            client.deadline = self._now + self._bounds.keepalive
            self._listen_for(client, 0 if client.eof else _IN)
            if client.closing:
                self._send(client)
            else:
                self._serve(client)

    # -- sending

    def _send(self, client: Client) -> None:
        """Send what there is, in one call; what the kernel does not take waits, and nothing is read meanwhile."""
        data = client.unsent
        if client.out:
            data = b"".join((data, *client.out)) if data or len(client.out) > 1 else client.out[0]
            client.out.clear()
        if data:
            try:
                sent = client.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._drop(client)
                return
            blocked = bool(client.unsent)
            client.unsent = data[sent:]
            if client.unsent:
                if not blocked:
                    client.deadline = self._now + SEND_S
                    self._listen_for(client, _OUT)
                return
            if blocked:
                self._listen_for(client, 0 if client.eof else _IN)
                if not client.closing:
                    self._continue(client)
        if client.closing and not client.waiting:
            self._finish(client)

    def _finish(self, client: Client) -> None:
        """Close, after a refusal gently."""
        if client.closed or client.lingering:
            return
        if client.eof or not (client.refused or client.connection.has_more):
            self._drop(client)
            return
        client.lingering = True
        client.deadline = self._now + LINGER_S
        try:
            client.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(client)
        else:
            self._listen_for(client, _IN)


def _ends(listener: socket.socket) -> dict[str, Any]:
    """Return what the environ says of our end of a connection."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return {"SERVER_NAME": name[0], "SERVER_PORT": str(name[1]), "REMOTE_ADDR": "", HOLDS: True}
    return {"SERVER_NAME": "localhost", "SERVER_PORT": "", "REMOTE_ADDR": "", HOLDS: True}
