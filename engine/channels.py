"""The telemetry channels: the one place from which decoder, lane rows, COPY columns and the table check are derived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_ID_BYTES: Final = 50
"""Longest satellite id in UTF-8 bytes; the CHECK constraint of `telemetry` says the same."""


@dataclass(frozen=True, slots=True)
class Channel:
    """One measured quantity: its name (JSON key and column), unit, and the range that makes sense at all.

    `low` and `high` bound what is accepted, both inclusive: limits of sense, not of health (see `limits`).
    """

    name: str
    unit: str
    low: float
    high: float
    required: bool = False


CHANNELS: Final[tuple[Channel, ...]] = (
    Channel("battery_charge_percent", "%", 0.0, 100.0, required=True),
    Channel("storage_usage_mb", "MB", 0.0, 1e9, required=True),
    Channel("signal_strength_dbm", "dBm", -200.0, 50.0, required=True),
    Channel("latitude", "deg", -90.0, 90.0),
    Channel("longitude", "deg", -180.0, 180.0),
    Channel("altitude_km", "km", -1.0, 1e6),
    Channel("velocity_kmph", "km/h", 0.0, 1e6),
    Channel("temperature_c", "degC", -273.15, 1000.0),
    Channel("bus_voltage_v", "V", -1000.0, 1000.0),
)
"""In the order of the lane rows and of the COPY columns. At most 32: a row names its channels in a 32-bit mask."""

BY_NAME: Final[dict[str, Channel]] = {channel.name: channel for channel in CHANNELS}
REQUIRED: Final[tuple[str, ...]] = tuple(channel.name for channel in CHANNELS if channel.required)
POINT_FIELDS: Final[tuple[str, ...]] = ("satellite_id", "timestamp", *BY_NAME)
"""The fields a client may send. `is_anomaly` is accepted besides and ignored: the service decides."""
