"""Every setting: its variable, its default and what it means. The only place that reads the environment."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

_DURATION: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_SIZE: Final = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 1000, "mb": 10**6, "gb": 10**9}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class SettingError(ValueError):
    """A setting that cannot be used; the text names the variable and the remedy."""


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"must be a whole number from {low} to {high}") from None
        if not low <= value <= high:
            raise ValueError(f"must lie between {low} and {high}")
        return value

    return parse


def _real(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    return value


def _duration(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        match = _QUANTITY.fullmatch(text)
        if match is None or match[2] not in _DURATION:
            raise ValueError("must be a duration such as 50ms, 1s, 1h or 30d")
        value = float(match[1]) * _DURATION[match[2]]
        if not low <= value <= high:
            raise ValueError(f"must lie between {timedelta(seconds=low)} and {timedelta(seconds=high)} (h:mm:ss)")
        return value

    return parse


def _size(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        match = _QUANTITY.fullmatch(text)
        if match is None or match[2].lower() not in _SIZE:
            raise ValueError("must be a size such as 128MiB")
        value = int(float(match[1]) * _SIZE[match[2].lower()])
        if not low <= value <= high:
            raise ValueError(f"must lie between {low} and {high} bytes")
        return value

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = text.lower()
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return parse


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("must be 1 or 0")


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError("must not be empty")
    return Path(text).expanduser().absolute()


def _database_url(text: str) -> str:
    from psycopg import ProgrammingError, conninfo  # a heavy import that only some processes need

    try:
        parsed = conninfo.conninfo_to_dict(text)
    except ProgrammingError:
        # libpq's own message repeats the text, and with it the password.
        raise ValueError("is not a PostgreSQL URL: write postgresql://user@host:5432/database") from None
    if not parsed:
        raise ValueError("is empty: leave it unset for the embedded PostgreSQL")
    for port in str(parsed.get("port", 5432)).split(","):
        if port and not (port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("has a port that is no number from 1 to 65535")
    # An @ or / of a password that was not encoded: libpq takes what follows for the host or the database, which every
    # message of a failed connection names.
    address = text.partition("?")[0]
    if "://" in address and address.count("@") > ("user" in parsed or "password" in parsed):
        raise ValueError("has an @ too many: write @ as %40 and / as %2F in a user's name or password")
    return text


def _has_password(url: str) -> bool:
    from psycopg import conninfo

    return not {"password", "sslpassword"}.isdisjoint(conninfo.conninfo_to_dict(url))


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text.strip()


def _default_lane_dir() -> Path:
    """Lanes lie in memory by default: apart for each user, since /dev/shm is everybody's."""
    return Path("/dev/shm/orbitstream" if os.geteuid() == 0 else f"/dev/shm/orbitstream-{os.geteuid()}")


def _default_home() -> Path:
    from engine.embedded import default_home

    try:
        return default_home(os.environ.get("XDG_DATA_HOME"))
    except RuntimeError as error:  # no HOME, and no entry in passwd
        raise SettingError("ORBITSTREAM_HOME must be set: this user has no home folder") from error


