"""Which points are anomalies: each channel against its configured limit."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from engine.rows import Columns, Flags


class Limit(NamedTuple):
    """A point violates it when `compare(value, threshold)`; the same comparison serves a float and a column."""

    channel: str
    compare: Callable[[Any, float], Any]
    threshold: float


class Limits:
    """The thresholds of the fleet; a channel that a point lacks (NaN in a column) never violates."""

    def __init__(self, *, battery_below: float, storage_above: float, signal_below: float) -> None:
        self.limits = (
            Limit("battery_charge_percent", operator.lt, battery_below),
            Limit("storage_usage_mb", operator.gt, storage_above),
            Limit("signal_strength_dbm", operator.lt, signal_below),
        )

    def flags(self, columns: Columns) -> Flags:
        """Return for each point whether it is an anomaly."""
        flags = np.zeros(len(columns), np.bool_)
        for limit in self.limits:
            values = columns.values.get(limit.channel)
            if values is not None:
                flags |= limit.compare(values, limit.threshold)
        return flags

    def flag(self, values: Mapping[str, float]) -> bool:
        """Tell whether one point with these values is an anomaly."""
        for channel, compare, threshold in self.limits:
            value = values.get(channel)
            if value is not None and compare(value, threshold):
                return True
        return False
