"""The state of each satellite against its limits, and its episodes: onset, peak, clear.

Kept by the writer, where points of all workers meet. `mark` sets is_anomaly before COPY and changes nothing, so that a
transaction may be repeated; `advance` moves the state, once the rows are stored. A point older than the one that the
state is of moves nothing. Several writers have each a state of their own; where they speak of one satellite, the open
row in the database is the state, which both widen and the first to see it cleared closes.

Only what can change a state is looked at point by point: satellites with a value beyond a limit, and those that are
not nominal. All others cost some vector operations.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import isnan
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.limits import CRITICAL, NOMINAL, WARNING, Limit, Limits
from engine.rows import Columns, Flags

Places = NDArray[np.int64]

FIRST_SLOTS: Final = 1024
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


class Readings(NamedTuple):
    """One channel of one satellite in order of time (us): values, and levels by their rate of change."""

    times: list[int]
    values: list[float]
    rates: list[int]


class Runs(NamedTuple):
    """Neighbouring rows of one satellite: where each run begins and ends, whose it is, and its place in the arrays."""

    begins: Places
    ends: Places
    names: list[bytes]
    slots: Places

    def holding(self, rows: Flags) -> list[int]:
        """Return the runs, by index, that hold at least one of the rows marked."""
        marked = np.flatnonzero(rows)
        if len(marked) == 0 or len(self.names) == len(rows):
            return [*map(int, marked)]
        return [*map(int, np.unique(np.searchsorted(self.begins, marked, "right") - 1))]


class Monitor:
    """The limits applied to a stream of stored points."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tracks: dict[bytes, dict[str, Track]] = {}
        self._slots: dict[bytes, int] = {}
        self._newest = np.zeros(FIRST_SLOTS, np.int64)  # time of the newest reading of each satellite
        self._tracked = np.zeros(FIRST_SLOTS, np.bool_)  # which satellites have tracks
        # For rates: the newest reading that was no spike, by channel.
        self._then = {channel: np.zeros(FIRST_SLOTS, np.int64) for channel in limits.rates}
        self._was = {channel: np.full(FIRST_SLOTS, np.nan) for channel in limits.rates}

    def mark(self, columns: Columns) -> None:
        """Set is_anomaly of each point: beyond a critical limit, or a critical spike. Changes no state."""
        _, critical = self.limits.beyond(columns)
        if self.limits.satellites or self.limits.rates:
            found = self._runs(columns)
            spiky = self._candidates(columns, found)
            for index in self._particular(found, spiky):
                span, own = _span(found, index), self.limits.of(found.names[index])
                _, critical[span] = self.limits.beyond(columns, span, own)
                for channel in spiky.get(index, ()):
                    critical[span] |= self._spikes(columns, found, index, channel)[0] == CRITICAL
        columns.is_anomaly = critical

    def advance(self, columns: Columns) -> list[Episode]:
        """Move the state by stored rows; returns the episodes that began, became worse or ended, in order."""
        beyond, _ = self.limits.beyond(columns)
        found = self._runs(columns)
        spiky = self._candidates(columns, found)
        for index in self._particular(found, {}):
            span = _span(found, index)
            beyond[span], _ = self.limits.beyond(columns, span, self.limits.of(found.names[index]))
        wanted = {*found.holding(beyond), *spiky}
        if self.tracks:
            wanted.update(np.flatnonzero(self._tracked[found.slots]).tolist())
        changed: list[Episode] = []
        for index in sorted(wanted):
            self._walk(columns, found, index, spiky.get(index, []), changed)
        self._remember(columns, found, spiky)
        np.maximum.at(self._newest, found.slots, columns.time[found.ends - 1])
        return changed

    def resume(self, episode: Episode) -> None:
        """Take up an episode that lasted when an earlier writer ended."""
        episode.told = episode.severity
        tracks = self.tracks.setdefault(episode.satellite, {})
        if episode.channel not in tracks:
            tracks[episode.channel] = Track(level=episode.severity, episode=episode)
        slot = self._slot_of([episode.satellite])[0]
        self._tracked[slot] = True
        self._newest[slot] = max(self._newest[slot], episode.onset)

    # -- rows to satellites

    def _runs(self, columns: Columns) -> Runs:
        ids = columns.satellite_id
        begins = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1])
        names: list[bytes] = ids[begins].tolist()
        return Runs(begins, np.append(begins[1:], len(ids)), names, self._slot_of(names))

    def _slot_of(self, names: list[bytes]) -> Places:
        """Return the place of each satellite in the arrays, making room for new ones."""
        try:
            return np.fromiter(map(self._slots.__getitem__, names), np.int64, len(names))
        except KeyError:
            for name in names:
                self._slots.setdefault(name, len(self._slots))
        while len(self._slots) > len(self._newest):
            self._newest = np.append(self._newest, np.zeros_like(self._newest))
            self._tracked = np.append(self._tracked, np.zeros_like(self._tracked))
            for channel in self.limits.rates:
                self._then[channel] = np.append(self._then[channel], np.zeros_like(self._then[channel]))
                self._was[channel] = np.append(self._was[channel], np.full_like(self._was[channel], np.nan))
        return self._slot_of(names)

    def _particular(self, found: Runs, spiky: dict[int, list[str]]) -> list[int]:
        """Return the runs, by index, of satellites with limits of their own, and those that may hold a spike."""
        own = self.limits.satellites
        return [index for index, name in enumerate(found.names) if name in own or index in spiky] if own else [*spiky]

    # -- one satellite, point by point

    def _walk(self, columns: Columns, found: Runs, index: int, spikes: list[str], changed: list[Episode]) -> None:
        name, span, slot = found.names[index], _span(found, index), found.slots[index]
        tracks = self.tracks.setdefault(name, {})
        for channel, limit in self.limits.of(name).items():
            column = columns.values.get(channel)
            if column is None:
                continue
            values = column[span].tolist()
            low, high = limit.lowest, limit.highest
            beyond = [place for place, value in enumerate(values) if value < low or value > high]
            if channel in spikes:
                rates = self._spikes(columns, found, index, channel)[0].tolist()
                beyond = sorted({*beyond, *(place for place, level in enumerate(rates) if level)})
            elif beyond or channel in tracks:
                rates = [NOMINAL] * len(values)
            if beyond or channel in tracks:
                track = tracks.pop(channel, None) or Track()
                readings = Readings(columns.time[span].tolist(), values, rates)
                _follow(track, (name, channel), limit, readings, beyond, int(self._newest[slot]), changed)
                if not track.idle:
                    tracks[channel] = track
        self._tracked[slot] = bool(tracks)
        if not tracks:
            del self.tracks[name]

    # -- rates of change

    def _candidates(self, columns: Columns, found: Runs) -> dict[int, list[str]]:
        """Return for each run, by its index, the channels that may hold a spike: a step too steep for some limit."""
        candidates: dict[int, list[str]] = {}
        for channel, rate in self.limits.rates.items():
            column = columns.values.get(channel)
            if column is None:
                continue
            then, was = np.empty(len(column), np.int64), np.empty(len(column))
            then[1:], was[1:] = columns.time[:-1], column[:-1]
            then[found.begins], was[found.begins] = self._then[channel][found.slots], self._was[channel][found.slots]
            steep = np.abs(column - was) > rate / 1e6 * (columns.time - then)
            for index in found.holding(steep):
                candidates.setdefault(index, []).append(channel)
        return candidates

    def _spikes(
        self, columns: Columns, found: Runs, index: int, channel: str
    ) -> tuple[NDArray[np.int8], tuple[int, float]]:
        """Return the level of each row by its rate of change, and the newest reading that is no spike.

        A reading is compared with the newest one that was no spike, so that the way back from a spike is none.
        """
        span, slot = _span(found, index), found.slots[index]
        limit = self.limits.of(found.names[index]).get(channel, Limit())
        then, was = int(self._then[channel][slot]), float(self._was[channel][slot])
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
        last = found.ends - 1
        for channel in self.limits.rates:
            column = columns.values.get(channel)
            if column is None:
                continue
            kept = [(index, self._spikes(columns, found, index, channel)[1])
                    for index, channels in spiky.items() if channel in channels]  # fmt: skip
            newer = ~np.isnan(column[last]) & (columns.time[last] > self._then[channel][found.slots])
            newer[[index for index, _ in kept]] = False
            slots = found.slots[newer]
            self._then[channel][slots], self._was[channel][slots] = columns.time[last[newer]], column[last[newer]]
            for index, (then, was) in kept:
                self._then[channel][found.slots[index]], self._was[channel][found.slots[index]] = then, was


def _span(found: Runs, index: int) -> slice:
    return slice(int(found.begins[index]), int(found.ends[index]))


def _follow(
    track: Track,
    who: tuple[bytes, str],
    limit: Limit,
    readings: Readings,
    beyond: list[int],
    newest: int,
    changed: list[Episode],
) -> None:
    """Move one track by all readings later than `newest`; `beyond` has the places of those that are not nominal.

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
