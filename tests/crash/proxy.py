"""A proxy before PostgreSQL's socket that can cut a connection at a named message, or stop passing anything on."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

SOCKET_NAME = ".s.PGSQL.5432"


class Proxy:
    """Listen in `folder` and pass everything on to the server of `url`, but for the faults that are armed.

    `cut_after(word)`: the next message of a client that holds `word` reaches the server, whose answer does not come
    back: both sides are closed once it is there. `stall_at(word)`: the next such message and all that follows on that
    connection is swallowed, and the connection stays open.
    """

    def __init__(self, folder: Path, url: str) -> None:
        parts: dict[str, Any] = psycopg.conninfo.conninfo_to_dict(url)
        self._target = parts["host"], int(parts["port"])
        self.url = psycopg.conninfo.make_conninfo(url, host=str(folder), hostaddr=None, port=5432)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / SOCKET_NAME))
        self._listener.listen(64)
        self._cut: bytes | None = None
        self._stall: bytes | None = None
        self.hits = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, word: bytes) -> None:
        self._cut = word

    def stall_at(self, word: bytes) -> None:
        self._stall = word

    def close(self) -> None:
        self._listener.close()
        for each in self._open:
            each.close()

    def _connect(self) -> socket.socket:
        host, port = self._target
        if host.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{host}/.s.PGSQL.{port}")
            return server
        return socket.create_connection((host, port))

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            swallow = threading.Event()
            cut = threading.Event()
            threading.Thread(target=self._to_server, args=(client, server, swallow, cut), daemon=True).start()
            threading.Thread(target=self._to_client, args=(client, server, swallow, cut), daemon=True).start()

    def _to_server(
        self, client: socket.socket, server: socket.socket, swallow: threading.Event, cut: threading.Event
    ) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                if self._stall is not None and self._stall in data:
                    self._stall = None
                    self.hits += 1
                    swallow.set()
                if swallow.is_set():
                    continue
                if self._cut is not None and self._cut in data:
                    self._cut = None
                    cut.set()
                server.sendall(data)
        if not swallow.is_set():  # a half-open connection: the server is not told that its client went
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)

    def _to_client(
        self, client: socket.socket, server: socket.socket, swallow: threading.Event, cut: threading.Event
    ) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                if cut.is_set():
                    self.hits += 1
                    break
                if not swallow.is_set():
                    client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
