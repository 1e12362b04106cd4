"""A writer's connection: what it may take to wait for the database, and how long to leave it alone after a failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import uniform
from typing import Any, Final, TypeVar

import psycopg
from psycopg.abc import PQGen

STATEMENT_TIMEOUT_S: Final = 6
TCP_TIMEOUT_S: Final = 5
ANSWER_TIMEOUT_S: Final = 7
"""The server's own time-out is of no use when its answer is lost on the way: this one is kept here."""

MAX_PATIENCE_S: Final = 600
CONNECT_BEATS: Final = 60
"""Seconds that connecting may take, over all hosts and addresses, before the writer counts as stuck."""
MIN_PAUSE_S: Final = 0.05
MAX_PAUSE_S: Final = 5.0

RV = TypeVar("RV")


class Connection(psycopg.Connection[Any]):
    """A connection in autocommit that beats while it waits for the server, and does not wait for ever."""

    beat: Callable[[], None] = staticmethod(lambda: None)
    answer_timeout = ANSWER_TIMEOUT_S

    @classmethod
    def open(cls, url: str, application: str, beat: Callable[[], None]) -> Connection:
        """Connect with every time-out set; raises psycopg.OperationalError."""
        with _beating(beat):
            connection = cls.connect(
                url,
                autocommit=True,
                connect_timeout=5,
                tcp_user_timeout=TCP_TIMEOUT_S * 1000,
                application_name=application,
                client_encoding="utf8",
            )
        connection.beat = beat
        connection.execute(
            f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'; SET lock_timeout = '{STATEMENT_TIMEOUT_S // 2}s';"
            f" SET idle_in_transaction_session_timeout = '{STATEMENT_TIMEOUT_S}s'; SET synchronous_commit = on;"
            " SET timezone = 'UTC'"
        )
        return connection

    def be_patient(self, doublings: int) -> None:
        """Double the time-outs so many times, up to MAX_PATIENCE_S; for what cannot be done in less."""
        seconds = min(STATEMENT_TIMEOUT_S * 2**doublings, MAX_PATIENCE_S)
        self.execute(f"SET statement_timeout = '{seconds}s'")
        self.answer_timeout = seconds + 1

    def wait(self, gen: PQGen[RV], interval: float = 0.2, timeout: float | None = None) -> RV:
        return super().wait(self._watched(gen, timeout or self.answer_timeout), interval)

    def _watched(self, gen: PQGen[RV], timeout: float) -> PQGen[RV]:
        deadline = time.monotonic() + timeout
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                self.beat()
                if not ready and time.monotonic() > deadline:
                    raise psycopg.OperationalError(f"no answer from the database within {timeout} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            result: RV = end.value
            return result


@contextmanager
def _beating(beat: Callable[[], None]) -> Iterator[None]:
    """Beat from a thread while a name is looked up and its addresses are tried one after the other."""
    done = threading.Event()

    def run() -> None:
        for _ in range(CONNECT_BEATS):
            beat()
            if done.wait(1.0):
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def pause_after(failures: int) -> float:
    """Return how long to wait after so many failures in a row: 50 ms to 5 s, with jitter."""
    longest: float = min(MAX_PAUSE_S, MIN_PAUSE_S * 2.0 ** min(failures - 1, 10))
    return longest * uniform(0.5, 1.0)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
