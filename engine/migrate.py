"""Bring a database to the schema of this version: the files of sql/, in order, each once, each in one transaction.

Then, each time, sql/rights.sql: a role that the administrator made since then has its rights at the next `migrate`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from engine import data_folder, policies
from engine.settings import Settings

ADVISORY_LOCK: Final = 0x6F726269745F6D67  # "orbit_mg": held for the whole of a migration
LOCK_TIMEOUT_S: Final = 60
RIGHTS: Final = "rights.sql"
ROLES: Final = ("orbitstream_owner", "orbitstream_ingest", "orbitstream_read")

_FILE = re.compile(r"(\d{4})_(\w+)\.sql")
_NAME = "(?:any|plain|apache|timescaledb|timescale)"
_HEADER = re.compile(rf"-- edition: ({_NAME}(?:, {_NAME})*)\n")

_OFFERS: Final = {
    "plain": (
        "a table with indexes, the aggregates as views; retention by the service",
        "chunks, columnstore, continuous aggregates: install TimescaleDB, create the extension in a new database",
    ),
    "apache": (
        "a hypertable with indexes, the aggregates as views; retention by the service",
        "columnstore, continuous aggregates: install TimescaleDB under the timescale license (its own packages or "
        "images), then migrate again",
    ),
    "timescale": (
        "a hypertable in the columnstore, continuous aggregates, policies for refresh, compression and retention",
        "",
    ),
}


class MigrationError(Exception):
    """A database that cannot be migrated; the text says what to do."""


class MigrationBusyError(MigrationError):
    """Somebody else migrates it."""


@dataclass(frozen=True, slots=True)
class Edition:
    """What the server can do. `name` is `plain`, `apache` or `timescale`."""

    name: str
    server: str
    timescaledb: str | None

    def fits(self, wanted: str) -> bool:
        """Tell whether a migration file for `wanted`, names joined by commas, is meant for this server."""
        mine = {"any", self.name} | ({"timescaledb"} if self.timescaledb is not None else set())
        return not mine.isdisjoint(wanted.split(", "))

    @property
    def offers(self) -> list[str]:
        """What is used of this server, and what it lacks and how to get that; one line each."""
        has, lacks = _OFFERS[self.name]
        return [f"enables: {has}", *([f"lacks: {lacks}"] if lacks else [])]

    def __str__(self) -> str:
        if self.timescaledb is None:
            return f"PostgreSQL {self.server} without TimescaleDB: plain table, no chunks, no columnstore"
        if self.name == "apache":
            offers = "apache license: hypertable, no columnstore"
        else:
            offers = "timescale license: all features"
        return f"PostgreSQL {self.server} with TimescaleDB {self.timescaledb} ({offers})"


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of sql/."""

    version: int
    name: str
    edition: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations(folder: Path | None = None) -> list[Migration]:
    """Read sql/ in order of version; raises MigrationError for a file that is not headed by its edition."""
    found = []
    for path in sorted((folder or data_folder("sql")).glob("*.sql")):
        if path.name == RIGHTS:
            continue
        named, text = _FILE.fullmatch(path.name), path.read_text()
        header = _HEADER.match(text)
        if named is None or header is None:
            raise MigrationError(f"{path} must be named 0001_what.sql and begin with '-- edition: ...'")
        found.append(Migration(int(named[1]), named[2], header[1], text))
    return found


def find_edition(connection: psycopg.Connection[Any]) -> Edition:
    """Ask the server what it is; a capability is never read from a version number."""
    row = connection.execute(
        "SELECT current_setting('server_version'), (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'),"
        " current_setting('timescaledb.license', true)"
    ).fetchone()
    assert row is not None
    server, timescaledb, license_name = row
    name = "plain" if timescaledb is None else "timescale" if license_name == "timescale" else "apache"
    return Edition(name, server.split()[0], timescaledb)


def connect(url: str, application: str) -> psycopg.Connection[Any]:
    """Open a connection for schema work and chores, in autocommit; it prepares nothing, so that any pooler will do."""
    return psycopg.connect(
        url,
        autocommit=True,
        connect_timeout=5,
        application_name=application,
        client_encoding="utf8",
        prepare_threshold=None,
    )


def on_this_machine(connection: psycopg.Connection[Any]) -> bool:
    """Tell whether the server is one of this machine, whose processes and disks are to be seen from here."""
    host = connection.info.host
    return host.startswith("/") or host in ("localhost", "127.0.0.1", "::1")


