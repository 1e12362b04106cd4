"""Episodes: what a stream of points makes of the state of a satellite, and what it must not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.episodes import Episode, Monitor
from engine.limits import CRITICAL, WARNING, Limit, Limits
from engine.rows import Columns
from engine.satellites import Satellites

BATTERY, STORAGE = "battery_charge_percent", "storage_usage_mb"
S = 1_000_000
PLAIN = Limit(warning_below=20, critical_below=10)


def columns(*points: tuple[int, float], satellite: bytes = b"A") -> Columns:
    """Make columns of one satellite, (second, battery) each."""
    return Columns(
        np.array([second * S for second, _ in points], np.int64),
        np.array([satellite] * len(points)),
        {BATTERY: np.array([value for _, value in points], np.float64)},
        np.zeros(len(points), np.bool_),
    )


def monitor(limit: Limit = PLAIN, **satellites: Limit) -> Monitor:
    own = {name.encode(): {BATTERY: each} for name, each in satellites.items()}
    return Monitor(Limits({BATTERY: limit}, own), Satellites())


def flags(watch: Monitor, points: Columns) -> list[bool]:
    watch.mark(points)
    return [bool(flag) for flag in points.is_anomaly]


def advance(watch: Monitor, points: Columns) -> list[Episode]:
    watch.mark(points)
    return watch.advance(points, watch.satellites.runs(points))


def summary(episode: Episode) -> tuple[int, int, float, float]:
    return episode.severity, episode.onset // S, episode.cleared / S, episode.peak


def test_an_episode_has_onset_peak_severity_and_clear() -> None:
    watch = monitor()
    (begun,) = advance(watch, columns((1, 50), (2, 15), (3, 14)))
    assert summary(begun) == (WARNING, 2, 0, 14)
    (worse,) = advance(watch, columns((4, 5), (5, 8), (6, 12)))
    assert worse is begun and summary(worse) == (CRITICAL, 2, 0, 5)
    (over,) = advance(watch, columns((7, 30)))
    assert over is begun and summary(over) == (CRITICAL, 2, 7, 5) and over.points == 5
    assert advance(watch, columns((8, 30))) == [] and watch.tracks == {}


def test_a_state_changes_after_so_many_points_in_a_row() -> None:
    watch = monitor(Limit(critical_below=10, violations=3))
    assert advance(watch, columns((1, 5), (2, 5), (3, 50), (4, 5), (5, 4))) == []
    (begun,) = advance(watch, columns((6, 6)))
    assert summary(begun) == (CRITICAL, 4, 0, 4)
    assert advance(watch, columns((7, 50), (8, 50), (9, 5), (10, 50), (11, 50))) == []
    (over,) = advance(watch, columns((12, 50)))
    assert summary(over) == (CRITICAL, 4, 10, 4)


def test_hysteresis_keeps_an_episode_in_one_piece() -> None:
    watch = monitor(Limit(critical_below=10, hysteresis=2))
    changed = advance(watch, columns((1, 9.9), (2, 10.1), (3, 9.9), (4, 11.9), (5, 12.1)))
    assert [summary(each) for each in changed] == [(CRITICAL, 1, 5, 9.9)] * 2 and changed[0] is changed[1]


def test_a_late_point_is_an_anomaly_and_moves_no_state() -> None:
    watch = monitor()
    advance(watch, columns((10, 50)))
    late = columns((5, 3), (6, 3))
    assert flags(watch, late) == [True, True]
    assert advance(watch, late) == []
    (begun,) = advance(watch, columns((11, 3)))
    assert advance(watch, columns((7, 50), (8, 50))) == [] and not begun.cleared
    (over,) = advance(watch, columns((12, 50)))
    assert over.cleared == 12 * S


def test_every_satellite_has_a_state_and_may_have_limits_of_its_own() -> None:
    watch = monitor(B=Limit(critical_below=2), C=Limit(critical_below=60))
    points = Columns(
        np.array([1, 2, 1, 2, 1, 2], np.int64) * S,
        np.array([b"A", b"A", b"B", b"B", b"C", b"C"]),
        {BATTERY: np.array([5.0, 50, 5, 1, 50, 70])},
        np.zeros(6, np.bool_),
    )
    assert flags(watch, points) == [True, False, False, True, True, False]
    assert [(each.satellite, each.cleared // S) for each in advance(watch, points)] == [
        (b"A", 2), (b"A", 2), (b"B", 0), (b"C", 2), (b"C", 2),
    ]  # fmt: skip


def test_a_spike_is_an_anomaly_and_the_way_back_is_none() -> None:
    watch = monitor(Limit(critical_rate=5))
    assert flags(watch, columns((1, 50), (2, 51), (3, 90), (4, 52), (5, 53))) == [False, False, True, False, False]
    advance(watch, columns((1, 50), (2, 51)))
    split = columns((3, 90))  # the reading before it came in another transaction
    assert flags(watch, split) == [True] and flags(watch, split) == [True], "marking changes nothing"
    (begun,) = advance(watch, split)
    assert (begun.kind, begun.peak, begun.limit) == ("rate", 90, 5)
    after = columns((4, 52))
    assert flags(watch, after) == [False]
    assert [each.cleared for each in advance(watch, after)] == [4 * S]
    # A step that stays is taken for the truth once the rate to it is possible.
    assert flags(watch, columns((5, 72), (6, 72), (7, 72), (8, 72))) == [True, True, True, False]


def test_a_gap_hides_no_spike() -> None:
    watch, gap = monitor(Limit(critical_rate=5)), np.nan
    assert flags(watch, columns((1, gap), (2, 20), (3, gap), (4, 90))) == [False, False, False, True]
    advance(watch, columns((1, gap), (2, 20), (3, gap)))
    (begun,) = advance(watch, columns((4, gap), (5, 90), (6, gap)))
    assert (begun.kind, begun.onset) == ("rate", 5 * S)
    assert flags(watch, columns((7, gap))) == [False]


def test_channels_that_points_lack_break_nothing() -> None:
    watch = Monitor(Limits({BATTERY: PLAIN, STORAGE: Limit(critical_above=5, critical_rate=1)}), Satellites())
    (begun,) = advance(watch, columns((1, 5), (2, np.nan), (3, 5)))
    assert begun.points == 2 and not begun.cleared


def test_an_episode_of_an_earlier_writer_goes_on() -> None:
    watch = monitor()
    watch.resume(Episode(b"A", BATTERY, "below", CRITICAL, 5 * S, 3.0, 6 * S, 10.0, 4))
    assert advance(watch, columns((4, 50))) == [], "before its onset"
    assert advance(watch, columns((7, 4))) == []
    (over,) = advance(watch, columns((8, 50)))
    assert summary(over) == (CRITICAL, 5, 8, 3.0) and over.points == 5


@given(
    st.lists(st.floats(0, 100) | st.just(np.nan), min_size=1, max_size=40),
    st.integers(1, 4),
    st.floats(0, 5),
    st.data(),
)
def test_how_points_are_cut_into_transactions_changes_nothing(
    values: list[float], violations: int, hysteresis: float, data: st.DataObject
) -> None:
    limit = Limit(warning_below=40, critical_below=20, critical_rate=30, violations=violations, hysteresis=hysteresis)
    points = [(second, value) for second, value in enumerate(values, 1)]
    cut = data.draw(st.integers(0, len(points)))
    whole, parts = monitor(limit), monitor(limit)
    at_once = columns(*points)
    expected = flags(whole, at_once), [summary(each) for each in advance(whole, at_once)]
    marked, changed = [], []
    for part in (points[:cut], points[cut:]):
        if part:
            marked += flags(parts, columns(*part))
            changed += advance(parts, columns(*part))
    assert (marked, [summary(each) for each in changed]) == expected


@pytest.mark.parametrize("count", [1, 1023, 1024, 5000])
def test_any_number_of_satellites_is_followed(count: int) -> None:
    watch = monitor(Limit(critical_below=10, critical_rate=1000))
    ids = np.array([b"S%05d" % number for number in range(count)])
    for second, value in ((1, 50.0), (2, 5.0), (3, 50.0)):
        points = Columns(np.full(count, second * S), ids, {BATTERY: np.full(count, value)}, np.zeros(count, np.bool_))
        changed = advance(watch, points)
        assert len(changed) == (0 if second == 1 else count)
    assert {each.cleared for each in changed} == {3 * S}
