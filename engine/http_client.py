"""A client of the event loop: its socket, what is to be sent on it, and how it ends."""

from __future__ import annotations

import select
import socket
from typing import Any, Final

from engine.http_connection import Connection, Phase

SEND_S: Final = 30.0
"""For an answer that the client does not take; it is not read from meanwhile, so no other answer piles up."""
LINGER_S: Final = 2.0
"""After a refusal what the client still sends is read and dropped, or the kernel would reset the connection and with
it the answer on its way. Also how long a stopping loop waits for a request on a kept connection."""

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT


class Client:
    """A connection that the loop serves; it is in `clients`, by descriptor, from its making to its `drop`."""

    __slots__ = (
        "_clients", "_epoll", "_interest", "_socket", "behind", "body_begun", "closed", "closing", "connection",
        "deadline", "eof", "fd", "holding", "lingering", "out", "refused", "stage", "unsent", "waiting",
    )  # fmt: skip

    def __init__(
        self, sock: socket.socket, connection: Connection, deadline: float, clients: dict[int, Client], epoll: Any
    ) -> None:
        self._socket, self.fd, self.connection = sock, sock.fileno(), connection
        self._clients, self._epoll, self._interest = clients, epoll, _IN
        self.deadline = deadline
        self.stage: Phase | None = None  # what is being read
        self.body_begun = 0.0
        self.out: list[bytes] = []  # answers in order; not more than one turn's
        self.unsent = b""  # what the kernel did not take
        self.holding = False  # `out` has an answer that waits for a sync: nothing more is served
        self.waiting = False  # parked
        self.behind = False  # it sent more requests than one turn takes: they come first, then more is read
        self.eof = False  # it sends no more
        self.closing = False  # it gets no more after `out`
        self.refused = False
        self.lingering = False
        self.closed = False
        clients[self.fd] = self
        epoll.register(self.fd, _IN)

    def read(self, buffer: memoryview) -> int | None:
        """Read what is there into `buffer`; returns how much, 0 at the end, None if there is nothing (any more)."""
        try:
            count = self._socket.recv_into(buffer)
        except BlockingIOError:
            return None
        except OSError:
            self.drop()
            return None
        if self.lingering:
            if not count:
                self.drop()
            return None
        if not count:
            self.eof = True
            self._listen_for(0)
        return count

    def pause(self) -> None:
        """Read nothing until `resume`."""
        self._listen_for(0)

    def resume(self) -> None:
        self._listen_for(0 if self.eof else _IN)

    def send(self, now: float) -> bool:
        """Send what there is, in one call; what the kernel does not take waits, and nothing is read meanwhile.

        Tells whether something that had to wait is through, so that requests may be served again.
        """
        data = self.unsent
        if self.out:
            data = b"".join((data, *self.out)) if data or len(self.out) > 1 else self.out[0]
            self.out.clear()
        blocked = bool(self.unsent)
        if data:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.drop()
                return False
            self.unsent = data[sent:]
            if self.unsent:
                if not blocked:
                    self.deadline = now + SEND_S
                    self._listen_for(_OUT)
                return False
            if blocked:
                self.resume()
        if self.closing and not self.waiting:
            self._finish(now)
        return blocked and not self.closing

    def _finish(self, now: float) -> None:
        """Close; gently where the client may still be sending."""
        if self.closed or self.lingering:
            return
        if self.eof or not (self.refused or self.connection.has_more):
            self.drop()
            return
        self.lingering = True
        self.deadline = now + LINGER_S
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.drop()
        else:
            self._listen_for(_IN)

    def drop(self) -> None:
        """Close at once."""
        if not self.closed:
            self.closed = self.closing = True
            del self._clients[self.fd]
            self.connection.forget()
            self._socket.close()

    def _listen_for(self, interest: int) -> None:
        if self._interest != interest and not self.closed:
            self._interest = interest
            self._epoll.modify(self.fd, interest)
