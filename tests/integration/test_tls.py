"""TLS to the database as deploy/README.md tells it: a private CA, verify-full, a server that takes nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trustme
from psycopg.conninfo import make_conninfo

from tests.conftest import EDITIONS, GIVEN_URL
from tests.servers import editions
from tests.service import POINT, Service, eventually

NAME = "db.orbitstream.test"


@dataclass(frozen=True)
class Secured:
    """A server that lets in TLS connections only, by password; `ca` signed its certificate, for NAME."""

    address: str
    ca: Path
    other_ca: Path

    def url(self, **given: Any) -> str:
        return make_conninfo(self.address, **{"host": NAME, "hostaddr": "127.0.0.1", "dbname": "postgres", **given})


# The wheel's PostgreSQL is built without OpenSSL: this takes Debian's.
@pytest.fixture(params=["apache"] if "apache" in EDITIONS and not GIVEN_URL else [])
def secured(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Secured]:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "other.pem")
    with getattr(editions, request.param)() as url:
        with psycopg.connect(url, autocommit=True) as connection:
            install_certificate(connection, authority.issue_cert(NAME))
        eventually(lambda: refuses(make_conninfo(url, sslmode="disable")), what="TLS only")
        yield Secured(url, tmp_path / "ca.pem", tmp_path / "other.pem")


def install_certificate(connection: psycopg.Connection[Any], certificate: trustme.LeafCert) -> None:
    [data] = connection.execute("SHOW data_directory").fetchone() or [""]
    folder = editions.CHROOT / data.lstrip("/")
    owner = folder.stat()
    for name, text in (
        ("server.crt", b"".join(blob.bytes() for blob in certificate.cert_chain_pems)),
        ("server.key", certificate.private_key_pem.bytes()),
        ("pg_hba.conf", b"hostssl all all 127.0.0.1/32 scram-sha-256\n"),
    ):
        (folder / name).write_bytes(text)
        (folder / name).chmod(0o600)
        os.chown(folder / name, owner.st_uid, owner.st_gid)
    connection.execute("ALTER SYSTEM SET ssl = on")
    connection.execute("SELECT pg_reload_conf()")


def refuses(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return True
    return False


def test_the_service_uses_tls_and_checks_whom_it_talks_to(secured: Secured, lane_dir: Path) -> None:
    verified = secured.url(sslmode="verify-full", sslrootcert=secured.ca)
    with Service(verified, lane_dir) as service:
        for url, said in (
            (secured.url(sslmode="verify-full", sslrootcert=secured.other_ca), "certificate verify failed"),
            (secured.url(sslmode="verify-full", sslrootcert=secured.ca, host="impostor.test"), "does not match host"),
            (secured.url(sslmode="disable"), "no encryption"),
        ):
            refused = service.run("migrate", DATABASE_URL=url)
            assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
            assert said in refused.stderr
        service.start()
        assert service.post("/telemetry", POINT)[0] == 202
        eventually(lambda: service.count() == 1)
        ours = (  # the writer's, and maintenance's, which starts after it
            "SELECT bool_and(ssl), min(version), count(*) > 1 FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
            " WHERE application_name LIKE 'orbitstream-%%'"
        )
        eventually(lambda: service.query(ours)[0][2], what="both connections")
        assert service.query(ours) == [(True, "TLSv1.3", True)]
        assert service.stop() == 0
