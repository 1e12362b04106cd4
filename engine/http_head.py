"""The head of an HTTP/1.1 request: bytes to WSGI environ, or one Problem. Pure: no sockets, no state but a memo.

The grammar is taken strictly (RFC 9112), since whatever two readers of the same bytes read differently lets a request
be smuggled past one of them. Firstly: a line is either exactly `name ":" value` of the allowed characters, ended by CR
LF, or the request is refused. Given that, and that a body has at most one length, known before its first byte, no byte
of a body is ever taken for a request.

A client sends the same head again and again, so heads are remembered by their bytes: the same bytes mean the same.
"""

from __future__ import annotations

import re
import sys
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

from engine.problems import Problem

MAX_REQUEST_LINE: Final = 4094
MAX_HEADERS: Final = 100
MAX_HEADER_LINE: Final = 8190
MAX_HEAD: Final = 64 << 10
"""Beyond it nobody waits for the end of a head: 100 headers of the largest size would be 800 kB a connection."""
CHUNKED: Final = -1

_MEMO_HEADS: Final = 512
_MEMO_BYTES: Final = 1024
"""Longer heads are parsed each time: 512 remembered ones hold 2 MB at most. A hit saves about 15 us."""

_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/(\d)\.(\d)", re.ASCII)
_TARGET = re.compile(r"(?:https?://[^/?#]*)?(/[^?#]*|(?=\?|$)|\*$)(?:\?([^#]*))?", re.IGNORECASE)
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_HOST = re.compile(r"[^\s,/?#@\\]*")
_LENGTH = re.compile(r"[0-9]{1,18}")
_ONCE: Final = frozenset(
    ("HOST", "CONTENT-LENGTH", "CONTENT-TYPE", "TRANSFER-ENCODING", "IDEMPOTENCY-KEY", "AUTHORIZATION")
)
"""Fields of which a second would be taken for a part of the first."""

_ENVIRON: Final[dict[str, Any]] = {
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.errors": sys.stderr,
    "wsgi.multithread": False,
    "wsgi.multiprocess": True,
    "wsgi.run_once": False,
    "wsgi.input_terminated": True,
    "SCRIPT_NAME": "",
}


class Head(NamedTuple):
    """What a head says. `environ` is a template: copy it. `length` is that of the body in bytes, or CHUNKED."""

    environ: dict[str, Any]
    length: int
    keep_alive: bool
    expects_continue: bool


def bad(detail: str) -> Problem:
    """Return the Problem for a request that is not HTTP."""
    return Problem("bad-request", detail)


def parse(raw: bytes) -> Head:
    """Parse a head, its closing empty line included; raises Problem for whatever is not plainly a request."""
    lines = raw[:-4].decode("latin-1").split("\r\n")
    if len(lines[0]) > MAX_REQUEST_LINE:
        raise bad(f"the request line is over {MAX_REQUEST_LINE} bytes: shorten the path")
    line = _REQUEST_LINE.fullmatch(lines[0])
    if line is None:
        raise bad("the request line must read METHOD PATH HTTP/1.1")
    method, target, major, minor = line.groups()
    if major != "1" or minor not in "01":
        raise bad(f"HTTP/{major}.{minor} is not spoken here: use HTTP/1.1")
    path = _TARGET.fullmatch(target)
    if path is None:
        raise bad("the target of the request line must be a path such as /telemetry")
    fields = _fields(lines[1:])
    if "HOST" not in fields and minor == "1":
        raise bad("the Host header is missing")
    if not _HOST.fullmatch(fields.get("HOST", "")):
        raise bad("the Host header is not a host name with an optional port")
    connection = {token.strip() for token in fields.get("CONNECTION", "").lower().split(",")}
    environ = {
        **_ENVIRON,
        "REQUEST_METHOD": method,
        "RAW_URI": target,
        "PATH_INFO": unquote_to_bytes(path[1] or "/").decode("latin-1"),
        "QUERY_STRING": path[2] or "",
        "SERVER_PROTOCOL": f"HTTP/1.{minor}",
        **{f"HTTP_{name.replace('-', '_')}": value for name, value in fields.items()},
    }
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if f"HTTP_{name}" in environ:
            environ[name] = environ.pop(f"HTTP_{name}")
    keep_alive = "close" not in connection if minor == "1" else "keep-alive" in connection
    return Head(environ, _body_length(fields, minor), keep_alive, _expects_continue(fields, minor))


