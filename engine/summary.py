"""What a writer says of its work: one line a second on what was stored, and a few on what was anomalous."""

from __future__ import annotations

import logging
import time

import numpy as np

from engine.drain import Flush
from engine.episodes import Episode
from engine.limits import SEVERITIES
from engine.logs import Limited


class Summary:
    """One line a second on what was stored, and a few warnings on what was anomalous."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.anomaly_log = Limited(log)
        self.alarms = Limited(log, burst=1)
        self.since = time.monotonic()
        self.points = self.flushes = self.anomalies = 0

    def add(self, flushed: Flush) -> None:
        self.points += flushed.committed
        self.flushes += 1
        if flushed.columns is None:
            return
        self.anomalies += int(np.count_nonzero(flushed.columns.is_anomaly))

    def tell(self, changed: list[Episode]) -> None:
        """Write a line for each episode that began, became worse or ended."""
        for episode in changed:
            identity = episode.satellite.decode(errors="replace")
            if episode.severity > episode.told:
                episode.told = episode.severity
                self.anomaly_log.warning(
                    "anomaly satellite_id=%s %s=%g severity=%s %s=%g", identity, episode.channel, episode.peak,
                    SEVERITIES[episode.severity], episode.kind, episode.limit,
                )  # fmt: skip
            if episode.cleared:
                self.log.debug(
                    "anomaly over satellite_id=%s %s peak=%g seconds=%.3f points=%d", identity, episode.channel,
                    episode.peak, (episode.cleared - episode.onset) / 1e6, episode.points,
                )  # fmt: skip

    def tick(self, now: float) -> None:
        if now - self.since >= 1.0:
            self.flush()

    def flush(self) -> None:
        if self.flushes:
            self.log.info("inserted %d rows in %d flushes anomalies=%d", self.points, self.flushes, self.anomalies)
        self.anomaly_log.flush()
        self.alarms.flush()
        self.since = time.monotonic()
        self.points = self.flushes = self.anomalies = 0
