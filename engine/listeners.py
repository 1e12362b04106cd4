"""The listening sockets of the event loop, which other workers accept from too."""

from __future__ import annotations

import errno
import logging
import select
import socket
from collections.abc import Sequence
from typing import Any, Final

PAUSE_S: Final = 20e-6
MAX_PAUSE_S: Final = 2e-3
"""After each accept the listener is left to the other workers for PAUSE_S per connection already held, so that who has
fewer takes the next one. Without it one of two workers got all of 64 connections, and half of the rate."""
OUT_OF_RESOURCES_S: Final = 0.25

_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger("orbitstream.http")


class ListenerShutError(Exception):
    """The supervisor shut the listener down: it wants us to end."""


class Listeners:
    """Accept while there is room, and leave others their share."""

    def __init__(self, listeners: Sequence[socket.socket], epoll: Any, environ: dict[str, Any]) -> None:
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._ends = {fd: {**_end(listener), **environ} for fd, listener in self._listeners.items()}
        self._epoll = epoll
        self._registered = False
        self._accept_at = 0.0

    def __contains__(self, fd: int) -> bool:
        return fd in self._listeners

    def watch(self, room: bool, now: float) -> float:
        """Listen for connections if there is room and it is time to; returns when to call again at the latest."""
        wanted = room and now >= self._accept_at
        if wanted != self._registered:
            self._registered = wanted
            for fd in self._listeners:
                if wanted:
                    self._epoll.register(fd, select.EPOLLIN)
                else:
                    self._epoll.unregister(fd)
        return self._accept_at if room and not wanted else float("inf")

    def accept(self, fd: int, held: int, now: float) -> tuple[socket.socket, dict[str, Any]] | None:
        """Return a connection and what the environ says of its ends, if there is one; `held` are there already.

        Raises ListenerShutError.
        """
        try:
            sock, address = self._listeners[fd].accept()
        except BlockingIOError:  # another worker was faster
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise ListenerShutError from error
            if error.errno in _OUT_OF_RESOURCES:
                log.error("cannot accept connections: %s; raise the limit of open files (ulimit -n)", error)
                self._accept_at = now + OUT_OF_RESOURCES_S
            return None  # any other: the client left before it was accepted
        self._accept_at = now + min(held * PAUSE_S, MAX_PAUSE_S)
        sock.setblocking(False)
        ends = self._ends[fd]
        if isinstance(address, tuple):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ends = {**ends, "REMOTE_ADDR": address[0], "REMOTE_PORT": str(address[1])}
        return sock, ends


def _end(listener: socket.socket) -> dict[str, Any]:
    """Return what the environ says of our end of a connection."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return {"SERVER_NAME": name[0], "SERVER_PORT": str(name[1]), "REMOTE_ADDR": ""}
    return {"SERVER_NAME": "localhost", "SERVER_PORT": "", "REMOTE_ADDR": ""}
