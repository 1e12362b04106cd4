"""What a run came to: counts and latencies of all senders, as one line of words or one JSON object."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from simulator.settings import Settings

# Bins are 1 % wide, 1 us to 100 s: a percentile is off by half a percent at most, and merging is addition.
LOWEST_S = 1e-6
GROWTH = 1.01
BINS = int(np.ceil(np.log(100.0 / LOWEST_S) / np.log(GROWTH)))
# Less than this is the timer's grain, not a sender that cannot keep up.
NOTABLE_LAG_S = 0.1


class Latencies:
    """Count latencies in bins of equal ratio; what lies beyond an end is in the last bin there, the maximum is exact.

    A latency runs from when a request was due (a batch: its last point) to its last answer, retries included, or to
    when it was given up. Every request that was sent counts, whatever became of it.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, dtype=np.int64)
        self._max = 0.0

    def add(self, seconds: list[float]) -> None:
        """Count latencies, in seconds."""
        if not seconds:
            return
        values = np.maximum(np.array(seconds), LOWEST_S)
        bins = (np.log(values / LOWEST_S) / np.log(GROWTH)).astype(np.int64)
        self._counts += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)
        self._max = max(self._max, float(values.max()))

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another process exported."""
        self._counts[other["bins"]] += np.array(other["counts"], dtype=np.int64)
        self._max = max(self._max, other["max"])

    def export(self) -> dict[str, Any]:
        """Return the bins in use, as JSON-ready values."""
        used: npt.NDArray[np.int64] = np.flatnonzero(self._counts)
        return {"bins": used.tolist(), "counts": self._counts[used].tolist(), "max": self._max}

    def quantile(self, share: float) -> float | None:
        """Return the latency in seconds that `share` (0 to 1) of the requests did not exceed, None without requests."""
        total = int(self._counts.sum())
        if not total:
            return None
        rank = max(1, int(np.ceil(share * total)))
        index = int(np.searchsorted(np.cumsum(self._counts), rank))
        return float(min(LOWEST_S * GROWTH ** (index + 0.5), self._max))

    def milliseconds(self) -> dict[str, float | None]:
        """Return p50, p99 and max in milliseconds, None without requests."""
        values = {"p50": self.quantile(0.5), "p99": self.quantile(0.99), "max": self._max or None}
        return {name: None if value is None else round(value * 1e3, 3) for name, value in values.items()}


@dataclass(slots=True)
class Tally:
    """Count what senders did.

    sent = accepted + refused + unknown + in flight, in points; scheduled: points that were due, None without a
    schedule; seconds: from the start to the last answer; behind_seconds: the longest time by which a request left later
    than due.
    """

    sent: int = 0
    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    requests: int = 0
    retries: int = 0
    anomalies: int = 0
    scheduled: int | None = None
    seconds: float = 0.0
    behind_seconds: float = 0.0

    def add(self, other: dict[str, Any]) -> None:
        """Add another process's tally: counts add up, times are the longest."""
        for name in ("sent", "accepted", "refused", "unknown", "requests", "retries", "anomalies"):
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
    """Hold the result of a run; `failures` has one line for each sender that died, whose last counts may be short."""

    settings: Settings
    tally: Tally = field(default_factory=Tally)
    latencies: Latencies = field(default_factory=Latencies)
    failures: list[str] = field(default_factory=list)

    @property
    def points_per_second(self) -> float:
        """Return the accepted points a second of the run."""
        return self.tally.accepted / self.tally.seconds if self.tally.seconds else 0.0

    @property
    def unsent(self) -> int:
        """Return how many points were due and never left."""
        return max(0, (self.tally.scheduled or 0) - self.tally.sent)

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
            "seconds": round(tally.seconds, 3),
            "points_per_second": round(self.points_per_second, 1),
            "latency_ms": self.latencies.milliseconds(),
            "behind_seconds": round(tally.behind_seconds, 3),
            "anomalies": tally.anomalies,
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
