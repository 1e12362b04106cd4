"""The fleet: a pure function of (seed, satellite, time), within its ranges, with as many anomalies as asked for."""

from __future__ import annotations

import numpy as np
import pytest

from simulator import orbits, track
from simulator.anomalies import Anomaly, beyond_limits
from simulator.fleet import CHANNEL_SETS, REQUIRED, Fleet, Readings, read_constellation, satellite_ids

NOW_US = 1_795_306_200_000_000
DAY_US = 86_400_000_000


def read(fleet: Fleet, points: int, *, spread_us: int = DAY_US) -> Readings:
    """Read at `points` scattered (satellite, time)."""
    dice = np.random.default_rng(5)
    satellite = dice.integers(fleet.first, fleet.first + fleet.count, points)
    return fleet.read(satellite, NOW_US + dice.integers(0, spread_us, points))


def test_one_seed_gives_the_same_readings() -> None:
    a, b = (read(Fleet(0, 50, seed=7, anomaly_rate=0.1, channels="all"), 5_000) for _ in range(2))
    assert (a.values == b.values).all()
    assert (a.anomaly == b.anomaly).all()


def test_another_seed_gives_other_readings() -> None:
    a, b = (read(Fleet(0, 50, seed=seed, anomaly_rate=0.1), 5_000) for seed in (7, 8))
    assert (a.values != b.values).mean() > 0.9
    assert (a.anomaly != b.anomaly).any()


def test_the_split_into_processes_changes_no_reading() -> None:
    whole = Fleet(0, 100, seed=1, anomaly_rate=0.1, channels="all")
    part = Fleet(40, 60, seed=1, anomaly_rate=0.1, channels="all")
    readings = read(part, 3_000)
    assert (whole.read(readings.satellite, readings.time_us).values == readings.values).all()


def test_a_reading_does_not_depend_on_the_company_it_is_read_in() -> None:
    fleet = Fleet(0, 100, seed=1, anomaly_rate=0.2, channels="all")
    together = read(fleet, 101, spread_us=2 * 3_600_000_000)
    for i in range(101):
        alone = fleet.read(together.satellite[i : i + 1], together.time_us[i : i + 1])
        assert (alone.values[:, 0] == together.values[:, i]).all()


def test_every_channel_stays_in_its_range() -> None:
    readings = read(Fleet(0, 1_000, seed=3, anomaly_rate=0.3, channels="all"), 200_000)
    for channel, values in zip(CHANNEL_SETS["all"], readings.values / 1.0, strict=True):
        values = values / 10**channel.decimals
        assert channel.low <= values.min() <= values.max() <= channel.high, channel.name


def test_a_calm_reading_breaks_no_limit_and_a_spike_exactly_one() -> None:
    readings = read(Fleet(0, 1_000, seed=3, anomaly_rate=0.1), 200_000)
    assert not beyond_limits(readings.values[:, readings.anomaly == Anomaly.NONE]).any()
    battery, storage, signal = readings.values[:, readings.anomaly == Anomaly.SPIKE] / 100
    broken = np.array([battery < 10, storage > 95_000, signal < -100])
    assert (broken.sum(axis=0) == 1).all()
    assert (broken.mean(axis=1) > 0.3).all()


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.01, 0.5, 1.0])
def test_the_share_of_anomalies_is_the_rate(rate: float) -> None:
    points = 200_000
    share = (read(Fleet(0, 100, seed=1, anomaly_rate=rate), points).anomaly > 0).mean()
    # Readings of one episode stand or fall together: 14,400 slots of a day, not 200,000 points, decide.
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / 14_400) ** 0.5


def test_each_scenario_shows_in_its_channel_and_lasts_minutes() -> None:
    seconds = np.arange(0, 86_400, 30)
    satellites = 200
    where, when = np.tile(np.arange(satellites), len(seconds)), np.repeat(NOW_US + seconds * 1_000_000, satellites)
    calm = Fleet(0, satellites, seed=4, anomaly_rate=0.0).read(where, when).values / 100
    readings = Fleet(0, satellites, seed=4, anomaly_rate=0.05).read(where, when)
    values, kinds = readings.values / 100, readings.anomaly
    assert set(np.unique(kinds)) == set(Anomaly)
    untouched = kinds == Anomaly.NONE
    assert (values[:, untouched] == calm[:, untouched]).all()

    def of(kind: Anomaly, channel: int) -> np.ndarray:
        return values[channel, kinds == kind]

    assert of(Anomaly.BATTERY_DRAIN, 0).min() < 5
    assert of(Anomaly.STORAGE_LEAK, 1).max() > 97_000
    assert np.median(of(Anomaly.SIGNAL_LOSS, 2)) < -110
    assert np.ptp(of(Anomaly.TUMBLING, 2)) > 25
    episodes = (kinds.reshape(len(seconds), satellites) == Anomaly.SIGNAL_LOSS).astype(int)
    lengths = 30 * episodes.sum() / max((np.diff(episodes, axis=0) == 1).sum(), 1)
    assert 200 < lengths < 400, "five minutes on average"


