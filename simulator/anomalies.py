"""What goes wrong: episodes of minutes on single satellites, and spikes of single readings; and who had which.

A satellite's time is cut into slots of SLOT_US. A slot holds one episode or none, which lies within it: so whether a
reading is in an episode follows from seed, satellite and time alone.

Of the readings, half of the anomaly rate lie in episodes, the other half are spikes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from simulator.traits import GOLDEN, Floats, Int64s, Traits, Words, fractions, mix

Kinds = npt.NDArray[np.uint8]
Scaled = npt.NDArray[np.int32]

SLOT_US: Final = 600_000_000
SHORTEST: Final = 0.2
LONGEST: Final = 0.8
"""An episode's length, as shares of its slot: half of it on average."""
LIMITS: Final = (1_000, 9_500_000, -10_000)
"""The limits that the service watches by default, in hundredths: battery below, storage above, signal below."""


class Anomaly(IntEnum):
    """Name what is wrong with a reading; the numbers are those of the spools."""

    NONE = 0
    BATTERY_DRAIN = 1
    STORAGE_LEAK = 2
    SIGNAL_LOSS = 3
    TUMBLING = 4
    SILENCE = 5
    SPIKE = 6


NAMES: Final = tuple(kind.name.lower() for kind in Anomaly)
# Out of 16 episodes: silence is rare, for what it does to a fleet is the loss of readings.
EPISODES: Final = np.repeat(
    np.array(
        [Anomaly.BATTERY_DRAIN, Anomaly.STORAGE_LEAK, Anomaly.SIGNAL_LOSS, Anomaly.TUMBLING, Anomaly.SILENCE],
        dtype=np.uint8,
    ),
    (4, 4, 4, 3, 1),
)
# A spike breaks one limit: it lies in [start, start + span), in hundredths.
SPIKE_START: Final = np.array([100, 9_510_000, -11_900, 9_000, 3_600])
SPIKE_SPAN: Final = np.array([850, 480_000, 1_850, 4_000, 800])


class Disturbance:
    """Disturb readings of the satellites of `traits`; rate: the share, 0 to 1, of the readings that are anomalous.

    A moment is a time since some whole slot of its satellite, in microseconds.
    """

    def __init__(self, traits: Traits, rate: float) -> None:
        self._traits = traits
        self._slots = np.uint64(round(rate * 2**32))
        episodes = 0.5 * (SHORTEST + LONGEST) * rate
        self._spikes = np.uint64(round((rate - episodes) / (1.0 - episodes) * 2**32))

    def steps_touched(self, mine: slice, moment_us: Int64s, steps: int, step_us: int) -> npt.NDArray[np.bool_]:
        """Tell of each of `steps` steps from `moment_us` (satellites,) on whether an episode touches it.

        mine: which satellites; returns (steps, satellites).
        """
        local = np.arange(mine.start, mine.stop)
        middle = moment_us + (np.arange(steps)[:, None] * step_us + step_us // 2)
        rows = np.tile(local, steps)
        chosen, progress, length, _ = self._episodes(rows, middle.ravel())
        touched = np.zeros(steps * len(local), dtype=np.bool_)
        margin = 0.51 * step_us / SLOT_US / length
        touched[chosen] = (progress > -margin) & (progress < 1.0 + margin)
        return touched.reshape(steps, len(local))

    def apply(self, values: Scaled, local: Int64s, moment_us: Int64s, candidates: Int64s, noise: Words) -> Kinds:
        """Change the values, (channels, n) in hundredths, of anomalous readings; return what each of the n has.

        The first three rows are battery, storage and signal; rows 7 and 8, if any, temperature and voltage. candidates:
        the readings in a step that an episode touches, local and moment_us: of these; noise: (n,).
        """
        kinds = np.zeros(len(noise), dtype=np.uint8)
        if not self._slots:
            return kinds
        if len(candidates):
            chosen, progress, _, words = self._episodes(local, moment_us)
            inside = (progress >= 0.0) & (progress < 1.0)
            rows = candidates[chosen[inside]]
            kinds[rows] = EPISODES[(words[inside] % np.uint64(len(EPISODES))).astype(np.int64)]
            _play(values, rows, kinds[rows], progress[inside], moment_us[chosen[inside]] / 1e6)
        where = np.flatnonzero((noise >> np.uint64(32)) < self._spikes)
        where = where[kinds[where] == Anomaly.NONE]
        self._apply_spikes(values, where, noise[where])
        kinds[where] = Anomaly.SPIKE
        return kinds

    def _episodes(self, local: Int64s, moment_us: Int64s) -> tuple[Int64s, Floats, Floats, Words]:
        """Return which of n moments lie in a slot that has an episode; how far (0 to 1, or outside) each of these is
        into it, its length as a share of the slot, and random words of its own."""
        slot = moment_us // SLOT_US
        words = self._traits.hash(local, slot)
        chosen = np.flatnonzero((words >> np.uint64(32)) < self._slots)
        words = mix(words[chosen] + GOLDEN)
        within = (moment_us[chosen] - slot[chosen] * SLOT_US) / SLOT_US
        length = SHORTEST + (LONGEST - SHORTEST) * fractions(words)
        progress = (within - (1.0 - length) * fractions(mix(words + GOLDEN))) / length
        return chosen, progress, length, words

    def _apply_spikes(self, values: Scaled, where: Int64s, noise: Words) -> None:
        """Overwrite one channel of each reading: of three, or of five when temperature and voltage are there."""
        words = mix(noise + GOLDEN)
        choices = 5 if len(values) > 8 else 3
        which = (words % np.uint64(choices)).astype(np.int64)
        channel = np.where(which < 3, which, which + 4)
        values[channel, where] = SPIKE_START[which] + SPIKE_SPAN[which] * fractions(words)


def _play(values: Scaled, rows: Int64s, kind: Kinds, progress: Floats, seconds: Floats) -> None:
    """Act out the episodes of the readings `rows`, `progress` (0 to 1) into each."""

    def pull(channel: int, which: npt.NDArray[np.bool_], to: float, speed: float) -> None:
        """Move a channel from its calm course to a value, in the first 1 / speed of the episode."""
        if which.any():
            part = np.minimum(progress[which] * speed, 1.0)
            mine = rows[which]
            calm = values[channel, mine]
            values[channel, mine] = calm + (to - calm) * part

    pull(0, kind == Anomaly.BATTERY_DRAIN, 400.0, 1.5)
    pull(1, kind == Anomaly.STORAGE_LEAK, 9_750_000.0, 1.5)
    pull(2, kind == Anomaly.SIGNAL_LOSS, -11_500.0, 8.0)
    tumbling = kind == Anomaly.TUMBLING
    if tumbling.any():
        # Antenna and panels sweep past their targets once in 20 s.
        away = 0.5 - 0.5 * np.cos(seconds[tumbling] * (2.0 * np.pi / 20.0))
        values[2, rows[tumbling]] -= (away * 3_000.0).astype(np.int32)
        values[0, rows[tumbling]] -= (progress[tumbling] * 0.3 * values[0, rows[tumbling]]).astype(np.int32)


def beyond_limits(values: Scaled) -> npt.NDArray[np.bool_]:
    """Tell of each reading, (channels, n) in hundredths, whether it breaks a limit that the service watches."""
    battery, storage, signal = LIMITS
    return np.asarray((values[0] < battery) | (values[1] > storage) | (values[2] < signal))
