"""What the limits cost a point: is_anomaly before COPY, and the state of each satellite after it.

    pytest bench/test_limits.py --benchmark-columns=min,median

A batch of ten thousand points as a transaction has at 10,000 points/s or more, sorted by satellite and time, 1 % of the
satellites in an episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.episodes import Monitor
from engine.limits import Limit, Limits
from engine.rows import Columns
from engine.satellites import Satellites

POINTS = 10_000
DEFAULT = {
    "battery_charge_percent": Limit(critical_below=10),
    "storage_usage_mb": Limit(critical_above=95_000),
    "signal_strength_dbm": Limit(critical_below=-100),
}
FULL = {
    "battery_charge_percent": Limit(20, 10, critical_rate=500, hysteresis=2, violations=3),
    "storage_usage_mb": Limit(warning_above=90_000, critical_above=95_000, critical_rate=50_000, violations=3),
    "signal_strength_dbm": Limit(-95, -100, critical_rate=200, hysteresis=2, violations=3),
}


def batch(turn: int, satellites: int) -> Columns:
    random = np.random.default_rng(turn)
    each = POINTS // satellites
    ids = np.repeat(np.array([b"SAT-%05d" % number for number in range(satellites)]), each)
    battery = random.uniform(50, 50.1, POINTS)
    battery[(np.arange(POINTS) // each) % 100 == 0] = 5
    return Columns(
        np.tile(np.arange(each) * 10_000, satellites) + turn * each * 10_000 + 1,
        ids,
        {
            "battery_charge_percent": battery,
            "storage_usage_mb": random.uniform(40_000, 40_100, POINTS),
            "signal_strength_dbm": random.uniform(-70, -69, POINTS),
        },
        np.zeros(POINTS, np.bool_),
    )


@pytest.mark.benchmark
@pytest.mark.parametrize("limits", [DEFAULT, FULL], ids=["three thresholds", "every kind of limit"])
@pytest.mark.parametrize("satellites", [100, 1000, 10_000])
def test_a_point_costs_a_fraction_of_a_microsecond(satellites: int, limits: dict[str, Limit], benchmark: Any) -> None:
    known = Satellites()
    monitor = Monitor(Limits(limits), known)
    batches = iter([batch(turn, satellites) for turn in range(1, 31)])

    def work(columns: Columns) -> None:
        monitor.mark(columns)
        monitor.advance(columns, known.runs(columns))

    work(batch(0, satellites))
    benchmark.pedantic(work, setup=lambda: ((next(batches),), {}), rounds=30)
    cost = benchmark.stats.stats.median / POINTS
    # 10,000 satellites with one point each is the worst there is: a number to look up for every point. The bounds leave
    # room for a machine that is not at rest.
    assert cost < (1e-6 if satellites < POINTS else 3e-6)