def test_a_battery_drains_in_shadow_and_a_pass_empties_the_recorder_and_strengthens_the_signal() -> None:
    """Seen over six orbits of Hubble, computed here from its elements without the fleet's tables."""
    times = NOW_US + np.arange(0, 6 * 95 * 60, 20) * 1_000_000
    constellation = read_constellation(None, 2)
    readings = Fleet(1, 2, seed=1, anomaly_rate=0.0).read(np.ones(len(times), dtype=np.int64), times).values
    position = np.moveaxis(constellation.propagate(times)[0][1:], 2, 0)
    lit = track.sunlit(position.transpose(0, 2, 1), times)[:, 0]
    heard = track.hearing(position.transpose(0, 2, 1), times)[0][:, 0]
    # Away from the two minutes around a change, which the nodes blur.
    settled = np.array([np.ptp(lit[max(i - 8, 0) : i + 9]) == 0 for i in range(len(lit))])[1:]
    slope = np.diff(readings[0].astype(float))
    assert (lit == 0).sum() > 100
    assert slope[settled & (lit[1:] == 0)].mean() < -3, "hundredths of a percent in 20 s"
    assert slope[settled & (lit[1:] == 1)].mean() >= 0
    load = np.diff(readings[1].astype(float))
    assert load[(heard[1:] == 1)].mean() < 0 < load[(heard[1:] == 0)].mean()
    assert readings[2][heard == 1].min() > np.median(readings[2][heard == 0])


def test_positions_are_those_of_the_orbit() -> None:
    """Also between nodes, and for copies: those fly the same orbit elsewhere."""
    fleet = Fleet(0, 200, seed=1, anomaly_rate=0.0, channels="all")
    times = NOW_US + np.arange(0, 7_200, 7) * 1_000_000
    constellation = read_constellation(None, 71)
    for satellite in (0, 40, 70):
        values = fleet.read(np.full(len(times), satellite), times).values
        position, velocity = constellation.propagate(times)
        latitude, longitude, altitude = orbits.geodetic(orbits.earth_fixed(position[satellite], times))
        assert np.abs(values[3] / 1e4 - latitude).max() < 0.002
        assert np.abs(values[5] / 100 - altitude).max() < 0.1
        away = np.abs((values[4] / 1e4 - longitude + 180) % 360 - 180) * np.cos(np.radians(latitude))
        assert away.max() < 0.002
        assert np.abs(values[6] / 100 - 3_600 * np.linalg.norm(velocity[satellite], axis=-1)).max() < 10
    copy = fleet.read(np.full(len(times), 71 + 40), times).values / 100
    assert copy[5].min() == pytest.approx(fleet.read(np.full(len(times), 40), times).values[5].min() / 100, abs=15)


@pytest.mark.parametrize("satellite", range(1, 6))
def test_channels_change_gradually(satellite: int) -> None:
    fleet = Fleet(0, 6, seed=2, anomaly_rate=0)
    seconds = 4 * 3_600
    values = fleet.read(np.full(seconds, satellite), NOW_US + 1_000_000 * np.arange(seconds)).values / 100
    battery, storage, signal = np.abs(np.diff(values)).max(axis=1)
    assert battery < 0.15
    assert storage < 250
    assert signal < 3.5
    assert np.ptp(values[0]) > 10, "the battery drains in shadow and recharges in sunlight"
    minutes = values[1, ::60]
    assert (np.diff(minutes) > 0).any() and (np.diff(minutes) < 0).any(), "storage grows, and shrinks at a pass"


def test_ids_have_five_digits_or_as_many_as_the_fleet_needs() -> None:
    assert satellite_ids(42, 43, 100).tolist() == [b"SAT-00042"]
    assert satellite_ids(99_999, 100_000, 100_000).tolist() == [b"SAT-99999"]
    assert satellite_ids(0, 1, 100_001).tolist() == [b"SAT-000000"]


def test_required_channels_come_first_and_alone_by_default() -> None:
    assert Fleet(0, 1, seed=1, anomaly_rate=0).channels == REQUIRED == CHANNEL_SETS["all"][:3]
