"""Orbits against those who know: SGP4's own verification set, and skyfield for places on the Earth."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from skyfield.api import EarthSatellite, load, wgs84

from simulator import orbits
from simulator.orbits import Constellation, ElementsError, parse_elements, read_elements

NOW_US = 1_795_306_200_000_000
JANUARY_2018_US = 1_516_500_000_000_000
ISS = """ISS (ZARYA)
1 25544U 98067A   18020.89808844  .00002078  00000-0  38550-4 0  9992
2 25544  51.6424  32.9776 0003646  28.7227  39.5332 15.54190080 95614
"""


def verification_set() -> dict[str, list[list[float]]]:
    """Return, for each satellite of SGP4's verification set, rows of minutes since epoch, x, y, z."""
    rows: dict[str, list[list[float]]] = {}
    for line in resources.files("sgp4").joinpath("tcppver.out").read_text().splitlines():
        words = line.split()
        if len(words) == 2 and words[1] == "xx":
            satellite = words[0]
            rows[satellite] = []
        elif len(words) >= 7:
            rows[satellite].append([float(word) for word in words[:4]])
    return rows


def verification_elements() -> list[orbits.Elements]:
    text = resources.files("sgp4").joinpath("SGP4-VER.TLE").read_text()
    # The file's second lines carry start, end and step behind the checksum; some checksums are wrong on purpose.
    lines = [line[:69] for line in text.splitlines() if line[:2] in ("1 ", "2 ")]
    return [
        orbits.Elements(first[2:7].strip(), first, second)
        for first, second in zip(lines[::2], lines[1::2], strict=True)
    ]


def test_positions_are_those_of_the_verification_set() -> None:
    expected = verification_set()
    worst, compared = 0.0, 0
    for elements in verification_elements():
        constellation = Constellation([elements])
        satellite = constellation._satellites[0]
        epoch_us = (satellite.jdsatepoch - orbits.JULIAN_1970) * orbits.DAY_US
        epoch_us += satellite.jdsatepochF * orbits.DAY_US
        for minutes, *position in expected[elements.name.lstrip("0")]:
            # The verification programs end a satellite's run where SGP4 reports an error: so must we.
            try:
                found, _ = constellation.propagate(np.array([round(epoch_us + minutes * 60e6)]))
            except ElementsError:
                continue
            worst = max(worst, float(np.linalg.norm(found[0, 0] - position)))
            compared += 1
    print(f"{compared} positions, worst error {worst * 1e3:.3f} m")
    assert compared > 600
    assert worst < 1.0


def test_places_on_the_earth_are_those_of_skyfield() -> None:
    bundled = read_elements(orbits.BUNDLED)
    constellation = Constellation(bundled)
    times_us = JANUARY_2018_US + np.arange(0, 86_400_000_000, 7_200_000_000)
    position, velocity = constellation.propagate(times_us)
    latitude, longitude, altitude = orbits.geodetic(orbits.earth_fixed(position, times_us))
    scale = load.timescale(builtin=True)
    moments = scale.from_datetimes([datetime.fromtimestamp(time_us / 1e6, UTC) for time_us in times_us])
    for index in range(0, len(bundled), 6):
        theirs = EarthSatellite(bundled[index].first, bundled[index].second, bundled[index].name, scale).at(moments)
        place = wgs84.geographic_position_of(theirs)
        ours = [orbits.surface_point(a, b) for a, b in zip(latitude[index], longitude[index], strict=True)]
        surface = [
            orbits.surface_point(a, b) for a, b in zip(place.latitude.degrees, place.longitude.degrees, strict=True)
        ]
        assert np.linalg.norm(np.array(ours) - np.array(surface), axis=1).max() < 1.0
        assert np.abs(altitude[index] - place.elevation.km).max() < 0.1
        speed = np.linalg.norm(velocity[index], axis=-1)
        assert np.abs(speed - np.linalg.norm(theirs.velocity.km_per_s, axis=0)).max() * 3_600 < 1.0


@pytest.mark.parametrize("altitude", [0.0, 400.0, 36_000.0])
def test_geodetic_places_come_back(altitude: float) -> None:
    for latitude in (-90.0, -89.9999, -45.0, 0.0, 1e-9, 30.0, 90.0):
        for longitude in (-179.999, -90.0, 0.0, 120.0):
            phi, lam = np.radians(latitude), np.radians(longitude)
            up = np.array([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
            found = orbits.geodetic(orbits.surface_point(latitude, longitude) + altitude * up)
            assert found[0] == pytest.approx(latitude, abs=1e-6)
            assert found[2] == pytest.approx(altitude, abs=1e-6)
            if abs(latitude) < 90:
                assert found[1] == pytest.approx(longitude, abs=1e-8)


def test_the_bundled_elements_fly_today_without_drag_and_keep_their_shape() -> None:
    bundled = read_elements(orbits.BUNDLED)
    assert len(bundled) >= 50
    then, _ = Constellation(bundled, drag=False).propagate(JANUARY_2018_US + np.arange(0, 2 * 10**10, 10**8))
    now, _ = Constellation(bundled, drag=False).propagate(NOW_US + np.arange(0, 2 * 10**10, 10**8))
    for positions in (then, now):
        altitude = np.linalg.norm(positions, axis=-1) - orbits.EARTH_RADIUS_KM
        assert (altitude > 350).all() and (altitude < 1_000).all()
    assert np.abs(np.linalg.norm(then, axis=-1).mean(axis=1) - np.linalg.norm(now, axis=-1).mean(axis=1)).max() < 5


def test_the_sun_is_where_skyfield_can_tell_without_an_ephemeris() -> None:
    """At the equinoxes of 2026 (20 March 14:46, 23 September 00:05) it crosses the equator, in June it is at 23.44."""
    for moment, declination in (("2026-03-20T14:46", 0.0), ("2026-09-23T00:05", 0.0), ("2026-06-21T08:25", 23.436)):
        direction = orbits.sun_direction(np.array([np.datetime64(moment, "us").astype(np.int64)]))[0]
        assert np.degrees(np.arcsin(direction[2])) == pytest.approx(declination, abs=0.02)
        assert np.linalg.norm(direction) == pytest.approx(1.0)


def test_elements_are_read_with_and_without_names() -> None:
    lines = ISS.splitlines()
    assert [each.name for each in parse_elements(lines, "x")] == ["ISS (ZARYA)"]
    assert [each.name for each in parse_elements(["# note", "", *lines[1:], *lines], "x")] == ["25544", "ISS (ZARYA)"]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "ends without a whole pair"),
        (ISS.splitlines()[:2], "ends without a whole pair"),
        ([ISS.splitlines()[2]], "line 1 is a second line without its first"),
        ([ISS.splitlines()[1]] * 2, "line 2 is not the second line of satellite 25544"),
        (ISS.replace("51.6424", "51.6425").splitlines(), "line 3 has a wrong length or checksum"),
    ],
)
def test_wrong_elements_are_one_clear_line(lines: list[str], complaint: str) -> None:
    with pytest.raises(ElementsError, match=complaint):
        parse_elements(lines, "file")


def test_elements_that_do_not_reach_today_say_so(tmp_path: Path) -> None:
    file = tmp_path / "iss.tle"
    file.write_text(ISS.replace(" 38550-4 0  9992", " 55077-1 0  9992"))
    with pytest.raises(ElementsError, match=r"of ISS \(ZARYA\) do not reach 2026-11-22T.*use newer ones"):
        Constellation(read_elements(file)).propagate(np.array([NOW_US]))
    with pytest.raises(ElementsError, match="cannot be read: No such file"):
        read_elements(tmp_path / "none")
