"""What a run is: one frozen object made from the command line, sent to every sender process, embedded in the report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

# A third or less of what one process reaches against a service that only reads (one 2.8 GHz Xeon core: 2 to 3 million
# points/s in batches of 1,000, 55,000 to 90,000 single posts/s): asked for more than this, a run gets more processes.
POINTS_PER_PROCESS = 600_000
REQUESTS_PER_PROCESS = 18_000
# How long requests in flight may still take once the run is stopped.
STOP_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Describe a run.

    rate: points/s a satellite, the mean of the profile, 0 = as fast as answers come; duration: seconds, None = until
    `points` are sent; points: None = no limit; anomaly_rate and single_share: 0 to 1; connections: a process; timeout:
    seconds a request; tle, sent_log, truth: files; start_us: the first point's timestamp, None = now; prepare: make all
    requests before the first is sent; replay: the file that is played instead of the fleet, `speed` times as fast.
    """

    api_url: str
    satellites: int
    rate: float
    duration: float | None
    points: int | None
    anomaly_rate: float
    channels: str
    processes: int
    connections: int
    batch: int
    single_share: float
    format: str
    seed: int
    timeout: float
    sent_log: str | None = None
    truth: str | None = None
    tle: str | None = None
    profile: str = "constant"
    encoding: str = "identity"
    idempotency_keys: bool = False
    start_us: int | None = None
    prepare: bool = False
    replay: str | None = None
    speed: float = 1.0

    def configuration(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, for the report."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Job:
    """Describe the part of one sender process: the satellites [first, last), and where to send and to log.

    points: its share of the limit; spool: the file for its points; run: a random word, the same in all; family,
    address: of the service, resolved; host, path: the request's Host header and the prefix of its paths; parent: the
    process id that it dies with.
    """

    settings: Settings
    number: int
    first: int
    last: int
    points: int | None
    spool: str | None
    run: str
    family: int
    address: tuple[Any, ...]
    host: str
    path: str
    token: str | None
    parent: int

    def to_line(self) -> bytes:
        """Return the job as one line of JSON. It may hold a token: write it to a pipe, never to a file or argv."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Job:
        """Read what `to_line` wrote."""
        fields = json.loads(line)
        fields["settings"] = Settings(**fields["settings"])
        fields["address"] = tuple(fields["address"])
        return cls(**fields)


def share(total: int, part: int, parts: int) -> tuple[int, int]:
    """Return the range [first, last) of `total` things that falls to `part` of `parts`; sizes differ by one at most."""
    return total * part // parts, total * (part + 1) // parts


def default_processes(*, satellites: int, rate: float, batch: int, single_share: float, cores: int) -> int:
    """Choose how many processes send: as few as can keep the schedule, at most one a core or a satellite.

    A process more than needed takes time from a service on the same machine and makes the batches fill more slowly.
    Without a schedule (rate 0) the other half of the cores is left to the service: making points is the cheaper part.
    """
    if not rate:
        return max(1, min(cores // 2, satellites))
    points = satellites * rate
    singles = 1.0 if batch == 1 else single_share
    requests = points * (singles + (1.0 - singles) / batch)
    needed = int(max(points / POINTS_PER_PROCESS, requests / REQUESTS_PER_PROCESS)) + 1
    return max(1, min(needed, cores, satellites))


def default_connections(*, batch: int, single_share: float) -> int:
    """Choose the connections a process: single posts spend their time waiting, batches spend it being sent."""
    return 32 if batch == 1 or single_share else 16
