"""Errors as RFC 9457 problem details, `application/problem+json`: one line that a person can act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import falcon
import orjson

from engine.points import DecodeError, Fault

MEDIA_TYPE: Final = "application/problem+json"
TYPE_BASE: Final = "urn:orbitstream:problem:"

PROBLEMS: Final[dict[str, tuple[str, str]]] = {
    "malformed-json": (falcon.HTTP_400, "Malformed JSON"),
    "malformed-arrow": (falcon.HTTP_400, "Malformed Arrow stream"),
    "bad-request": (falcon.HTTP_400, "Bad request"),
    "unauthorized": (falcon.HTTP_401, "Token needed"),
    "forbidden": (falcon.HTTP_403, "Not allowed"),
    "not-found": (falcon.HTTP_404, "Not found"),
    "method-not-allowed": (falcon.HTTP_405, "Method not allowed"),
    "request-timeout": (falcon.HTTP_408, "Request timed out"),
    "too-large": (falcon.HTTP_413, "Request too large"),
    "too-many-points": (falcon.HTTP_413, "Too many points"),
    "unsupported-media-type": (falcon.HTTP_415, "Unsupported media type"),
    "expectation-failed": (falcon.HTTP_417, "Expectation failed"),
    "invalid-point": (falcon.HTTP_422, "Invalid point"),
    "quota-exceeded": (falcon.HTTP_429, "Quota exceeded"),
    "headers-too-large": (falcon.HTTP_431, "Headers too large"),
    "not-implemented": (falcon.HTTP_501, "Not implemented"),
    "lane-failed": (falcon.HTTP_503, "Lane stopped"),
    "lane-full": (falcon.HTTP_503, "Lane full"),
    "not-ready": (falcon.HTTP_503, "Not ready"),
    "overloaded": (falcon.HTTP_503, "Overloaded"),
}
"""Every problem there is: its code, the end of its `type`, with status and title."""
RETRYABLE: Final = (falcon.HTTP_408, falcon.HTTP_429, falcon.HTTP_503)


def describe(fault: Fault) -> dict[str, Any]:
    """Return a fault as an answer shows it."""
    return {**fault._asdict(), "retryable": False}


class Problem(Exception):
    """An answer other than success; nothing of the request is stored."""

    def __init__(
        self, code: str, detail: str, *, faults: Sequence[Fault] = (), headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.code, self.detail, self.faults, self.headers = code, detail, faults, headers or {}
        self.status, self.title = PROBLEMS[code]
        self.retryable = self.status in RETRYABLE

    @classmethod
    def of(cls, error: DecodeError) -> Problem:
        return cls(error.code, error.detail, faults=error.faults)

    def body(self, instance: str) -> bytes:
        document: dict[str, Any] = {
            "type": TYPE_BASE + self.code,
            "title": self.title,
            "status": int(self.status[:3]),
            "detail": self.detail,
            "instance": instance,
            "retryable": self.retryable,
            "accepted": 0,
        }
        if self.faults:
            document["errors"] = [describe(fault) for fault in self.faults]
        return orjson.dumps(document)


def answer(request: falcon.Request, response: falcon.Response, problem: Problem, _: Any) -> None:
    """Write a Problem as the answer (falcon error handler)."""
    response.status = problem.status
    response.content_type = MEDIA_TYPE
    response.data = problem.body(request.path)
    for name, value in problem.headers.items():
        response.set_header(name, value)


def answer_http(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError, _: Any) -> None:
    """Write an error that falcon raised itself (no route, wrong method, ...) in the same form."""
    codes = {404: "not-found", 405: "method-not-allowed", 413: "too-large", 415: "unsupported-media-type"}
    code = codes.get(error.status_code, "bad-request")
    detail = {
        404: "there is nothing at this path: post to /telemetry or /telemetry/batch",
        405: f"{request.method} is not for this path",
    }.get(error.status_code, error.description or error.title or "the request cannot be understood")
    problem = Problem(code, detail, headers=dict(error.headers or {}))
    answer(request, response, problem, None)
    if code == "bad-request":
        response.status = error.status


def answer_crash(request: falcon.Request, response: falcon.Response, error: Exception, _: Any) -> None:
    """Answer a bare 500: the record may yet be stored, so the answer must not deny it. The log has the traceback."""
    import logging

    logging.getLogger("orbitstream.app").exception("%s %s failed", request.method, request.path, exc_info=error)
    response.status = falcon.HTTP_500
    response.content_type = falcon.MEDIA_TEXT
    response.data = b""
