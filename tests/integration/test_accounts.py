"""The accounts of deploy/compose.yaml on a real server: what each can do and must not, and where no password shows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from engine import data_folder, migrate, settings
from engine.embedded import find_installations
from tests.conftest import EDITIONS, GIVEN_URL
from tests.servers import editions
from tests.service import POINT, Service, command_line, eventually
from tests.unit.test_compose import environment, make_passwords

ROWS = "SELECT now(), 'A', 1, 1, 1, now(), false"
POINT_COLUMNS = (
    "(time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm, received_at, is_anomaly)"
)


@dataclass(frozen=True)
class Accounts:
    """A database set up as the container of compose.yaml does it, and migrated; its accounts by their passwords."""

    superuser: str
    secrets: Path

    def url(self, compose_url: str) -> str:
        """Return a URL of compose.yaml with our server in the place of `db`."""
        parts = conninfo_to_dict(self.superuser)
        return make_conninfo(compose_url, **{key: parts[key] for key in ("host", "port", "dbname")})

    @property
    def migrator(self) -> str:
        return self.url(environment("orbitstream")["MIGRATION_DATABASE_URL"])

    @property
    def service(self) -> str:
        return self.url(environment("orbitstream")["DATABASE_URL"])

    @property
    def grafana(self) -> str:
        password = (self.secrets / "grafana_database_password").read_text()
        return make_conninfo(self.url("postgresql://"), user="orbitstream_grafana", password=password)

    def passwords(self) -> dict[str, str]:
        """Return the passwords of the service file by section."""
        words = (self.secrets / "pg_service.conf").read_text().replace("[", "").replace("]", "").split()
        return {name: line.removeprefix("password=") for name, line in zip(words[::2], words[1::2], strict=True)}


@pytest.fixture(scope="module", params=[] if GIVEN_URL else [name for name in EDITIONS if name != "timescale"])
def accounts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Accounts]:
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "deploy").mkdir()
    assert make_passwords(checkout) == 0
    secrets = checkout / "deploy" / "secrets"
    with getattr(editions, request.param)() as server:
        url = make_conninfo(server, dbname="orbitstream_accounts")
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute("CREATE DATABASE orbitstream_accounts")
        with psycopg.connect(url, autocommit=True) as connection:
            let_in_by_password(connection)
            if request.param == "apache":
                connection.execute("CREATE EXTENSION timescaledb")  # as the image does before our script
        for _ in range(2):  # a second time, as after a change of passwords
            run_accounts_sql(url, secrets)
        made = Accounts(url, secrets)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PGSERVICEFILE", str(secrets / "pg_service.conf"))
            migrate.migrate(settings.load({}), made.migrator, lambda _: None)
            yield made


def let_in_by_password(connection: psycopg.Connection[Any]) -> None:
    """Add our accounts to pg_hba.conf: the embedded server knows its own by their user of the system."""
    [path] = connection.execute("SHOW hba_file").fetchone() or [""]
    if os.access(path, os.W_OK):
        names = "orbitstream_migrator,orbitstream_service,orbitstream_grafana"
        with open(path, "a") as file:
            file.write(f"local all {names} scram-sha-256\n")
        connection.execute("SELECT pg_reload_conf()")


def run_accounts_sql(url: str, secrets: Path) -> None:
    psql = find_installations()[0].bindir / "psql"
    command = [psql, "-X", "-v", "ON_ERROR_STOP=1", "-v", f"secrets={secrets}", "-d", url]
    subprocess.run([*command, "-f", data_folder("deploy") / "accounts.sql"], check=True, capture_output=True)


def test_the_service_stores_points_as_its_account_and_grafana_reads_them(accounts: Accounts, lane_dir: Path) -> None:
    with Service(accounts.service, lane_dir) as service:
        service.start(MIGRATION_DATABASE_URL=accounts.migrator)
        assert service.post("/telemetry", POINT | {"satellite_id": "seen-by-grafana"})[0] == 202
        with psycopg.connect(accounts.grafana, autocommit=True) as connection:
            stored = "SELECT count(*) FROM telemetry WHERE satellite_id = 'seen-by-grafana'"
            eventually(lambda: connection.execute(stored).fetchone() == (1,), what="one point")
        users = "SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name LIKE 'orbitstream-writer%'"
        with psycopg.connect(accounts.superuser) as connection:
            assert connection.execute(users).fetchall() == [("orbitstream_service",)]
        denied = service.run("dead-letters", "purge")
        assert (denied.returncode, denied.stderr.count("\n")) == (1, 1)
        assert "set MIGRATION_DATABASE_URL" in denied.stderr
        purged = service.run("dead-letters", "purge", MIGRATION_DATABASE_URL=accounts.migrator)
        assert (purged.returncode, purged.stdout) == (0, "purged 0 dead letters\n")
        assert service.stop() == 0
        assert "permission denied" not in service.output()


MUST_NOT = {
    "service": [
        "DELETE FROM telemetry",
        "UPDATE telemetry SET is_anomaly = true",
        "TRUNCATE telemetry",
        "DROP TABLE telemetry",
        "ALTER TABLE telemetry ADD COLUMN mine int",
        "CREATE INDEX ON telemetry (received_at)",
        "DELETE FROM ingest_progress",
        "DELETE FROM idempotency_key",
        "DELETE FROM dead_letter",
        "UPDATE dead_letter SET replayed_at = now()",
        "DELETE FROM anomaly_event",
        "DELETE FROM engine_stats",
        "UPDATE orbitstream_database SET created_at = now()",
        "INSERT INTO orbitstream_migration VALUES (0, '', '', '')",
        "CREATE TABLE mine ()",
        "CREATE SCHEMA mine",
        "CREATE ROLE mine",
        "CREATE EXTENSION pg_buffercache",
        "GRANT orbitstream_owner TO orbitstream_service",
        "SET ROLE orbitstream_owner",
        "ALTER ROLE orbitstream_migrator PASSWORD 'mine'",
        "ALTER SYSTEM SET fsync = off",
        "COPY telemetry TO PROGRAM 'true'",
        "SELECT pg_read_file('postgresql.conf')",
        "SELECT rolpassword FROM pg_authid",
    ],
    "grafana": [
        "DELETE FROM telemetry",
        f"INSERT INTO telemetry {POINT_COLUMNS} {ROWS}",
        "INSERT INTO ingest_progress (lane, node) VALUES (gen_random_uuid(), '')",
        "UPDATE dead_letter SET replayed_at = now()",
        "SELECT * FROM idempotency_key",
        "SELECT * FROM orbitstream_migration",
        "CREATE TABLE mine ()",
        "CREATE TEMPORARY TABLE mine ()",
        "SET ROLE orbitstream_ingest",
        "COPY telemetry TO PROGRAM 'true'",
        "SELECT pg_read_file('postgresql.conf')",
        "SELECT rolpassword FROM pg_authid",
    ],
    "migrator": [
        "ALTER ROLE orbitstream_migrator SUPERUSER",
        "CREATE ROLE mine SUPERUSER",
        "SELECT rolpassword FROM pg_authid",
        "COPY telemetry TO PROGRAM 'true'",
        "ALTER SYSTEM SET fsync = off",
    ],
}
MUST = {
    "service": [
        f"INSERT INTO telemetry {POINT_COLUMNS} {ROWS}",
        "INSERT INTO ingest_progress (lane, node) VALUES (gen_random_uuid(), 'mine') ON CONFLICT DO NOTHING",
        "SELECT position FROM ingest_progress FOR UPDATE",
        "UPDATE ingest_progress SET flushes = flushes + 1",
        "INSERT INTO idempotency_key (scope, key, body_hash, lane, position)"
        " VALUES ('', 'mine', '', gen_random_uuid(), 0) ON CONFLICT (scope, key) DO UPDATE SET created_at = now()",
        "INSERT INTO dead_letter (reason, detail, point, lane, position) VALUES ('', '', '{}', gen_random_uuid(), 0)",
        "SELECT id FROM orbitstream_database",
        "INSERT INTO engine_stats (time, node, process, name, first_of_minute, alive)"
        " VALUES (now(), '', 'writer', '', false, true)",
        "INSERT INTO anomaly_event (satellite_id, channel, severity, kind, limit_value, onset, peak, peak_at, points)"
        " VALUES ('A', '', 'warning', 'below', 1, now(), 0, now(), 1)",
        "UPDATE anomaly_event SET cleared_at = now()",
    ],
    "grafana": [
        "SELECT count(*) FROM telemetry",
        "SELECT * FROM ingest_progress",
        "SELECT * FROM dead_letter",
        "SELECT FROM engine_stats, anomaly_event, fleet_stats, database_stats, storage_stats, capacity, background_job",
        "SELECT query FROM slow_query",
        "SELECT datname, numbackends FROM pg_stat_database",
    ],
    "migrator": [
        "ALTER TABLE telemetry ADD COLUMN mine int",
        "CREATE TABLE mine ()",
        "DELETE FROM telemetry",
        "DELETE FROM idempotency_key",
        "UPDATE dead_letter SET replayed_at = now()",
    ],
}


@pytest.mark.parametrize("account", ["service", "grafana", "migrator"])
def test_an_account_can_do_what_it_must_and_no_more(accounts: Accounts, account: str) -> None:
    """Each in a transaction that is rolled back; Grafana's after switching off what only protects from mistakes."""
    wrong = []
    with psycopg.connect(getattr(accounts, account)) as connection:
        for allowed, statements in ((True, MUST[account]), (False, MUST_NOT[account])):
            for statement in statements:
                connection.execute("SET TRANSACTION READ WRITE")
                try:
                    connection.execute(statement.encode())
                    outcome = "done"
                except psycopg.Error as error:
                    outcome = error.sqlstate or "closed"
                connection.rollback()
                # A statement that cannot run in a transaction is refused for that first: its rights are tried alone.
                if outcome == "25001":
                    outcome = alone(getattr(accounts, account), statement)
                if outcome != ("done" if allowed else "42501"):
                    wrong.append((statement, outcome))
    assert wrong == []


