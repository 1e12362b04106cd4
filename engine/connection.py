"""A writer's connection: what it may take to wait for the database, and how long to leave it alone after a failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import uniform
from typing import Any, Final, TypeVar

import psycopg
from psycopg.abc import PQGen

# All end before heartbeat.STALE_S, so that a writer is not taken for stuck while it waits for the database.
STATEMENT_TIMEOUT_S: Final = 6
TCP_TIMEOUT_S: Final = 5
ANSWER_TIMEOUT_S: Final = 7
"""The server's own time-out is of no use when its answer is lost on the way: this one is kept here."""

MIN_PAUSE_S: Final = 0.05
MAX_PAUSE_S: Final = 5.0

RV = TypeVar("RV")


class Connection(psycopg.Connection[Any]):
    """A connection in autocommit that beats while it waits for the server, and does not wait for ever."""

    beat: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def open(cls, url: str, application: str, beat: Callable[[], None]) -> Connection:
        """Connect with every time-out set; raises psycopg.OperationalError."""
        connection = cls.connect(
            url,
            autocommit=True,
            connect_timeout=5,
            tcp_user_timeout=TCP_TIMEOUT_S * 1000,
            application_name=application,
        )
        connection.beat = beat
        connection.execute(
            f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'; SET lock_timeout = '{STATEMENT_TIMEOUT_S // 2}s';"
            f" SET idle_in_transaction_session_timeout = '{STATEMENT_TIMEOUT_S}s'; SET synchronous_commit = on;"
            " SET timezone = 'UTC'"
        )
        return connection

    def wait(self, gen: PQGen[RV], interval: float = 0.2, timeout: float | None = None) -> RV:
        return super().wait(self._watched(gen, timeout or ANSWER_TIMEOUT_S), interval)

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


def pause_after(failures: int) -> float:
    """Return how long to wait after so many failures in a row: 50 ms to 5 s, with jitter."""
    longest: float = min(MAX_PAUSE_S, MIN_PAUSE_S * 2.0 ** min(failures - 1, 10))
    return longest * uniform(0.5, 1.0)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
