"""The flags of the simulator: what a command line says, checked, as Settings."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from simulator.bodies import ENCODINGS, MEDIA_TYPES
from simulator.fleet import CHANNEL_SETS
from simulator.schedule import PROFILES
from simulator.settings import Settings, default_connections, default_processes

DEFAULT_DURATION = 10.0
# What prepared points take in memory at most, and their requests but for what differs in heads. Seen, with keys and all
# channels: 393 bytes a point in batches of 10 in JSON, 796 alone, 1,224 in pairs in Arrow.
POINT_BYTES = 400
REQUEST_BYTES = 2_000
EPILOG = """\
examples:
  orbitstream-simulator
        100 satellites, one reading a second each, ten seconds, one POST a reading
  orbitstream-simulator --satellites 1000 --rate 10 --batch 1000 --duration 60
        10,000 points/s in ten batches a second
  orbitstream-simulator --rate 0 --batch 1000
        as many points as the service takes
  orbitstream-simulator --rate 0 --batch 1000 --points 5000000 --prepare
        the same for a service on this machine: made beforehand, they leave it more of the CPU
  orbitstream-simulator --rate 100 --batch 500 --single-share 0.05 --sent-log sent.parquet --json
        batches with single posts among them; every point and its outcome to a file, the report as JSON
  orbitstream-simulator --tle stations.txt --channels all --anomaly-rate 0.05 --truth truth.parquet
        satellites where they are, and which readings a detector should find
  orbitstream-simulator replay flight.parquet --speed 10
        what a file holds, ten times as fast; `replay --help` tells its columns

what becomes of a point:
  accepted   answered 200 or 202
  refused    answered 4xx or 503: nothing of the request is stored. A 503 or 429 that names a Retry-After is tried
             again when it says, until 30 s after the end of the run
  unknown    the connection broke, the answer took longer than --timeout, or was a bare 500 or 502: stored or not.
             Sent again only with --idempotency-keys: without them that could store it twice
  silent     its satellite was in an episode of silence and sent nothing

anomalies (half of --anomaly-rate are spikes, half episodes of 2 to 8 minutes on single satellites):
  battery_drain, storage_leak, signal_loss, tumbling, silence, spike

the sent log (Parquet, one row a point that was sent):
  satellite_id  string (dictionary), as in the request: SAT-00042
  time          timestamp[us, UTC], the point's timestamp; (satellite_id, time) is unique, also from run to run
  outcome       string (dictionary): accepted, refused or unknown
  It is complete when the simulator ends. One that is killed leaves FILE.*.spool, with what was settled until then.

the truth (Parquet, one row a point with an anomaly): satellite_id, time, outcome (also: silent), and
  anomaly       string (dictionary), one of the above
  beyond_limit  bool: battery < 10 %, storage > 95,000 MB or signal < -100 dBm, the service's limits by default

readings depend on --seed, --tle, --anomaly-rate, satellite and time alone: two runs with the same --start send the same
bytes. Without --tle the orbits are those of 71 real satellites of 2018, flown without drag.

environment:
  ORBITSTREAM_TOKEN   sent as `Authorization: Bearer ...`; or use --token-file. There is no flag for the token itself:
                      other users could read it in the process list

exit code: 0 every point that was due was accepted, 1 some were not (see the report), or a sender process died,
2 a bad flag or no service, nothing was sent, 130 stopped by Ctrl-C (the report and the log are complete)
"""
REPLAY_EPILOG = """\
the file (.parquet, .csv, .ndjson or .jsonl) has a row a point:
  satellite_id             string
  time or timestamp        timestamp or RFC 3339 string
  any other column         number: a channel of the service; an empty cell is left out
  is_anomaly, received_at and outcome are passed over, so that an export of the table can be replayed as it is.

