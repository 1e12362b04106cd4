"""Whole runs against a real socket server that answers by script: outcomes, retries, the sent log, stopping.

The law that most tests check: the log holds every point that was sent and no other; accepted points reached the server
in a request that it accepted, refused ones never did.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from simulator import control
from simulator.__main__ import main

Key = tuple[str, datetime]

ACCEPT = b'HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n{"status":"accepted"}'
ACCEPT_AND_CLOSE = ACCEPT.replace(b"Content-Type", b"Connection: close\r\nContent-Type")
CHUNKED = b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
INVALID = b"HTTP/1.1 422 Unprocessable Content\r\nContent-Type: application/problem+json\r\nContent-Length: 2\r\n\r\n{}"
LATER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\n"
    b"Retry-After: 0\r\nContent-Length: 2\r\n\r\n{}"
)
MUCH_LATER = LATER.replace(b"Retry-After: 0", b"Retry-After: 5")
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
CLOSE = b""  # the script's word for: read the request, close without an answer
SILENCE = None  # and for: read the request, never answer


class Server:
    """Answer the n-th request (from 0) with script(n, points); keep what arrived.

    received: the points of every request that was read whole, with the answer given; connections: opened so far.
    """

    def __init__(self) -> None:
        self.script: Callable[[int, list[Key]], bytes | None] = lambda n, points: ACCEPT
        self.received: list[tuple[list[Key], bytes | None]] = []
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.all_closed = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def stop_listening(self) -> None:
        with contextlib.suppress(OSError):  # done before
            self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.stop_listening()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):  # its client was killed, which its thread has not seen yet
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def keys(self, *answers: bytes | None) -> list[Key]:
        """Return the points that arrived in requests with one of these answers, of all requests without any."""
        return [key for points, answer in self.received if not answers or answer in answers for key in points]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open.add(sock)
                self.all_closed.clear()
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as stream:
            with contextlib.suppress(OSError):
                while self._answer(sock, stream):
                    pass
            with self._lock:
                self._open.discard(sock)
                if not self._open:
                    self.all_closed.set()

    def _answer(self, sock: socket.socket, stream: Any) -> bool:
        head = b"".join(iter(stream.readline, b"\r\n")) if stream.peek(1) else b""
        length = re.search(rb"Content-Length: (\d+)", head)
        body = stream.read(int(length[1])) if length else b""
        if not length or len(body) < int(length[1]):
            return False
        points = parse(head, body)
        with self._lock:
            answer = self.script(len(self.received), points)
            self.received.append((points, answer))
            self.heads.append(head)
            self.bodies.append(body)
        if answer is SILENCE:
            return bool(stream.read(1))
        if answer:
            sock.sendall(answer)
        return answer not in (CLOSE, ACCEPT_AND_CLOSE)


def parse(head: bytes, body: bytes) -> list[Key]:
    if b"x-ndjson" in head:
        points = [orjson.loads(line) for line in body.splitlines()]
    else:
        found = orjson.loads(body)
        points = found if isinstance(found, list) else [found]
    return [(point["satellite_id"], datetime.fromisoformat(point["timestamp"])) for point in points]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def simulate(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], dict[Key, str]]]:
    """Return a function that runs the simulator: flags in; exit code, report, and outcome by key out."""

    def run(*flags: str) -> tuple[int, dict[str, Any], dict[Key, str]]:
        log = tmp_path / "sent.parquet"
        calm = [] if "--anomaly-rate" in flags else ["--anomaly-rate", "0"]
        code = main(["--api-url", server.url, "--json", "--quiet", "--sent-log", str(log), *calm, *flags])
        report = json.loads(capsys.readouterr().out)
        outcomes = read_log(log)
        assert os.listdir(tmp_path) == ["sent.parquet"], "spools are removed"
        assert report["sent"] == len(outcomes) == report["accepted"] + report["refused"] + report["unknown"]
        assert Counter(outcomes.values()) == Counter(
            {name: report[name] for name in ("accepted", "refused", "unknown") if report[name]}
        )
        return code, report, outcomes

    return run


def read_log(path: Path) -> dict[Key, str]:
    """Return the outcome of every point in a sent log, checking that no key is there twice."""
    table = parquet.read_table(path)
    assert [str(field.type) for field in table.schema] == [
        "dictionary<values=string, indices=int32, ordered=0>",
        "timestamp[us, tz=UTC]",
        "dictionary<values=string, indices=int32, ordered=0>",
    ]
    rows = list(zip(*(table[name].to_pylist() for name in ("satellite_id", "time", "outcome")), strict=True))
    assert len({row[:2] for row in rows}) == len(rows)
    return {(satellite, time.astimezone(UTC)): outcome for satellite, time, outcome in rows}


def with_outcome(outcomes: dict[Key, str], outcome: str) -> set[Key]:
    return {key for key, found in outcomes.items() if found == outcome}


@pytest.mark.parametrize(
    "flags",
    [
        ("--rate", "50", "--duration", "0.3"),
        ("--rate", "200", "--duration", "0.3", "--batch", "50"),
        ("--rate", "200", "--duration", "0.3", "--batch", "50", "--format", "ndjson", "--channels", "all"),
        ("--rate", "200", "--duration", "0.3", "--batch", "50", "--single-share", "0.2", "--processes", "2"),
        ("--rate", "0", "--points", "3000", "--batch", "100", "--single-share", "0.05", "--processes", "2"),
        ("--rate", "0", "--points", "3000", "--batch", "100", "--single-share", "0.05", "--prepare"),
    ],
)
def test_the_log_is_exactly_what_the_server_accepted(flags: tuple[str, ...], server: Server, simulate: Any) -> None:
    code, report, outcomes = simulate("--satellites", "40", "--anomaly-rate", "0.5", *flags)
    assert code == 0
    assert set(outcomes.values()) == {"accepted"}
    keys = server.keys()
    assert len(keys) == len(set(keys)) == report["sent"]
    assert set(keys) == set(outcomes)
    assert report["requests"] == len(server.received)
    expected = 3000 if "3000" in flags else int(40 * int(flags[1]) * 0.3)
    assert report["sent"] + report["silent"] == expected and report["unsent"] == 0
    # At any one moment each satellite has an episode or not, for ten minutes: of ten, nine did once.
    assert 0.2 < report["anomalies"] / expected < 0.9
    assert max(time for _, time in keys) <= datetime.now(UTC)


def test_answers_decide_what_becomes_of_points(server: Server, simulate: Any) -> None:
    answers = [ACCEPT, INVALID, CLOSE, BROKEN, CHUNKED, ACCEPT_AND_CLOSE]
    server.script = lambda n, points: answers[n % 6]
    code, report, outcomes = simulate("--satellites", "6", "--rate", "0", "--points", "600", "--batch", "10")
    assert code == 1, "points were lost"
    assert len(server.keys()) == len(set(server.keys())) == 600, "nothing is sent twice"
    assert with_outcome(outcomes, "accepted") == set(server.keys(ACCEPT, CHUNKED, ACCEPT_AND_CLOSE))
    assert with_outcome(outcomes, "refused") == set(server.keys(INVALID))
    assert with_outcome(outcomes, "unknown") == set(server.keys(CLOSE, BROKEN))
    assert report["retries"] == 0


def test_a_503_with_retry_after_is_tried_again_with_the_same_points(server: Server, simulate: Any) -> None:
    tried: Counter[Key] = Counter()

    def refuse_twice(_: int, points: list[Key]) -> bytes:
        tried[points[0]] += 1
        return LATER if tried[points[0]] <= 2 else ACCEPT

    server.script = refuse_twice
    code, report, outcomes = simulate("--satellites", "4", "--rate", "0", "--points", "200", "--batch", "20")
    assert code == 0
    assert report["requests"] == 10 and report["retries"] == 20
    assert set(outcomes.values()) == {"accepted"}
    assert set(server.keys(ACCEPT)) == set(outcomes)
    assert set(tried.values()) == {3}


def test_a_retry_that_fails_otherwise_has_that_outcome(server: Server, simulate: Any) -> None:
    server.script = lambda n, points: [LATER, CLOSE, LATER, INVALID][n] if n < 4 else ACCEPT
    _, report, outcomes = simulate("--rate", "0", "--points", "3", "--connections", "1")
    assert sorted(outcomes.values()) == ["accepted", "refused", "unknown"]
    assert report["retries"] == 2


def test_the_schedule_goes_on_while_the_service_stalls(server: Server, simulate: Any) -> None:
    """Coordinated omission: the points that waited behind the stall count with their wait."""
    server.script = lambda n, points: LATER.replace(b"After: 0", b"After: 1") if n == 0 else ACCEPT
    code, report, _ = simulate("--satellites", "1", "--rate", "20", "--duration", "1", "--connections", "1")
    assert code == 0
    assert report["accepted"] == 20
    assert 0.9 < report["behind_seconds"] < 2
    assert report["latency_ms"]["p50"] > 300
    assert report["latency_ms"]["max"] >= 1_000


def test_a_slow_answer_is_unknown_and_its_connection_not_used_again(server: Server, simulate: Any) -> None:
    server.script = lambda n, points: SILENCE if n == 0 else ACCEPT
    code, report, outcomes = simulate("--rate", "0", "--points", "5", "--connections", "1", "--timeout", "0.2")
    assert code == 1
    assert with_outcome(outcomes, "unknown") == set(server.keys(SILENCE))
    assert report["unknown"] == 1 and report["accepted"] == 4
    assert report["latency_ms"]["max"] >= 200
    assert server.connections == 3, "the parent's probe, the one given up, its replacement"


def test_nothing_accepted_is_exit_code_1(server: Server, simulate: Any) -> None:
    server.script = lambda n, points: INVALID
    code, report, outcomes = simulate("--rate", "0", "--points", "10")
    assert code == 1
    assert report["refused"] == len(outcomes) == 10


def test_a_service_that_goes_away_leaves_points_unsent_not_unknown(server: Server, simulate: Any) -> None:
    def close_for_good(_: int, points: list[Key]) -> bytes:
        server.stop_listening()
        os.kill(os.getpid(), signal.SIGINT)  # or it would try to connect for 30 s more
        return ACCEPT_AND_CLOSE

    server.script = close_for_good
    code, report, outcomes = simulate("--satellites", "1", "--rate", "1000", "--duration", "5", "--connections", "1")
    assert code == 130
    assert set(server.keys()) == set(outcomes) and set(outcomes.values()) == {"accepted"}
    assert report["accepted"] == 1


def test_ctrl_c_settles_what_is_under_way_and_reports(server: Server, simulate: Any) -> None:
    """Of four connections one is accepted, one waits for its retry, one never answers when Ctrl-C comes."""

    def interrupt_at_the_fourth(n: int, _: list[Key]) -> bytes | None:
        if n == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return [ACCEPT, MUCH_LATER, SILENCE][n] if n < 3 else ACCEPT

    server.script = interrupt_at_the_fourth
    code, report, outcomes = simulate("--rate", "0", "--duration", "60", "--batch", "5", "--connections", "4")
    assert code == 130
    assert report["seconds"] < 5
    assert with_outcome(outcomes, "refused") == set(server.keys(MUCH_LATER))
    assert with_outcome(outcomes, "unknown") == set(server.keys(SILENCE))
    assert with_outcome(outcomes, "accepted") == set(server.keys(ACCEPT))


def test_ctrl_c_while_points_are_made_sends_none_and_leaves_no_sender(server: Server) -> None:
    flags = ["--rate", "0", "--batch", "1000", "--points", "5000000", "--prepare", "--api-url", server.url]
    command = [sys.executable, "-m", "simulator", *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        assert run.stderr is not None
        assert run.stderr.readline() == b"  making 5,000,000 points\n"
        run.send_signal(signal.SIGINT)
        assert run.wait(10) == 130
        assert run.stderr.read() == b""  # no sender had to be killed
    assert not server.received


def test_a_sender_that_dies_is_reported(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    senders: list[control.SenderProcess] = []
    start = control.SenderProcess.__init__

    def remember(self: control.SenderProcess, job: Any) -> None:
        start(self, job)
        senders.append(self)

    def kill_the_second(n: int, _: list[Key]) -> bytes:
        if n == 0:
            senders[1].kill()
        return ACCEPT

    monkeypatch.setattr(control.SenderProcess, "__init__", remember)
    server.script = kill_the_second
    log = tmp_path / "sent.parquet"
    flags = ["--satellites", "2", "--processes", "2", "--rate", "20", "--duration", "0.5", "--sent-log", str(log)]
    assert main(["--api-url", server.url, *flags]) == 1
    captured = capsys.readouterr()
    assert "sender 1 died (SIGKILL)" in captured.err
    logged, arrived = set(read_log(log)), set(server.keys())
    assert logged <= arrived
    assert {key for key in arrived if key[0] == "SAT-00000"} <= logged


def test_a_killed_simulator_takes_its_senders_with_it_and_leaves_the_spools(server: Server, tmp_path: Path) -> None:
    going = threading.Event()

    def notice(n: int, _: list[Key]) -> bytes:
        if n == 40:
            going.set()
        return ACCEPT

    server.script = notice
    flags = ["--rate", "0", "--duration", "60", "--processes", "2", "--sent-log", str(tmp_path / "sent.parquet")]
    command = [sys.executable, "-m", "simulator", "--api-url", server.url, "--batch", "10", *flags]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        assert going.wait(20)
        process.kill()
    assert server.all_closed.wait(10), "senders of a killed simulator go on sending"
    assert len(list(tmp_path.glob("sent.parquet.*.spool"))) == 2


def test_progress_goes_to_stderr_and_one_line_of_words_to_stdout(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--api-url", server.url, "--rate", "1", "--duration", "1.3", "--anomaly-rate", "0"]) == 0
    captured = capsys.readouterr()
    words = re.fullmatch(r"sent 130 points in (1\.\d) s: 130 accepted \((\d+)/s\), 0 refused, .*\n", captured.out)
    assert (
        words and abs(130 / int(words[2]) - float(words[1])) < 0.06
    )  # 100/s, on a busy machine 99; the time is rounded
    assert re.search(r"^  1 s  \d+ points sent  \d+ accepted  0 refused  \d+/s$", captured.err, re.MULTILINE)


def test_requests_are_well_formed(server: Server, simulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORBITSTREAM_TOKEN", "s3cret")
    simulate("--rate", "0", "--points", "20", "--batch", "10", "--format", "ndjson", "--connections", "1")
    assert server.heads[0].split(b"\r\n")[:-1] == [
        b"POST /telemetry/batch HTTP/1.1",
        b"Host: " + server.url.removeprefix("http://").encode(),
        b"User-Agent: orbitstream-simulator",
        b"Authorization: Bearer s3cret",
        b"Content-Type: application/x-ndjson",
        b"Content-Length: " + server.heads[0].split(b"Content-Length: ")[1].split(b"\r\n")[0],
    ]
    assert len(server.received) == 2


def test_with_a_key_an_unknown_outcome_is_tried_again_until_it_is_known(server: Server, simulate: Any) -> None:
    server.script = lambda n, points: [CLOSE, BROKEN, LATER, ACCEPT][n] if n < 4 else ACCEPT
    flags = ["--rate", "0", "--points", "40", "--batch", "20", "--connections", "1", "--idempotency-keys"]
    code, report, outcomes = simulate(*flags)
    assert code == 0
    assert report["accepted"] == 40 and report["requests"] == 2 and report["retries"] == 3
    keys = [request_key(head) for head in server.heads]
    assert keys[0] == keys[1] == keys[2] == keys[3] != keys[4]
    assert set(server.keys(ACCEPT)) == set(outcomes)


def request_key(head: bytes) -> bytes:
    found = re.search(rb"Idempotency-Key: (\S+)", head)
    assert found
    return found[1]


def test_single_posts_have_keys_of_their_own(server: Server, simulate: Any) -> None:
    simulate("--rate", "0", "--points", "600", "--batch", "1", "--idempotency-keys", "--processes", "2")
    assert len({request_key(head) for head in server.heads}) == len(server.heads) == 600


def test_two_runs_with_one_seed_and_start_send_the_same_bytes(server: Server, simulate: Any) -> None:
    flags = ["--satellites", "20", "--rate", "50", "--duration", "0.4", "--batch", "40", "--single-share", "0.1"]
    flags += ["--channels", "all", "--anomaly-rate", "0.2", "--processes", "2", "--start", "2026-11-22T00:00:00Z"]
    sent = []
    for _ in range(2):
        server.bodies.clear()
        simulate(*flags)
        sent.append(sorted(server.bodies))
    assert sent[0] == sent[1] and len(sent[0]) > 20
    assert b'"timestamp":"2026-11-22T00:00:00.' in sent[0][0]


def test_the_truth_names_every_anomaly_and_the_silent(server: Server, tmp_path: Path) -> None:
    truth = tmp_path / "truth.parquet"
    flags = ["--satellites", "1000", "--rate", "1", "--duration", "1", "--batch", "100", "--anomaly-rate", "0.3"]
    assert main(["--api-url", server.url, "--quiet", *flags, "--truth", str(truth)]) == 0
    rows = parquet.read_table(truth).to_pylist()
    keys = [(row["satellite_id"], row["time"].astimezone(UTC)) for row in rows]
    kinds = [row["anomaly"] for row in rows]
    assert set(kinds) == {"battery_drain", "storage_leak", "signal_loss", "tumbling", "silence", "spike"}
    silent = {key for key, kind in zip(keys, kinds, strict=True) if kind == "silence"}
    arrived = set(server.keys())
    assert silent and not silent & arrived and set(keys) - silent <= arrived
    assert len(arrived) == 1_000 - len(silent)
    told = {key for key, row in zip(keys, rows, strict=True) if row["beyond_limit"]}
    assert told - silent == {key for body in server.bodies for key in beyond_limits(body)}


def beyond_limits(body: bytes) -> Iterator[Key]:
    for point in orjson.loads(body):
        if (
            point["battery_charge_percent"] < 10
            or point["storage_usage_mb"] > 95_000
            or point["signal_strength_dbm"] < -100
        ):
            yield point["satellite_id"], datetime.fromisoformat(point["timestamp"])


@pytest.mark.parametrize(("suffix", "body_format"), [("parquet", "json"), ("csv", "ndjson"), ("ndjson", "json")])
def test_a_replay_sends_the_file_in_its_rhythm(
    suffix: str, body_format: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"flight.{suffix}"
    times = [datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC) for second in (4, 0, 1, 2, 3)]
    names = ["b", "a\u00e9", "b", "a\u00e9", "b"]
    columns = {"satellite_id": names, "time": times, "battery_charge_percent": [1.5, 2.0, 3.0, 4.0, 5.0]}
    columns |= {"temperature_c": [None, 7.25, None, None, 9.0], "is_anomaly": [True, False, False, False, False]}
    table = pa.table(columns)
    if suffix == "parquet":
        parquet.write_table(table, file)
    elif suffix == "csv":
        csv.write_csv(table, file)
    else:
        file.write_bytes(b"\n".join(orjson.dumps(row) for row in table.to_pylist()))
    flags = ["--speed", "10", "--json", "--quiet", "--batch", "2", "--format", body_format, "--keep-times"]
    assert main(["replay", str(file), "--api-url", server.url, "--processes", "1", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accepted"] == 5 and 0.3 < report["seconds"] < 2
    assert sorted(server.keys()) == sorted(zip(names, times, strict=True))
    points = b"".join(server.bodies)
    assert points.count(b"temperature_c") == 2 and b"is_anomaly" not in points and b"7.25" in points


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("no.csv", None, "cannot be read"),
        ("x.txt", "a", "is none of .parquet, .csv, .ndjson, .jsonl"),
        ("x.csv", "satellite_id,battery\na,1\n", "has no points with satellite_id and time"),
        ("x.csv", "satellite_id,time\na,2026-01-01T00:00:00\n", "has no time zone"),
        ("x.csv", "satellite_id,time\na,2026-01-01T00:00:00Z\nb,\n", "1 of 2 rows have no time"),
        ("x.ndjson", '{"satellite_id":"a","time":"2026-01-01T00:00:00Z"}\n{"satellite_id":"b"}\n', "have no time"),
        ("x.ndjson", '{"satellite_id":"a","time":"2026-01-01T00:00:00Z"}\n{"time":"2026-01-01T00:00:00Z"}\n',
         "have no satellite_id"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_replayed_is_one_clear_line(
    name: str, text: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["replay", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_a_connection_that_the_server_closes_while_idle_is_replaced(server: Server, simulate: Any) -> None:
    """The server closes after each answer without having said so in it."""
    answer = server._answer
    server._answer = lambda sock, stream: answer(sock, stream) and False  # type: ignore[method-assign]
    code, report, outcomes = simulate("--satellites", "1", "--rate", "10", "--duration", "0.6", "--connections", "1")
    assert code == 0
    assert report["accepted"] == 6 and report["unknown"] == 0
    assert set(outcomes) == set(server.keys())
    assert server.connections >= 6


@pytest.mark.parametrize("flags", [(), ("--prepare",)])
def test_a_closed_loop_sends_nothing_before_its_start(flags: tuple[str, ...], server: Server, simulate: Any) -> None:
    """Or a rate would count points of more seconds than it divides by."""
    arrived: list[float] = []

    def note(_: int, __: list[Key]) -> bytes:
        arrived.append(time.time())
        return ACCEPT

    server.script = note
    _, report, _ = simulate("--rate", "0", "--points", "500", "--batch", "50", *flags)
    started = datetime.fromisoformat(report["started_at"]).timestamp()
    assert min(arrived) >= started
