"""A rig for trials: a private database, a service of its own and the simulator, all gone afterwards.

Nothing here touches the user's lanes, port or tables.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from engine import process, settings
from engine.embedded import EmbeddedPostgres

READY_S: Final = 30.0
KILL_GRACE_S: Final = 10.0
DRAIN_S: Final = 300
"""What was accepted is to be compared with rows, not with what still waits: a minute of full load may wait."""


class RigError(Exception):
    """A trial could not run to its end."""


def private_folder(parent: Path, name: str = "demo", mode: int = 0o755) -> Path:
    """Make a folder for this run, named by its process; those of runs that were killed are removed on the way."""
    parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    for old in parent.glob(f"{name}-*"):
        pid = old.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not Path("/proc", pid).exists()):
            shutil.rmtree(old, ignore_errors=True)
    folder = parent / f"{name}-{os.getpid()}"
    folder.mkdir(mode=mode)
    return folder


@contextmanager
def private_database(home: Path, say: Callable[[str], None]) -> Iterator[EmbeddedPostgres]:
    """Run a database of one\'s own in `home`."""
    server = EmbeddedPostgres(home, die_with_parent=True)
    server.start(say)
    try:
        yield server
    finally:
        server.stop()


def overrides(dsn: str, lane_dir: Path, workers: int, writers: int) -> dict[str, str]:
    """Return the environment of a service of one's own, which nothing of the user's settings reaches."""
    return {
        "DATABASE_URL": dsn,
        "MIGRATION_DATABASE_URL": "",
        "ORBITSTREAM_LANE_DIR": str(lane_dir),
        "PORT": "0",
        "ORBITSTREAM_HOST": "127.0.0.1",
        "ORBITSTREAM_TOKENS_FILE": "",
        "ORBITSTREAM_WORKERS": str(workers),
        "ORBITSTREAM_WRITERS": str(writers),
        "ORBITSTREAM_DRAIN_TIMEOUT": f"{DRAIN_S}s",
        "LOG_LEVEL": "error",
    }


@contextmanager
def service(overrides: dict[str, str], lane_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `orbitstream serve` and yield it with its address, once it accepts points and has its database."""
    port_file = lane_dir / "port"
    environment = settings.child_environment(settings.load({}))
    for _, variable, _, _ in settings.options():
        environment.pop(variable, None)
    running = subprocess.Popen(
        [sys.executable, "-P", "-m", "engine", "serve", "--port-file", str(port_file), "--parent", str(os.getpid())],
        env=environment | overrides,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield running, _await_ready(running, port_file)
    finally:
        if running.poll() is None:  # what it still holds is thrown away
            running.terminate()
            try:
                running.wait(KILL_GRACE_S)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def stop(service: subprocess.Popen[bytes]) -> None:
    """Stop a service once its lanes are drained; raises RigError when it does not end well."""
    service.send_signal(signal.SIGTERM)
    if service.wait(DRAIN_S + 60) != 0:
        raise RigError(f"the service ended with exit code {service.returncode}")


def _await_ready(service: subprocess.Popen[bytes], port_file: Path) -> str:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise RigError(f"the service ended at its start with exit code {service.returncode}")
        with suppress(OSError, ValueError):
            url = f"http://127.0.0.1:{int(port_file.read_text())}"
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return url
        time.sleep(0.05)  # until the service answers, ends or the time is over
    raise RigError(f"the service is not healthy after {READY_S:.0f} s")


def simulate(url: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Run the simulator with these flags and values against `url`; return its report. Raises RigError."""
    command = [sys.executable, "-P", "-m", "simulator", "--json", "--api-url", url]
    for flag, value in flags.items():
        command += [flag] if value is True else [flag, str(value)]
    ours = os.getpid()
    simulator = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: process.die_with_parent(ours, signal.SIGTERM),
    )
    try:
        output, _ = simulator.communicate()
    except KeyboardInterrupt:
        simulator.wait(15)  # the terminal sent it the same Ctrl-C; it ends what is under way
        raise
    finally:
        if simulator.poll() is None:
            simulator.kill()
    if simulator.returncode not in (0, 1):
        raise RigError(f"the simulator ended with exit code {simulator.returncode}")
    report: dict[str, Any] = json.loads(output)
    if report["started_at"] is None:
        raise RigError(f"the simulator sent nothing: {'; '.join(report['failures'])}")
    return report


def say(who: str, message: str) -> None:
    """Tell on stderr how far a trial is."""
    print(f"{who}: {message}", file=sys.stderr, flush=True)


def cpu_seconds(service: int, database: Iterable[int]) -> dict[str, float]:
    """Return the CPU time used so far, in seconds, by stage: edge, writer, maintenance, supervisor, database.

    service: the process id of the supervisor; database: the server's processes on this machine.
    """
    used = dict.fromkeys(("edge", "writer", "maintenance", "supervisor", "database"), 0.0)
    for pid, command in process_tree(service).items():
        used[_stage(command)] += _cpu(pid)
    used["database"] = sum(_cpu(pid) for pid in database if _named(pid, "postgres"))
    return used


def anonymous_bytes(service: int) -> dict[str, int]:
    """Return the largest anonymous memory of a process in each stage: its own, without lanes and libraries."""
    most: dict[str, int] = {}
    for pid, command in process_tree(service).items():
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()  # smaps_rollup walks all pages of a lane
            size = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
            most[_stage(command)] = max(size, most.get(_stage(command), 0))
    return most


def process_tree(root: int) -> dict[int, str]:
    """Return the command lines of a process and of all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, str] = {}
    todo = [root]
    while todo:
        pid = todo.pop()
        with suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            todo += children.get(pid, [])
    return found


def _stage(command: str) -> str:
    stages = {"gunicorn": "edge", "engine.writer": "writer", "engine.maintenance": "maintenance"}
    return next((stage for word, stage in stages.items() if word in command), "supervisor")


def _named(pid: int, name: str) -> bool:
    """Tell whether a process of this machine has this name: a number from another machine may mean any."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == name
    except OSError:
        return False


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
