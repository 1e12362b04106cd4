"""Answers as bytes: status, headers and body in one piece. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from email.utils import formatdate

from engine.problems import MEDIA_TYPE, Problem

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def http_date() -> str:
    """Return the time as a Date header has it."""
    return formatdate(usegmt=True)


def render(
    status: str,
    headers: Iterable[tuple[str, str]],
    body: bytes,
    *,
    date: str,
    connection: str | None = None,
    head_only: bool = False,
) -> bytes:
    """Return an answer in one piece; `connection` is the Connection header, `head_only` that of a HEAD request.

    Raises ValueError for a header that holds a line end.
    """
    lines = [f"HTTP/1.1 {status}\r\nDate: {date}"]
    bodiless = status[:3] in ("204", "304") or status[0] == "1"
    counted = bodiless
    for name, value in headers:
        if name.lower() == "content-length":
            if bodiless:
                continue
            counted = True
        lines.append(f"{name}: {value}")
    if not counted:
        lines.append(f"Content-Length: {len(body)}")
    if connection is not None:
        lines.append(f"Connection: {connection}")
    lines.append("\r\n")
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) + 1 or head.count("\r") != len(lines) + 1:
        raise ValueError(f"a header of the answer {status} holds a line end")
    return head.encode("latin-1") if head_only or bodiless else head.encode("latin-1") + body


def refusal(problem: Problem, instance: str, date: str) -> bytes:
    """Return the answer to what is no request; the connection closes after it."""
    headers = [("Content-Type", MEDIA_TYPE), *problem.headers.items()]
    return render(problem.status, headers, problem.body(instance), date=date, connection="close")


def unknown(date: str) -> bytes:
    """Return the bare 500 that says nothing of whether the request was stored."""
    return render("500 Internal Server Error", [], b"", date=date, connection="close")
