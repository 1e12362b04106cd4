"""The chain of the engine without what makes a service of it: what orjson and COPY leave of COPY alone.

Two processes find bodies in what a socket brings, parse them with orjson, make columns of the objects and put them into
shared memory; two others join, sort and COPY them in transactions as large as the engine's. Of HTTP there is what tells
where a body begins and ends. Nothing is checked, no checksum is made, no ledger kept, and nothing outlives a fault. Its
rounds are taken in turns with the engine's: the same requests, server and machine.

python -m bench.bare --rounds 5 --database-url postgresql://...
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psycopg

from bench import results
from bench.ingest import SPARE, WARM_UP_S, measure
from engine import columnstore, copy_format, drain, process, rig, rows, settings, trial
from engine.backlog import GATHER_S
from engine.channels import REQUIRED
from engine.rows import Columns
from engine.timestamps import parse_all

PAIRS = 2
"""Receivers, each with a writer of its own, as there are web workers and writers in the engine's rounds."""
BATCH = 1000
SLOTS, SLOT_BYTES = 512, 1 << 16
"""A slot holds one body: 42 bytes a point."""
RECORDS, FEW = drain.MAX_TRANSACTION_POINTS // BATCH, columnstore.MIN_POINTS // BATCH
"""Bodies of one transaction at most, and those for which a writer does not begin before GATHER_S, as in the engine."""
ACCEPT_PAUSE_S = 1e-4
"""After each accept the other receiver has so long a connection already held to take the next one."""
BUFFER_BYTES = 1 << 20
POLL_S = 0.002
IDLE_LOOK_S = 0.1
WAIT_S = 60.0
ANSWER = b"HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
HEAD, TAIL, COMMITTED, COMPRESSED, LAST_NS, CLIENTS = range(0, 48, 8)
"""Words of the slots, each on a cache line of its own."""


class Slots:
    """Shared memory between one receiver and one writer: words, and slots that are filled and emptied in turn."""

    def __init__(self) -> None:
        view = memoryview(mmap.mmap(-1, mmap.PAGESIZE + SLOTS * SLOT_BYTES))
        self.words, self.data = view[: mmap.PAGESIZE].cast("Q"), view[mmap.PAGESIZE :]

    def put(self, columns: Columns) -> None:
        """Fill the next slot, and wait for one that is empty."""
        while self.words[HEAD] - self.words[TAIL] >= SLOTS:
            time.sleep(0.0005)  # a writer frees slots within a transaction; the chain is killed from outside
        payload = b"".join(rows.pack(columns))
        start = self.words[HEAD] % SLOTS * SLOT_BYTES
        self.data[start : start + 4 + len(payload)] = struct.pack("<I", len(columns)) + payload
        self.words[HEAD] += 1

    def take(self) -> list[tuple[int, int, memoryview]]:
        """Return what waits, RECORDS bodies at most, as `rows.unpack` wants it."""
        found = []
        for place in range(self.words[TAIL], min(self.words[HEAD], self.words[TAIL] + RECORDS)):
            start = place % SLOTS * SLOT_BYTES
            found.append((int.from_bytes(self.data[start : start + 4], "little"), 0, self.data[start + 4 :]))
        return found


def to_columns(body: memoryview) -> Columns:
    """Turn an array of points into columns; whoever sends points of another kind than the simulator's gets nonsense."""
    points = orjson.loads(body)
    table = dict(zip(points[0], zip(*map(dict.values, points), strict=True), strict=True))
    times = parse_all(table["timestamp"])
    assert times is not None
    ids = "".join(table["satellite_id"]).encode()
    return Columns(
        time=times,
        satellite_id=np.frombuffer(ids, f"S{len(ids) // len(points)}"),
        values={name: np.frombuffer(struct.pack(f"{len(points)}d", *table[name])) for name in REQUIRED},
        is_anomaly=np.zeros(len(points), np.bool_),
    )


