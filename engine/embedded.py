"""The embedded PostgreSQL: a server of our own for the demo, development, tests and single machines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg
from psycopg import pq

from engine.embedded_home import ROLE, SOCKET_NAME, Home
from engine.installations import EmbeddedError, Installation, choose_installation, find_installations

DATABASE = "orbitstream"
START_DEADLINE = 60.0  # seconds without any answer
RECOVERY_DEADLINE = 600.0  # seconds of "starting up": replaying max_wal_size on a slow disk takes minutes
QUIT_DEADLINE = 10.0  # seconds after SIGQUIT: the postmaster itself kills what is left after 5
ORPHANS_DEADLINE = 30.0  # seconds for the backends of a killed postmaster to see that it is gone
ORPHANS_COMPLAINT = "pre-existing shared memory block"


def default_home(xdg_data_home: str | None) -> Path:
    """Name the folder that holds the embedded server's data when ORBITSTREAM_HOME does not.

    `xdg_data_home` is the value of XDG_DATA_HOME; empty or relative counts as unset, as its specification asks. Root
    gets /var/lib/orbitstream: the server runs as another user, who cannot enter /root.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/orbitstream")
    if xdg_data_home and os.path.isabs(xdg_data_home):
        return Path(xdg_data_home) / "orbitstream"
    return Path.home() / ".local" / "share" / "orbitstream"


