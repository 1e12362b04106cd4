"""The `orbitstream` command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from engine import (
    __version__,
    capacity,
    demo,
    health,
    heartbeat,
    lanes,
    limits,
    logs,
    migrate,
    operate,
    process,
    settings,
    supervisor,
    tokens,
    top,
)
from engine.embedded import EmbeddedPostgres
from engine.installations import EmbeddedError
from engine.ring import LaneError
from engine.settings import Settings

USAGE: Final = 2
"""Exit code for a setting, a folder or a port that cannot be used: nothing was started."""

log = logging.getLogger("orbitstream")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough; the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(argv: list[str] | None) -> int:
    options = _parser().parse_args(argv)
    given = {name: getattr(options, name, None) for name, *_ in settings.options()}
    try:
        config = settings.load(**given)
        logs.configure(config.log_level, "orbitstream")
        code: int = options.run(config, options)
        return code
    except BrokenPipeError:
        raise
    except (settings.SettingError, limits.LimitsError, lanes.LaneDirError, EmbeddedError) as error:
        print(f"orbitstream: {error}", file=sys.stderr)
        return USAGE
    except (migrate.MigrationError, operate.OperateError) as error:
        print(f"orbitstream: {error}", file=sys.stderr)
        return 1
    except (OSError, LaneError) as error:
        print(f"orbitstream: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orbitstream",
        description="Take telemetry over HTTP and store every accepted point in TimescaleDB exactly once.",
        epilog="Start with `orbitstream demo`: it needs nothing but this program. Settings are environment variables; "
        "`orbitstream serve --help` lists them all.",
    )
    parser.add_argument("--version", action="version", version=f"orbitstream {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = _command(commands, "serve", _serve, "run the service: web workers, writers, maintenance")
    _add_no_migrate(serve)
    serve.add_argument("--port-file", type=Path, help="write the port listened on to this file")
    serve.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    write = _command(commands, "write", _write, "run the writers only, beside a gunicorn of your own")
    _add_no_migrate(write)
    migration = _command(commands, "migrate", _migrate, "bring the database to this version's schema")
    migration.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is pending")
    migration.add_argument("--wait", action="store_true", help="keep trying while the database is away")
    migration.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    status = _command(commands, "status", _status, "show lanes, writers and the database; exit 1 if degraded")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    watch = _command(commands, "top", top.command, "watch the engine live; works with the database away")
    watch.add_argument("--once", action="store_true", help="print one report of a second, and end")
    watch.add_argument("--json", action="store_true", help="print that report as one JSON object")
    _command(commands, "drain", _drain, "store what waits in the lanes, then end; exit 1 if some is left")
    verify_ = _command(commands, "verify", operate.verify_command, "check that every point published is accounted for")
    verify_.add_argument("--deep", action="store_true", help="also count the rows of telemetry against the ledger")
    verify_.add_argument("--json", action="store_true", help="print one JSON object")
    lane = _command(commands, "lanes", operate.lanes_command, "list the lanes, or let a stopped one go on")
    lane.add_argument(
        "action",
        choices=("list", "resume", "adopt"),
        help="resume: after a restore; adopt: store here what waits in a lane of a database that is gone for good",
    )
    lane.add_argument("lane", nargs="?", help="the lane (all are listed without): its uuid, or its file name")
    lane.add_argument("--json", action="store_true", help="print one JSON object")
    letters = _command(commands, "dead-letters", operate.dead_letters_command, "points that the database refused")
    letters.add_argument("action", choices=("list", "replay", "purge"), help="purge: those replayed, or those named")
    letters.add_argument("ids", nargs="*", type=int, help="replay or purge only these")
    letters.add_argument("--limit", type=int, default=50, help="list at most so many (default: %(default)s)")
    letters.add_argument("--json", action="store_true", help="print one JSON object a line")
    token = _command(commands, "token", operate.token_command, "create, list and revoke bearer tokens")
    token.add_argument("action", choices=("create", "list", "revoke"))
    token.add_argument("name", nargs="?", help="whose token it is; its idempotency keys are its own")
    token.add_argument("--scope", action="append", choices=tokens.SCOPES, help="may be repeated (default: write)")
    token.add_argument("--quota", type=float, metavar="N", help="points/s at most (default: no limit)")
    export = _command(commands, "export", operate.export_command, "write points to Parquet files, one a day")
    export.add_argument(
        "--from", dest="begin", type=operate.instant, required=True, help="first instant, as 2026-01-31"
    )
    export.add_argument("--to", dest="end", type=operate.instant, required=True, help="the instant after the last")
    export.add_argument("--out", type=Path, required=True, help="folder to write to")
    back = _command(commands, "import", operate.import_command, "store an export's points, once however often repeated")
    back.add_argument("dir", type=Path, help="folder of an export")
    back.add_argument("--beside", action="store_true", help="also where the table has other points of those days")
    back.add_argument("--again", action="store_true", help="store anew what an earlier import stored and is gone since")
    demo.add_command(commands)
    capacity.add_command(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], help: str) -> argparse.ArgumentParser:
    """Add a subcommand that takes every setting as a flag."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + "."
    )
    command.set_defaults(run=run)
    group = command.add_argument_group("settings", "each can also be given as the environment variable named")
    for field, variable, text, default in settings.options():
        shown = f"{text} [{variable}; default: {default}]".replace("%", "%%")
        group.add_argument(f"--{field.replace('_', '-')}", dest=field, metavar="VALUE", help=shown)
    return command


