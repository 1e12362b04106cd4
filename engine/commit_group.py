"""Answers that wait: for the sync of their turn, and after it, if they were asked to, for the database."""

from __future__ import annotations

import logging
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
    """The held answers of one turn, and the parked ones of all."""

    def __init__(self) -> None:
        self.pending: list[_Pending] = []
        self.parked: list[_Parked] = []

    def hold(self, client: Client, held: Held, settled: bytes) -> None:
        """Hold the answer that is appended to `client.out` next; `settled` goes instead of it if it is to wait."""
        client.holding = True
        client.waiting = held.wait_s > 0
        self.pending.append(_Pending(client, held, len(client.out), settled))

    def commit(self, now: float, date: bytes) -> list[Client]:
        """Sync, which the first receipt does for all; returns the clients whose answers may leave.

        When it fails, each of them is told by a bare 500 that the outcome is not known, and what it sent behind is
        not answered.
        """
        pending, self.pending = self.pending, []
        for client, held, place, settled in pending:
            try:
                held.receipt.sync()
            except OSError as error:
                if len(client.out) > place:
                    log.error("whether requests were stored is not known, their lane is stopped: %s", error)
                    client.out[place:] = [http_answer.unknown(date)]
                    client.closing, client.waiting = True, False
                continue
            if held.wait_s:
                client.pause()
                self.parked.append(_Parked(client, held, now + held.wait_s, client.out.pop(), settled))
            else:
                held.receipt.answered()
        clients = []
        for client, *_ in pending:
            if client.holding:
                client.holding = False
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
