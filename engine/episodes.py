"""The state of each satellite against its limits, and its episodes: onset, peak, clear.

Kept by the writer, where points of all workers meet. `mark` sets is_anomaly before COPY and changes nothing, so that a
transaction may be repeated; `advance` moves the state, once the rows are stored. A point older than the one that the
state is of moves nothing. Several writers have each a state of their own; where they speak of one satellite, the open
row in the database is the state, which both widen and the first to see it cleared closes.

Only what can change a state is looked at point by point: channels of a satellite with a value beyond a limit, and those
that are not nominal. All others cost some vector operations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from math import isnan
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.limits import CRITICAL, NOMINAL, WARNING, Limit, Limits
from engine.rows import Columns, Floats
from engine.satellites import Places, Runs, Satellites, extended

RATE_WITHIN_US: Final = 600_000_000
"""Readings further apart say nothing of a rate of change."""


@dataclass(slots=True)
class Episode:
    """One channel of one satellite beyond its limits; times in us since 1970, `cleared` 0 while it lasts.

    `told` is the severity that a log line has told of.
    """

    satellite: bytes
    channel: str
    kind: str
    severity: int
    onset: int
    peak: float
    peak_at: int
    limit: float
    points: int = 1
    cleared: int = 0
    told: int = NOMINAL


@dataclass(slots=True)
class Track:
    """The state of one channel of one satellite, and how many points in a row speak for another one."""

    level: int = NOMINAL
    pending: int = 0
    towards: int = NOMINAL
    since: int = 0
    first: Episode | None = None
    episode: Episode | None = None

    @property
    def idle(self) -> bool:
        """Whether a nominal reading would change nothing."""
        return self.level == NOMINAL and not self.pending


class Monitor:
    """The limits applied to a stream of stored points."""

    def __init__(self, limits: Limits, satellites: Satellites) -> None:
        self.limits, self.satellites = limits, satellites
        self.tracks: dict[int, dict[str, Track]] = {}
        room = satellites.room
        self._newest = np.zeros(room, np.int64)  # time of the newest reading of each satellite
        self._tracked = np.zeros(room, np.bool_)  # which satellites have tracks
        # For rates: the newest reading that was no spike, by channel.
        self._then = {channel: np.zeros(room, np.int64) for channel in limits.rates}
        self._was = {channel: np.full(room, np.nan) for channel in limits.rates}

    def mark(self, columns: Columns) -> None:
        """Set is_anomaly of each point: beyond a critical limit, or a critical spike. Changes no state."""
        critical = self.limits.critical(columns)
        if self.limits.satellites or self.limits.rates:
            found = self.satellites.runs(columns)
            self._make_room()
            spiky = self._candidates(columns, found)
            for index in self._particular(found, spiky):
                span, own = found.span(index), self.limits.of(self._name(found, index))
                critical[span] = self.limits.critical(columns, span, own)
                for channel in spiky.get(index, ()):
                    critical[span] |= self._spikes(columns, found, index, channel)[0] == CRITICAL
        columns.is_anomaly = critical

    def advance(self, columns: Columns, found: Runs) -> list[Episode]:
        """Move the state by rows that were marked and stored, of which `found` tells the satellites.

        Returns the episodes that began, became worse or ended, in order.
        """
        self._make_room()
        spiky = self._candidates(columns, found)
        wanted: dict[int, set[str]] = defaultdict(set)  # by run: the channels that may change a state
        for channel, beyond in self.limits.beyond(columns).items():
            for index in found.holding(beyond):
                wanted[index].add(channel)
        for index in self._particular(found, {}):
            wanted[index].update(self.limits.of(self._name(found, index)))
        for index, channels in spiky.items():
            wanted[index].update(channels)
        if self.tracks:
            for index in self._tracked[found.numbers].nonzero()[0].tolist():
                wanted[index].update(self.tracks[int(found.numbers[index])])
        changed: list[Episode] = []
        for index in sorted(wanted):
            self._walk(columns, found, index, wanted[index], spiky.get(index, []), changed)
        self._remember(columns, found, spiky)
        np.maximum.at(self._newest, found.numbers, columns.time[found.ends - 1])
        return changed

    def resume(self, episode: Episode) -> None:
        """Take up an episode that lasted when an earlier writer ended."""
        episode.told = episode.severity
        number = self.satellites.number(episode.satellite)
        self._make_room()
        tracks = self.tracks.setdefault(number, {})
        if episode.channel not in tracks:
            tracks[episode.channel] = Track(level=episode.severity, episode=episode)
        self._tracked[number] = True
        self._newest[number] = max(self._newest[number], episode.onset)

    def _make_room(self) -> None:
        room = self.satellites.room
        if room == len(self._newest):
            return
        self._newest, self._tracked = extended(self._newest, room), extended(self._tracked, room)
        for channel in self.limits.rates:
            self._then[channel] = extended(self._then[channel], room)
            self._was[channel] = extended(self._was[channel], room, np.nan)

    def _name(self, found: Runs, index: int) -> bytes:
        return self.satellites.names[int(found.numbers[index])]

    def _particular(self, found: Runs, spiky: dict[int, list[str]]) -> list[int]:
        """Return the runs, by index, of satellites with limits of their own, and those that may hold a spike."""
        own = self.limits.satellites
        if not own:
            return [*spiky]
        names = map(self.satellites.names.__getitem__, found.numbers.tolist())
        return [index for index, name in enumerate(names) if name in own or index in spiky]

    # -- one satellite, point by point

    def _walk(
        self, columns: Columns, found: Runs, index: int, wanted: set[str], spikes: list[str], changed: list[Episode]
    ) -> None:
        number, span = int(found.numbers[index]), found.span(index)
        name, alone = self.satellites.names[number], span.stop - span.start == 1
        newest, tracks = int(self._newest[number]), self.tracks.get(number, {})
        for channel, limit in self.limits.of(name).items():
            column = columns.values.get(channel) if channel in wanted else None
            if column is None:
                continue
            low, high, quiet = limit.lowest, limit.highest, channel not in tracks and channel not in spikes
            if alone and channel not in spikes:  # as most are at a fleet's usual rates
                value = column.item(span.start)
                if quiet and not (value < low or value > high):
                    continue
                track = tracks.get(channel) or Track()
                time = columns.time.item(span.start)
                if time > newest and not isnan(value):
                    _step(track, (name, channel), limit, (time, value, NOMINAL), changed)
            else:
                values: list[float] = column[span].tolist()
                beyond = [place for place, value in enumerate(values) if value < low or value > high]
                if quiet and not beyond:
                    continue
                rates = [NOMINAL] * len(values)
                if channel in spikes:
                    rates = self._spikes(columns, found, index, channel)[0].tolist()
                    beyond = sorted({*beyond, *(place for place, level in enumerate(rates) if level)})
                track = tracks.get(channel) or Track()
                readings = columns.time[span].tolist(), values, rates
                _follow(track, (name, channel), limit, readings, beyond, newest, changed)
            if track.idle:
                tracks.pop(channel, None)
            else:
                tracks[channel] = track
        self._tracked[number] = bool(tracks)
        if tracks:
            self.tracks[number] = tracks
        else:
            self.tracks.pop(number, None)

    # -- rates of change

    def _candidates(self, columns: Columns, found: Runs) -> dict[int, list[str]]:
        """Return for each run, by its index, the channels that may hold a spike: a step too steep for some limit."""
        candidates: dict[int, list[str]] = {}
        for channel, rate in self.limits.rates.items():
            column = columns.values.get(channel)
            if column is None:
                continue
            there, runs = _readings(column, found)
            first = np.append(-1, runs[:-1]) != runs
            values, times, numbers = column[there], columns.time[there], found.numbers[runs[first]]
            then, was = np.empty_like(times), np.empty_like(values)
            then[1:], was[1:] = times[:-1], values[:-1]
            then[first], was[first] = self._then[channel][numbers], self._was[channel][numbers]
            steep = np.abs(values - was) > rate / 1e6 * (times - then)
            for index in np.unique(runs[steep]).tolist():
                candidates.setdefault(index, []).append(channel)
        return candidates

    def _spikes(
        self, columns: Columns, found: Runs, index: int, channel: str
    ) -> tuple[NDArray[np.int8], tuple[int, float]]:
        """Return the level of each row by its rate of change, and the newest reading that is no spike.

        A reading is compared with the newest one that was no spike, so that the way back from a spike is none.
        """
        span, number = found.span(index), found.numbers[index]
        limit = self.limits.of(self._name(found, index)).get(channel, Limit())
        then, was = int(self._then[channel][number]), float(self._was[channel][number])
        levels = np.zeros(span.stop - span.start, np.int8)
        readings = zip(columns.time[span].tolist(), columns.values[channel][span].tolist(), strict=True)
        for place, (time, value) in enumerate(readings):
            if time <= then or isnan(value):
                continue
            rate = abs(value - was) / (time - then) * 1e6 if time - then <= RATE_WITHIN_US else 0.0
            if rate > limit.critical_rate:
                levels[place] = CRITICAL
            elif rate > limit.warning_rate:
                levels[place] = WARNING
            else:
                then, was = time, value
        return levels, (then, was)

    def _remember(self, columns: Columns, found: Runs, spiky: dict[int, list[str]]) -> None:
        """Keep the newest reading of every satellite that was no spike."""
        if not self.limits.rates:
            return
        for channel in self.limits.rates:
            column = columns.values.get(channel)
            if column is None:
                continue
            kept = [(index, self._spikes(columns, found, index, channel)[1])
                    for index, channels in spiky.items() if channel in channels]  # fmt: skip
            there, runs = _readings(column, found)
            last = np.append(runs[1:], -1) != runs
            there, runs = there[last], runs[last]
            newer = columns.time[there] > self._then[channel][found.numbers[runs]]
            newer &= ~np.isin(runs, [index for index, _ in kept])
            there, numbers = there[newer], found.numbers[runs[newer]]
            self._then[channel][numbers], self._was[channel][numbers] = columns.time[there], column[there]
            for index, (then, was) in kept:
                number = found.numbers[index]
                self._then[channel][number], self._was[channel][number] = then, was


def _readings(column: Floats, found: Runs) -> tuple[Places, Places]:
    """Return the rows that have a value, and the run that each of them belongs to, by index."""
    there = (~np.isnan(column)).nonzero()[0]
    return there, np.repeat(np.arange(len(found.begins)), found.ends - found.begins)[there]


def _follow(
    track: Track,
    who: tuple[bytes, str],
    limit: Limit,
    readings: tuple[list[int], list[float], list[int]],
    beyond: list[int],
    newest: int,
    changed: list[Episode],
) -> None:
    """Move one track by all readings later than `newest`; `beyond` has the places of those that are not nominal.

    The readings are their times, values, and levels by the rate of change, in order of time.

    While the track is idle, nominal readings are passed over: of most satellites that is all but a few.
    """
    times, values, rates = readings
    place, latest = 0, newest
    while place < len(times):
        if track.idle:
            following = bisect_left(beyond, place)
            if following == len(beyond):
                return
            passed = range(beyond[following] - 1, place - 1, -1)
            place = beyond[following]
            if passed:
                latest = max(latest, next((times[each] for each in passed if not isnan(values[each])), latest))
        if times[place] > latest and not isnan(values[place]):
            latest = times[place]
            _step(track, who, limit, (latest, values[place], rates[place]), changed)
        place += 1


def _step(
    track: Track, who: tuple[bytes, str], limit: Limit, reading: tuple[int, float, int], changed: list[Episode]
) -> None:
    """Move one track by one reading (time, value, level by its rate of change)."""
    time, value, spike = reading
    level = max(limit.level(value, track.level), spike)
    if level == track.level:
        track.pending, track.first = 0, None
        if track.episode is not None:
            _widen(track.episode, time, value)
        return
    rising = level > track.level
    if track.pending == 0 or rising != (track.towards > track.level):
        track.pending, track.towards, track.since, track.first = 0, level, time, None
        if rising and track.episode is None:
            track.first = _begin(who, limit, reading, level)
    elif track.first is not None:
        _widen(track.first, time, value)
    track.pending += 1
    # What all of the points in a row agree on: the lowest level on the way up, the highest on the way down.
    track.towards = min(track.towards, level) if rising else max(track.towards, level)
    if level != NOMINAL and track.episode is not None:
        _widen(track.episode, time, value)
    if track.pending < limit.violations and not (rising and spike > track.level):
        return
    _enter(track, max(track.towards, spike) if rising else track.towards, changed)


def _enter(track: Track, level: int, changed: list[Episode]) -> None:
    track.level, track.pending = level, 0
    if track.episode is None:
        track.episode, track.first = track.first, None
    episode = track.episode
    assert episode is not None
    if level == NOMINAL:
        episode.cleared, track.episode = track.since, None
        changed.append(episode)
    elif level > episode.severity:
        episode.severity = level
        changed.append(episode)


def _begin(who: tuple[bytes, str], limit: Limit, reading: tuple[int, float, int], level: int) -> Episode:
    time, value, spike = reading
    below, above = (
        (limit.critical_below, limit.critical_above)
        if level == CRITICAL
        else (limit.warning_below, limit.warning_above)
    )
    if value < below:
        kind, threshold = "below", below
    elif value > above:
        kind, threshold = "above", above
    else:
        kind, threshold = "rate", limit.critical_rate if spike == CRITICAL else limit.warning_rate
    return Episode(*who, kind, NOMINAL, time, value, time, threshold)


def _widen(episode: Episode, time: int, value: float) -> None:
    """Count a further point of an episode, and keep the value that is furthest beyond."""
    episode.points += 1
    worse = value < episode.peak if episode.kind == "below" else value > episode.peak
    if worse and episode.kind != "rate":
        episode.peak, episode.peak_at = value, time
