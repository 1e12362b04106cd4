"""The conservation equation of a live system: published = committed + deduplicated + dead-lettered + forgone + queued.

Each term has its own source: published from the lane's header, the settled four from the ledger, queued by walking the
records in the lane. `answered <= published` is checked besides, since a kill may fall between the two.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg

from engine import lanes, ledger
from engine.consumer import SealedConsumer
from engine.ring import Lane, LaneError, boot_id

ATTEMPTS: Final = 200
"""Looks at one lane until its words and the ledger stood still for the time of a look."""


class VerifyError(Exception):
    """A lane whose records cannot be counted, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Balance:
    """One lane's terms, in points."""

    lane: str
    published: int
    committed: int
    deduplicated: int
    dead_lettered: int
    forgone: int
    queued: int
    answered: int

    @property
    def residual(self) -> int:
        settled = self.committed + self.deduplicated + self.dead_lettered + self.forgone
        return self.published - settled - self.queued

    @property
    def holds(self) -> bool:
        return self.residual == 0 and self.answered <= self.published

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "residual": self.residual}


class Checked(NamedTuple):
    """The lanes of a folder: the balance of each; those of other databases, which have theirs; and those that could not
    be read, with the reason."""

    balances: list[Balance]
    elsewhere: dict[str, UUID]
    unreadable: dict[str, str]


def balances(connection: psycopg.Connection[Any], folder: Path) -> Checked:
    """Look at each lane, archived ones included.

    Raises LaneStoppedError for a database without an identity, OSError for a folder that cannot be listed.
    """
    database = ledger.identity(connection)
    found = Checked([], {}, {})
    seen: set[UUID] = set()
    # A lane that is archived while this looks is found there; one that is brought back, among the others once more.
    for path in chain.from_iterable(listed(folder) for listed in (lanes.lane_files, lanes.archived, lanes.lane_files)):
        try:
            lane = Lane(path)
        except (OSError, LaneError) as error:
            if not lanes.is_there(path):  # moved since it was listed, or removed
                continue
            found.unreadable[path.name] = str(error)
            continue
        try:
            if lane.uuid in seen:
                continue
            seen.add(lane.uuid)
            if lane.database in (None, database):
                found.balances.append(balance(connection, lane))
            else:
                found.elsewhere[path.name] = lane.database
        except (VerifyError, LaneError) as error:
            found.unreadable[path.name] = str(error)
        finally:
            lane.close()
    return found


def balance(connection: psycopg.Connection[Any], lane: Lane) -> Balance:
    """Look at ledger, header and records until all three are of one moment.

    The order makes it so: the ledger's position S first, then head and its counters, then the records from S to head.
    If those were freed and overwritten meanwhile, the walk finds no valid record, and we look again; if the tail says
    that none was freed, one is damaged. Raises VerifyError, LaneError.
    """
    for _ in range(ATTEMPTS):
        row = connection.execute(
            "SELECT position, committed_points, deduplicated_points, dead_lettered_points, forgone_points"
            " FROM ingest_progress WHERE lane = %s",
            [lane.uuid],
        ).fetchone()
        position, committed, deduplicated, dead_lettered, forgone = row or (0, 0, 0, 0, 0)
        answered = lane.answered_points
        head, published = lane.snapshot
        queued = _walk(lane, position, head)
        if queued is not None:
            settled = (committed, deduplicated, dead_lettered, forgone)
            return Balance(lane.path.name, published.points, *settled, queued, answered)
        if lane.tail <= position:  # what lies behind the tail nobody overwrites
            raise VerifyError(f"a record between {position} and {head} is damaged: keep the file")
        time.sleep(0.01)  # for the writer to get out of the way; ATTEMPTS times at most
    raise VerifyError(
        f"records between the ledger's position {position} and the tail {lane.tail} are overwritten: the lane moves too"
        " fast, verify again under less load; or the database went back in time, the writers' log says so then"
    )


def _walk(lane: Lane, position: int, head: int) -> int | None:
    """Count the points of the records from `position` to `head`; None if they are no longer all there."""
    if lane.boot != boot_id():
        records = SealedConsumer(lane).read(position, 1 << 62, 1 << 62)
        points = sum(record.points for record in records)
        for record in records:
            record.payload.release()
        return points
    return lane.points_between(position, head)


def total(parts: list[Balance]) -> Balance:
    """Return the sum over all lanes."""
    names = ("published", "committed", "deduplicated", "dead_lettered", "forgone", "queued", "answered")
    return Balance("total", *(sum(getattr(part, name) for part in parts) for name in names))


def deep(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Return (rows that the ledger says were committed or replayed, rows that telemetry has), of one snapshot.

    They agree as long as no retention, no purge of replayed dead letters and nobody else has changed rows.
    """
    row = connection.execute(
        "SELECT (SELECT coalesce(sum(committed_points), 0) FROM ingest_progress)"
        " + (SELECT count(*) FROM dead_letter WHERE replayed_at IS NOT NULL), (SELECT count(*) FROM telemetry)"
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])
