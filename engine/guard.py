"""Who may come in: bearer tokens, their scopes and their quotas. In the way of requests only where tokens are set."""

from __future__ import annotations

import math
import threading
import time
from typing import Any, Final, NoReturn

import falcon

from engine.problems import Problem
from engine.tokens import Token, Tokens, TokensError

_REALM: Final = 'Bearer realm="orbitstream"'


class Bucket:
    """A token's quota in this process: `rate` points/s, saved up for one second at most.

    A request is let in while something is left and may overdraw, so that a batch may be larger than a second's worth;
    what it took too much is waited for afterwards.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._level = rate
        self._at = time.monotonic()

    def wait(self) -> float:
        """Return in how many seconds a request will be let in, 0 for now."""
        now = time.monotonic()
        self._level = min(self.rate, self._level + (now - self._at) * self.rate)
        self._at = now
        return 0.0 if self._level > 0 else -self._level / self.rate + 1e-3

    def take(self, points: int) -> None:
        """Charge points that were accepted."""
        self._level -= points


class Guard:
    """Falcon middleware: lets a request in whose token has the scope that its resource names in `scope`.

    `shares`: among how many workers a quota is divided; each grants its share, since they share no memory.
    """

    def __init__(self, tokens: Tokens, shares: int) -> None:
        self._tokens, self._shares = tokens, shares
        self._buckets: dict[str, Bucket] = {}
        self._mutex = threading.Lock()

    def process_resource(self, request: falcon.Request, _: falcon.Response, resource: Any, __: Any) -> None:
        """Raise Problem unless the request may reach the resource; leaves its token in the request's context."""
        scope = getattr(resource, "scope", None)
        if scope is None:
            return
        token = self._identify(request.get_header("Authorization"))
        if scope not in token.scopes:
            _refuse("forbidden", f"this token has no scope {scope}", f'error="insufficient_scope", scope="{scope}"')
        request.context.token = token
        if token.quota is not None and scope == "write":
            with self._mutex:
                wait = self._bucket(token, token.quota).wait()
            if wait:
                raise Problem(
                    "quota-exceeded",
                    f"the quota of {token.quota:g} points/s is used up",
                    headers={"Retry-After": str(math.ceil(wait))},
                )

    def charge(self, request: falcon.Request, points: int) -> None:
        """Take accepted points off the quota of the request's token."""
        token: Token = request.context.token
        if token.quota is not None:
            with self._mutex:
                self._bucket(token, token.quota).take(points)

    def _identify(self, header: str | None) -> Token:
        if header is None:
            _refuse("unauthorized", "send a token: Authorization: Bearer ...")
        scheme, _, value = header.strip().partition(" ")
        try:
            token = self._tokens.find(value.strip()) if scheme.lower() == "bearer" else None
        except TokensError as error:
            raise Problem("not-ready", f"{error}: the log of the service says why") from error
        if token is None:
            _refuse("unauthorized", "this token is not known here, or no longer", 'error="invalid_token"')
        return token

    def _bucket(self, token: Token, quota: float) -> Bucket:
        rate = quota / self._shares
        bucket = self._buckets.get(token.sha256)
        if bucket is None or bucket.rate != rate:
            bucket = self._buckets[token.sha256] = Bucket(rate)
        return bucket


def _refuse(code: str, detail: str, challenge: str = "") -> NoReturn:
    raise Problem(code, detail, headers={"WWW-Authenticate": f"{_REALM}, {challenge}" if challenge else _REALM})
