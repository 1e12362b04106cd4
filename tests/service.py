"""The service under test as real processes, and what tests ask of it: start, post, kill, wait, compare."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg

from engine import migrate

POINT = {
    "satellite_id": "TEST-01",
    "battery_charge_percent": 80.5,
    "storage_usage_mb": 1000,
    "signal_strength_dbm": -70,
}


@contextmanager
def folder_on_disk() -> Iterator[Path]:
    """Make a folder that is on a disk, as /tmp need not be, and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="os-lanes-", dir="/var/tmp") as folder:
        yield Path(folder)


def eventually(happened: Callable[[], Any], seconds: float = 10.0, what: str = "") -> Any:
    """Wait until `happened()` is true and return what it returned; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or happened}"
        time.sleep(0.02)  # a look may scan /proc: more often it would take the processor from what is waited for
    return result


def compresses(connection: psycopg.Connection[Any]) -> bool:
    """Tell whether the server can take a COPY straight into compressed chunks."""
    row = connection.execute(
        "SELECT count(*) FROM pg_settings WHERE name = 'timescaledb.enable_direct_compress_copy'"
    ).fetchone()
    return row == (1,) and migrate.find_edition(connection).name == "timescale"


def children(pid: int) -> list[int]:
    """Return the living child processes of `pid`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_gone(pid: int) -> bool:
    """Tell whether a process is dead; a zombie is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Service:
    """One `orbitstream` command in a session of its own, with its log kept in the lane directory."""

    def __init__(self, database: str, lane_dir: Path) -> None:
        self.database, self.lane_dir = database, lane_dir
        self.log = lane_dir / "test.log"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {
            "DATABASE_URL": database,
            "ORBITSTREAM_LANE_DIR": str(lane_dir),
            "ORBITSTREAM_LANE_BYTES": "16MiB",
            "ORBITSTREAM_WORKERS": "2",
            "PORT": "0",
        }

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill_everything()
        if error is not None:
            self.show_output()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run an orbitstream command to its end."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "engine", *command],
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
        )

    def spawn(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start an orbitstream command, its output appended to the log."""
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", *command],
                env={**os.environ, **self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )

    def start(self, *, healthy: bool = True, **environment: str) -> Service:
        """Start `serve` and wait until it accepts points, and unless told otherwise has its database."""
        port_file = self.lane_dir / "port"
        port_file.unlink(missing_ok=True)
        self.process = self.spawn("-m", "engine", "serve", "--port-file", str(port_file), **environment)
        self.port = eventually(lambda: self._alive() and port_file.exists() and int(port_file.read_text() or 0), 20)
        eventually(lambda: self._alive() and self.get("/health/ready")[0] == 200, 20, "ready")
        if healthy:
            self.await_healthy()
        return self

    def _alive(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.output()[-3000:]}"
        return True

    def await_healthy(self, seconds: float = 20.0) -> None:
        eventually(lambda: self._alive() and self.get("/health")[0] == 200, seconds, "healthy")

    def output(self) -> str:
        return self.log.read_text()

    def show_output(self) -> None:
        if self.log.exists():
            print(self.output()[-6000:], file=sys.stderr)

    # -- HTTP

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Send one request on a connection of its own; returns status, parsed or raw body, headers in lower case."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            payload = json.dumps(body) if isinstance(body, dict | list) else body
            connection.request(method, path, payload, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            raw = response.read()
            names = {name.lower(): value for name, value in response.getheaders()}
            parsed = json.loads(raw) if "json" in names.get("content-type", "") and raw else raw
            return response.status, parsed, names
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any, dict[str, str]]:
        try:
            return self.request("GET", path)
        except OSError:
            return 0, None, {}

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
        return self.request("POST", path, body, headers)

    # -- database

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database, autocommit=True) as connection:
            return connection.execute(sql.encode(), parameters).fetchall()

    def count(self) -> int:
        try:
            return int(self.query("SELECT count(*) FROM telemetry")[0][0])
        except psycopg.errors.UndefinedTable:
            return 0

    # -- processes

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def writers(self) -> list[int]:
        return [pid for pid in children(self.pid) if "engine.writer" in command_line(pid)]

    def arbiters(self) -> list[int]:
        return [pid for pid in children(self.pid) if "gunicorn" in command_line(pid)]

    def arbiter(self) -> int:
        (pid,) = self.arbiters()
        return pid

    def workers(self) -> list[int]:
        return [worker for arbiter in self.arbiters() for worker in children(arbiter)]

    def everything(self) -> list[int]:
        found, todo = [], [self.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            todo += children(pid)
        return found

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Ask the service to end and return its exit code."""
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(seconds)

    def kill_everything(self) -> None:
        """SIGKILL every process of the service at once."""
        pids = self.everything()
        kill(pids)
        assert self.process is not None
        self.process.wait(10)
        for pid in pids:
            eventually(lambda pid=pid: is_gone(pid), 5, f"end of {pid}")


def kill(pids: Iterable[int], signum: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue
