"""Limits: a column and a single point are judged alike, and at the threshold itself nothing is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from engine.limits import Limits
from engine.rows import Columns

LIMITS = Limits(battery_below=10, storage_above=95_000, signal_below=-100)


@pytest.mark.parametrize(
    ("battery", "storage", "signal", "anomaly"),
    [
        (10, 95_000, -100, False),
        (9.99, 0, 0, True),
        (50, 95_000.1, 0, True),
        (50, 0, -100.5, True),
        (5, 99_000, -150, True),
    ],
)
def test_thresholds(battery: float, storage: float, signal: float, anomaly: bool) -> None:
    values = {"battery_charge_percent": battery, "storage_usage_mb": storage, "signal_strength_dbm": signal}
    assert LIMITS.flag(values) is anomaly
    columns = Columns(
        time=np.zeros(1, np.int64),
        satellite_id=np.array([b"A"]),
        values={name: np.array([value], np.float64) for name, value in values.items()},
        is_anomaly=np.zeros(1, np.bool_),
    )
    assert LIMITS.flags(columns).tolist() == [anomaly]


def test_an_absent_channel_is_no_anomaly() -> None:
    assert not LIMITS.flag({})
    columns = Columns(
        time=np.zeros(2, np.int64),
        satellite_id=np.array([b"A", b"B"]),
        values={"battery_charge_percent": np.array([np.nan, 1.0])},
        is_anomaly=np.zeros(2, np.bool_),
    )
    assert LIMITS.flags(columns).tolist() == [False, True]
