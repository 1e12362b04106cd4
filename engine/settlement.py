"""Idempotency keys: which records of a transaction are settled for the first time.

A keyed record carries the hash of its body and the client's key; the key's row in the database names the record that
came first with it. Firstly: the row is inserted, or locked, in the transaction that settles the record. Given that, two
writers with the same key settle one after the other, and the second sees what the first one did.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, Protocol
from uuid import UUID

import psycopg

from engine.dead_letters import KEY_EXPIRED, KEY_REUSED
from engine.keys import split

KEPT: Final = timedelta(days=7)
"""How long the database remembers a key."""
OLDEST_UNKNOWN_US: Final = 6 * 86_400_000_000
"""A keyed record that waited longer might be a repetition of one whose key is forgotten: it is set aside."""

FRESH: Final = "fresh"
DUPLICATE: Final = "duplicate"


class KeyedRecord(Protocol):
    """A record with its key; `key` is empty when the client gave none."""

    @property
    def end(self) -> int: ...
    @property
    def key(self) -> bytes: ...
    @property
    def time_us(self) -> int: ...


def settle(cursor: psycopg.Cursor[Any], lane: UUID, records: Sequence[KeyedRecord], now_us: int) -> list[str]:
    """Return a verdict for each record: FRESH, DUPLICATE, or the reason why it becomes a dead letter.

    Records without a key are FRESH. Runs in the transaction of the records; keys are taken in sorted order, so that
    two writers cannot wait for each other.
    """
    first: dict[tuple[str, str], KeyedRecord] = {}
    for record in records:
        if record.key:
            first.setdefault(split(record.key)[:2], record)
    if not first:
        return [FRESH] * len(records)
    known: dict[tuple[str, str], tuple[bytes, bool]] = {}
    for (scope, key), record in sorted(first.items(), key=lambda item: item[0]):
        found = cursor.execute(
            "INSERT INTO idempotency_key AS known (scope, key, body_hash, lane, position) VALUES (%s, %s, %s, %s, %s)"
            " ON CONFLICT (scope, key) DO UPDATE SET created_at = known.created_at"
            " RETURNING body_hash, lane, position",
            [scope, key, split(record.key)[2], lane, record.end],
        ).fetchone()
        assert found is not None
        known[scope, key] = (bytes(found[0]), (found[1], found[2]) == (lane, record.end))
    return [_verdict(record, first, known, now_us) for record in records]


def _verdict(
    record: KeyedRecord,
    first: dict[tuple[str, str], KeyedRecord],
    known: dict[tuple[str, str], tuple[bytes, bool]],
    now_us: int,
) -> str:
    if not record.key:
        return FRESH
    scope, key, body_hash = split(record.key)
    known_hash, ours = known[scope, key]
    if ours and first[scope, key] is record:
        return KEY_EXPIRED if now_us - record.time_us > OLDEST_UNKNOWN_US else FRESH
    return DUPLICATE if known_hash == body_hash else KEY_REUSED
