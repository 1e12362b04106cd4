"""Answers as bytes: status, headers and body in one piece. No I/O."""

from __future__ import annotations

from email.utils import formatdate
from typing import Any, Final

from engine.problems import MEDIA_TYPE, Problem

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


_MEMO_HEADS: Final = 256
_memo: dict[tuple[Any, ...], bytes] = {}


def http_date() -> bytes:
    """Return the Date header, as a line."""
    return b"Date: %b\r\n" % formatdate(usegmt=True).encode()


def render(
    status: str, headers: list[tuple[str, str]], body: bytes, date: bytes, connection: str = "", head_only: bool = False
) -> bytes:
    """Return an answer in one piece; `connection` is the Connection header, `head_only` is for a HEAD request.

    Raises ValueError for a header that holds a line end.
    """
    bodiless = status.startswith(("1", "204", "304"))
    key = (status, connection, bodiless or len(body), *headers)
    head = _memo.get(key)
    if head is None:
        if len(_memo) >= _MEMO_HEADS:
            _memo.clear()
        head = _memo[key] = _head(status, headers, connection, None if bodiless else len(body))
    return b"".join((head, date, b"\r\n" if head_only or bodiless else b"\r\n" + body))


def _head(status: str, headers: list[tuple[str, str]], connection: str, length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {status}"]
    lines += [f"{name}: {value}" for name, value in headers if length is not None or name.lower() != "content-length"]
    if length is not None and not any(name.lower() == "content-length" for name, _ in headers):
        lines.append(f"Content-Length: {length}")
    if connection:
        lines.append(f"Connection: {connection}")
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError(f"a header of the answer {status} holds a line end")
    return "\r\n".join([*lines, ""]).encode("latin-1")


def refusal(problem: Problem, instance: str, date: bytes) -> bytes:
    """Return the answer to what is no request; the connection closes after it."""
    headers = [("Content-Type", MEDIA_TYPE), *problem.headers.items()]
    return render(problem.status, headers, problem.body(instance), date, "close")


def unknown(date: bytes) -> bytes:
    """Return the bare 500 that says nothing of whether the request was stored."""
    return render("500 Internal Server Error", [], b"", date, "close")