def alone(url: str, statement: str) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        try:
            connection.execute(statement.encode())
        except psycopg.Error as error:
            return error.sqlstate or "closed"
    return "done"


def test_every_table_is_listed_in_rights_sql(accounts: Accounts) -> None:
    """A new table nobody thought of: the service would stop at it, or Grafana show an error."""
    ours = (
        "SELECT relname FROM pg_class JOIN pg_roles ON pg_roles.oid = relowner"
        " WHERE rolname = 'orbitstream_migrator' AND relkind IN ('r', 'p', 'v', 'm')"
        " AND relnamespace = 'public'::regnamespace"
    )
    with psycopg.connect(accounts.superuser) as connection:
        found = {name for (name,) in connection.execute(ours.encode())} - {"orbitstream_migration"}
    listed = (data_folder("sql") / migrate.RIGHTS).read_text()
    assert len(found) >= 5
    assert {name for name in found if f"('{name}'," not in listed} == set()


def test_rights_follow_roles_that_are_made_later(accounts: Accounts) -> None:
    """An account that may not create roles migrates first; the administrator makes them; `migrate` gives the rights."""
    with psycopg.connect(accounts.superuser, autocommit=True) as connection:
        connection.execute("CREATE ROLE plain_user LOGIN PASSWORD 'of-plain-user'")
        connection.execute("CREATE DATABASE plain_users OWNER plain_user")
        for role in migrate.ROLES:  # out of the way: roles belong to all databases of a server
            connection.execute(f"ALTER ROLE {role} RENAME TO {role}_aside")
    said: list[str] = []
    url = make_conninfo(accounts.superuser, dbname="plain_users", options="-c role=plain_user")
    try:
        migrate.migrate(settings.load({}), url, said.append)
        assert said[-1].startswith("this account may not create the roles orbitstream_owner, orbitstream_ingest")
    finally:
        with psycopg.connect(accounts.superuser, autocommit=True) as connection:
            for role in migrate.ROLES:
                connection.execute(f"ALTER ROLE {role}_aside RENAME TO {role}")
    said.clear()
    migrate.migrate(settings.load({}), url, said.append)
    assert not [line for line in said if "applied" in line or "may not" in line]
    with psycopg.connect(make_conninfo(accounts.superuser, dbname="plain_users")) as connection:
        rights = "SELECT has_table_privilege('orbitstream_ingest', 'telemetry', 'INSERT'), "
        rights += "has_table_privilege('orbitstream_read', 'telemetry', 'SELECT')"
        assert connection.execute(rights.encode()).fetchone() == (True, True)
    with psycopg.connect(accounts.superuser, autocommit=True) as connection:
        connection.execute("DROP DATABASE plain_users WITH (FORCE)")
        connection.execute("DROP ROLE plain_user")