def _fields(lines: list[str]) -> dict[str, str]:
    """Return the header fields by upper-case name; repeated ones are joined by commas where that is not ambiguous."""
    if len(lines) > MAX_HEADERS:
        raise Problem("headers-too-large", f"the request has over {MAX_HEADERS} headers")
    fields: dict[str, str] = {}
    for line in lines:
        if len(line) > MAX_HEADER_LINE:
            raise Problem("headers-too-large", f"a header is over {MAX_HEADER_LINE} bytes")
        field = _FIELD.fullmatch(line)
        if field is None:
            if line[:1] in (" ", "\t"):
                raise bad("a header goes on in a second line: write it in one")
            raise bad("a header is not Name: value, without a space before the colon and without control characters")
        name, value = field[1].upper(), field[2].strip(" \t")
        if name not in fields:
            fields[name] = value
        elif name in _ONCE:
            raise bad(f"the header {name.title()} is there twice")
        else:
            fields[name] += "," + value
    # In the environ X_Token would stand where X-Token stands: a proxy that checks or sets the latter could be fooled.
    return {name: value for name, value in fields.items() if "_" not in name}


def _body_length(fields: dict[str, str], minor: str) -> int:
    coding, length = fields.get("TRANSFER-ENCODING"), fields.get("CONTENT-LENGTH")
    if coding is not None:
        if length is not None:
            raise bad("Content-Length and Transfer-Encoding are both there: send one of them")
        if minor == "0":
            raise bad("HTTP/1.0 has no Transfer-Encoding: use HTTP/1.1")
        if coding.lower() != "chunked":
            raise Problem("not-implemented", "the only Transfer-Encoding understood here is chunked")
        return CHUNKED
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise bad("Content-Length must be one whole number")
    return int(length)


def _expects_continue(fields: dict[str, str], minor: str) -> bool:
    expected = fields.get("EXPECT")
    if expected is None or minor == "0":
        return False
    if expected.lower() != "100-continue":
        raise Problem("expectation-failed", "the only Expect understood here is 100-continue")
    return True


def named_path(raw: bytes) -> str:
    """Return the path that the beginning of a head names, for the `instance` of a Problem; empty if there is none."""
    line = _REQUEST_LINE.match(raw[: MAX_REQUEST_LINE + 16].partition(b"\r\n")[0].decode("latin-1"))
    path = _TARGET.fullmatch(line[2]) if line else None
    return unquote_to_bytes(path[1]).decode("utf-8", "replace") if path else ""


def is_field(line: bytes) -> bool:
    """Tell whether a line is a header field (of a trailer)."""
    return _FIELD.fullmatch(line.decode("latin-1")) is not None


class Heads:
    """Parse heads, remembering those seen lately."""

    def __init__(self) -> None:
        self._memo: dict[bytes, Head] = {}

    def known(self, raw: bytes) -> tuple[Head | None, int]:
        """Return the head with which `raw` begins if it is remembered, and where it ends."""
        end = raw.find(b"\r\n\r\n", 0, _MEMO_BYTES) + 4
        return self._memo.get(raw[:end]), end

    def read(self, raw: bytes) -> Head:
        """Return what `parse` returns."""
        head = self._memo.get(raw)
        if head is None:
            head = parse(raw)
            if len(raw) <= _MEMO_BYTES:
                if len(self._memo) >= _MEMO_HEADS:
                    self._memo.clear()
                self._memo[raw] = head
        return head
