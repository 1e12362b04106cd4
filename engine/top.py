"""`orbitstream top`: what the engine does, live, in a terminal. Reads lanes and heartbeats, never the database."""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from engine import lanes, recorder, stats
from engine.heartbeat import LATENCY_EDGES, quantiles_ms
from engine.settings import Settings
from engine.stats import Sample

INTERVAL_S: Final = 1.0
HISTORY: Final = 120
BARS: Final = " ▁▂▃▄▅▆▇█"

Report = dict[str, Any]


def command(config: Settings, options: argparse.Namespace) -> int:
    """Show the engine until q or Ctrl-C; with --once a single report, as JSON with --json."""
    if options.once or options.json:
        lanes.expect(config.lane_dir)
        before = stats.take(config.lane_dir)
        time.sleep(INTERVAL_S)  # a rate needs two looks
        report = describe(before, stats.take(config.lane_dir))
        if options.json:
            print(json.dumps(report))
        else:
            from rich.console import Console

            Console().print(Screen(config).render(report, Console().width))
        return 0
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("orbitstream: top needs a terminal: use --once, or --once --json for a script", file=sys.stderr)
        return 2
    _watch(config)
    return 0


def describe(before: Sample, now: Sample) -> Report:
    """Return what happened between two samples, and how things stand at the second."""
    seconds = max(1e-6, now.taken - before.taken)
    lanes_before = {lane.uuid: lane for lane in before.lanes}
    writers_before = {writer.name: writer for writer in before.writers}

    def rate(after: float, earlier: float) -> float:
        return round(max(0.0, after - earlier) / seconds, 3)

    lanes: list[Report] = []
    for lane in now.lanes:
        was = lanes_before.get(lane.uuid, lane)
        growth = (lane.queue_bytes - was.queue_bytes) / seconds
        lanes.append({
            "name": lane.name, "worker": lane.pid if lane.usage else None,
            "accepted_per_s": rate(lane.accepted, was.accepted), "refused_per_s": rate(lane.refused, was.refused),
            "queue_points": lane.queue_points, "fill": round(lane.fill, 4), "residual": lane.residual,
            "full_in_s": round((lane.capacity_bytes - lane.queue_bytes) / growth) if growth > 1 else None,
            "cpu": rate(lane.usage.cpu_s, was.usage.cpu_s) if lane.usage and was.usage else None,
        })  # fmt: skip
    writers: list[Report] = []
    latency = np.zeros(len(LATENCY_EDGES), np.uint64)
    for writer in now.writers:
        earlier = writers_before.get(writer.name, writer)
        latency += recorder.since(writer.latency, earlier.latency)
        writers.append({
            "name": writer.name, "pid": writer.pid, "state": writer.state, "beat_age_s": round(writer.age_s, 1),
            "committed_per_s": rate(writer.committed, earlier.committed),
            "anomalies_per_s": rate(writer.anomalies, earlier.anomalies),
            "flushes_per_s": rate(writer.flushes, earlier.flushes),
            "busy": min(1.0, rate(writer.busy_s, earlier.busy_s)),
            "cpu": rate(writer.usage.cpu_s, earlier.usage.cpu_s) if writer.usage and earlier.usage else None,
            "dead_lettered": writer.dead_lettered, "failures": writer.failures, "stopped_lanes": writer.stopped_lanes,
        })  # fmt: skip
    p50, p99 = (
        (round(it, 2) for it in quantiles_ms(latency, LATENCY_EDGES, (0.5, 0.99))) if latency.any() else (None,) * 2
    )
    alive = [writer for writer in now.writers if writer.alive]
    connected = [writer for writer in alive if writer.state == "connected"]
    return {
        "database": "connected" if connected else "away" if alive else "unknown",
        "edition": connected[0].edition if connected else "unknown",
        "accepted_per_s": round(sum(lane["accepted_per_s"] for lane in lanes), 1),
        "refused_per_s": round(sum(lane["refused_per_s"] for lane in lanes), 1),
        "committed_per_s": round(sum(writer["committed_per_s"] for writer in writers), 1),
        "anomalies_per_s": round(sum(writer["anomalies_per_s"] for writer in writers), 1),
        "latency_ms": {"p50": p50, "p99": p99},
        "queue_points": sum(lane.queue_points for lane in now.lanes),
        "residual": now.residual,
        "committed": sum(writer.committed for writer in now.writers),
        "lanes": lanes,
        "writers": writers,
    }


def sparkline(values: Iterator[float] | deque[float], width: int) -> str:
    """Return the last `width` values as bars from 0 to the largest."""
    shown = list(values)[-width:]
    most = max(shown, default=0.0)
    if most <= 0:
        return BARS[0] * len(shown)
    return "".join(BARS[0 if value <= 0 else 1 + min(7, int(value / most * 8))] for value in shown)


