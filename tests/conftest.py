"""Fixtures: a real private database for the whole run, and the service as real processes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from engine.embedded import EmbeddedPostgres
from tests.service import Service

TEST_DATABASE_URL = os.environ.get("ORBITSTREAM_TEST_DATABASE_URL")
"""A server of yours to run the tests on; each run makes databases of its own there and drops them."""

_covered: set[str] = set()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _covered:
        terminalreporter.write_line(f"database editions covered: {', '.join(sorted(_covered))}")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a server with a database that may be used to create others."""
    if TEST_DATABASE_URL:
        _covered.add(f"{TEST_DATABASE_URL.rpartition('@')[2]} (given)")
        yield TEST_DATABASE_URL
        return
    home = Path(tempfile.mkdtemp(prefix="os-test-", dir="/tmp"))
    home.chmod(0o755)
    postgres = EmbeddedPostgres(home, die_with_parent=True)
    postgres.start()
    _covered.add(postgres.origin)
    try:
        yield postgres.dsn
    finally:
        postgres.stop()
        shutil.rmtree(home)


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database of this test's own."""
    name = f"test_{os.getpid()}_{abs(hash(request.node.nodeid)) % 10**9}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        parts = psycopg.conninfo.conninfo_to_dict(server)
        yield psycopg.conninfo.make_conninfo(**{**parts, "dbname": name})
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def lane_dir() -> Iterator[Path]:
    """A lane directory of this test's own, in memory."""
    folder = Path(tempfile.mkdtemp(prefix="os-lanes-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def service(database: str, lane_dir: Path) -> Iterator[Service]:
    """`orbitstream serve`, not started yet, over a database and a lane directory of its own."""
    with Service(database, lane_dir) as running:
        yield running
