"""Spawn, reap, restart, stop: the parent of the web side, the writers and the maintenance.

Every child leads a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone and the order of
stopping is ours: no new requests, then the requests under way, then the lanes drained, then the database. Every child
dies with us by the kernel's parent-death signal.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from engine import data_folder, heartbeat, lanes, settings
from engine.heartbeat import STALE_S, Heartbeat
from engine.settings import Settings

TICK_S: Final = 0.2
MIN_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 2.0
SETTLED_S: Final = 10.0
"""A child that lived so long starts its next backoff from the beginning."""
BOOT_S: Final = 30.0
"""A writer that has not beaten once so long after its start is taken for stuck."""
WEB_GRACE_S: Final = 25.0
"""A little over gunicorn's graceful_timeout; then its session is killed."""
KILL_GRACE_S: Final = 5.0
MIGRATION_FAILED: Final = 3
"""Exit code of `migrate --wait` when trying again would not help."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

log = logging.getLogger("orbitstream.supervisor")


@dataclass(slots=True)
class Child:
    """One process we keep alive: how to start it, and how its starts went."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()
    popen: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    next_start: float = 0.0

    @property
    def running(self) -> bool:
        return self.popen is not None and self.popen.returncode is None

    def spawn(self, environment: dict[str, str], *flags: str) -> None:
        """Start the process; call from the main thread, whose end the parent-death signal watches."""
        self.popen = subprocess.Popen(
            [*self.command, *flags],
            cwd="/",
            env={**environment, **self.environment},
            pass_fds=self.descriptors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.started = time.monotonic()

    def signal(self, signum: int) -> None:
        if self.running:
            assert self.popen is not None
            self.popen.send_signal(signum)

    def kill(self) -> None:
        """SIGKILL the whole session of the child."""
        if self.running:
            assert self.popen is not None
            os.killpg(self.popen.pid, signal.SIGKILL)


class Supervisor:
    """Run the writers and the maintenance, and with a listening socket the web side too, until told to stop."""

    def __init__(self, config: Settings, listener: socket.socket | None, *, migrate: bool) -> None:
        self.config, self.listener = config, listener
        self.environment = settings.child_environment(config)
        python = [sys.executable, "-P", "-m"]  # -P: never import from the working directory
        parent = ["--parent", str(os.getpid())]
        self.web: Child | None = None
        if listener is not None:
            self.web = Child(
                "web",
                [*python, "gunicorn", "-c", str(data_folder("deploy") / "gunicorn.conf.py"), "engine.app:create_app()"],
                {settings.SUPERVISED: f"{os.getpid()}:{listener.fileno()}"},
                (listener.fileno(),),
            )
        self.writers = [
            Child(f"writer-{index}", [*python, "engine.writer", "--index", str(index), *parent])
            for index in range(config.writer_count)
        ]
        self.maintenance = [Child("maintenance", [*python, "engine.maintenance", *parent])]
        if config.max_connections < 2:
            self.maintenance = []
            log.warning("MAX_CONNECTIONS=1 leaves no connection for maintenance: retention does not run here")
        self.migration: Child | None = None
        if migrate:
            self.migration = Child("migration", [*python, "engine", "migrate", "--wait", *parent])
        self.migrated = not migrate
        self.signals: deque[int] = deque()
        self.beats: dict[str, Heartbeat] = {}
        for index in range(len(self.writers)):
            self._mark_ended(index)  # a writer of an earlier run that was killed could not do so itself
        heartbeat.forget(config.lane_dir, len(self.writers))
        self.hurry = False

    # -- running

    def run(self, keep_database: Callable[[], None] | None = None) -> int:
        """Keep everything alive until SIGTERM or SIGINT, then stop in order; returns the exit code.

        `keep_database` is called at every tick, to restart an embedded server that died.
        """
        wake = self._catch_signals()
        code = 0
        try:
            while True:
                self._wait(wake, TICK_S)
                stop = self._handle_signals()
                if stop:
                    break
                if self._reap_migration():
                    code = 1
                    break
                for child in self._wanted():
                    self._keep(child)
                self._kill_stale()
                if keep_database is not None:
                    keep_database()
        finally:
            self._stop(wake)
        return code

    def _wanted(self) -> list[Child]:
        """The children that should be running now: writers only once the schema is there."""
        wanted = [self.web] if self.web is not None else []
        if self.migrated:
            return [*wanted, *self.writers, *self.maintenance]
        assert self.migration is not None
        return [*wanted, self.migration]

    def _catch_signals(self) -> int:
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for signum in _SIGNALS:
            signal.signal(signum, lambda signum, _: self.signals.append(signum))
        return read

    def _wait(self, wake: int, seconds: float) -> None:
        if select.select([wake], [], [], seconds)[0]:
            os.read(wake, 4096)

    def _handle_signals(self) -> bool:
        """Act on the signals that came; tell whether one asks us to stop."""
        while self.signals:
            signum = self.signals.popleft()
            if signum in (signal.SIGTERM, signal.SIGINT):
                log.info("%s: stopping", signal.Signals(signum).name)
                return True
            if signum == signal.SIGHUP and self.web is not None:
                log.info("SIGHUP: new web workers take over")
                self.web.signal(signal.SIGHUP)
        return False

    def _keep(self, child: Child, *flags: str) -> None:
        """Reap the child if it ended, and start it, with `flags`, if its time has come."""
        now = time.monotonic()
        if child.popen is not None and child.popen.poll() is not None:
            code = child.popen.returncode
            child.popen = None
            # SIGKILL comes from outside: who backs off then lets the lanes fill while a machine is being tidied up.
            own_fault = code != -signal.SIGKILL and now - child.started <= SETTLED_S
            child.failures = child.failures + 1 if own_fault else 0
            pause = min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2 ** min(child.failures, 10)) if child.failures > 1 else 0.0
            child.next_start = now + pause
            if child in self.writers:
                self._mark_ended(self.writers.index(child))
            log.warning("%s ended (%s), starts again in %.1f s", child.name, _reason(code), pause)
        if child.popen is None and now >= child.next_start:
            child.spawn(self.environment, *flags)
            assert child.popen is not None
            log.debug("started %s, process %d", child.name, child.popen.pid)

    def _reap_migration(self) -> bool:
        """Let the writers start once the migration is through; tell whether it failed for good."""
        if self.migrated or self.migration is None or self.migration.popen is None:
            return False
        code = self.migration.popen.poll()
        if code == 0:
            self.migrated = True
        elif code == MIGRATION_FAILED:
            log.error("the database cannot be migrated, see above: stopping")
            return True
        return False

    def _kill_stale(self) -> None:
        """SIGKILL a writer that no longer beats, also one that is stopped; another takes its lanes then."""
        now = time.monotonic()
        for index, child in enumerate(self.writers):
            if not child.running:
                continue
            assert child.popen is not None
            beat = self._beat(index)
            beating = beat is not None and beat.pid == child.popen.pid
            if (beat is not None and beat.age > STALE_S) if beating else now - child.started > BOOT_S:
                log.error("%s has not moved for %.0f s: killing it", child.name, STALE_S)
                child.kill()

    def _mark_ended(self, index: int) -> None:
        """Say for a dead writer that it ended, so that nobody takes its last beat for a living one."""
        beat = self._beat(index)
        if beat is not None:
            beat.mark_ended()

    def _beat(self, index: int) -> Heartbeat | None:
        path = heartbeat.beat_file(self.config.lane_dir, index)
        if path.name not in self.beats and (beat := heartbeat.read(path)) is not None:
            self.beats[path.name] = beat
        return self.beats.get(path.name)

    # -- stopping

    def _stop(self, wake: int) -> None:
        """No new requests; finish those under way; drain; then the rest. A second signal skips the waiting."""
        if self.web is not None:
            self.web.signal(signal.SIGTERM)
            assert self.listener is not None
            # gunicorn keeps its listener open while it stops: this refuses new clients at once.
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self._await([self.web], WEB_GRACE_S, wake)
        if self.migrated:
            self._drain(wake)
        others = [*self.maintenance, *([self.migration] if self.migration is not None else [])]
        for child in others:
            child.signal(signal.SIGTERM)
        self._await(others, KILL_GRACE_S, wake)
        self._report_backlog()

    def _drain(self, wake: int) -> None:
        """Let every writer end once the lanes are empty; one that is dead, or dies of it, has a successor."""
        for child in self.writers:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + self.config.drain_timeout
        while not self.hurry and time.monotonic() < deadline:
            unfinished = [child for child in self.writers if child.popen is None or child.popen.poll() != 0]
            if not unfinished:
                return
            for child in unfinished:
                self._keep(child, "--drain")  # also one that SIGTERM met before it could listen
            self._wait(wake, TICK_S)
            self.hurry = self._handle_signals()
        self._await(self.writers, KILL_GRACE_S, wake)

    def _await(self, children: list[Child], seconds: float, wake: int) -> None:
        """Wait for children to end, then kill what is left of their sessions."""
        deadline = time.monotonic() + (0.0 if self.hurry else seconds)
        while any(child.running and child.popen and child.popen.poll() is None for child in children):
            if time.monotonic() >= deadline:
                break
            self._wait(wake, TICK_S)
            if self._handle_signals():
                log.warning("second signal: not waiting any longer")
                self.hurry = True
                deadline = time.monotonic()
        for child in children:
            if child.running:
                log.warning("%s did not end in time: killing it", child.name)
                child.kill()
                assert child.popen is not None
                child.popen.wait(KILL_GRACE_S)

    def _report_backlog(self) -> None:
        left = 0
        for lane in lanes.open_lanes(self.config.lane_dir):
            left += lane.queued_points
            lane.close()
        for name, why in (unreadable := lanes.unreadable(self.config.lane_dir)).items():
            log.error("what %s holds is not known: %s", name, why)
        if left:
            log.warning("%d points stay in the lanes in %s: the next start drains them", left, self.config.lane_dir)
        elif not unreadable:
            log.info("stopped, the lanes are empty")


def _reason(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def listen(config: Settings) -> socket.socket:
    """Bind and listen on the configured address; raises SettingError that names the variable if it cannot be had."""
    try:
        socket.getaddrinfo(config.host, None)
    except (OSError, UnicodeError) as error:
        raise settings.SettingError(f"ORBITSTREAM_HOST={config.host!r} is not an address of this machine") from error
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise settings.SettingError(
            f"PORT={config.port}: cannot listen on {config.host}: {error.strerror or error}; "
            "stop what uses the port, or set PORT or ORBITSTREAM_HOST"
        ) from error
    os.set_inheritable(listener.fileno(), True)
    return listener