class Screen:
    """Draws reports, with a history of the numbers that matter."""

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._history: dict[str, deque[float]] = {}

    def render(self, report: Report, width: int) -> Any:
        """Return what rich prints; narrow terminals get fewer columns."""
        from rich.console import Group
        from rich.text import Text

        healthy = report["database"] == "connected"
        head = Text.assemble(
            ("OrbitStream  ", "bold"),
            (f"database {report['database']}", "green" if healthy else "bold red"),
            f" ({report['edition']})  " if healthy else "  ",
            f"{_many(report['lanes'], 'lane')}  {_many(report['writers'], 'writer')}  ",
            (str(self._config.lane_dir), "dim"),
        )
        head.no_wrap, head.overflow = True, "ellipsis"
        tables = (self._numbers(report, width), self._lanes(report, width), self._writers(report, width))
        return Group(head, *(part for table in tables for part in ("", table)))

    def _numbers(self, report: Report, width: int) -> Any:
        from rich.table import Table

        residual, p99 = report["residual"], report["latency_ms"]["p99"]
        rows = [
            ("accepted", report["accepted_per_s"], "/s", ""),
            ("committed", report["committed_per_s"], "/s", "green"),
            ("refused", report["refused_per_s"], "/s", "bold red" if report["refused_per_s"] else ""),
            ("latency p99", p99, "ms", "red" if p99 is not None and p99 > 100 else ""),
            ("queued", report["queue_points"], "", ""),
            ("anomalies", report["anomalies_per_s"], "/s", "yellow" if report["anomalies_per_s"] else ""),
            ("residual", residual, "", "bold red" if residual else ""),
        ]  # fmt: skip
        table = Table.grid(padding=(0, 1))
        for name, value, unit, style in rows:
            history = self._history.setdefault(name, deque(maxlen=HISTORY))
            history.append(float(value or 0))
            bars = sparkline(history, max(0, width - 32))
            shown = "-" if value is None else f"{value:,.1f}".removesuffix(".0")
            table.add_row(
                f"{name:<12}",
                f"[{style}]{shown:>11}[/]" if style else f"{shown:>11}",
                f"{unit if value is not None else '':<2}",
                bars,
            )
        return table

    def _lanes(self, report: Report, width: int) -> Any:
        wide = width >= 90
        columns = ["lane", "fill", "queued", "accepted/s", *(["worker", "refused/s", "full in", "cpu"] if wide else [])]
        rows = []
        for lane in report["lanes"]:
            color = "red" if lane["fill"] > 0.9 else "yellow" if lane["fill"] > 0.7 else "green"
            bar = round(lane["fill"] * 8)
            fill = f"[{color}]{'█' * bar}{'·' * (8 - bar)}[/] {lane['fill']:6.1%}"
            row = [lane["name"], fill, f"{lane['queue_points']:,}", f"{lane['accepted_per_s']:,.0f}"]
            full = lane["full_in_s"]
            more = [str(lane["worker"] or "none"), f"{lane['refused_per_s']:,.0f}", f"{full:,} s" if full else "-",
                    "-" if lane["cpu"] is None else f"{lane['cpu']:.0%}"]  # fmt: skip
            rows.append(row + more if wide else row)
        return _table(columns, rows)

    def _writers(self, report: Report, width: int) -> Any:
        wide = width >= 90
        columns = [
            "writer",
            "state",
            "rows/s",
            "busy",
            *(["tx/s", "beat", "cpu", "dead letters", "stopped"] if wide else []),
        ]
        rows = []
        for writer in report["writers"]:
            color = "green" if writer["state"] == "connected" else "bold red"
            row = [writer["name"], f"[{color}]{writer['state']}[/]", f"{writer['committed_per_s']:,.0f}",
                   f"{writer['busy']:.0%}"]  # fmt: skip
            more = [f"{writer['flushes_per_s']:.0f}", f"{writer['beat_age_s']} s",
                    "-" if writer["cpu"] is None else f"{writer['cpu']:.0%}",
                    f"{writer['dead_lettered']:,}", str(writer["stopped_lanes"])]  # fmt: skip
            rows.append(row + more if wide else row)
        return _table(columns, rows)


def _many(things: list[Report], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _table(columns: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _watch(config: Settings) -> None:
    """Redraw each second on a screen of its own, until q or a signal; leave the terminal as it was."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    logging.disable(logging.CRITICAL)
    console, screen = Console(), Screen(config)
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    stopping: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: stopping.append(number))
    signal.signal(signal.SIGWINCH, lambda *_: None)  # wakes the wait: the next frame has the new size
    before = stats.take(config.lane_dir)
    report = describe(before, before)
    with _raw_keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + INTERVAL_S
        while not stopping:
            live.update(Group(screen.render(report, console.width), Text("\nq quits", "dim")), refresh=True)
            ready, _, _ = select.select([sys.stdin, read], [], [], max(0.0, due - time.monotonic()))
            if read in ready:
                os.read(read, 4096)
            if sys.stdin in ready and os.read(sys.stdin.fileno(), 64) in (b"q", b"Q", b"\x1b", b""):
                break
            if time.monotonic() >= due:
                now = stats.take(config.lane_dir)
                report, before, due = describe(before, now), now, due + INTERVAL_S


@contextmanager
def _raw_keys() -> Iterator[None]:
    """Read keys as they are pressed, without echo; Ctrl-C stays a signal."""
    fd = sys.stdin.fileno()
    kept = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, kept)
