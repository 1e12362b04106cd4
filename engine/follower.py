"""What a writer does with points besides storing them: it follows their satellites.

Before COPY each point is marked, anomalous or not; after COMMIT the satellite's newest point and its episodes move on,
and are put into the database now and then. None of it is part of the delivery promise: where the database refuses it,
the points go on.
"""

from __future__ import annotations

import math
import time

from engine import limits
from engine.connection import Connection
from engine.drain import Flush
from engine.episodes import Episode, Monitor
from engine.latest import Latest
from engine.recorder import Recorder
from engine.rows import Columns
from engine.satellites import Satellites
from engine.settings import Settings


class Follower:
    """The satellites of one writer's points: limits, newest points, episodes; with `stats` also its node's stats."""

    def __init__(self, config: Settings, *, stats: bool) -> None:
        self.satellites = Satellites()
        self.monitor = Monitor(limits.of_settings(config), self.satellites)
        self.latest = Latest(self.satellites)
        self.recorder = Recorder(config.lane_dir, config.node, stats=stats)

    def mark(self, columns: Columns) -> None:
        """Set is_anomaly of points that are about to be stored; may be repeated."""
        self.monitor.mark(columns)

    def follow(self, flushed: Flush) -> list[Episode]:
        """Move on by what was stored; returns the episodes that began, became worse or ended."""
        if flushed.columns is None:
            return []
        found = self.satellites.runs(flushed.columns)
        self.latest.add(flushed.columns, flushed.received, found)
        changed = self.monitor.advance(flushed.columns, found)
        self.recorder.add(changed)
        return changed

    def resume(self, connection: Connection) -> None:
        """Go on with the episodes that an earlier writer left open; end those of a limit that is there no more."""
        forgotten = []
        for episode in self.recorder.lasting(connection):
            if episode.channel in self.monitor.limits.of(episode.satellite):
                self.monitor.resume(episode)
            else:
                forgotten.append(episode)
        self.recorder.forget(connection, forgotten)

    def record(self, connection: Connection, *, ending: bool = False) -> None:
        """Write down episodes and stats that are due; raises psycopg.Error when the connection is of no more use."""
        self.recorder.tick(math.inf if ending else time.monotonic(), connection)

    def put_latest(self, connection: Connection, *, ending: bool = False) -> None:
        """Put newest points that are due into satellite_latest; after a psycopg.Error none are due for a while."""
        if ending:
            self.latest.finish(connection)
        elif self.latest.due(time.monotonic()):
            self.latest.put(connection)
