"""When the answer to a published request may leave: once it is true.

A 202 of durability `disk` is true after an fdatasync, a 200 (`Prefer: wait`, RFC 7240) once the database has settled
the record. A server that answers many clients in turn says in the environ that it holds answers back itself: it is
handed a Held. Any other has a thread for each request, which waits here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

import falcon

from engine.prefer import wait_seconds
from engine.producer import Receipt

HOLDS: Final = "orbitstream.holds"
"""The environ key by which a server says that it looks for a Held under the key HELD after the application returned."""
HELD: Final = "orbitstream.held"
POLL_S: Final = 0.002
"""Between two looks at a lane's tail, and only while somebody waits: a settled record is answered for 1 ms late."""


class Held(NamedTuple):
    """An answer to hold until `receipt.sync()` returned: if that raises OSError, the outcome is unknown.

    With `wait_s`, hold it further, until the receipt is settled, and send a 200 with the body `settled()` instead; or
    send the answer as it is once `wait_s` passed or the receipt is given up. Call `receipt.answered()` when it leaves.
    """

    receipt: Receipt
    wait_s: int
    settled: Callable[[], bytes]


def release(request: falcon.Request, response: falcon.Response, receipt: Receipt, settled: Callable[[], bytes]) -> None:
    """Let the response, which says that points are accepted, go as soon as it is true.

    `settled` makes the body that says that they are committed, which few ask for. Raises OSError when a sync failed:
    the outcome is unknown.
    """
    wait_s = wait_seconds(request.env.get("HTTP_PREFER"))
    if wait_s:
        response.append_header("Preference-Applied", f"wait={wait_s}")
    if HOLDS in request.env:
        if wait_s or receipt.producer.durable:
            request.env[HELD] = Held(receipt, wait_s, settled)
            return
    else:
        receipt.sync()
        if wait_s and _settles(receipt, wait_s):
            response.status = falcon.HTTP_200
            response.data = settled()
    receipt.answered()


def _settles(receipt: Receipt, wait_s: int) -> bool:
    deadline = time.monotonic() + wait_s
    while not receipt.settled:
        if receipt.given_up or time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)  # a thread of its own, that nothing wakes; until wait_s
    return True
