"""What a writer says of its work: one line a second on what was stored, and a few on what was anomalous."""

from __future__ import annotations

import logging
import time

import numpy as np

from engine.drain import Flush
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
        anomalous = np.flatnonzero(flushed.columns.is_anomaly)
        if len(anomalous) == 0:
            return
        self.anomalies += len(anomalous)
        shown = anomalous[: max(0, self.anomaly_log.room())]
        for index in shown.tolist():
            values = " ".join(f"{name}={column[index]:g}" for name, column in flushed.columns.values.items())
            identity = flushed.columns.satellite_id[index].decode(errors="replace")
            self.anomaly_log.warning("anomaly satellite_id=%s %s", identity, values)
        self.anomaly_log.hold(len(anomalous) - len(shown))

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
