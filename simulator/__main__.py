"""Command line of the simulator: flags in, one run, a report out."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from simulator import sent_log
from simulator.control import Run, Unreachable, make_jobs, reach
from simulator.fleet import CHANNEL_SETS
from simulator.report import Report
from simulator.settings import Settings, default_connections, default_processes

DEFAULT_DURATION = 10.0
EPILOG = """\
examples:
  orbitstream-simulator
        100 satellites, one reading a second each, ten seconds, one POST a reading
  orbitstream-simulator --satellites 1000 --rate 10 --batch 1000 --duration 60
        10,000 points/s in ten batches a second
  orbitstream-simulator --rate 0 --batch 1000
        as many points as the service takes
  orbitstream-simulator --rate 100 --batch 500 --single-share 0.05 --sent-log sent.parquet --json
        batches with single posts among them; every point and its outcome to a file, the report as JSON

what becomes of a point:
  accepted   answered 200 or 202
  refused    answered 4xx or 503: nothing of the request is stored. A 503 or 429 that names a Retry-After is tried
             again, until 30 s after the end of the run
  unknown    the connection broke, the answer took longer than --timeout, or was a bare 500 or 502: stored or not.
             Never sent again, because that could store it twice

the sent log (Parquet, one row a point that was sent):
  satellite_id  string (dictionary), as in the request: SAT-00042
  time          timestamp[us, UTC], the point's timestamp; (satellite_id, time) is unique, also from run to run
  outcome       string (dictionary): accepted, refused or unknown
  It is complete when the simulator ends. One that is killed leaves FILE.*.spool, with what was settled until then.

readings depend on --seed, --anomaly-rate, satellite and time alone: with these and the sent log they can be computed
again.

environment:
  ORBITSTREAM_TOKEN   sent as `Authorization: Bearer ...`; or use --token-file. There is no flag for the token itself:
                      other users could read it in the process list

exit code: 0 the run went through (refusals are in the report), 1 nothing was accepted or a sender process died,
2 a bad flag or no service, nothing was sent, 130 stopped by Ctrl-C (the report and the log are complete)
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


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser(
        prog="orbitstream-simulator",
        description="Play a constellation: satellites that POST their telemetry to OrbitStream over HTTP.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fleet = parser.add_argument_group("the fleet")
    add = fleet.add_argument
    add("--satellites", type=whole(1, 1_000_000), default=100, metavar="N", help="satellites (100)")
    add(
        "--anomaly-rate",
        type=real(0, 1),
        default=0.01,
        metavar="F",
        help="share of the points with battery < 10 %%, storage > 95,000 MB or signal < -100 dBm (0.01)",
    )
    add(
        "--channels",
        choices=list(CHANNEL_SETS),
        default="required",
        help="required: battery, storage, signal; all: also position, velocity, temperature, voltage (required)",
    )
    add("--seed", type=whole(0, 2**63 - 1), default=1, metavar="N", help="same seed, same readings (1)")
    add_load_flags(parser)
    output = parser.add_argument_group("what it tells")
    add = output.add_argument
    add("--json", action="store_true", help="print the report as one JSON object")
    add("--sent-log", metavar="FILE", help="write every point sent and its outcome to FILE, see below")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def add_load_flags(parser: Parser) -> None:
    """Describe the flags of the load."""
    add = parser.add_argument_group("the load").add_argument
    add("--api-url", default="http://127.0.0.1:8080", metavar="URL", help="the service (http://127.0.0.1:8080)")
    add(
        "--rate",
        type=real(0, 100_000),
        default=1.0,
        metavar="R",
        help="points/s a satellite, kept whatever the service does; 0: as fast as answers come (1)",
    )
    add(
        "--duration",
        type=real(0.001, 1e7),
        metavar="S",
        help="seconds; what is late at the end is sent for up to 30 s more (10; no limit with --points)",
    )
    add("--points", type=whole(1, 10**12), metavar="N", help="stop after N points in all")
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
    add("--format", choices=["json", "ndjson"], default="json", help="body of a batch (json)")
    add(
        "--processes",
        type=whole(1, 256),
        metavar="N",
        help="sender processes (as many as the rate needs, at most one a core; with --rate 0 half of the cores)",
    )
    add("--connections", type=whole(1, 1_000), metavar="N", help="a process (16; 32 with single posts)")
    add("--timeout", type=real(0.001, 3_600), default=10.0, metavar="S", help="wait for an answer, seconds (10)")
    add("--token-file", metavar="FILE", help="file with the bearer token (default: ORBITSTREAM_TOKEN)")


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Fill in the defaults that depend on other flags; raise UsageError for flags that contradict each other."""
    a = arguments
    if a.format != "json" and a.batch == 1:
        raise UsageError(f"--format {a.format} is for batches; add --batch 1000, say")
    if a.processes and a.processes > a.satellites:
        raise UsageError(f"--processes {a.processes} is more than --satellites {a.satellites}; each needs one at least")
    duration = a.duration
    if duration is None and a.points is None:
        duration = DEFAULT_DURATION
    cores = len(os.sched_getaffinity(0))
    return Settings(
        api_url=a.api_url,
        satellites=a.satellites,
        rate=a.rate,
        duration=duration,
        points=a.points,
        anomaly_rate=a.anomaly_rate,
        channels=a.channels,
        processes=a.processes
        or default_processes(
            satellites=a.satellites, rate=a.rate, batch=a.batch, single_share=a.single_share, cores=cores
        ),
        connections=a.connections or default_connections(batch=a.batch, single_share=a.single_share),
        batch=a.batch,
        single_share=a.single_share,
        format=a.format,
        seed=a.seed,
        timeout=a.timeout,
        sent_log=a.sent_log,
    )


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


def send(arguments: argparse.Namespace) -> tuple[Report, int]:
    """Do one run; return its report and the signal that stopped it, 0 if none. Raise UsageError, Unreachable."""
    settings = settings_from(arguments)
    host, port, host_header, path = parse_url(settings.api_url)
    token = read_token(arguments.token_file)
    family, address = reach(host, port, settings.timeout)
    if settings.sent_log:
        try:
            sent_log.prepare(settings.sent_log)
        except OSError as error:
            raise UsageError(f"--sent-log {settings.sent_log} cannot be written: {error.strerror}") from error
    jobs = make_jobs(settings, family, address, host=host_header, path=path, token=token)
    run = Run(settings, jobs, None if arguments.quiet else sys.stderr)
    handlers = {number: signal.signal(number, run.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        report = run.run()
        if settings.sent_log:
            try:
                sent_log.merge([job.spool for job in jobs if job.spool], settings.sent_log, settings.satellites)
            except OSError as error:
                report.failures.append(f"the sent log could not be written, its spools remain: {error}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return report, run.interrupted


def main(argv: list[str] | None = None) -> int:
    """Run the simulator; return the exit code."""
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
        report, interrupted = send(arguments)
    except (UsageError, Unreachable) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    for failure in report.failures:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
    print(json.dumps(report.to_json()) if arguments.json else report.to_words(), flush=True)
    if interrupted:
        return 128 + interrupted
    return 1 if report.failures or not report.tally.accepted else 0


if __name__ == "__main__":
    sys.exit(main())
