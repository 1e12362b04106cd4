"""What a client prefers: the `Prefer` header of RFC 7240."""

from __future__ import annotations

import re
from typing import Final

MAX_WAIT_S: Final = 60

_PREFERENCE = re.compile(r'\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)\s*(?:=\s*("(?:[^"\\]|\\.)*"|[^\s,;"]*))?\s*((?:;[^,]*)?)')


def preferences(header: str | None) -> dict[str, str]:
    """Return the preferences of a header, names in lower case; the first one counts, what cannot be read does not."""
    found: dict[str, str] = {}
    for item in (header or "").split(","):
        match = _PREFERENCE.fullmatch(item)
        if match is not None:
            found.setdefault(match[1].lower(), (match[2] or "").strip('"'))
    return found


def is_lenient(header: str | None) -> bool:
    """Tell whether bad points are to be left out of a batch instead of refusing it."""
    return header is not None and preferences(header).get("handling", "").lower() == "lenient"


def wait_seconds(header: str | None) -> int:
    """Return for how many seconds the client is willing to wait, at most MAX_WAIT_S; 0 if it does not say."""
    given = preferences(header).get("wait", "") if header is not None else ""
    return min(int(given[:9]), MAX_WAIT_S) if given.isascii() and given.isdigit() else 0