points keep their order and their distances, divided by --speed, and are stamped anew from now on; --keep-times leaves
their timestamps as they are.
"""


class UsageError(Exception):
    """Report a flag that cannot be; the message is one line with the remedy."""


class Parser(argparse.ArgumentParser):
    """Raise UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Turn a parse error into one line."""
        raise UsageError(f"{message}; --help lists the flags")


def real(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers from low to high; NaN is none of them."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:,g}")
        return value

    return parse


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high:,}")
        return value

    return parse


def build_parser(replay: bool = False) -> Parser:
    """Describe the command line, or that of `replay`."""
    parser = Parser(
        prog="orbitstream-simulator replay" if replay else "orbitstream-simulator",
        description="Send what a file holds to OrbitStream, in its own rhythm."
        if replay
        else "Play a constellation: satellites that POST their telemetry to OrbitStream over HTTP.",
        epilog=REPLAY_EPILOG if replay else EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if replay:
        parser.add_argument("replay", metavar="FILE", help="what to send, see below")
        parser.add_argument("--speed", type=real(0.001, 1e6), default=1.0, metavar="X", help="times as fast (1)")
        parser.add_argument("--keep-times", action="store_true", help="send the timestamps of the file")
    else:
        add_fleet_flags(parser)
        add_schedule_flags(parser)
    add_load_flags(parser)
    output = parser.add_argument_group("what it tells")
    add = output.add_argument
    add("--json", action="store_true", help="print the report as one JSON object")
    add("--sent-log", metavar="FILE", help="write every point sent and its outcome to FILE, see below")
    add("--quiet", action="store_true", help="no progress on stderr")
    if not replay:
        add("--truth", metavar="FILE", help="write every point with an anomaly to FILE, see below")
    return parser


def add_fleet_flags(parser: Parser) -> None:
    """Describe the flags of the fleet."""
    add = parser.add_argument_group("the fleet").add_argument
    add("--satellites", type=whole(1, 1_000_000), default=100, metavar="N", help="satellites (100)")
    add("--tle", metavar="FILE", help="their orbits, two-line elements; satellites beyond them fly copies")
    add(
        "--anomaly-rate",
        type=real(0, 1),
        default=0.01,
        metavar="F",
        help="share of the points with an anomaly, see below (0.01)",
    )
    add(
        "--channels",
        choices=list(CHANNEL_SETS),
        default="required",
        help="required: battery, storage, signal; all: also position, velocity, temperature, voltage (required)",
    )
    add("--seed", type=whole(0, 2**63 - 1), default=1, metavar="N", help="same seed, same readings (1)")


def add_schedule_flags(parser: Parser) -> None:
    """Describe the flags of the schedule."""
    add = parser.add_argument_group("the schedule").add_argument
    add(
        "--rate",
        type=real(0, 100_000),
        default=1.0,
        metavar="R",
        help="points/s a satellite, kept whatever the service does; 0: as fast as answers come (1)",
    )
    add(
        "--profile",
        choices=list(PROFILES),
        default="constant",
        help="how the rate runs, --rate being its mean: constant; ramp from 0 to twice; burst: each 10 s, five times in"
        " the first; diurnal: one day in the whole run (constant)",
    )
    add(
        "--duration",
        type=real(0.001, 1e7),
        metavar="S",
        help="seconds; what is late at the end is sent for up to 30 s more (10; no limit with --points)",
    )
    add("--points", type=whole(1, 10**12), metavar="N", help="stop after N points in all")
    add(
        "--prepare",
        action="store_true",
        help="make all --points of a run with --rate 0 before the first is sent; sending them takes a third of the CPU",
    )
    add("--start", type=moment, metavar="TIME", help="timestamp of the first point, RFC 3339 (now)")


def add_load_flags(parser: Parser) -> None:
    """Describe the flags of the load."""
    add = parser.add_argument_group("the load").add_argument
    add("--api-url", default="http://127.0.0.1:8080", metavar="URL", help="the service (http://127.0.0.1:8080)")
    add(
        "--batch",
        type=whole(1, 100_000),
        default=1,
        metavar="N",
        help="points a request; 1: POST /telemetry; more: POST /telemetry/batch, sent smaller after one second (1)",
    )
    add(
        "--single-share",
        type=real(0, 1),
        default=0.0,
        metavar="F",
        help="share of the points posted one by one beside the batches (0)",
    )
    add(
        "--format",
        choices=list(MEDIA_TYPES),
        default="json",
        help="body of a batch: json, an array of objects; columnar, an object of arrays; ndjson; arrow, an IPC stream"
        " (json)",
    )
    add("--encoding", choices=list(ENCODINGS), default="identity", help="how the body of a batch is packed (identity)")
    add(
        "--idempotency-keys",
        action="store_true",
        help="give each request a key, and send it again when its outcome is unknown",
    )
    add(
        "--processes",
        type=whole(1, 256),
        metavar="N",
        help="sender processes (as many as the rate needs, at most one a core; with --rate 0 half of the cores)",
    )
    add("--connections", type=whole(1, 1_000), metavar="N", help="a process (16; 32 with single posts)")
    add("--timeout", type=real(0.001, 3_600), default=10.0, metavar="S", help="wait for an answer, seconds (10)")
    add("--token-file", metavar="FILE", help="file with the bearer token (default: ORBITSTREAM_TOKEN)")


def moment(text: str) -> int:
    """Parse an RFC 3339 time with an offset; return microseconds since 1970 UTC."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write 2026-11-22T12:00:00Z, say") from None
    if when.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r} has no offset; write {text}Z for UTC")
    since = when.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Fill in the defaults that depend on other flags; raise UsageError for flags that contradict each other."""
    a = arguments
    for name in ("format", "encoding"):
        value = getattr(a, name)
        if value not in ("json", "identity") and a.batch == 1:
            raise UsageError(f"--{name} {value} is for batches; add --batch 1000, say")
    if a.processes and a.processes > a.satellites:
        raise UsageError(f"--processes {a.processes} is more than --satellites {a.satellites}; each needs one at least")
    duration = a.duration
    if duration is None and a.points is None:
        duration = DEFAULT_DURATION
    if a.profile != "constant" and not a.rate:
        raise UsageError(f"--profile {a.profile} needs a --rate to shape; with --rate 0 the service sets the pace")
    if a.profile in ("ramp", "diurnal") and duration is None:
        raise UsageError(f"--profile {a.profile} spans the run; add --duration 60, say")
    if a.prepare:
        check_prepared(a)
    return Settings(
        satellites=a.satellites,
        rate=a.rate,
        duration=duration,
        points=a.points,
        prepare=a.prepare,
        anomaly_rate=a.anomaly_rate,
        channels=a.channels,
        processes=a.processes
        or default_processes(
            satellites=a.satellites, rate=a.rate, batch=a.batch, single_share=a.single_share, cores=cores()
        ),
        seed=a.seed,
        truth=a.truth,
        tle=a.tle,
        profile=a.profile,
        start_us=a.start,
        **load_settings(a),
    )


def check_prepared(a: argparse.Namespace) -> None:
    """Raise UsageError when the run cannot be made before its start: it has a schedule, no end, or no room."""
    if a.rate or a.points is None:
        raise UsageError(
            "--prepare is for runs whose pace the service sets and whose end is known: add --rate 0 --points N"
        )
    head = REQUEST_BYTES + len(a.api_url) + len(read_token(a.token_file) or "")
    most = free_memory() // 2 // (POINT_BYTES + head // (1 if a.single_share else a.batch))
    if a.points > most:
        raise UsageError(
            f"--prepare keeps all points in memory: half of what is free has room for {most:,}; lower --points"
        )


def free_memory() -> int:
    """Return the bytes that the kernel, and a container's limit, leave to a process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit: "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