def _add_no_migrate(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-migrate", action="store_true", help="leave the database's schema as it is")


@contextmanager
def _database(config: Settings) -> Iterator[tuple[Settings, EmbeddedPostgres | None]]:
    """Yield settings with a DATABASE_URL: the one that was given, or that of the embedded server, started here."""
    if config.database_url is not None:
        yield config, None
        return
    # A SIGTERM before the supervisor has its own handlers must still stop the server that is being started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = EmbeddedPostgres(config.home)
    server.start(lambda message: log.info("embedded database: %s", message))
    try:
        given = {**config.given, "DATABASE_URL": server.dsn}
        yield replace(config, database_url=server.dsn, given=given), server
    finally:
        server.stop()


def _serve(config: Settings, options: argparse.Namespace) -> int:
    if options.parent is not None:
        process.die_with_parent(options.parent)
    if config.tokens_file is not None and not tokens.load(config.tokens_file):
        log.warning("%s holds no token: nobody can post yet", config.tokens_file)
    limits.of_settings(config)  # what a writer could not read shall stop the start
    lanes.prepare(config.lane_dir, config.durability)
    lanes.check_room(config.lane_dir, config.workers, config.lane_bytes)
    with _sole_supervisor(config), supervisor.listen(config) as listener:
        host, port = listener.getsockname()[:2]
        if options.port_file is not None:
            options.port_file.write_text(f"{port}\n")
        with _database(config) as (config, server):
            log.info(
                "listening on http://%s:%d, %d workers, %d writers, lanes in %s",
                f"[{host}]" if ":" in host else host, port, config.workers, config.writer_count, config.lane_dir,
            )  # fmt: skip
            service = supervisor.Supervisor(config, listener, migrate=not options.no_migrate)
            return service.run(_keeping(server))


def _write(config: Settings, options: argparse.Namespace) -> int:
    limits.of_settings(config)  # what a writer could not read shall stop the start
    lanes.prepare(config.lane_dir, config.durability)
    with _sole_supervisor(config), _database(config) as (config, server):
        log.info("draining %s with %d writers", config.lane_dir, config.writer_count)
        service = supervisor.Supervisor(config, None, migrate=not options.no_migrate)
        return service.run(_keeping(server))


def _keeping(server: EmbeddedPostgres | None) -> Callable[[], None]:
    """Return what starts the embedded server again when it died; nothing to do for a database of the user's."""

    def keep() -> None:
        if server is None:
            return
        try:
            server.ensure(lambda message: log.warning("embedded database: %s", message))
        except EmbeddedError as error:
            log.error("embedded database: %s", error)

    return keep


@contextmanager
def _sole_supervisor(config: Settings) -> Iterator[None]:
    """Hold the lock that says who supervises the writers of a lane directory."""
    lock = lanes.Lock(config.lane_dir / "writers.lock")
    if not lock.acquire():
        raise settings.SettingError(
            f"ORBITSTREAM_LANE_DIR={str(config.lane_dir)!r} is served by process {lock.holder()} already: "
            "stop that one, or set another folder"
        )
    try:
        yield
    finally:
        lock.release()


def _migrate(config: Settings, options: argparse.Namespace) -> int:
    import psycopg

    if options.parent is not None:
        process.die_with_parent(options.parent)
    with _database(config) as (config, _):
        url = config.owner_url
        assert url is not None
        pause = supervisor.MIN_BACKOFF_S
        while True:
            try:
                if options.check:
                    return _check_schema(url)
                migrate.migrate(config, url, lambda message: log.info("%s", message))
                return 0
            except psycopg.OperationalError as error:
                reason = " ".join(str(error).split())[:300]
                if not options.wait:
                    raise migrate.MigrationError(f"cannot reach the database: {reason}") from error
                log.warning("database away, will migrate when it is back: %s", reason)
            except migrate.MigrationError as error:
                if not options.wait:
                    raise
                if not isinstance(error, migrate.MigrationBusyError):  # told apart from a crash by whoever started us
                    log.error("%s", error)
                    return supervisor.MIGRATION_FAILED
                log.warning("%s", error)
            time.sleep(pause)  # backs off while the database is away; a signal ends it
            pause = min(2 * pause, supervisor.MAX_BACKOFF_S)


def _check_schema(url: str) -> int:
    with migrate.connect(url, "orbitstream-migrate") as connection:
        edition = migrate.find_edition(connection)
        left = migrate.pending(connection, edition)
    print(edition, *edition.offers, sep="\n")
    for migration in left:
        print(f"pending {migration.version:04d} {migration.name}")
    print("the schema is up to date" if not left else f"{len(left)} migrations are pending: run `orbitstream migrate`")
    return 1 if left else 0


def _status(config: Settings, options: argparse.Namespace) -> int:
    lanes.expect(config.lane_dir)
    report = health.describe(config)
    report["unreadable"] = lanes.unreadable(config.lane_dir)
    report["lanes"] = [
        {
            "name": lane.path.name,
            "uuid": str(lane.uuid),
            "queued_points": lane.queued_points,
            "fill": round(lane.fill, 4),
            "published_points": lane.published.points,
            "settled_points": lane.settled_points,
        }
        for lane in lanes.open_lanes(config.lane_dir)
    ]
    if options.json:
        print(json.dumps(report))
    else:
        _print_status(report, config)
    return 0 if report["status"] == "healthy" and not report["unreadable"] else 1


def _print_status(report: dict[str, Any], config: Settings) -> None:
    queue, writers = report["queue"], report["writers"]
    print(f"{report['status']}: database {report['database']} ({report['edition']}), lanes in {config.lane_dir}")
    committed = f"{report['committed_points']} points committed, {report['compressed_points']} of them compressed"
    print(f"writers  {writers['alive']} of {writers['expected']} alive, {committed}")
    print(f"queue    {queue['points']} points, the oldest {queue['oldest_s']} s old; {report['stopped_lanes']} stopped")
    for lane in report["lanes"]:
        numbers = (
            f"{lane['fill']:>6.1%} full {lane['queued_points']:>10} queued {lane['published_points']:>12} published"
        )
        print(f"{lane['name']}  {numbers}")
    for name, why in report["unreadable"].items():
        print(f"{name}  unreadable: {why}")


def _drain(config: Settings, options: argparse.Namespace) -> int:
    limits.of_settings(config)  # what a writer could not read shall stop the start
    lanes.expect(config.lane_dir)
    lanes.prepare(config.lane_dir, config.durability)
    with _sole_supervisor(config), _database(config) as (config, _):
        url = config.database_url
        assert url is not None
        from engine.writer import Writer

        beat = heartbeat.Heartbeat(heartbeat.beat_file(config.lane_dir, 0), own=True)
        writer = Writer(replace(config, writers=1), url, 0, beat)
        signal.signal(signal.SIGTERM, writer.stop)
        before = beat.committed_points
        writer.stop()
        writer.run()
        left = sum(lane.queued_points for lane in lanes.open_lanes(config.lane_dir))
        unreadable = lanes.unreadable(config.lane_dir)
        and_files = f", and what these hold: {', '.join(unreadable)}" if unreadable else ""
        print(f"stored {beat.committed_points - before} points, {left} left in {config.lane_dir}{and_files}")
        return 1 if left or unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