def pending(connection: psycopg.Connection[Any], edition: Edition) -> list[Migration]:
    """Return the migrations that this database still needs; raises MigrationError if what it has is not ours."""
    known = [migration for migration in migrations() if edition.fits(migration.edition)]
    row = connection.execute("SELECT to_regclass('orbitstream_migration') IS NOT NULL").fetchone()
    if row is None or not row[0]:
        return known
    applied = dict(connection.execute("SELECT version, checksum FROM orbitstream_migration").fetchall())
    for migration in known:
        if applied.get(migration.version, migration.checksum) != migration.checksum:
            raise MigrationError(
                f"migration {migration.version:04d} {migration.name} is in the database in another form: its file was "
                "changed after it had been applied; restore the file, or start with a new database"
            )
    newest = max((migration.version for migration in migrations()), default=0)
    if max(applied, default=0) > newest:
        raise MigrationError(
            f"the database is at version {max(applied)}, this program knows {newest}: install the newer OrbitStream"
        )
    return [migration for migration in known if migration.version not in applied]


def migrate(settings: Settings, url: str, say: Callable[[str], None]) -> Edition:
    """Apply what is pending, alone (an advisory lock keeps others out), and return the edition.

    Each migration is one transaction: one that fails leaves the version before it in place. Raises MigrationError, or
    psycopg.OperationalError when the database cannot be reached.
    """
    try:
        return _migrate(settings, url, say)
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        raise MigrationError(f"the migrating account cannot do what it must: {_first_line(error)}") from error


def _migrate(settings: Settings, url: str, say: Callable[[str], None]) -> Edition:
    with connect(url, "orbitstream-migrate") as connection:
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
        try:
            connection.execute("SELECT pg_advisory_lock(%s)", [ADVISORY_LOCK])
        except psycopg.errors.LockNotAvailable as error:
            raise MigrationBusyError(
                f"another migration has been running for {LOCK_TIMEOUT_S} s: wait for it"
            ) from error
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise MigrationError(f"the database's encoding is {encoding}: create it with ENCODING 'UTF8'")
        _enable_timescaledb(connection, say)
        edition = find_edition(connection)
        for line in (str(edition), *edition.offers):
            say(line)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS orbitstream_migration (version integer PRIMARY KEY, name text NOT NULL,"
            " checksum text NOT NULL, edition text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        connection.execute(
            "SELECT set_config('orbitstream.chunk_interval', %s, false)", [f"{settings.chunk_interval:.0f} seconds"]
        )
        for migration in pending(connection, edition):
            _apply(connection, migration, edition)
            say(f"applied {migration.version:04d} {migration.name}")
        if edition.timescaledb is not None:
            policies.settle(connection, settings, edition.name)
        _grant_rights(connection, say)
        return edition


def _apply(connection: psycopg.Connection[Any], migration: Migration, edition: Edition) -> None:
    try:
        with connection.transaction():
            connection.execute(migration.sql.encode())
            connection.execute(
                "INSERT INTO orbitstream_migration (version, name, checksum, edition) VALUES (%s, %s, %s, %s)",
                [migration.version, migration.name, migration.checksum, edition.name],
            )
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        raise MigrationError(
            f"migration {migration.version:04d} {migration.name} failed and was undone: {_first_line(error)}"
        ) from error


def _grant_rights(connection: psycopg.Connection[Any], say: Callable[[str], None]) -> None:
    """Make the three roles where this account may, and give those that are there their rights."""
    with connection.transaction():
        connection.execute((data_folder("sql") / RIGHTS).read_bytes())
    found = {name for (name,) in connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [[*ROLES]])}
    if missing := [name for name in ROLES if name not in found]:
        say(
            f"this account may not create the roles {', '.join(missing)}: where service and Grafana are to have "
            "accounts of their own, let an administrator create them, then migrate again"
        )


def _enable_timescaledb(connection: psycopg.Connection[Any], say: Callable[[str], None]) -> None:
    """Create the extension where the server offers it; a server that refuses is used as plain PostgreSQL."""
    available = connection.execute(
        "SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb' AND installed_version IS NULL"
    ).fetchone()
    if available is None or _applied_any(connection):
        return
    try:
        connection.execute("CREATE EXTENSION timescaledb CASCADE")
    except psycopg.Error as error:
        with suppress(psycopg.Error):
            connection.rollback()
        say(f"TimescaleDB is on the server but cannot be used here: {_first_line(error)}")
        if connection.closed:  # without shared_preload_libraries the extension ends the session
            raise MigrationError(
                "the server has TimescaleDB but does not load it: add timescaledb to shared_preload_libraries"
            ) from error


def _applied_any(connection: psycopg.Connection[Any]) -> bool:
    row = connection.execute("SELECT to_regclass('orbitstream_migration') IS NOT NULL").fetchone()
    return bool(row and row[0])


def _first_line(error: psycopg.Error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
