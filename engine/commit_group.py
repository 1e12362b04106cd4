"""Answers that wait: for a sync, and after it, if they were asked to, for the database.

One sync is under way at a time, on a thread of its own, so that the loop reads and decodes meanwhile. Whatever is
published until it returns is the next group: the slower the disk, the more requests one sync answers for.
"""

from __future__ import annotations

import logging
import os
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

from engine import http_answer
from engine.answers import Held
from engine.http_client import Client

log = logging.getLogger("orbitstream.http")


class _Pending(NamedTuple):
    """A held answer, `client.out[place]`, and what is sent instead once it is settled."""

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


class CommitGroup:
    """The held answers, of the sync under way and of the next one, and the parked ones of all."""

    def __init__(self) -> None:
        self.parked: list[_Parked] = []
        self._gathered: list[_Pending] = []
        self._under_way: list[_Pending] = []
        self._outcomes: list[Exception | None] = []
        self._todo: SimpleQueue[list[_Pending] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)
        """Readable when the sync under way returned: call `finish`."""

    def hold(self, client: Client, held: Held, settled: bytes) -> None:
        """Hold the answer that is appended to `client.out` next; `settled` goes instead of it if it is to wait."""
        client.holding = True
        client.waiting = held.wait_s > 0
        self._gathered.append(_Pending(client, held, len(client.out), settled))

    def begin(self) -> None:
        """Let the thread sync what was gathered, unless it is at work or there is nothing."""
        if not self._gathered or self._under_way:
            return
        if self._thread is None:
            self._thread = Thread(target=self._sync, name="sync", daemon=True)
            self._thread.start()
        self._under_way, self._gathered = self._gathered, []
        self._todo.put(self._under_way)

    def _sync(self) -> None:
        """Bring groups to the disk, one after the other; the first record of a lane does so for all."""
        while (group := self._todo.get()) is not None:
            self._outcomes = [_outcome(pending.held) for pending in group]
            os.eventfd_write(self.fd, 1)

    def finish(self, now: float, date: bytes) -> list[Client]:
        """Return the clients whose answers may leave, now that their sync returned.

        When it failed, each of them is told by a bare 500 that the outcome is not known, and what it sent behind is
        not answered.
        """
        os.eventfd_read(self.fd)
        group, self._under_way = self._under_way, []
        for (client, held, place, settled), error in zip(group, self._outcomes, strict=True):
            if error is not None:
                if len(client.out) > place:
                    log.error("whether requests were stored is not known, their lane is stopped: %s", error)
                    client.out[place:] = [http_answer.unknown(date)]
                    client.closing, client.waiting = True, False
            elif held.wait_s:
                self.parked.append(_Parked(client, held, now + held.wait_s, client.out.pop(), settled))
            else:
                held.receipt.answered()
        clients = []
        for client, *_ in group:
            if client.holding:
                client.holding = False
                if client.waiting:
                    client.pause()
                else:
                    client.resume()
                clients.append(client)
        return clients

    def look(self, now: float, until: float) -> list[Client]:
        """Put the answer into `out` of each who waited for a record that is settled now, or long enough.

        Nobody waits beyond `until`. Returns the clients.
        """
        parked, self.parked = self.parked, []
        done = []
        for each in parked:
            client, held, deadline, accepted, settled = each
            if client.closed:
                continue
            if held.receipt.settled:
                client.out.append(settled)
            elif held.receipt.given_up or now >= min(deadline, until):
                client.out.append(accepted)
            else:
                self.parked.append(each)
                continue
            held.receipt.answered()
            client.waiting = False
            client.resume()
            done.append(client)
        return done

    def close(self) -> None:
        """End the thread, once the sync under way returned."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join()
        os.close(self.fd)


def _outcome(held: Held) -> Exception | None:
    """Return why it is not known whether a record is on the disk, None if it is."""
    try:
        held.receipt.sync()
    except Exception as error:  # whatever it is: a thread that ended would leave its clients without an answer
        return error
    return None
