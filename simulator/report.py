"""What a run came to: counts and latencies of all senders, as one line of words or one JSON object."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from simulator.histogram import Latencies
from simulator.settings import Settings

COUNTS = (
    "sent", "accepted", "refused", "unknown", "requests", "retries", "anomalies", "beyond_limits", "silent",
    "cpu_seconds",
)  # fmt: skip
# Less than this is the timer's grain, not a sender that cannot keep up.
NOTABLE_LAG_S = 0.1


@dataclass(slots=True)
class Tally:
    """Count what senders did.

    sent = accepted + refused + unknown + in flight, in points; silent: points that their satellite did not send;
    anomalies, beyond_limits: points sent that had an anomaly, that broke a limit which the service watches; scheduled:
    points that were due, None without a schedule; seconds: from the start to the last answer; behind_seconds: the
    longest time by which a request left later than due; cpu_seconds: what the senders used.
    """

    sent: int = 0
    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    requests: int = 0
    retries: int = 0
    anomalies: int = 0
    beyond_limits: int = 0
    silent: int = 0
    scheduled: int | None = None
    seconds: float = 0.0
    behind_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, other: dict[str, Any]) -> None:
        """Add another process's tally: counts add up, times are the longest."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + other[name])
        if other["scheduled"] is not None:
            self.scheduled = (self.scheduled or 0) + other["scheduled"]
        self.seconds = max(self.seconds, other["seconds"])
        self.behind_seconds = max(self.behind_seconds, other["behind_seconds"])

    def export(self) -> dict[str, Any]:
        """Return the tally as JSON-ready values."""
        return asdict(self)


@dataclass(slots=True)
class Report:
    """Hold the result of a run.

    failures: a line for each sender that died, whose last counts may be short; started_us: when the first point could
    leave, microseconds since 1970 UTC, None if none could.
    """

    settings: Settings
    tally: Tally = field(default_factory=Tally)
    latencies: Latencies = field(default_factory=Latencies)
    failures: list[str] = field(default_factory=list)
    started_us: int | None = None

    @property
    def points_per_second(self) -> float:
        """Return the accepted points a second of the run."""
        return self.tally.accepted / self.tally.seconds if self.tally.seconds else 0.0

    @property
    def unsent(self) -> int:
        """Return how many points were due and never left."""
        return max(0, (self.tally.scheduled or 0) - self.tally.sent - self.tally.silent)

    @property
    def lost(self) -> int:
        """Return how many points were due and not accepted."""
        return self.tally.refused + self.tally.unknown + self.unsent

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON-ready object, its configuration included."""
        tally = self.tally
        return {
            "sent": tally.sent,
            "accepted": tally.accepted,
            "refused": tally.refused,
            "unknown": tally.unknown,
            "unsent": self.unsent,
            "requests": tally.requests,
            "retries": tally.retries,
            "started_at": self.started_us and datetime.fromtimestamp(self.started_us / 1e6, UTC).isoformat(),
            "seconds": round(tally.seconds, 3),
            "points_per_second": round(self.points_per_second, 1),
            "latency_ms": self.latencies.milliseconds(),
            "behind_seconds": round(tally.behind_seconds, 3),
            "anomalies": tally.anomalies,
            "beyond_limits": tally.beyond_limits,
            "silent": tally.silent,
            "cpu_seconds": round(tally.cpu_seconds, 3),
            "latency_histogram": self.latencies.encode(),
            "failures": self.failures,
            "configuration": self.settings.configuration(),
        }

    def to_words(self) -> str:
        """Return the report as one line."""
        tally = self.tally
        latency = self.latencies.milliseconds()
        parts = [
            f"sent {tally.sent:,} points in {tally.seconds:.1f} s: {tally.accepted:,} accepted"
            f" ({self.points_per_second:,.0f}/s)",
            f"{tally.refused:,} refused",
            f"{tally.unknown:,} unknown",
            f"{tally.anomalies:,} anomalies",
        ]
        if latency["p50"] is not None:
            parts.append(
                f"latency p50 {latency['p50']:.3g} ms, p99 {latency['p99']:.3g} ms, max {latency['max']:.3g} ms"
            )
        if tally.retries:
            parts.append(f"{tally.retries:,} retries")
        if tally.behind_seconds >= NOTABLE_LAG_S:
            parts.append(f"up to {tally.behind_seconds:.1f} s behind schedule")
        if tally.silent:
            parts.append(f"{tally.silent:,} silent")
        if self.unsent:
            parts.append(f"{self.unsent:,} due but never sent")
        return ", ".join(parts)


def _short(value: float | None) -> str:
    """Return a number with three digits, or with all before the point."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def progress_line(seconds: float, tally: Tally, per_second: float) -> str:
    """Return one line for a run under way: `seconds` into it, accepting `per_second` points/s just now."""
    line = (
        f"  {seconds:.0f} s  {tally.sent:,} points sent  {tally.accepted:,} accepted  {tally.refused:,} refused"
        f"  {per_second:,.0f}/s"
    )
    return line + (f"  {tally.unknown:,} unknown" if tally.unknown else "")
