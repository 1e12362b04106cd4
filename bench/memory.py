"""Memory of a service's processes while it works: sampled, and how it grows."""

from __future__ import annotations

import threading
import time

import numpy as np

from engine import rig

Samples = list[tuple[float, dict[str, int]]]
WINDOWS = 10


class Memory(threading.Thread):
    """Sample the anonymous memory of the largest process of each stage every half second."""

    def __init__(self, service: int) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._done = threading.Event()
        self.samples: Samples = []
        self.start()

    def run(self) -> None:
        begin = time.monotonic()
        while not self._done.wait(0.5):
            self.samples.append((time.monotonic() - begin, rig.anonymous_bytes(self._service)))

    def stop(self) -> dict[str, dict[str, float]]:
        """End, and return by stage: the most, in MB, and how that grows, in percent a minute."""
        self._done.set()
        self.join()
        growth = slopes(self.samples)
        return {
            stage: {
                "most_mb": round(max(sizes.get(stage, 0) for _, sizes in self.samples) / 1e6, 1),
                "percent_a_minute": growth[stage],
            }
            for stage in growth
        }


def slopes(samples: Samples) -> dict[str, float]:
    """Return the growth of each stage's memory in percent a minute, over the last three quarters of the samples.

    What a process takes for a transaction comes and goes: a line is drawn through the most of each tenth.
    """
    kept = samples[len(samples) // 4 :]
    windows = [part for part in np.array_split(np.arange(len(kept)), WINDOWS) if len(part)]
    if len(windows) < WINDOWS:
        return dict.fromkeys(kept[0][1], 0.0) if kept else {}
    times = np.array([np.mean([kept[index][0] for index in part]) for part in windows]) / 60
    found = {}
    for stage in kept[0][1]:
        most = np.array([max(kept[index][1].get(stage, 0) for index in part) for part in windows], dtype=float)
        found[stage] = round(float(np.polyfit(times, most, 1)[0] / most.mean() * 100), 2)
    return found