def receive(listener: socket.socket, slots: Slots) -> None:
    """Answer each request once its points are in shared memory; never ends."""
    poll = select.epoll()
    poll.register(listener.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE)
    clients: dict[int, tuple[socket.socket, bytearray]] = {}
    filled: dict[int, int] = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                try:
                    client, _ = listener.accept()
                except BlockingIOError:
                    continue
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                poll.register(client.fileno(), select.EPOLLIN)
                clients[client.fileno()], filled[client.fileno()] = (client, bytearray(BUFFER_BYTES)), 0
                slots.words[CLIENTS] = len(clients)
                time.sleep(len(clients) * ACCEPT_PAUSE_S)  # for the other receiver to take the next connection
                continue
            client, buffer = clients[fd]
            try:
                got = client.recv_into(memoryview(buffer)[filled[fd] :])
                if got:
                    filled[fd] = answer(client, buffer, filled[fd] + got, slots)
            except ConnectionError:
                got = 0
            if not got:
                client.close()
                del clients[fd]


def answer(client: socket.socket, buffer: bytearray, filled: int, slots: Slots) -> int:
    """Answer the whole requests in a buffer; return how many bytes of the next one are left, at its beginning."""
    while (body := buffer.find(b"\r\n\r\n", 0, filled) + 4) > 3:
        length = LENGTH.search(buffer, 0, body)
        assert length is not None
        end = body + int(length[1])
        if filled < end:
            break
        slots.put(to_columns(memoryview(buffer)[body:end]))
        client.send(ANSWER)
        buffer[: filled - end] = buffer[end:filled]
        filled -= end
    return filled


