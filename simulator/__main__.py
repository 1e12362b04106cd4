"""Command line of the simulator: flags in, one run, a report out."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from simulator import sent_log
from simulator.control import Run, Unreachable, make_jobs, reach
from simulator.flags import UsageError, build_parser, parse_url, read_token, settings_from
from simulator.fleet import read_constellation, satellite_ids
from simulator.orbits import ElementsError
from simulator.replay import RecordingError, replay_settings
from simulator.report import Report


def send(arguments: argparse.Namespace) -> tuple[Report, int]:
    """Do one run; return its report and the signal that stopped it, 0 if none.

    Raises UsageError, ElementsError, RecordingError, Unreachable.
    """
    host, port, host_header, path = parse_url(arguments.api_url)
    token = read_token(arguments.token_file)
    if hasattr(arguments, "replay"):
        settings, names = replay_settings(arguments)
    else:
        settings = settings_from(arguments)
        read_constellation(settings.tle, settings.satellites)
        names = satellite_ids(0, settings.satellites, settings.satellites)
    family, address = reach(host, port, settings.timeout)
    for flag, file in (("--sent-log", settings.sent_log), ("--truth", settings.truth)):
        if file:
            try:
                sent_log.prepare(file)
            except OSError as error:
                raise UsageError(f"{flag} {file} cannot be written: {error.strerror}") from error
    jobs = make_jobs(settings, family, address, host=host_header, path=path, token=token)
    run = Run(settings, jobs, None if arguments.quiet else sys.stderr)
    handlers = {number: signal.signal(number, run.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        report = run.run()
        try:
            sent_log.merge([job.spool for job in jobs if job.spool], names, settings.sent_log, settings.truth)
        except OSError as error:
            report.failures.append(f"the log could not be written, its spools remain: {error}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return report, run.interrupted


def main(argv: list[str] | None = None) -> int:
    """Run the simulator; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    replay = words[:1] == ["replay"]
    parser = build_parser(replay)
    try:
        arguments = parser.parse_args(words[replay:])
        report, interrupted = send(arguments)
    except (UsageError, ElementsError, RecordingError, Unreachable) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    for failure in report.failures:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
    print(json.dumps(report.to_json()) if arguments.json else report.to_words(), flush=True)
    if interrupted:
        return 128 + interrupted
    return 1 if report.failures or report.lost or not report.tally.accepted else 0


if __name__ == "__main__":
    sys.exit(main())
