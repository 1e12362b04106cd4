"""The constellation: seed, satellite and time in, readings out; numpy only, no I/O, no state between calls.

A reading is a pure function of (seed, satellite, time). Given that, two runs with one seed agree wherever their times
agree, the split into processes changes nothing, a satellite goes on where an earlier run left it, and whoever holds a
sent log can recompute every value that was sent.

Values travel as integers in units of a channel's resolution (battery 87.31 % is 8731): exact, and ready to print.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Scaled = npt.NDArray[np.int32]

MINUTE_US = 60e6
SIDEREAL_DAY_US = 86_164.0905e6
EARTH_RADIUS_KM = 6_371.0
EARTH_GM = 398_600.4418  # km^3/s^2


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
    Channel("altitude_km", 2, 0, 2_000),
    Channel("velocity_kmph", 2, 0, 30_000),
    Channel("temperature_c", 2, -100, 150),
    Channel("bus_voltage_v", 2, 0, 50),
)
CHANNEL_SETS = {"required": REQUIRED, "all": REQUIRED + OPTIONAL}

# The limits that the service watches by default are battery < 10 %, storage > 95,000 MB, signal < -100 dBm. An anomaly
# breaks exactly one of them and lies in [start, start + span); every other reading keeps well clear of all three.
ANOMALY_START = np.array([100, 9_510_000, -11_900])
ANOMALY_SPAN = np.array([850, 480_000, 1_850])


@dataclass(frozen=True, slots=True)
class Readings:
    """Hold n readings, column-wise.

    satellite: (n,) index in the fleet; time_us: (n,) microseconds since 1970 UTC; values: (channels, n) in units of
    10**-decimals; anomalous: (n,) whether the reading breaks a limit.
    """

    satellite: Int64s
    time_us: Int64s
    values: Scaled
    anomalous: npt.NDArray[np.bool_]

    def pick(self, rows: Int64s) -> Readings:
        """Return the readings at the given positions."""
        return Readings(self.satellite[rows], self.time_us[rows], self.values[:, rows], self.anomalous[rows])


def id_digits(fleet_size: int) -> int:
    """Return how many digits an id of a fleet of this size has, at least 5."""
    return max(5, len(str(fleet_size - 1)))


def satellite_ids(first: int, last: int, fleet_size: int) -> npt.NDArray[np.bytes_]:
    """Name the satellites [first, last) of a fleet: ``SAT-00042``, all of one width, as fixed-width ASCII."""
    digits = id_digits(fleet_size)
    return np.array([b"SAT-%0*d" % (digits, index) for index in range(first, last)], dtype=f"S{digits + 4}")


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit words in place (the finaliser of splitmix64) and return them."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


class Fleet:
    """Simulate the satellites [first, last) of a constellation.

    anomaly_rate is the share of the readings, 0 to 1, that break a limit. Satellite indices are those of the whole
    constellation; asking for one outside [first, last) raises IndexError.
    """

    def __init__(self, first: int, last: int, *, seed: int, anomaly_rate: float, channels: str = "required") -> None:
        self.first = first
        self.count = last - first
        self.channels = CHANNEL_SETS[channels]
        self._all = channels == "all"
        self._threshold = np.uint64(round(anomaly_rate * 2**32))
        # The seed enters once, mixed: neighbouring seeds must not give fleets that are shifted copies of each other.
        self._seed = _mix(np.array([seed % 2**64], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))[0]
        self._salt = _mix(
            np.arange(first, last, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self._seed + np.uint64(1)
        )
        self._traits = self._draw_traits()

    def _draw(self, number: int, low: float, high: float) -> Floats:
        """Draw trait `number` of every satellite, uniform in [low, high)."""
        words = _mix(self._salt + np.uint64(number * 0xD1342543DE82EF95 % 2**64))
        return (words >> np.uint64(11)).astype(np.float64) * ((high - low) * 2.0**-53) + low

    def _draw_traits(self) -> Floats:
        """Return one row a trait, one column a satellite; percent, MB and dBm already in hundredths."""
        altitude = self._draw(1, 400.0, 1_200.0)
        axis = EARTH_RADIUS_KM + altitude
        period_us = 2e6 * np.pi * np.sqrt(axis**3 / EARTH_GM)
        sunlit = self._draw(2, 0.60, 0.68)
        downlink = self._draw(3, 0.06, 0.12)
        traits = [
            1.0 / period_us,
            self._draw(4, 0.0, 1.0),  # where on the orbit it was at the epoch
            1.0 / (0.85 * sunlit),  # the battery is full again after 85 % of the sunlit arc
            1.0 / (1.0 - sunlit),
            self._draw(5, 4_500.0, 6_500.0),  # battery at the end of the shadow
            self._draw(6, 2_000.0, 3_000.0),  # how far it charges above that
            1.0 / self._draw(7, 80 * MINUTE_US, 240 * MINUTE_US),  # from one ground pass to the next
            self._draw(8, 0.0, 1.0),
            1.0 / (1.0 - downlink),
            1.0 / downlink,
            self._draw(9, 200_000.0, 2_000_000.0),  # storage left after a downlink
            self._draw(10, 1_000_000.0, 6_800_000.0),  # storage filled between two passes
            self._draw(11, -9_000.0, -6_500.0),  # signal, mean
            self._draw(12, 100.0, 400.0),  # signal, swing
            2 * np.pi / self._draw(13, 4 * MINUTE_US, 12 * MINUTE_US),
            altitude,
            3_600.0 * np.sqrt(EARTH_GM / axis),
            self._draw(14, 30.0, 90.0),  # inclination, degrees
            self._draw(15, -2_000.0, 500.0),  # temperature at the end of the shadow
        ]
        return np.array(traits)

    def read(self, satellite: Int64s, time_us: Int64s) -> Readings:
        """Read satellites, given by index (n,), at times (n,) in microseconds since 1970 UTC."""
        local = satellite - self.first
        traits = np.take(self._traits, local, axis=1)
        noise = self._noise(local, time_us)
        time = time_us.astype(np.float64)
        values = np.empty((len(self.channels), len(satellite)), dtype=np.int32)

        orbit = time * traits[0] + traits[1]
        orbit -= np.floor(orbit)
        # Charging, full, draining: the smallest of three lines, so the level never jumps.
        charge = np.minimum(np.minimum(orbit * traits[2], (1.0 - orbit) * traits[3]), 1.0)
        ripple = (noise & np.uint64(0xFF)).astype(np.float64) * (1 / 64) - 2.0
        values[0] = traits[4] + traits[5] * charge + ripple

        cycle = time * traits[6] + traits[7]
        cycle -= np.floor(cycle)
        filled = np.minimum(cycle * traits[8], (1.0 - cycle) * traits[9])
        values[1] = traits[10] + traits[11] * filled

        hiss = ((noise >> np.uint64(8)) & np.uint64(0xFFFF)).astype(np.float64) * (300 / 65_536) - 150.0
        values[2] = traits[12] + traits[13] * np.sin(time * traits[14]) + hiss

        if self._all:
            self._read_optional(values, traits, time, orbit, charge)
        anomalous = (noise >> np.uint64(32)) < self._threshold
        self._disturb(values, anomalous, noise)
        return Readings(satellite, time_us, values, anomalous)

    def _noise(self, local: Int64s, time_us: Int64s) -> npt.NDArray[np.uint64]:
        """Return 64 random bits a reading, a function of seed, satellite and time alone."""
        words = time_us.view(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        words += np.take(self._salt, local)
        return _mix(words)

    def _read_optional(self, values: Scaled, traits: Floats, time: Floats, orbit: Floats, charge: Floats) -> None:
        """Fill the optional channels: a circular orbit over a turning Earth, warm and well fed in sunlight."""
        angle = 2 * np.pi * orbit
        wave = np.sin(angle)
        values[3] = 10_000 * traits[17] * wave
        turns = orbit - time * (1 / SIDEREAL_DAY_US)
        values[4] = 3_600_000 * (turns - np.floor(turns)) - 1_800_000
        values[5] = 100 * (traits[15] + 5.0 * wave)
        values[6] = 100 * (traits[16] - 10.0 * wave)
        values[7] = traits[18] + 3_000 * charge
        values[8] = 2_600 + 0.06 * (traits[4] + traits[5] * charge)

    def _disturb(self, values: Scaled, anomalous: npt.NDArray[np.bool_], noise: npt.NDArray[np.uint64]) -> None:
        """Overwrite one required channel of each anomalous reading with a value beyond its limit."""
        where = np.flatnonzero(anomalous)
        if not len(where):
            return
        words = _mix(noise[where] + np.uint64(0x9E3779B97F4A7C15))
        kind = (words % np.uint64(3)).astype(np.int64)
        depth = (words >> np.uint64(11)) * 2.0**-53
        values[kind, where] = ANOMALY_START[kind] + ANOMALY_SPAN[kind] * depth