def write(dsn: str, slots: Slots) -> None:
    """COPY what comes, sorted, straight to the columnstore where the server can do that; never ends."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        store = columnstore.Columnstore(connection)
        since = 0.0
        while True:
            waiting, now = slots.words[HEAD] - slots.words[TAIL], time.monotonic()
            since = since if waiting else now
            if waiting < FEW and (not waiting or now - since < GATHER_S):
                time.sleep(POLL_S)  # shared memory is polled, and more may gather
                continue
            since = now
            records = slots.take()
            columns, received = rows.unpack(rows.layout(), records)
            order = copy_format.order(columns)
            columns = rows.take(columns, order)
            names = ", ".join(copy_format.column_names(columns))
            with connection.transaction(), connection.cursor() as cursor:
                asked = store.begin(cursor, len(columns))
                with cursor.copy(f"COPY telemetry ({names}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
                    for piece in copy_format.pieces(columns, received[order]):
                        copy.write(piece)
                store.end(cursor, len(columns))
            slots.words[TAIL] += len(records)
            slots.words[LAST_NS] = time.time_ns()
            slots.words[COMPRESSED] += len(columns) * (asked and store.works)
            slots.words[COMMITTED] += len(columns)


@dataclass(slots=True)
class Bare:
    """One round of the chain: points/s and its share of COPY alone (rows/s) around it, the share that went straight to
    the columnstore, the share of the CPU that no process used, connections by receiver."""

    per_second: float
    copy_per_second: float
    compressed: float
    idle: float
    clients: list[int]

    @property
    def share(self) -> float:
        return self.per_second / self.copy_per_second


@contextmanager
def chain(dsn: str) -> Iterator[tuple[str, list[Slots], Callable[[], bool]]]:
    """Yield the URL of a chain into `dsn`, its shared memory, and whether it is whole; it is killed afterwards."""
    ours, fork = os.getpid(), get_context("fork")

    def run(work: Callable[..., None], *arguments: Any) -> None:
        process.die_with_parent(ours, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        process.keep_freed_memory()
        gc.disable()
        work(*arguments)

    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
        listener.setblocking(False)
        shared, started = [Slots() for _ in range(PAIRS)], []
        for slots in shared:
            for work in ((receive, listener, slots), (write, dsn, slots)):
                started.append(fork.Process(target=run, args=work, daemon=True))
                started[-1].start()
                stack.callback(started[-1].kill)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", shared, lambda: all(each.is_alive() for each in started)


@contextmanager
def idle_looks() -> Iterator[list[tuple[float, float]]]:
    """Note in the background, while the body runs, the time (s since 1970) and the machine's idle CPU so far, in s."""
    looks: list[tuple[float, float]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(IDLE_LOOK_S):
            fields = Path("/proc/stat").read_text().split(maxsplit=6)
            looks.append((time.time(), (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield looks
    finally:
        over.set()
        thread.join()


def load(
    url: str, shared: list[Slots], whole: Callable[[], bool], options: argparse.Namespace, prepared: int = 0
) -> Bare:
    """Send as many points as are taken and wait until all are committed; rates are counted as a trial counts them."""
    before = [total(shared, word) for word in (COMMITTED, COMPRESSED)]
    with idle_looks() as looks:
        report = rig.simulate(url, trial.load_flags(0, options, prepared))
        deadline = time.monotonic() + WAIT_S
        while total(shared, COMMITTED) - before[0] < report["accepted"]:
            if time.monotonic() > deadline or not whole():
                raise rig.RigError("the chain did not commit what it took")
            time.sleep(0.01)  # shared memory is polled; until the deadline
    if report["refused"] + report["unknown"] + report["retries"]:
        raise rig.RigError(f"the chain did not take what was sent: {'; '.join(report['failures'])}")
    begin = datetime.fromisoformat(report["started_at"]).timestamp()
    last = max(slots.words[LAST_NS] for slots in shared) / 1e9
    loaded = [look for look in looks if begin <= look[0] <= last]
    idle = (loaded[-1][1] - loaded[0][1]) / (loaded[-1][0] - loaded[0][0]) / (os.cpu_count() or 1)
    compressed = (total(shared, COMPRESSED) - before[1]) / report["accepted"]
    clients = [slots.words[CLIENTS] for slots in shared]
    return Bare(report["accepted"] / (last - begin), 1.0, compressed, idle, clients)


def total(shared: list[Slots], word: int) -> int:
    return sum(slots.words[word] for slots in shared)


def bare(options: argparse.Namespace) -> Bare:
    """Measure the chain once, and COPY alone before and after."""
    config = settings.load({"DATABASE_URL": options.database_url} if options.database_url else {})
    home = rig.private_folder(Path("/tmp"), "orbitstream-bare")
    try:
        with trial.scratch_database(config, home) as dsn, chain(dsn) as (url, shared, whole):
            pace = load(url, shared, whole, options).per_second
            ceiling = trial.Ceiling(dsn, options.satellites, PAIRS, seconds=min(options.seconds, WARM_UP_S))
            ceiling.measure()
            trial.empty(dsn, checkpoint=True)
            found = load(url, shared, whole, options, int(SPARE * pace * options.seconds))
            trial.empty(dsn, checkpoint=True)
            ceiling.measure()
            found.copy_per_second = ceiling.rows_per_second
            return found
    finally:
        shutil.rmtree(home, ignore_errors=True)


def main() -> int:
    """Measure both in turns, write results/bare.json, print a line a round."""
    parser = argparse.ArgumentParser(prog="python -m bench.bare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--satellites", type=int, default=1000)
    parser.add_argument("--database-url", default=os.environ.get("DATABASE_URL"), help="make scratch databases there")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.batch = BATCH
    configuration = {name: getattr(options, name) for name in ("rounds", "seconds", "satellites", "batch")}
    engines = argparse.Namespace(
        **vars(options), workers=PAIRS, writers=PAIRS, rate=0.0, prepare=True, format="json", history=0
    )
    found = []
    for number in range(options.rounds):
        turns = {"bare": lambda: bare(options), "engine": lambda: measure(options.satellites, engines)}
        taken: dict[str, Any] = {way: turns[way]() for way in sorted(turns, reverse=bool(number % 2))}
        chained, engine = taken["bare"], taken["engine"]
        shares = {"bare": round(chained.share, 3), "engine": engine["committed_to_copy"]}
        found.append({"shares": shares, "bare": asdict(chained), "engine": engine})
        print(
            f"of COPY alone: the bare chain {shares['bare']:.2f} ({chained.per_second:,.0f}/s, {chained.compressed:.0%}"
            f" straight to the columnstore, {chained.idle:.0%} of the CPU idle), the engine {shares['engine']:.2f}"
            f" ({engine['committed_per_second']:,}/s)",
            flush=True,
        )
    shares = {way: statistics.median(each["shares"][way] for each in found) for way in ("bare", "engine")}
    path = results.save("bare", configuration, {"rounds": found, "shares": shares}, options.output)
    print(f"medians: the bare chain {shares['bare']:.2f}, the engine {shares['engine']:.2f} of COPY alone; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