def _setting(variable: str, default: Any, parse: Callable[[str], Any], help: str, shown: str = "") -> Any:
    """Declare a setting; a callable default is computed when it is needed, `shown` is how help names it."""
    metadata = {"variable": variable, "parse": parse, "help": help, "shown": shown or str(default)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one installation; durations in seconds, sizes in bytes. Made by `load`."""

    host: str = _setting("ORBITSTREAM_HOST", "127.0.0.1", _text, "address to listen on")
    port: int = _setting("PORT", 8080, _whole(0, 65535), "port to listen on, 0 for any free one")
    tokens_file: Path | None = _setting(
        "ORBITSTREAM_TOKENS_FILE",
        None,
        _path,
        "file of the bearer tokens that let a client in; `orbitstream token create NAME` makes it",
        "unset: no token is asked for",
    )
    allow_anonymous: bool = _setting(
        "ORBITSTREAM_ALLOW_ANONYMOUS", False, _switch, "1 to listen beyond loopback although no tokens are set", "0"
    )
    database_url: str | None = _setting(
        "DATABASE_URL", None, _database_url, "the database", "unset: an embedded PostgreSQL under ORBITSTREAM_HOME"
    )
    migration_database_url: str | None = _setting(
        "MIGRATION_DATABASE_URL", None, _database_url, "the database, as its owner, for migrations", "DATABASE_URL"
    )
    max_connections: int = _setting(
        "MAX_CONNECTIONS", 10, _whole(1, 1000), "upper bound of database connections: writers and maintenance"
    )
    batch_size: int = _setting("BATCH_SIZE", 1000, _whole(1, 1_000_000), "points that make a flush worth its while")
    batch_timeout: float = _setting(
        "BATCH_TIMEOUT", 0.02, _duration(0.001, 60), "age of a waiting point that makes a flush due", "20ms"
    )
    workers: int = _setting(
        "ORBITSTREAM_WORKERS", lambda: os.cpu_count() or 1, _whole(1, 256), "web workers", "one a core"
    )
    worker_class: str = _setting(
        "ORBITSTREAM_WORKER_CLASS",
        "eventloop",
        _one_of("eventloop", "gthread"),
        "gunicorn worker class: eventloop, or gthread, which is slower but speaks TLS (certfile, keyfile)",
    )
    writers: int = _setting("ORBITSTREAM_WRITERS", 1, _whole(1, 64), "writer processes")
    lane_dir: Path = _setting(
        "ORBITSTREAM_LANE_DIR", _default_lane_dir, _path, "folder of the lanes", "/dev/shm/orbitstream[-UID]"
    )
    durability: str = _setting(
        "ORBITSTREAM_DURABILITY",
        "process",
        _one_of("process", "os", "disk"),
        "what a 202 survives: process (any kill), os (also a crash, but for the last seconds), disk (power loss); "
        "os and disk keep their lanes under ORBITSTREAM_HOME by default",
    )
    archive_keep: float = _setting(
        "ORBITSTREAM_ARCHIVE_KEEP",
        30 * 86400.0,
        _duration(0, 36500 * 86400),
        "how long drained lanes of an earlier boot are kept: as long as a backup of the database may be restored",
        "30d",
    )
    lane_bytes: int = _setting(
        "ORBITSTREAM_LANE_BYTES", 128 << 20, _size(1 << 16, 1 << 40), "size of one worker's lane", "128MiB"
    )
    max_body_bytes: int = _setting(
        "ORBITSTREAM_MAX_BODY_BYTES", 16 << 20, _size(1024, 1 << 31), "largest request body", "16MiB"
    )
    max_points: int = _setting("ORBITSTREAM_MAX_POINTS", 100_000, _whole(1, 10_000_000), "most points in a request")
    unknown_fields: str = _setting(
        "ORBITSTREAM_UNKNOWN_FIELDS",
        "reject",
        _one_of("reject", "ignore"),
        "unknown fields of a point: reject or ignore",
    )
    anomaly_battery: float = _setting(
        "ANOMALY_THRESHOLD_BATTERY", 10.0, _real, "a battery charge below this, in %, is an anomaly"
    )
    anomaly_storage: float = _setting(
        "ANOMALY_THRESHOLD_STORAGE", 95_000.0, _real, "a storage usage above this, in MB, is an anomaly"
    )
    anomaly_signal: float = _setting(
        "ANOMALY_THRESHOLD_SIGNAL", -100.0, _real, "a signal strength below this, in dBm, is an anomaly"
    )
    limits_file: Path | None = _setting(
        "ORBITSTREAM_LIMITS_FILE",
        None,
        _path,
        "TOML file of limits by channel and satellite, over the three thresholds: warning and critical, hysteresis, "
        "violations in a row, rate of change",
        "none",
    )
    drain_timeout: float = _setting(
        "ORBITSTREAM_DRAIN_TIMEOUT", 30.0, _duration(0, 86400), "how long a stop may take to empty the lanes", "30s"
    )
    chunk_interval: float = _setting(
        "ORBITSTREAM_CHUNK_INTERVAL", 3600.0, _duration(60, 365 * 86400), "time span of one hypertable chunk", "1h"
    )
    compress_after: float = _setting(
        "ORBITSTREAM_COMPRESS_AFTER", 86400.0, _duration(60, 36500 * 86400),
        "age at which a chunk goes to the columnstore, or is rewritten there as a whole", "1d",
    )  # fmt: skip
    retention: float = _setting(
        "ORBITSTREAM_RETENTION", 30 * 86400.0, _duration(3600, 36500 * 86400), "age at which points are dropped", "30d"
    )
    home: Path = _setting(
        "ORBITSTREAM_HOME", _default_home, _path, "folder of the embedded PostgreSQL",
        "the user's data folder; /var/lib/orbitstream for root",
    )  # fmt: skip
    node: str = _setting(
        "ORBITSTREAM_NODE", socket.gethostname, _text, "name of this machine in the database", "host name"
    )
    log_level: str = _setting(
        "LOG_LEVEL", "info", _one_of("debug", "info", "warning", "error"), "least severe log line to write"
    )
    given: dict[str, str] = field(default_factory=dict)
    """The variables that were given, as text: what a child process needs to load the same settings."""

    @property
    def owner_url(self) -> str | None:
        return self.migration_database_url or self.database_url

    @property
    def writer_count(self) -> int:
        """Writers to start: one connection of MAX_CONNECTIONS is kept for maintenance, if there is more than one."""
        return max(1, min(self.writers, self.max_connections - 1))


def options() -> list[tuple[str, str, str, str]]:
    """Return (field, variable, help, default) of every setting, for a command line."""
    return [
        (item.name, item.metadata["variable"], item.metadata["help"], item.metadata["shown"])
        for item in fields(Settings)
        if item.metadata
    ]


def load(environ: Mapping[str, str] | None = None, **overrides: str | None) -> Settings:
    """Read the settings from the environment; `overrides` (field=text) take precedence.

    Raises SettingError, one line that names the variable, for a value that cannot be used. A password is not taken from
    an override: overrides are a command line, which every user of the machine can read.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for item in fields(Settings):
        if not item.metadata:
            continue
        variable = item.metadata["variable"]
        text = overrides.get(item.name)
        text = environ.get(variable) if text is None else text
        if text is None or (text == "" and item.default is None):
            continue
        given[variable] = text
        try:
            values[item.name] = item.metadata["parse"](text)
            if overrides.get(item.name) is not None and "URL" in variable and _has_password(text):
                raise ValueError("has a password on the command line, which the process list shows: set the variable")
            if isinstance(values[item.name], Path):
                given[variable] = str(values[item.name])  # children have another working directory
        except ValueError as error:
            shown = "" if "URL" in variable else f"={text!r}"
            raise SettingError(f"{variable}{shown} {error}") from None
    settings = Settings(given=given, **values)
    if settings.durability != "process" and "lane_dir" not in values:
        settings = replace(settings, lane_dir=settings.home / "lanes")
    check_exposure(settings, settings.host)
    return settings


SUPERVISED: Final = "ORBITSTREAM_SUPERVISED"
"""Set by a supervisor for the gunicorn it starts, as PID:DESCRIPTOR: its process id and the listening socket."""


def failpoint() -> tuple[str, int]:
    """Return the failpoint that a test armed (ORBITSTREAM_FAILPOINT=name:n), as its name and n; ("", 0) without one."""
    name, _, nth = os.environ.get("ORBITSTREAM_FAILPOINT", "").partition(":")
    return name, int(nth or 1) if name else 0


def supervised() -> tuple[int, int] | None:
    """Return (supervisor's process id, descriptor of the listening socket) under `orbitstream serve`, else None."""
    text = os.environ.get(SUPERVISED)
    if text is None:
        return None
    pid, _, descriptor = text.partition(":")
    return int(pid), int(descriptor)


def child_environment(config: Settings, **more: str) -> dict[str, str]:
    """Return the environment in which a child process loads the same settings."""
    # Nothing here multiplies matrices: numpy's threads for it would cost each process 0.1 s of CPU at its start.
    return {"OPENBLAS_NUM_THREADS": "1", **os.environ, **config.given, **more}


def check_exposure(settings: Settings, host: str) -> None:
    """Raise SettingError if listening on `host` would let in anybody, and nobody said that this is meant."""
    if settings.tokens_file is None and not settings.allow_anonymous and not _is_loopback(host):
        raise SettingError(
            f"ORBITSTREAM_HOST={host!r} lets anybody in: set ORBITSTREAM_TOKENS_FILE (`orbitstream token create NAME` "
            "makes it), keep 127.0.0.1 behind a proxy, or set ORBITSTREAM_ALLOW_ANONYMOUS=1"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
