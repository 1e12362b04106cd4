"""`orbitstream top` in a terminal of its own: a pseudo-terminal, keys, resizes, and a database that is away."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tests.integration.test_service import refuse_connections
from tests.service import POINT, Service, eventually


class Terminal:
    """A running `top` and the screen that it wrote so far."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.fd, self.process, self.text = fd, process, ""

    def shows(self, pattern: str) -> bool:
        """Read what is there and tell whether the last frame shows the pattern."""
        try:
            while True:
                self.text += os.read(self.fd, 65536).decode(errors="replace")
        except (BlockingIOError, OSError):
            pass
        frame = self.text.rpartition("\x1b[H")[2]
        return re.search(pattern, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame)) is not None

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))


@contextmanager
def top(service: Service, columns: int) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {**os.environ, **service.environment, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "engine", "top"], stdin=slave, stdout=slave, stderr=slave, env=environment,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    before = termios.tcgetattr(slave)
    try:
        yield Terminal(master, process)
        assert termios.tcgetattr(slave) == before, "the terminal is left as it was"
    finally:
        process.kill()
        process.wait(5)
        os.close(master)
        os.close(slave)


def test_top_follows_the_engine_its_window_and_its_database(service: Service, server: str) -> None:
    service.start(ORBITSTREAM_WORKERS="1")
    name = str(psycopg.conninfo.conninfo_to_dict(service.database)["dbname"])
    with top(service, 120) as terminal:
        connected = r"OrbitStream  database connected \((plain|apache|timescale)\)"
        eventually(lambda: terminal.shows(connected), 15, "the first frame")
        assert terminal.shows(r"worker +refused/s +full in")
        service.post("/telemetry/batch", [POINT] * 500)
        eventually(lambda: terminal.shows(r"committed +[1-9][\d,.]* /s"), 10, "a rate")
        terminal.resize(60)
        eventually(lambda: terminal.shows("accepted/s") and not terminal.shows("full in"), 10, "the narrow frame")
        refuse_connections(server, name, refuse=True)
        eventually(lambda: terminal.shows("OrbitStream  database away"), 15, "the database away")
        refuse_connections(server, name, refuse=False)
        os.write(terminal.fd, b"q")
        assert terminal.process.wait(5) == 0


def test_top_once_is_a_report_for_scripts(service: Service) -> None:
    service.start(ORBITSTREAM_WORKERS="1")
    assert service.post("/telemetry/batch", [POINT] * 10)[0] == 202
    eventually(lambda: service.count() == 10)
    report = json.loads(service.run("top", "--once", "--json").stdout)
    assert (report["database"], report["committed"], report["residual"]) == ("connected", 10, 0)
    assert [writer["state"] for writer in report["writers"]] == ["connected"]
    assert "lane-0000" in service.run("top", "--once").stdout
    refused = service.run("top")
    assert refused.returncode == 2 and "top needs a terminal" in refused.stderr
