"""One event loop over many connections: read, call the WSGI application, answer. Nothing of gunicorn.

Whatever requests are there are all given to the application, which publishes their points. An answer that must not
leave before the disk has its record is held (`answers.Held`), and nothing more of its connection is served; one sync
covers all that are held (`commit_group`), and they leave. `Prefer: wait` parks its connection and no other: the lane's
tail is looked at between turns. What a client sends is bounded in size (http_head, http_connection) and in time, here.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine import http_answer
from engine.answers import HELD, HOLDS, POLL_S, Held
from engine.commit_group import CommitGroup
from engine.http_client import LINGER_S, SEND_S, Client
from engine.http_connection import Connection, Phase, Room
from engine.http_head import Heads
from engine.listeners import Listeners, ListenerShutError
from engine.problems import Problem

HEAD_S: Final = 10.0
"""For a head, from its first byte (or the connect) to its last: it fits into a packet or two, on any link."""
BODY_S: Final = 10.0
BODY_RATE: Final = 8192
"""For a body: BODY_S, and a second more for each BODY_RATE bytes of it that came. A slower link than 64 kbit/s has
time for 80 kB, some 500 points; who sends a byte now and then is gone after BODY_S."""
TICK_S: Final = 0.25
REQUESTS_A_TURN: Final = 16
"""Of one connection, so that a client that pipelines thousands leaves room for others."""
READ_BYTES: Final = 256 << 10

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
        self._epoll = select.epoll()
        self._listeners = Listeners(listeners, self._epoll, {HOLDS: True})
        self._clients: dict[int, Client] = {}
        self._heads, self._room = Heads(), Room(bounds.max_body)
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._again: list[Client] = []  # they have requests left over from the last turn
        self._group = CommitGroup()
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

    def run(self, keep_going: Callable[[], bool]) -> None:
        """Serve until `keep_going`, asked every TICK_S, says no or `stop` was called, and the last answer has left."""
        self._epoll.register(self._group.fd, select.EPOLLIN)
        if self._wake >= 0:
            self._epoll.register(self._wake, select.EPOLLIN)
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
                client.drop()
            self._listeners.watch(False, self._now)
            self._epoll.close()
            self._group.close()

    def _turn(self) -> None:
        events = self._epoll.poll(self._timeout())
        self._now = time.monotonic()
        if self._now >= self._date_until:
            self._date, self._date_until = http_answer.http_date(), self._now + 0.5
        again, self._again = self._again, []
        synced = False
        for fd, mask in events:
            client = self._clients.get(fd)
            if client is not None:
                if mask & select.EPOLLIN:
                    self._read(client)
                elif mask & select.EPOLLOUT:
                    self._send(client)
                else:  # reset by the client
                    client.drop()
            elif fd in self._listeners:
                self._accept(fd)
            elif fd == self._group.fd:
                synced = True
            else:
                os.read(fd, 4096)
                self._next_tick = 0.0
        for client in again:
            self._serve(client)
        self._let_go(synced)

    def _let_go(self, synced: bool) -> None:
        """Send the held answers that are true now, and have those gathered since brought to the disk."""
        if synced:
            for client in self._group.finish(self._now, self._date):
                self._release(client)
        self._group.begin()
        if self._group.parked:
            for client in self._group.look(self._now, self._idle_until):
                self._serve_on(client)

    def _timeout(self) -> float:
        """Return for how long there may be nothing to do."""
        room = not self.stopping and len(self._clients) < self._bounds.max_connections
        until = self._listeners.watch(room, self._now)
        if self._again:
            return 0.0
        longest = POLL_S if self._group.parked else TICK_S
        return max(0.0, min(min(self._next_tick, until) - time.monotonic(), longest))

    def _tick(self) -> None:
        """Close what is overdue."""
        for client in list(self._clients.values()):
            if self._now < client.deadline or client.waiting or client.holding:
                continue
            if client.stage in (None, Phase.IDLE) or client.unsent or client.closing:
                client.drop()
            else:
                what = "head" if client.stage is Phase.HEAD else "body"
                self._refuse(client, Problem("request-timeout", f"the {what} of the request took too long to arrive"))
                self._send(client)

    def _accept(self, fd: int) -> None:
        try:
            accepted = self._listeners.accept(fd, len(self._clients), self._now)
        except ListenerShutError:
            self.stop()
            return
        if accepted is not None:
            sock, ends = accepted
            connection = Connection(self._heads, ends, self._room)
            Client(sock, connection, self._now + HEAD_S, self._clients, self._epoll)

    def _read(self, client: Client) -> None:
        if client.behind:
            return
        if client.holding:
            client.pause()
            return
        count = client.read(self._buffer)
        if count is not None:
            client.connection.feed(self._buffer[:count])
            self._serve(client)
            client.connection.give_back()

    def _serve(self, client: Client) -> None:
        """Answer the whole requests that are there, and send unless an answer is held."""
        client.behind = False
        if client.closing or client.waiting or client.unsent or client.holding:
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
            client.stage = phase
            client.deadline = min(self._now + self._bounds.keepalive, self._idle_until)
        elif phase is Phase.HEAD:
            if client.stage is not phase:
                client.stage = phase
                client.deadline = self._now + HEAD_S
        else:
            if client.stage is not Phase.BODY:
                client.stage, client.body_begun = Phase.BODY, self._now
            client.deadline = client.body_begun + BODY_S + connection.received / BODY_RATE
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
        client.stage = Phase.IDLE
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
                    uncounted = [pair for pair in self._headers if pair[0].lower() != "content-length"]
                    committed = held.settled()
                    settled = http_answer.render("200 OK", uncounted, committed, self._date, connection, head_only)
                self._group.hold(client, held, settled)
            client.out.append(answer)
        except Exception:  # whatever the app raises: this client is told, the others are served on
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
        client.connection.forget()
        client.closing = client.refused = True

    def _release(self, client: Client) -> None:
        """Send the answers that were held, and serve in the next turn what the client sent behind."""
        self._send(client)
        if (client.connection.has_more or client.eof) and not (client.closing or client.waiting or client.unsent):
            self._continue(client)

    def _serve_on(self, client: Client) -> None:
        """Send the answer of a client that was parked, and serve what it sent behind."""
        client.deadline = self._now + self._bounds.keepalive
        if client.closing:
            self._send(client)
        else:
            self._serve(client)

    def _send(self, client: Client) -> None:
        if client.send(self._now):
            self._continue(client)
