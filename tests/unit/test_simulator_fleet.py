"""The fleet: a pure function of (seed, satellite, time), within its ranges, with as many anomalies as asked for."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.fleet import CHANNEL_SETS, REQUIRED, Fleet, Readings, satellite_ids

NOW_US = 1_795_306_200_000_000
DAY_US = 86_400_000_000


def read(fleet: Fleet, points: int, *, spread_us: int = DAY_US) -> Readings:
    """Read at `points` scattered (satellite, time)."""
    dice = np.random.default_rng(5)
    satellite = dice.integers(fleet.first, fleet.first + fleet.count, points)
    return fleet.read(satellite, NOW_US + dice.integers(0, spread_us, points))


def broken_limits(readings: Readings) -> np.ndarray:
    """Count, for each reading, the service's default limits that it breaks."""
    battery, storage, signal = readings.values[:3] / 100
    return (battery < 10).astype(int) + (storage > 95_000) + (signal < -100)


def test_one_seed_gives_the_same_readings() -> None:
    a, b = (read(Fleet(0, 50, seed=7, anomaly_rate=0.1, channels="all"), 5_000) for _ in range(2))
    assert (a.values == b.values).all()
    assert (a.anomalous == b.anomalous).all()


def test_another_seed_gives_other_readings() -> None:
    a, b = (read(Fleet(0, 50, seed=seed, anomaly_rate=0.1), 5_000) for seed in (7, 8))
    assert (a.values != b.values).mean() > 0.9
    assert (a.anomalous != b.anomalous).any()


def test_the_split_into_processes_changes_no_reading() -> None:
    whole = Fleet(0, 100, seed=1, anomaly_rate=0.1, channels="all")
    part = Fleet(40, 60, seed=1, anomaly_rate=0.1, channels="all")
    readings = read(part, 3_000)
    assert (whole.read(readings.satellite, readings.time_us).values == readings.values).all()


def test_a_reading_does_not_depend_on_the_company_it_is_read_in() -> None:
    fleet = Fleet(0, 100, seed=1, anomaly_rate=0.2, channels="all")
    together = read(fleet, 301)
    for i in range(301):
        alone = fleet.read(together.satellite[i : i + 1], together.time_us[i : i + 1])
        assert (alone.values[:, 0] == together.values[:, i]).all()


def test_every_channel_stays_in_its_range() -> None:
    readings = read(Fleet(0, 1_000, seed=3, anomaly_rate=0.3, channels="all"), 200_000)
    for channel, values in zip(CHANNEL_SETS["all"], readings.values / 1.0, strict=True):
        values = values / 10**channel.decimals
        assert channel.low <= values.min() <= values.max() <= channel.high, channel.name


def test_an_anomaly_breaks_exactly_one_limit_and_no_other_reading_any() -> None:
    readings = read(Fleet(0, 1_000, seed=3, anomaly_rate=0.1), 200_000)
    assert (broken_limits(readings) == readings.anomalous).all()
    broken = readings.values[:, readings.anomalous] / 100
    assert all(
        share > 0.3 for share in ((broken[0] < 10).mean(), (broken[1] > 95_000).mean(), (broken[2] < -100).mean())
    )


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.01, 0.5, 1.0])
def test_the_share_of_anomalies_is_the_rate(rate: float) -> None:
    points = 200_000
    share = read(Fleet(0, 100, seed=1, anomaly_rate=rate), points).anomalous.mean()
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / points) ** 0.5


@pytest.mark.parametrize("satellite", range(5))
def test_channels_change_gradually(satellite: int) -> None:
    fleet = Fleet(0, 5, seed=2, anomaly_rate=0)
    seconds = 4 * 3_600
    values = fleet.read(np.full(seconds, satellite), NOW_US + 1_000_000 * np.arange(seconds)).values / 100
    battery, storage, signal = np.abs(np.diff(values)).max(axis=1)
    assert battery < 0.15
    assert storage < 250
    assert signal < 3.5
    assert np.ptp(values[0]) > 15, "the battery drains in shadow and recharges in sunlight"
    minutes = values[1, ::60]
    assert (np.diff(minutes) > 0).any() and (np.diff(minutes) < 0).any(), "storage grows, and shrinks at a pass"


def test_ids_have_five_digits_or_as_many_as_the_fleet_needs() -> None:
    assert satellite_ids(42, 43, 100).tolist() == [b"SAT-00042"]
    assert satellite_ids(99_999, 100_000, 100_000).tolist() == [b"SAT-99999"]
    assert satellite_ids(0, 1, 100_001).tolist() == [b"SAT-000000"]


def test_required_channels_come_first_and_alone_by_default() -> None:
    assert Fleet(0, 1, seed=1, anomaly_rate=0).channels == REQUIRED == CHANNEL_SETS["all"][:3]
