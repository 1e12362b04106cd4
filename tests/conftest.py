"""Fixtures: real servers for the whole run, an empty database for each test, and the service as real processes.

ORBITSTREAM_TEST_EDITIONS says which editions of the database to run on: `plain` unless told otherwise, or
`plain,apache,timescale`. ORBITSTREAM_TEST_DATABASE_URL runs the tests on a server of yours instead: an account that may
create databases and roles.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from engine import migrate
from tests import long_run
from tests.servers import editions
from tests.service import Service, folder_on_disk

GIVEN_URL = os.environ.get("ORBITSTREAM_TEST_DATABASE_URL")
EDITIONS = os.environ.get("ORBITSTREAM_TEST_EDITIONS", "plain").split(",")
SERVERS = ["given"] if GIVEN_URL else [edition for edition in EDITIONS if edition != "timescale"]

on_each_edition = pytest.mark.parametrize("server", SERVERS, indirect=True, scope="session")
"""For a test of what depends on the server: tables, COPY, retention. The others run on one edition."""

_covered: set[str] = set()
_edition_of: dict[str, str] = {}  # by the URL of the server


def pytest_configure() -> None:
    unknown = set(EDITIONS) - set(editions.ALL)
    if unknown:
        raise pytest.UsageError(f"ORBITSTREAM_TEST_EDITIONS: {', '.join(unknown)} is none of {', '.join(editions.ALL)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("database editions covered")
    for line in sorted(_covered):
        terminalreporter.write_line(line)
    missing = sorted(set(editions.ALL) - set(EDITIONS))
    if missing and not GIVEN_URL:
        terminalreporter.write_line(f"not asked for: {', '.join(missing)} (ORBITSTREAM_TEST_EDITIONS)")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    long_run.write(exitstatus)
    if hasattr(session.config, "workeroutput"):  # one of several processes (-n): the first one prints
        session.config.workeroutput["covered"] = sorted(_covered)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _covered.update(getattr(node, "workeroutput", {}).get("covered", ()))


@pytest.fixture(scope="session")
def server_of() -> Iterator[Callable[[str], str]]:
    """Give the URL of an edition's server, started when it is first asked for and stopped after the last test."""
    running: dict[str, str] = {}
    with ExitStack() as stack:

        def url(edition: str) -> str:
            if edition not in running:
                running[edition] = GIVEN_URL or stack.enter_context(getattr(editions, edition)())
                _edition_of[running[edition]] = edition
            return running[edition]

        yield url


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, server_of: Callable[[str], str]) -> str:
    """The URL of a database on a server where others may be created: the first edition's, or with `on_each_edition`."""
    if not SERVERS:
        pytest.skip("no edition was asked for whose server has several databases (ORBITSTREAM_TEST_EDITIONS)")
    return server_of(getattr(request, "param", SERVERS[0]))


@contextmanager
def empty_database(server: str, test: str) -> Iterator[str]:
    """Yield the URL of a new database for `test`, and note its edition as covered."""
    name = f"test_{os.getpid()}_{zlib.crc32(test.encode())}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        url = psycopg.conninfo.make_conninfo(server, dbname=name)
        yield url
        _note(url, _edition_of[server])
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _note(url: str, asked: str) -> None:
    """Count an edition as covered if the test's database is of it: a TimescaleDB server also has databases without."""
    with psycopg.connect(url, autocommit=True) as connection:
        edition = migrate.find_edition(connection)
    if asked in (edition.name, "given"):
        _covered.add(f"{edition.name}: {edition}")


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database of this test's own."""
    with empty_database(server, request.node.nodeid) as url:
        yield url


@pytest.fixture(params=["given"] if GIVEN_URL else EDITIONS)
def any_database(request: pytest.FixtureRequest, server_of: Callable[[str], str]) -> Iterator[str]:
    """The URL of an empty database of each edition asked for; for migrations and queries, one connection at a time."""
    if request.param == "timescale":
        with editions.timescale() as url:
            yield url
            _note(url, "timescale")
    else:
        with empty_database(server_of(request.param), request.node.nodeid) as url:
            yield url


@pytest.fixture
def lane_dir() -> Iterator[Path]:
    """A lane directory of this test's own, in memory."""
    folder = Path(tempfile.mkdtemp(prefix="os-lanes-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def disk_dir() -> Iterator[Path]:
    """A folder of this test's own that is on a disk."""
    with folder_on_disk() as folder:
        yield folder


@pytest.fixture
def service(database: str, lane_dir: Path) -> Iterator[Service]:
    """`orbitstream serve`, not started yet, over a database and a lane directory of its own."""
    with Service(database, lane_dir) as running:
        yield running
        running.show_output()  # which pytest keeps for the report of a failure