def load_settings(a: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a fleet's run and a replay have in common."""
    return {
        "api_url": a.api_url,
        "connections": a.connections or default_connections(batch=a.batch, single_share=a.single_share),
        "batch": a.batch,
        "single_share": a.single_share,
        "format": a.format,
        "encoding": a.encoding,
        "idempotency_keys": a.idempotency_keys,
        "timeout": a.timeout,
        "sent_log": a.sent_log,
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def parse_url(url: str) -> tuple[str, int, str, str]:
    """Return connect host, port, Host header and path prefix of an http:// URL; raise UsageError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError as error:
        raise UsageError(f"--api-url {url}: {error}") from error
    if parts.scheme != "http" or not host:
        raise UsageError(f"--api-url {url} is not an http:// URL; write http://127.0.0.1:8080, say")
    if "@" in parts.netloc or parts.query or parts.fragment or not url.isascii() or any(c <= " " for c in url):
        raise UsageError(f"--api-url {url} has more than host, port and path; write http://127.0.0.1:8080, say")
    return host, port, parts.netloc, parts.path.rstrip("/")


def read_token(path: str | None) -> str | None:
    """Return the bearer token from a file, else from the environment, else None; raise UsageError."""
    source = f"--token-file {path}" if path else "ORBITSTREAM_TOKEN"
    try:
        token = Path(path).read_text("ascii").strip() if path else os.environ.get("ORBITSTREAM_TOKEN")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source} cannot be read: {getattr(error, 'strerror', None) or 'not ASCII'}") from error
    if token is None or (token == "" and not path):
        return None
    if not token or not token.isascii() or any(c <= " " or c == "\x7f" for c in token):
        raise UsageError(f"{source} does not hold a token: one line of printable ASCII without spaces")
    return token
