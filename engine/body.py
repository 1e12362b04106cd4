"""A request's body: which media type it is, read to its end, and decompressed, never beyond the limit."""

from __future__ import annotations

from typing import Final, Protocol

import falcon
import pyarrow as pa

from engine.problems import Problem

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
ARROW: Final = "application/vnd.apache.arrow.stream"
ENCODINGS: Final = {"gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"}


class Input(Protocol):
    """`wsgi.input`."""

    def read(self, size: int, /) -> bytes: ...


class Lent:
    """The `wsgi.input` of a body that lies whole in the server's buffer.

    `view` is good until the application returns: where it lies the next request will.
    """

    __slots__ = ("_position", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """Return a copy of what comes next, of all that is left for -1."""
        start, self._position = self._position, len(self.view) if size < 0 else self._position + size
        return bytes(self.view[start : self._position])


def media_type(request: falcon.Request, *known: str) -> str:
    """Return which of the `known` media types the body is; raises Problem for another."""
    given = (request.content_type or JSON).partition(";")[0].strip().lower()
    if given not in known:
        raise Problem("unsupported-media-type", f"send {' or '.join(known)}", headers={"Accept": ", ".join(known)})
    return given


def read(request: falcon.Request, limit: int) -> bytes | memoryview:
    """Return the whole body, decompressed; raises Problem for one over `limit` bytes, cut short, or corrupt.

    A view is good until the application returns: what is kept of it must be copied.
    """
    encoding = request.env.get("HTTP_CONTENT_ENCODING")
    if encoding is None:
        return _read(request, limit)
    name = encoding.strip().lower()
    if name in ("identity", ""):
        return _read(request, limit)
    if name not in ENCODINGS:
        raise Problem(
            "unsupported-media-type",
            "send the body as it is, or with one Content-Encoding: gzip or zstd",
            headers={"Accept-Encoding": "gzip, zstd, identity"},
        )
    return _decompress(_read(request, limit), ENCODINGS[name], limit)


def _read(request: falcon.Request, limit: int) -> bytes | memoryview:
    """Return the body as it was sent, of known length or chunked."""
    length = request.content_length
    if length is not None and length > limit:
        raise _too_large(limit)
    if length is None and "chunked" not in (request.get_header("Transfer-Encoding") or "").lower():
        return b""
    stream: Input = request.env["wsgi.input"]
    if type(stream) is Lent:
        return stream.view
    wanted = limit + 1 if length is None else length
    pieces, got = [], 0
    while got < wanted:
        try:
            piece = stream.read(wanted - got)  # all at once: a body that is here is then not copied
        except Exception as error:  # whatever the server raises for broken chunks or a client that left
            raise Problem("bad-request", "the body cannot be read to its end") from error
        if not piece:
            break
        pieces.append(piece)
        got += len(piece)
    if got > limit:
        raise _too_large(limit)
    if length is not None and got < length:
        raise Problem("bad-request", "the body is shorter than its Content-Length")
    return b"".join(pieces)


def _decompress(body: bytes | memoryview, codec: str, limit: int) -> bytes:
    """Return what was compressed, in one member or frame or in several; stops at the first byte over `limit`."""
    try:
        with pa.CompressedInputStream(pa.BufferReader(body), codec) as stream:
            plain: bytes = stream.read(limit + 1)
    except (pa.ArrowException, OSError) as error:
        raise Problem("bad-request", f"the body is no whole and valid {codec}") from error
    if not body:
        raise Problem("bad-request", f"the body is empty, which is no {codec}")
    if len(plain) > limit:
        raise _too_large(limit)
    return plain


def _too_large(limit: int) -> Problem:
    return Problem("too-large", f"the body is over {limit} bytes, decompressed: send fewer points a request")
