"""The constellation: seed, satellite and time in, readings out; numpy only, no I/O.

A reading is a pure function of (seed, elements, satellite, time). Given that, two runs with one seed agree wherever
their times agree, the split into processes changes nothing, a satellite goes on where an earlier run left it, and
whoever holds a sent log can recompute every value that was sent. What a Fleet keeps between calls are ready-made nodes.

    track       the calm course of each channel along the orbit     anomalies   what goes wrong
    orbits      where a satellite is                                traits      how satellites differ, and noise

Values travel as integers in units of a channel's resolution (battery 87.31 % is 8731): exact, and ready to print.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator import orbits, track
from simulator.anomalies import Disturbance, Kinds, Scaled
from simulator.orbits import BUNDLED, Constellation, Nodes
from simulator.track import Track
from simulator.traits import Int64s, Traits, Words


@dataclass(frozen=True, slots=True)
class Channel:
    """Describe one simulated channel: its field name, decimals printed, and the range [low, high] it stays in."""

    name: str
    decimals: int
    low: int
    high: int


REQUIRED = (
    Channel("battery_charge_percent", 2, 0, 100),
    Channel("storage_usage_mb", 2, 0, 100_000),
    Channel("signal_strength_dbm", 2, -150, 50),
)
OPTIONAL = (
    Channel("latitude", 4, -90, 90),
    Channel("longitude", 4, -180, 180),
    Channel("altitude_km", 2, 0, 400_000),
    Channel("velocity_kmph", 2, 0, 50_000),
    Channel("temperature_c", 2, -100, 150),
    Channel("bus_voltage_v", 2, 0, 50),
)
CHANNEL_SETS = {"required": REQUIRED, "all": REQUIRED + OPTIONAL}


@dataclass(frozen=True, slots=True)
class Readings:
    """Hold n readings, column-wise.

    satellite: (n,) index in the fleet; time_us: (n,) microseconds since 1970 UTC; values: (channels, n) in units of
    10**-decimals; anomaly: (n,) what is wrong with each, of which SILENCE means that the satellite sends nothing.
    """

    satellite: Int64s
    time_us: Int64s
    values: Scaled
    anomaly: Kinds

    def pick(self, rows: Int64s) -> Readings:
        """Return the readings at the given positions, n > 0 and rising; where they are a run, as views."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        if last - first == len(rows):
            run = slice(first, last)
            return Readings(self.satellite[run], self.time_us[run], self.values[:, run], self.anomaly[run])
        values = np.take(self.values, rows, axis=1)
        return Readings(self.satellite[rows], self.time_us[rows], values, self.anomaly[rows])


def id_digits(fleet_size: int) -> int:
    """Return how many digits an id of a fleet of this size has, at least 5."""
    return max(5, len(str(fleet_size - 1)))


def satellite_ids(first: int, last: int, fleet_size: int) -> npt.NDArray[np.bytes_]:
    """Name the satellites [first, last) of a fleet: ``SAT-00042``, all of one width, as fixed-width ASCII."""
    digits = id_digits(fleet_size)
    return np.array([b"SAT-%0*d" % (digits, index) for index in range(first, last)], dtype=f"S{digits + 4}")


def read_constellation(path: str | None, satellites: int) -> Constellation:
    """Return the orbits of a fleet: those of a TLE file, or the bundled ones without drag; raise ElementsError."""
    elements = orbits.read_elements(path or BUNDLED)
    return Constellation(elements[:satellites], drag=path is not None)


class Fleet:
    """Simulate the satellites [first, last) of a constellation.

    anomaly_rate is the share of the readings, 0 to 1, that are anomalous. Satellite indices are those of the whole
    constellation; asking for one outside [first, last) raises IndexError.
    """

    def __init__(
        self,
        first: int,
        last: int,
        *,
        seed: int,
        anomaly_rate: float,
        channels: str = "required",
        constellation: Constellation | None = None,
    ) -> None:
        self.first = first
        self.count = last - first
        self.channels = CHANNEL_SETS[channels]
        self._traits = Traits(first, last, seed)
        self._disturbance = Disturbance(self._traits, anomaly_rate)
        orbit = constellation or read_constellation(None, last)
        self._track = Track(orbit, self._traits, self._disturbance, positions=channels == "all")

    def read(self, satellite: Int64s, time_us: Int64s) -> Readings:
        """Read satellites, given by index (n,), at times (n,) in microseconds since 1970 UTC; raise ElementsError."""
        local = satellite - self.first
        course, places = self._track.read(local, time_us)
        noise = self._traits.hash(local, time_us)
        values = np.empty((len(self.channels), len(satellite)), dtype=np.int32)
        # Ripple of +-2 %/100 and +-1.5 dB.
        values[0] = course[:, track.BATTERY] + _ripple(noise, 0, 2.0)
        values[1] = course[:, track.STORAGE]
        values[2] = course[:, track.SIGNAL] + _ripple(noise, 8, 150.0)
        if places is not None:
            latitude, longitude, altitude = orbits.geodetic(places)
            values[3] = np.rint(10_000 * latitude)
            values[4] = np.rint(10_000 * longitude)
            values[5] = np.rint(100 * altitude)
            values[6] = course[:, track.SPEED]
            values[7] = course[:, track.TEMPERATURE] + _ripple(noise, 16, 20.0)
            values[8] = course[:, track.VOLTAGE] + _ripple(noise, 24, 5.0)
        touched = np.flatnonzero(course[:, track.EPISODE])
        moment_us = time_us[touched] - self._track.offset_us[local[touched]]
        anomaly = self._disturbance.apply(values, local[touched], moment_us, touched, noise)
        return Readings(satellite, time_us, values, anomaly)


def _ripple(noise: Words, shift: int, size: float) -> Nodes:
    """Return noise in [-size, size), from eight random bits of each word."""
    bits = (noise >> np.uint64(shift)).astype(np.uint8)
    return bits.astype(np.float32) * np.float32(size / 128) - np.float32(size)
