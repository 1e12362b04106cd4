"""What a record carries of a request's Idempotency-Key: the hash of its body, the key's scope, and the key."""

from __future__ import annotations

import hashlib
from typing import Final

HASH_BYTES: Final = 16
MAX_KEY_BYTES: Final = 200


def record_key(scope: str, key: str, body: bytes | memoryview) -> bytes:
    """Return the key of the record of one request; neither `scope` nor `key` holds NUL.

    SHA-256 has instructions of its own in today's processors, and takes half as long as BLAKE2b there.
    """
    return hashlib.sha256(body).digest()[:HASH_BYTES] + scope.encode() + b"\0" + key.encode()


def split(record_key: bytes) -> tuple[str, str, bytes]:
    """Return scope, key and body hash of a record's key."""
    scope, _, key = record_key[HASH_BYTES:].partition(b"\0")
    return scope.decode(), key.decode(), record_key[:HASH_BYTES]
