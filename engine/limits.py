"""What is normal: the limits of each channel, for the fleet and for single satellites, from a TOML file.

    [channels.battery_charge_percent]       # what is not named here keeps its default
    warning_below = 20
    critical_below = 10                     # the default: ANOMALY_THRESHOLD_BATTERY
    hysteresis = 2                          # a level is left only at 12 and 22
    violations = 3                          # so many points in a row change the state
    critical_rate = 5                       # a spike: more than 5 a second, up or down

    [satellites.SAT-00042.battery_charge_percent]
    critical_below = 5                      # for this one; the rest as for the fleet

A point beyond a critical limit, spikes included, is an anomaly whatever came before it; hysteresis and violations are
for the state of a satellite (see `episodes`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, Final

import numpy as np

from engine.channels import BY_NAME, MAX_ID_BYTES
from engine.rows import Columns, Flags, Floats
from engine.settings import Settings

Bounds = tuple[float, float]

NOMINAL, WARNING, CRITICAL = range(3)
SEVERITIES: Final = ("nominal", "warning", "critical")
MAX_VIOLATIONS: Final = 1000


class LimitsError(ValueError):
    """A limits file that cannot be used; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The limits of one channel, in its unit; rates in its unit a second. A limit that is not set is infinite."""

    warning_below: float = -inf
    critical_below: float = -inf
    warning_above: float = inf
    critical_above: float = inf
    warning_rate: float = inf
    critical_rate: float = inf
    hysteresis: float = 0.0
    violations: int = 1
    lowest: float = field(init=False)
    """What lies below this, or above `highest`, violates some limit. Kept, as it is asked for at many a point."""
    highest: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lowest", max(self.warning_below, self.critical_below))
        object.__setattr__(self, "highest", min(self.warning_above, self.critical_above))

    @property
    def rate(self) -> float:
        return min(self.warning_rate, self.critical_rate)

    def level(self, value: float, held: int = NOMINAL) -> int:
        """Return the level of a value for a satellite that is at level `held`, which it leaves by the hysteresis."""
        back = self.hysteresis if held == CRITICAL else 0.0
        if value < self.critical_below + back or value > self.critical_above - back:
            return CRITICAL
        back = self.hysteresis if held else 0.0
        return WARNING if value < self.warning_below + back or value > self.warning_above - back else NOMINAL


class Limits:
    """The limits of the fleet: by channel, and by satellite and channel where a satellite has its own."""

    def __init__(
        self, channels: Mapping[str, Limit], satellites: Mapping[bytes, Mapping[str, Limit]] | None = None
    ) -> None:
        self.channels = dict(channels)
        self.satellites = {
            name: {**self.channels, **own} if own else self.channels for name, own in (satellites or {}).items()
        }
        self.rates: dict[str, float] = {}
        """The lowest limit of the rate of change that any satellite has, for each channel that has one."""
        for name, limit in [item for own in (self.channels, *self.satellites.values()) for item in own.items()]:
            if isfinite(limit.rate):
                self.rates[name] = min(limit.rate, self.rates.get(name, inf))
        self._critical = _critical(self.channels)

    def of(self, satellite: bytes) -> Mapping[str, Limit]:
        """Return the limits of a satellite by channel."""
        return self.satellites.get(satellite, self.channels)

    def critical(self, columns: Columns, span: slice = slice(None), own: Mapping[str, Limit] | None = None) -> Flags:
        """Return for each point of `span` whether a value is beyond a critical limit; NaN violates nothing.

        The limits are `own`, or those of the fleet.
        """
        flags = np.zeros(len(columns.time[span]), np.bool_)
        for name, bounds in (self._critical if own is None else _critical(own)).items():
            if name in columns.values:
                flags |= _beyond(columns.values[name][span], bounds)
        return flags

    def beyond(self, columns: Columns) -> dict[str, Flags]:
        """Return for each channel which points are beyond a limit of the fleet, be it a warning or critical."""
        return {
            name: _beyond(columns.values[name], (limit.lowest, limit.highest))
            for name, limit in self.channels.items()
            if name in columns.values
        }


def _critical(limits: Mapping[str, Limit]) -> dict[str, Bounds]:
    return {name: (limit.critical_below, limit.critical_above) for name, limit in limits.items()}


def _beyond(column: Floats, bounds: Bounds) -> Flags:
    low, high = bounds
    flags: Flags = column < low
    if high < inf:
        flags |= column > high
    return flags


def of_settings(config: Settings) -> Limits:
    """Return the limits of an installation: the three thresholds, and the file over them; raises LimitsError."""
    fleet = {
        "battery_charge_percent": Limit(critical_below=config.anomaly_battery),
        "storage_usage_mb": Limit(critical_above=config.anomaly_storage),
        "signal_strength_dbm": Limit(critical_below=config.anomaly_signal),
    }
    return load(config.limits_file, fleet)


def load(path: Path | None, fleet: Mapping[str, Limit]) -> Limits:
    """Read the limits from a TOML file over those of `fleet`; raises LimitsError."""
    if path is None:
        return Limits(fleet)
    try:
        return _read(path, fleet)
    except LimitsError as error:
        raise LimitsError(f"ORBITSTREAM_LIMITS_FILE: {error}") from error


def _read(path: Path, fleet: Mapping[str, Limit]) -> Limits:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise LimitsError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LimitsError(f"{path} is not TOML: {error}") from error
    unknown = set(document) - {"channels", "satellites"}
    if unknown:
        raise LimitsError(f"{path} has [{min(unknown)}]: only [channels.NAME] and [satellites.ID.NAME] are known")
    channels = dict(fleet)
    for name, given in _tables(path, document.get("channels", {}), "channels"):
        channels[name] = _limit(path, f"channels.{name}", given, channels.get(name, Limit()))
    if not isinstance(document.get("satellites", {}), dict):
        raise LimitsError(f"{path}: satellites must be a table")
    satellites: dict[bytes, dict[str, Limit]] = {}
    for satellite, own in document.get("satellites", {}).items():
        where = f"satellites.{satellite}"
        if not 0 < len(satellite.encode()) <= MAX_ID_BYTES or not isinstance(own, dict):
            raise LimitsError(f"{path}: [{where}] is no satellite id with channels under it")
        satellites[satellite.encode()] = {
            name: _limit(path, f"{where}.{name}", given, channels.get(name, Limit()))
            for name, given in _tables(path, own, where)
        }
    return Limits(channels, satellites)


def _tables(path: Path, given: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(given, dict):
        raise LimitsError(f"{path}: {where} must be a table")
    for name, limits in given.items():
        if name not in BY_NAME:
            raise LimitsError(f"{path}: [{where}.{name}] is no channel: there are {', '.join(BY_NAME)}")
        if not isinstance(limits, dict):
            raise LimitsError(f"{path}: {where}.{name} must be a table")
    return list(given.items())


def _limit(path: Path, where: str, given: dict[str, Any], base: Limit) -> Limit:
    names = [item.name for item in fields(Limit) if item.init]
    for name, value in given.items():
        if name not in names:
            raise LimitsError(f"{path}: {where}.{name} is not known: there are {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise LimitsError(f"{path}: {where}.{name} must be a number")
        if name in ("hysteresis", "warning_rate", "critical_rate") and value < 0:
            raise LimitsError(f"{path}: {where}.{name} must not be negative")
    limit = replace(base, **given)
    if not (isinstance(limit.violations, int) and 1 <= limit.violations <= MAX_VIOLATIONS):
        raise LimitsError(f"{path}: {where}.violations must be a whole number from 1 to {MAX_VIOLATIONS}")
    if limit.lowest > limit.highest:
        raise LimitsError(f"{path}: {where} leaves no value in order: {limit.lowest:g} is above {limit.highest:g}")
    return limit
