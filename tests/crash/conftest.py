"""Fixtures of the fault tests: a cluster that may be killed, and a proxy before the database."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.embedded import EmbeddedPostgres
from tests.crash.proxy import Proxy
from tests.servers import editions
from tests.service import Service


@pytest.fixture
def postgres() -> Iterator[EmbeddedPostgres]:
    """A cluster of this test's own, to be killed."""
    with editions.cluster() as server:
        yield server


@pytest.fixture
def proxied(service: Service) -> Iterator[Proxy]:
    """A proxy between the service (not its tests) and the database."""
    folder = Path(tempfile.mkdtemp(prefix="os-proxy-", dir="/tmp"))
    proxy = Proxy(folder, service.database)
    service.environment["DATABASE_URL"] = proxy.url
    service.environment["MIGRATION_DATABASE_URL"] = service.database
    yield proxy
    proxy.close()
    shutil.rmtree(folder)
