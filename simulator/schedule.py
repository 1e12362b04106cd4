"""When points are due: the open loop's profiles, and the closed loop's clock.

A profile says how the load of one cycle is spread over it. Whatever its shape, its mean is the rate asked for:

    constant    evenly                                   burst      half of each 10 s' points in the first second
    ramp        from nothing to twice the rate           diurnal    one day in the whole run: night, noon, night
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from simulator.traits import Floats, Int64s

BURST_S: Final = 10.0
_FINE: Final = np.linspace(0.0, 1.0, 1_025)
# Share of a cycle's time gone by -> share of its points due, as corners of a line that rises from (0, 0) to (1, 1).
PROFILES: Final[dict[str, tuple[Floats, Floats]]] = {
    "constant": (np.array([0.0, 1.0]), np.array([0.0, 1.0])),
    "ramp": (_FINE, _FINE**2),
    "burst": (np.array([0.0, 0.1, 1.0]), np.array([0.0, 0.5, 1.0])),
    "diurnal": (_FINE, _FINE - 0.9 / (2.0 * np.pi) * np.sin(2.0 * np.pi * _FINE)),
}
STEEPEST: Final = 5.0
"""No profile's peak is above so many times its mean."""


@dataclass(frozen=True, slots=True)
class Start:
    """Hold one moment on both clocks: time.monotonic() in seconds, and microseconds since 1970 UTC."""

    monotonic: float
    time_us: int


class OpenLoop:
    """Schedule `satellites` x `rate` points/s for `duration` seconds, at most `limit` of them; None: no end, no limit.

    Two points of one satellite are 1 / (STEEPEST * rate) apart or more, so for every rate up to 100,000/s their
    timestamps differ. Profiles that span the run need a duration.
    """

    def __init__(
        self, satellites: int, rate: float, duration: float | None, limit: int | None, profile: str = "constant"
    ) -> None:
        self._per_second = satellites * rate
        self._times, self._shares = PROFILES[profile]
        self._cycle_s = BURST_S if profile == "burst" else duration or 1.0
        self._constant = profile == "constant"
        # The subtraction keeps a product like 10.000000000000002 from scheduling one point too many.
        by_time = math.inf if duration is None else math.ceil(self._points(duration) - 1e-6)
        self._total = min(by_time, math.inf if limit is None else limit)

    @property
    def seconds(self) -> float:
        """Return how long the schedule lasts."""
        return math.inf if math.isinf(self._total) else float(self._seconds(np.array([self._total]))[0])

    def left(self, first: int) -> float:
        """Return how many points there are from point `first` on."""
        return self._total - first

    def offsets(self, first: int, count: int) -> Floats:
        """Return when the points [first, first + count) are due, in seconds after the start."""
        return self._seconds(np.arange(first, first + count))

    def due(self, elapsed: float) -> int:
        """Return how many points are due within `elapsed` seconds of the start."""
        return int(min(self._total, math.floor(self._points(max(elapsed, 0.0))) + 1))

    def _seconds(self, points: Int64s) -> Floats:
        if self._constant:
            return points / self._per_second
        cycles = points / (self._per_second * self._cycle_s)
        whole = np.floor(cycles)
        return np.asarray((whole + np.interp(cycles - whole, self._shares, self._times)) * self._cycle_s)

    def _points(self, elapsed: float) -> float:
        if self._constant:
            return elapsed * self._per_second
        whole, part = divmod(elapsed / self._cycle_s, 1.0)
        return float((whole + np.interp(part, self._times, self._shares)) * self._cycle_s * self._per_second)


class ClosedClock:
    """Give points their timestamps when there is no schedule: spread evenly from the block before until now.

    Invariant: no satellite gets one microsecond twice. Given that a satellite's turn comes every `satellites` points
    and no step is below 1000 / satellites ns, its timestamps lie 1,000 ns apart or more, so they differ once the
    nanoseconds are cut off. They run ahead of the clock only beyond a million points a second a satellite; `ahead`
    tells how far, and the plan then holds the points back.
    """

    def __init__(self, satellites: int, start_ns: int) -> None:
        self._least_ns = -(-1_000 // satellites)
        self._last_ns = start_ns

    def times_us(self, count: int, now_ns: int) -> Int64s:
        """Return the timestamps of the next `count` points, in microseconds since 1970 UTC."""
        step = max(self._least_ns, (now_ns - self._last_ns) // count)
        times = self._last_ns + step * np.arange(1, count + 1)
        self._last_ns += step * count
        return times // 1_000

    def ahead(self, now_ns: int) -> float:
        """Return how many seconds the last timestamp lies in the future, negative when it lies in the past."""
        return (self._last_ns - now_ns) * 1e-9
