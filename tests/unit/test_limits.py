"""Limits: what is beyond them, for the fleet and for single satellites; and what a limits file may say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine import limits, settings
from engine.limits import CRITICAL, NOMINAL, WARNING, Limit, LimitsError
from engine.rows import Columns

DEFAULT = limits.of_settings(settings.load({}))


@pytest.mark.parametrize(
    ("battery", "storage", "signal", "anomaly"),
    [
        (10, 95_000, -100, False),
        (9.99, 0, 0, True),
        (50, 95_000.1, 0, True),
        (50, 0, -100.5, True),
        (5, 99_000, -150, True),
        (np.nan, np.nan, np.nan, False),
    ],
)
def test_the_default_limits_are_the_three_thresholds(
    battery: float, storage: float, signal: float, anomaly: bool
) -> None:
    values = {"battery_charge_percent": battery, "storage_usage_mb": storage, "signal_strength_dbm": signal}
    columns = Columns(
        time=np.zeros(1, np.int64),
        satellite_id=np.array([b"A"]),
        values={name: np.array([value], np.float64) for name, value in values.items()},
        is_anomaly=np.zeros(1, np.bool_),
    )
    assert DEFAULT.critical(columns).tolist() == [anomaly]
    assert any(flags[0] for flags in DEFAULT.beyond(columns).values()) == anomaly


@pytest.mark.parametrize(
    ("value", "held", "level"),
    [
        (25, NOMINAL, NOMINAL),
        (19, NOMINAL, WARNING),
        (9, NOMINAL, CRITICAL),
        (11, CRITICAL, CRITICAL),  # back by less than the hysteresis
        (13, CRITICAL, WARNING),
        (21, WARNING, WARNING),
        (11, WARNING, WARNING),
        (22.5, WARNING, NOMINAL),
    ],
)
def test_a_level_is_left_only_by_the_hysteresis(value: float, held: int, level: int) -> None:
    assert Limit(warning_below=20, critical_below=10, hysteresis=2).level(value, held) == level


def test_a_file_changes_what_it_names_and_satellites_inherit(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(
        "[channels.battery_charge_percent]\nwarning_below = 20\nviolations = 3\n"
        "[channels.bus_voltage_v]\ncritical_above = 36.5\ncritical_rate = 2\n"
        '[satellites."SAT 1".battery_charge_percent]\ncritical_below = 5\n'
    )
    found = limits.of_settings(settings.load({"ORBITSTREAM_LIMITS_FILE": str(path)}))
    assert found.channels["battery_charge_percent"] == Limit(warning_below=20, critical_below=10, violations=3)
    assert found.channels["signal_strength_dbm"] == DEFAULT.channels["signal_strength_dbm"]
    own = found.of(b"SAT 1")
    assert own["battery_charge_percent"] == Limit(warning_below=20, critical_below=5, violations=3)
    assert own["bus_voltage_v"] == found.of(b"SAT 2")["bus_voltage_v"]
    assert found.rates == {"bus_voltage_v": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[channels", "is not TOML"),
        ("[fleet.a]", "only [channels.NAME]"),
        ("[channels.fuel]\n", "[channels.fuel] is no channel"),
        ("[channels.latitude]\nbelow = 3\n", "channels.latitude.below is not known"),
        ("[channels.latitude]\ncritical_below = true\n", "must be a number"),
        ("[channels.latitude]\nviolations = 0\n", "from 1 to 1000"),
        ("[channels.latitude]\nhysteresis = -1\n", "must not be negative"),
        ("[channels.latitude]\ncritical_below = 5\nwarning_above = 4\n", "leaves no value in order"),
        ("[satellites.A]\nlatitude = 3\n", "must be a table"),
        ("satellites = 3\n", "satellites must be a table"),
    ],
)
def test_a_bad_file_is_told_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(LimitsError) as caught:
        limits.load(path, {})
    assert says in str(caught.value) and str(caught.value).startswith("ORBITSTREAM_LIMITS_FILE: ")
    with pytest.raises(LimitsError, match="cannot be read"):
        limits.load(tmp_path / "none.toml", {})