def running_dsn(home: Path) -> str | None:
    """Return the URL of the server that another process runs under `home`; None when there is none."""
    folder = Home(home)
    try:
        lines = (folder.data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return None
    return _url(Path(lines[4]), DATABASE) if len(lines) > 4 and lines[4] else None


def _url(socket: Path, database: str) -> str:
    return f"postgresql://{ROLE}@/{database}?host={quote(str(socket), safe='')}&port=5432"


class EmbeddedPostgres:
    """A PostgreSQL under `home`, owned by this process between start() and stop().

    With `die_with_parent` the server ends (fast shutdown) when this process ends, however it ends; start() must then
    be called from the main thread, whose end is what the kernel watches. Without it the server survives a killed
    owner and the next start() adopts it. `memory_bytes` is what the machine can spare, measured when None;
    `installation` forces the PostgreSQL to run, else the best one that fits the data is taken. A child forked from
    the owner without exec shares its lock.
    """

    def __init__(
        self,
        home: Path,
        *,
        die_with_parent: bool = False,
        memory_bytes: int | None = None,
        installation: Installation | None = None,
    ) -> None:
        self._home = Home(home)
        self.data_dir = self._home.data
        self.origin = ""
        self.postmaster_pid = 0
        self._die_with_parent = die_with_parent
        self._memory_bytes = memory_bytes
        self._forced = installation
        self._process: subprocess.Popen[bytes] | None = None  # None as well for an adopted server

    @property
    def dsn(self) -> str:
        """Return the libpq URL of our database over the socket folder; valid after start()."""
        return _url(self._home.socket, DATABASE)

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self, progress: Callable[[str], None] = lambda message: None) -> None:
        """Bring the server up, or adopt the one a killed owner left, and return when it takes connections.

        Creates the data and the database when they are missing. `progress` gets a few words before each thing that
        takes time. Raises EmbeddedError; then nothing of ours is left running.
        """
        try:
            self._home.prepare()
            self._home.take()
            try:
                self._home.prepare_socket_folder()
                if not self._adopt(progress):
                    self._launch(progress)
                self._create_database()
            except BaseException:  # Ctrl-C too: nothing of ours is left running
                self.stop()
                raise
        except (OSError, subprocess.SubprocessError, psycopg.Error) as error:
            reason = " ".join(str(error).split())
            raise EmbeddedError(f"the embedded PostgreSQL under {self._home.path} cannot start: {reason}") from error

    def stop(self, timeout: float = 30.0) -> None:
        """End the server and give up the home: fast shutdown, after `timeout` seconds an immediate one.

        Committed rows are kept either way; after an immediate shutdown the next start recovers them from the log.
        """
        try:
            self._end_server(timeout)
            self._home.remove_socket_folder()
        finally:
            self._home.release()

    def ensure(self, progress: Callable[[str], None] = lambda message: None) -> None:
        """Start the server again if it has ended under us; blocks until it takes connections."""
        if self._ended():
            progress("PostgreSQL ended unexpectedly: starting it again")
            self.stop()
            self.start(progress)

    def _adopt(self, progress: Callable[[str], None]) -> bool:
        """Take over a postmaster that outlived its owner; False when there is none, or none any more."""
        pid_file = self.data_dir / "postmaster.pid"
        try:
            lines = pid_file.read_text().splitlines()
            pid, socket = int(lines[0]), "".join(lines[4:5])
        except (FileNotFoundError, IndexError, ValueError):
            return False
        if not self._is_our_postmaster(pid):
            if Path("/proc", str(pid)).exists():
                # The number now names another program, or a zombie: PostgreSQL would take it for a live server and
                # refuse. Backends that outlived their postmaster it still finds by their shared memory.
                pid_file.unlink()
                for name in (SOCKET_NAME, f"{SOCKET_NAME}.lock"):
                    (Path(socket) if socket else self._home.socket).joinpath(name).unlink(missing_ok=True)
            return False
        self.postmaster_pid = pid
        if self._die_with_parent:  # that signal can only be asked for by the process itself
            progress(f"stopping the PostgreSQL that an earlier run left (process {pid})")
            self._end_server(START_DEADLINE)
            return False
        progress(f"taking over the running PostgreSQL (process {pid})")
        self._home.socket = Path(socket) if socket else self._home.socket
        self.origin = str(self._home.record().get("origin", "PostgreSQL"))
        return self._wait_ready(progress)

    def _is_our_postmaster(self, pid: int) -> bool:
        process = Path("/proc", str(pid))
        try:
            if process.joinpath("comm").read_text() != "postgres\n":
                return False
            return os.readlink(process / "cwd") == str(self.data_dir)
        except PermissionError:  # root in a container has no CAP_SYS_PTRACE; the command line is open to all
            return os.fsencode(self.data_dir) in process.joinpath("cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False

    def _launch(self, progress: Callable[[str], None]) -> None:
        home = self._home
        home.sweep()
        choices = [self._forced] if self._forced else find_installations()
        chosen = choose_installation(choices, home.data, home.major(), bool(home.record().get("timescaledb")))
        if home.major() is None:
            progress("creating the database files (once)")
        self.origin = chosen.label
        bindir = home.reachable_binaries(chosen)
        home.write_record(chosen)
        if home.major() is None:
            home.create_data(bindir)
        home.write_settings(chosen, bindir, self._memory_bytes or _spare_memory())
        progress(f"starting PostgreSQL {chosen.version}")
        deadline = time.monotonic() + ORPHANS_DEADLINE
        while True:
            said_before = home.log.stat().st_size
            dies_by = signal.SIGINT if self._die_with_parent else None
            self._process = home.run(bindir, "postgres", "-D", str(home.data), dies_by=dies_by)
            self.postmaster_pid = self._process.pid
            if self._wait_ready(progress):
                return
            last_words = home.last_words(said_before)
            if ORPHANS_COMPLAINT not in last_words or time.monotonic() > deadline:
                raise EmbeddedError(f"PostgreSQL {chosen.version} ended while starting: {last_words}")
            time.sleep(0.1)  # until the orphans of the last server are gone, or the deadline

    def _wait_ready(self, progress: Callable[[str], None]) -> bool:
        """Return True when the server takes connections, False when it has ended."""
        began = told = time.monotonic()
        while not self._ended():
            answer = pq.PGconn.ping(f"{_url(self._home.socket, 'postgres')}&connect_timeout=5".encode())
            if answer == pq.Ping.OK:
                return True
            now = time.monotonic()
            if now - began > (RECOVERY_DEADLINE if answer == pq.Ping.REJECT else START_DEADLINE):
                raise EmbeddedError(f"PostgreSQL is not ready after {now - began:.0f} s: see {self._home.log}")
            if now - told > 5:
                told = now
                progress(f"waiting for PostgreSQL to recover its data ({now - began:.0f} s)")
            time.sleep(min(0.01 + (now - began) / 10, 0.25))  # each refusal is a line in the server's log
        return False

    def _ended(self) -> bool:
        return self._process.poll() is not None if self._process else not self._is_our_postmaster(self.postmaster_pid)

    def _end_server(self, timeout: float) -> None:
        if not self.postmaster_pid:
            return
        for signum, seconds in ((signal.SIGINT, timeout), (signal.SIGQUIT, QUIT_DEADLINE)):
            deadline = time.monotonic() + seconds
            if not self._ended():
                os.kill(self.postmaster_pid, signum)
            while not self._ended() and time.monotonic() < deadline:
                time.sleep(0.01)  # it may be no child of ours: only polling tells that it ended
        if not self._ended():
            raise EmbeddedError(f"PostgreSQL (process {self.postmaster_pid}) does not end: see {self._home.log}")
        self.postmaster_pid, self._process = 0, None

    def _create_database(self) -> None:
        with psycopg.connect(_url(self._home.socket, "postgres"), autocommit=True) as connection:
            query = "select from pg_database where datname = %s"
            if connection.execute(query, (DATABASE,)).fetchone() is None:
                connection.execute(f"create database {DATABASE}")


def _spare_memory() -> int:
    """Bytes this machine, or this container, can spare."""
    bounds = [1 << 40]
    with suppress(OSError, ValueError):
        bounds.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" when there is no bound
    if match := re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()):
        bounds.append(int(match[1]) << 10)
    return min(bounds)
