"""The file of bearer tokens: who may do what. It holds a token's SHA-256, never the token.

One JSON object a line:

    {"name": "gateway-1", "sha256": "9f86d0...", "scopes": ["write"], "quota": 5000.0, "created": "2026-01-31T12:00Z"}

A token is 256 random bits, so its plain hash tells nothing of it, and nobody can choose what digest is looked up.
`quota` is points a second, null for no limit. `orbitstream token` writes the file; a service reads it again when it
changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from engine.settings import SettingError

SCOPES: Final = ("write", "read")
CHECK_S: Final = 1.0
"""How often a change of the file is looked for: so long a revoked token may still work."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("orbitstream.tokens")


class TokensError(SettingError):
    """A tokens file that cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Token:
    """One line of the file; `quota` in points/s, None for no limit."""

    name: str
    sha256: str
    scopes: tuple[str, ...]
    quota: float | None
    created: str


def digest(token: str) -> str:
    """Return the SHA-256 of a token as the file has it."""
    return hashlib.sha256(token.encode()).hexdigest()


def load(path: Path) -> dict[str, Token]:
    """Return the tokens of a file by their digest; raises TokensError for one that cannot be used."""
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except FileNotFoundError as error:
        raise TokensError(f"ORBITSTREAM_TOKENS_FILE={str(path)!r} is not there: {_REMEDY}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise TokensError(f"ORBITSTREAM_TOKENS_FILE={str(path)!r} cannot be read: {reason}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TokensError(f"ORBITSTREAM_TOKENS_FILE={str(path)!r} can be written by others: chmod 600 it")
    found: dict[str, Token] = {}
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            token = _parse(line)
            if token is None or token.name in names or token.sha256 in found:
                what = "is no token" if token is None else "repeats another"
                raise TokensError(f"ORBITSTREAM_TOKENS_FILE={str(path)!r}: line {number} {what}: remove it")
            names.add(token.name)
            found[token.sha256] = token
    return found


_REMEDY: Final = "`orbitstream token create NAME` makes it"


def _parse(line: str) -> Token | None:
    try:
        given = json.loads(line)
        quota = given.get("quota")
        token = Token(
            name=given["name"],
            sha256=given["sha256"],
            scopes=tuple(given["scopes"]),
            quota=None if quota is None else float(quota),
            created=str(given.get("created", "")),
        )
        good = (
            _NAME.fullmatch(token.name)
            and _DIGEST.fullmatch(token.sha256)
            and set(token.scopes) <= set(SCOPES)
            and (token.quota is None or 0 < token.quota < float("inf"))
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return token if good else None


# -- the service's side


class Tokens:
    """The tokens as a service knows them: read again when the file changes, kept when it is broken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._signature: tuple[int, ...] | None = None
        self._next_check = 0.0
        self._tokens: dict[str, Token] | None = None

    def find(self, token: str) -> Token | None:
        """Return who has this token; raises TokensError as long as the file could not be read even once."""
        if time.monotonic() >= self._next_check:
            self._refresh()
        if self._tokens is None:
            raise TokensError("the tokens file cannot be read")
        wanted = digest(token)
        found = self._tokens.get(wanted)
        return found if found is not None and hmac.compare_digest(found.sha256, wanted) else None

    def _refresh(self) -> None:
        with self._mutex:
            self._next_check = time.monotonic() + CHECK_S
            try:
                now = os.stat(self._path)
                signature: tuple[int, ...] = (now.st_mtime_ns, now.st_size, now.st_ino, now.st_mode)
            except OSError:
                signature = ()
            if signature == self._signature:
                return
            self._signature = signature
            try:
                self._tokens = load(self._path)
                log.info("%d tokens in %s", len(self._tokens), self._path)
            except TokensError as error:
                kept = "the tokens of before still hold" if self._tokens is not None else "nobody is let in"
                log.error("%s; %s", error, kept)


# -- the operator's side


def create(path: Path, name: str, scopes: Iterable[str], quota: float | None) -> str:
    """Add a token to the file, making the file if need be, and return it: it can be seen this once only."""
    if not _NAME.fullmatch(name):
        raise TokensError(f"{name!r} is no name for a token: use 1 to 64 letters, digits, dots, dashes, underscores")
    with _locked(path.parent):
        known = load(path) if path.exists() else {}
        if any(token.name == name for token in known.values()):
            raise TokensError(f"there is a token {name} already: `orbitstream token revoke {name}`, or another name")
        secret = f"orbitstream_{secrets.token_urlsafe(32)}"
        created = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        token = Token(name, digest(secret), tuple(scope for scope in SCOPES if scope in set(scopes)), quota, created)
        _write(path, [*known.values(), token])
    return secret


def revoke(path: Path, name: str) -> bool:
    """Remove a token from the file; returns whether there was one of that name."""
    with _locked(path.parent):
        known = load(path).values()
        left = [token for token in known if token.name != name]
        if len(left) < len(known):
            _write(path, left)
        return len(left) < len(known)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock against other commands; on the folder, since the file itself is replaced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TokensError(f"the folder {str(folder)!r} of ORBITSTREAM_TOKENS_FILE: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, tokens: Iterable[Token]) -> None:
    """Replace the file at once, so that no reader sees half of it; mode 0600, and whose it was."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
        with open(descriptor, "w", encoding="utf-8") as file:
            for token in tokens:
                fields: dict[str, Any] = asdict(token)
                file.write(json.dumps(fields) + "\n")
            if path.exists() and os.geteuid() == 0:
                os.fchown(file.fileno(), path.stat().st_uid, path.stat().st_gid)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TokensError(f"ORBITSTREAM_TOKENS_FILE={str(path)!r} cannot be written: {error.strerror}") from error
