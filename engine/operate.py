"""Commands for the operator of a running system: verify, lanes, dead-letters, token, export, import."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg

from engine import dead_letters, lanes, ledger, migrate, policies, tokens, verify
from engine.consumer import Consumer, SealedConsumer
from engine.embedded import running_dsn
from engine.failpoints import ARMED, hit
from engine.ledger import LaneStoppedError
from engine.ring import Lane, LaneError, boot_id
from engine.settings import Settings

CLAIM_S: Final = 10.0
UNREADABLE: Final = "unreadable"
NO_NODE: Final = "-"
"""Stands in the ledger where a command made the row, and no node is known."""


class OperateError(Exception):
    """A command that cannot do what it was asked to; the text says why and what to do."""


@contextmanager
def connection(config: Settings) -> Iterator[psycopg.Connection[Any]]:
    """Connect to the database of the running service as its owner, also when that is the embedded one."""
    url = config.owner_url or running_dsn(config.home)
    if url is None:
        raise OperateError(
            f"no database: DATABASE_URL is not set, and no embedded PostgreSQL runs under {config.home}: start the"
            " service, or give this command the service's environment"
        )
    try:
        with migrate.connect(url, "orbitstream-operate") as opened:
            yield opened
    except psycopg.OperationalError as error:
        raise OperateError(f"cannot use the database: {' '.join(str(error).split())}") from error
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        raise OperateError("the database lacks this version's schema: run `orbitstream migrate`") from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise OperateError(
            f"{' '.join(str(error).split())}: set MIGRATION_DATABASE_URL to the account that owns the tables"
        ) from error
    except psycopg.Error as error:
        raise OperateError(f"the database refuses it: {' '.join(str(error).split())}") from error


def verify_command(config: Settings, options: argparse.Namespace) -> int:
    """Print the conservation equation for each lane and in total; exit 1 when it does not hold, or cannot be known."""
    lanes.expect(config.lane_dir)
    with connection(config) as database:
        try:
            checked = verify.balances(database, config.lane_dir)
        except LaneStoppedError as error:
            raise OperateError(str(error)) from error
        counted = verify.deep(database) if options.deep else None
    parts, elsewhere, unreadable = checked
    whole = verify.total(parts)
    fine = all(part.holds for part in parts) and not unreadable and (counted is None or counted[0] == counted[1])
    if options.json:
        report: dict[str, Any] = {"holds": fine, "lanes": [part.as_dict() for part in parts], "total": whole.as_dict()}
        report["lanes_of_another_database"] = {name: str(uuid) for name, uuid in elsewhere.items()}
        report["unreadable"] = unreadable
        if counted is not None:
            report["deep"] = {"ledger_rows": counted[0], "table_rows": counted[1]}
        print(json.dumps(report))
        return 0 if fine else 1
    for part in [*parts, whole]:
        forgone = f" + forgone {part.forgone}" if part.forgone else ""
        print(
            f"{part.lane}: published {part.published} = committed {part.committed} + deduplicated {part.deduplicated}"
            f" + dead-lettered {part.dead_lettered}{forgone} + queued {part.queued}, residual {part.residual}"
        )
    for name, uuid in elsewhere.items():
        print(f"{name}: not checked, it is of database {uuid}")
    for name, why in unreadable.items():
        print(f"{name}: not checked, {why}")
    if counted is not None:
        print(f"ledger says {counted[0]} rows, telemetry has {counted[1]}")
    return 0 if fine else 1


def lanes_command(config: Settings, options: argparse.Namespace) -> int:
    """List the lanes, or let one that was stopped go on."""
    lanes.expect(config.lane_dir)
    act = {"resume": resume, "adopt": adopt}.get(options.action)
    if act is not None:
        if options.lane is None:
            raise OperateError("which lane? `orbitstream lanes list` shows them")
        with connection(config) as database:
            try:
                print(act(database, config.lane_dir, options.lane))
            except (verify.VerifyError, LaneStoppedError) as error:
                raise OperateError(str(error)) from error
        return 0
    paths = [*lanes.lane_files(config.lane_dir), *lanes.archived(config.lane_dir)]
    rows = [_describe(path) for path in (paths if options.lane is None else [_find(config.lane_dir, options.lane)])]
    if options.json:
        print(json.dumps(rows))
    for row in rows if not options.json else []:
        if row["state"] == UNREADABLE:
            print(f"{row['name']:<42} {UNREADABLE}: {row['why']}")
            continue
        words = f"{row['state']:<8} {row['fill']:>6.1%} full {row['queued_points']:>10} queued"
        print(f"{row['name']:<42} {words}  uuid {row['uuid']}  database {row['database'] or '-'}")
    return 0


def _describe(path: Path) -> dict[str, Any]:
    try:
        lane = Lane(path)
    except (OSError, LaneError) as error:
        return {"name": path.name, "state": UNREADABLE, "why": str(error)}
    sealed = lane.boot != boot_id()
    state = "archived" if path.parent.name == lanes.ARCHIVE else "sealed" if sealed or lane.closed else "live"
    row = {
        "name": path.name,
        "uuid": str(lane.uuid),
        "state": state,
        "fill": 0.0 if state == "archived" else round(lane.fill, 4),
        "queued_points": 0 if state == "archived" else lane.queued_points,
        "published_points": lane.published.points,
        "answered_points": lane.answered_points,
        "database": str(lane.database) if lane.database else None,
    }
    lane.close()
    return row


def resume(database: psycopg.Connection[Any], folder: Path, wanted: str) -> str:
    """Let a lane go on after the database went back in time; returns what was done, in words.

    A live lane goes on from where it was drained to: what the restore took away of it is no longer in the lane, and is
    counted in the ledger as forgone. A sealed or archived lane, whose bytes never change, is drained again from where
    the ledger is. Raises LaneStoppedError, and changes nothing, for a lane of another database.
    """
    path = _find(folder, wanted)
    why = _why_not_ours(path, ledger.identity(database))
    if why is not None:
        raise LaneStoppedError(f"{path.name} stays stopped: {why}")
    was_archived = path.parent.name == lanes.ARCHIVE
    if was_archived:
        path = lanes.bring_back(path)
    consumer, lock = _claim(path)
    try:
        lane = consumer.lane
        if was_archived or isinstance(consumer, SealedConsumer):
            ledger.enter(database, lane, NO_NODE)
            consumer.resume()
            return f"{wanted}: drains again from where the ledger is"
        with database.transaction():
            if not ledger.catch_up(database, lane, NO_NODE):
                return f"{wanted}: nothing to do, the ledger is not behind it"
            forgone = _forgo(database, lane)
        return f"{wanted}: goes on from where it was drained to; {forgone} points of it went with the restore"
    finally:
        consumer.lane.close()
        lock.release()


def adopt(database: psycopg.Connection[Any], folder: Path, wanted: str) -> str:
    """Have this database take what waits in a lane of another one, which is gone for good; returns what was done.

    The lane's row comes before the word in its header: after a crash between them the lane is still the other's, and
    this can be done again. What the other database had settled is counted here as forgone, nothing of it is drained
    again, but for one transaction whose writer died between its COMMIT and its store of the tail: that is in both.
    Raises LaneStoppedError for an archived lane, in which nothing waits.
    """
    path, mine = _find(folder, wanted), ledger.identity(database)
    if _why_not_ours(path, mine) is None:
        return f"{wanted}: nothing to do, it is of no other database"
    if path.parent.name == lanes.ARCHIVE:
        raise LaneStoppedError(f"{wanted} is archived: nothing waits in it, the database that it is of had it all")
    consumer, lock = _claim(path)
    try:
        lane = consumer.lane
        consumer.close()
        with database.transaction():
            ledger.catch_up(database, lane, NO_NODE)
            _forgo(database, lane)
        former = lane.database
        if ARMED:
            hit("adopt-before-database")
        consumer.set_database(mine)
        return f"{wanted}: what waits in it is stored here now; what database {former} had of it counts as forgone"
    finally:
        consumer.lane.close()
        lock.release()


def _why_not_ours(path: Path, database: UUID) -> str | None:
    lane = Lane(path)
    try:
        return ledger.of_another_database(lane, database)
    finally:
        lane.close()


def _forgo(database: psycopg.Connection[Any], lane: Lane) -> int:
    """Count what was settled of a lane and is not in this database as forgone; return how many points that are."""
    forgone = max(0, verify.balance(database, lane).residual)  # counters that outlived a power loss may be of before
    ledger.forgo(database, lane, forgone)
    return forgone


def _find(folder: Path, wanted: str) -> Path:
    for path in [*lanes.lane_files(folder), *lanes.archived(folder)]:
        if wanted in (path.name, path.stem, _describe(path).get("uuid")):
            return path
    raise OperateError(f"there is no lane {wanted} in {folder}: `orbitstream lanes list` shows them")


def _claim(path: Path) -> tuple[Consumer, lanes.Lock]:
    """Take the consumer end; a writer that stopped the lane lets go of it within moments."""
    deadline = time.monotonic() + CLAIM_S
    while True:
        claimed = lanes.claim_consumer(path)
        if claimed is not None:
            return claimed
        if time.monotonic() > deadline:
            raise OperateError(f"{path.name} is being drained by a writer: only a stopped lane is resumed")
        time.sleep(0.05)  # flock has no time-out; a writer lets go within a scan


def dead_letters_command(config: Settings, options: argparse.Namespace) -> int:
    """List, replay or purge dead letters."""
    with connection(config) as database:
        if options.action == "purge":
            count = dead_letters.purge(database, options.ids, replayed=not options.ids)
            print(f"purged {count} dead letters")
            return 0
        if options.action == "replay":
            stored, refused = dead_letters.replay(database, options.ids or None)
            for line in refused:
                print(f"refused again: {line}")
            print(f"replayed {stored} dead letters, {len(refused)} refused again")
            return 1 if refused else 0
        if options.ids:
            raise OperateError("list shows all, the newest first: give ids to replay or purge")
        letters = dead_letters.waiting(database, options.limit)
    for letter in letters:
        if options.json:
            print(json.dumps(letter, default=str))
        else:
            identity = f"{letter['point']['satellite_id']} {letter['point']['time']}"
            print(f"{letter['id']}  {letter['reason']} {letter['sqlstate'] or ''}  {identity}  {letter['detail']}")
    if not letters and not options.json:
        print("no dead letters")
    return 0


def token_command(config: Settings, options: argparse.Namespace) -> int:
    """Create, list or revoke bearer tokens; a service sees the change within a second."""
    path = config.tokens_file
    if path is None:
        raise OperateError("set ORBITSTREAM_TOKENS_FILE, for this command and for the service")
    if options.action == "list":
        for token in sorted(tokens.load(path).values(), key=lambda each: each.name):
            quota = "no quota" if token.quota is None else f"{token.quota:g} points/s"
            print(f"{token.name}  {','.join(token.scopes)}  {quota}  created {token.created}")
        return 0
    if options.name is None:
        raise OperateError(f"say whose: `orbitstream token {options.action} NAME`")
    if options.action == "revoke":
        if not tokens.revoke(path, options.name):
            raise OperateError(f"there is no token {options.name}: `orbitstream token list` shows them")
        print(f"revoked {options.name}")
        return 0
    if options.quota is not None and not 0 < options.quota < float("inf"):
        raise OperateError(f"--quota {options.quota:g} must be points/s above 0")
    scopes = sorted(set(options.scope or ["write"]))
    secret = tokens.create(path, options.name, scopes, options.quota)
    try:
        print(f"{options.name} may {' and '.join(scopes)}; shown this once only:", file=sys.stderr)
        print(secret, flush=True)
    except OSError:  # a token that nobody has seen is of no use, and keeps its name from others
        tokens.revoke(path, options.name)
        raise
    return 0


def instant(text: str) -> datetime:
    """Read a date, or a date and time, as of UTC unless it has an offset; for argparse."""
    try:
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no date: write 2026-01-31 or 2026-01-31T12:00:00Z") from None


def export_command(config: Settings, options: argparse.Namespace) -> int:
    """Write points to Parquet files."""
    from engine import archive  # pyarrow: 20 MB that no other command needs

    with connection(config) as database:
        try:
            count = archive.export(database, options.begin, options.end, options.out, _progress)
        except archive.ArchiveError as error:
            raise OperateError(str(error)) from error
    print(f"exported {count} points to {options.out}, each file compared with the table")
    return 0


def import_command(config: Settings, options: argparse.Namespace) -> int:
    """Store the points of an export, each once however often this is repeated."""
    from engine import archive

    with connection(config) as database:
        try:
            keep = policies.retention(database) if migrate.find_edition(database).name == "timescale" else None
            keep = keep or timedelta(seconds=config.retention)
            stored, before = archive.restore(
                database, options.dir, _progress, keep, beside=options.beside, again=options.again
            )
        except archive.ArchiveError as error:
            raise OperateError(str(error)) from error
    print(f"imported {stored} points, {before} were imported before")
    return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr)