def test_grafana_cannot_write_by_mistake_nor_run_for_ever(accounts: Accounts) -> None:
    with psycopg.connect(accounts.grafana, autocommit=True) as connection:
        assert connection.execute("SHOW default_transaction_read_only").fetchone() == ("on",)
        assert connection.execute("SHOW statement_timeout").fetchone() == ("30s",)


def test_nobody_gets_in_without_a_password(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGSERVICEFILE")
    for name in ("orbitstream_service", "orbitstream_migrator", "orbitstream_grafana"):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(make_conninfo(accounts.url("postgresql://"), user=name))


@pytest.mark.parametrize("accounts", [] if GIVEN_URL else EDITIONS[:1], indirect=True, scope="module")
def test_a_password_shows_nowhere(accounts: Accounts, lane_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In DATABASE_URL itself, where it is hardest to hide, at the most talkative level; database up, away, wrong."""
    monkeypatch.delenv("PGSERVICEFILE")
    passwords = accounts.passwords()
    url = make_conninfo(accounts.url("postgresql://"), user="orbitstream_service", password=passwords["service"])
    owner = make_conninfo(accounts.url("postgresql://"), user="orbitstream_migrator", password=passwords["migrator"])
    wrong = make_conninfo(url, password="not-" + passwords["service"])
    down = f"postgresql://orbitstream_service:{passwords['service']}@127.0.0.1:1/orbitstream"
    shown = []
    with Service(url, lane_dir) as service:
        more = {"MIGRATION_DATABASE_URL": owner, "LOG_LEVEL": "debug", "ORBITSTREAM_DRAIN_TIMEOUT": "0s"}
        more["ORBITSTREAM_WORKERS"] = "1"
        for database, said in ((url, "connected to"), (wrong, "password authentication failed")):
            service.start(healthy=database == url, **more, DATABASE_URL=database)
            assert service.post("/telemetry", POINT)[0] == 202
            eventually(lambda said=said: said in service.output(), 30, what=said)
            shown += [str(service.get(path)[1]) for path in ("/health", "/metrics")]
            shown += [command_line(pid) for pid in service.everything()]
            service.stop()
        for command in (["status"], ["verify"], ["migrate"]):
            ended = service.run(*command, DATABASE_URL=down)
            shown += [ended.stdout, ended.stderr]
        assert "refused" in shown[-1]
        for broken in (down.replace(":1/", ":99999/"), f"host=a {passwords['service']}", down + "?nonsense=1"):
            ended = service.run("serve", DATABASE_URL=broken)
            assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
            shown += [ended.stderr]
        on_command_line = service.run("serve", "--database-url", down)
        assert on_command_line.returncode == 2
        assert "has a password on the command line" in on_command_line.stderr
        shown += [on_command_line.stderr, service.output()]
    assert len("".join(shown)) > 5000
    for password in passwords.values():
        assert [text for text in shown if password in text] == []
