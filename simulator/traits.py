"""What makes one satellite different from the next: numbers drawn once from the seed, and noise from seed and time.

Everything random in the fleet comes from here, by hashing: no generator with a state, so nothing depends on the order
in which it is asked for.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def mix(words: Words) -> Words:
    """Scramble 64-bit words in place (the finaliser of splitmix64) and return them."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def fractions(words: Words) -> Floats:
    """Return words as numbers in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Traits:
    """Hold the traits of the satellites [first, last), each (satellites,), and draw more by number."""

    def __init__(self, first: int, last: int, seed: int) -> None:
        self.first = first
        self.count = last - first
        # The seed enters once, mixed: neighbouring seeds must not give fleets that are shifted copies of each other.
        start = mix(np.array([seed % 2**64], dtype=np.uint64) + GOLDEN)[0]
        self.salt = mix(np.arange(first, last, dtype=np.uint64) * GOLDEN + start + np.uint64(1))
        # Hundredths of a percent; shares a second: a shadow of 35 minutes takes a fifth to a third of the charge.
        self.battery_full = self.draw(1, 9_400.0, 9_950.0)
        self.battery_drain = self.draw(2, 0.20, 0.33) / 2_100.0
        self.battery_gain = self.battery_drain * self.draw(3, 1.2, 1.8)
        # Hundredths of MB, and of MB/s: empty to full in 75 to 150 minutes, and back in a good pass.
        self.storage_low = self.draw(4, 200_000.0, 2_000_000.0)
        self.storage_high = self.draw(5, 7_000_000.0, 8_300_000.0)
        self.storage_fill = self.draw(6, 800.0, 1_400.0)
        self.storage_drain = self.draw(7, 12_000.0, 20_000.0)
        # Hundredths of dBm.
        self.signal_near = self.draw(8, -6_200.0, -5_600.0)
        self.signal_relay = self.draw(9, -8_900.0, -8_400.0)
        # Hundredths of degrees Celsius, after long in shadow and in sunlight.
        self.cold = self.draw(10, -2_500.0, -500.0)
        self.warm = self.draw(11, 2_500.0, 4_500.0)

    def draw(self, number: int, low: float, high: float) -> Floats:
        """Draw trait `number` of every satellite, uniform in [low, high)."""
        return fractions(self.hash(np.arange(self.count), number * 0xD1342543DE82EF95)) * (high - low) + low

    def hash(self, local: Int64s, number: int | Int64s) -> Words:
        """Return 64 random bits for each of n satellites (counted from `first`), a function of seed, satellite and
        number alone."""
        if isinstance(number, int):
            return mix(np.take(self.salt, local) + np.uint64(number % 2**64))
        words = number.view(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        words += np.take(self.salt, local)
        return mix(words)
