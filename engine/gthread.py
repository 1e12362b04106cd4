"""gunicorn's thread worker, the fallback class `gthread`: what it does otherwise than the event loop is mended here."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import Any, Final

from gunicorn.http import errors
from gunicorn.workers.gthread import ThreadWorker

from engine import http_answer
from engine.problems import Problem

_PROBLEMS: Final = (
    (errors.LimitRequestLine, "bad-request", "the request line is over 4094 bytes: shorten the path"),
    (errors.LimitRequestHeaders, "headers-too-large", "the request has over 100 headers, or one over 8190 bytes"),
    (errors.UnsupportedTransferCoding, "not-implemented", "the only Transfer-Encoding understood here is chunked"),
    (errors.ExpectationFailed, "expectation-failed", "the only Expect understood here is 100-continue"),
    (errors.ObsoleteFolding, "bad-request", "a header goes on in a second line: write it in one"),
    (errors.InvalidRequestLine, "bad-request", "the request line must read METHOD PATH HTTP/1.1"),
    (errors.InvalidHTTPVersion, "bad-request", "this version of HTTP is not spoken here: use HTTP/1.1"),
    (errors.InvalidHeaderName, "bad-request", "a header has a name that is not allowed"),
    (errors.InvalidHeader, "bad-request", "a header is malformed, missing or there twice"),
    (errors.ParseException, "bad-request", "this is not an HTTP request"),
)


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """A ThreadWorker that survives the supervisor's shutdown of the shared listening socket.

    The supervisor refuses new clients at once when it stops, while requests under way are finished; gunicorn's own
    worker would die of the EINVAL that accept gives then, and its requests with it.
    """

    def accept(self, listener: socket.socket) -> None:
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.alive = False

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answer what is no request as a problem, as the event loop does; gunicorn's own answer is HTML."""
        for kind, code, detail in _PROBLEMS:
            if isinstance(exc, kind):
                with suppress(OSError):
                    client.sendall(http_answer.refusal(Problem(code, detail), "", http_answer.http_date()))
                return
        super().handle_error(req, client, addr, exc)
