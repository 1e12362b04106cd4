"""Orbits: two-line elements in, where satellites are out; SGP4 by the `sgp4` package, everything vectorised.

    TLE text -> parse_elements -> Constellation.propagate -> TEME km, km/s -> earth_fixed -> geodetic

Frames: SGP4 speaks TEME (true equator, mean equinox, inertial for our purpose); turned by the Greenwich mean sidereal
angle it becomes Earth-fixed. Polar motion (below 15 m) and UT1 - UTC (below 0.5 km along the ground) are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from sgp4.api import SGP4_ERRORS, WGS72, Satrec, SatrecArray

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Nodes = npt.NDArray[np.float32]

EARTH_RADIUS_KM: Final = 6_378.137
FLATTENING: Final = 1 / 298.257223563
EARTH_TURN: Final = 7.292115e-5
"""Radians a second, against the stars."""
DAY_US: Final = 86_400_000_000
JULIAN_1970: Final = 2_440_587.5
JULIAN_2000: Final = 2_451_545.0
STEP_US: Final = 120_000_000
PAGE: Final = 64
PAGES_KEPT: Final = 8
BUNDLED: Final = Path(__file__).with_name("elements.tle")


class ElementsError(Exception):
    """Report elements that cannot be flown; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Elements:
    """Hold one satellite's name and its two lines."""

    name: str
    first: str
    second: str


def parse_elements(lines: Iterable[str], source: str) -> list[Elements]:
    """Read two-line elements, each with or without a line of its name before; `#` starts a comment.

    Raises ElementsError for a line out of place or with a wrong checksum.
    """
    found: list[Elements] = []
    name, first = "", ""
    for number, text in enumerate(lines, 1):
        line = text.rstrip()
        where = f"{source} line {number}"
        if not line or line.startswith("#"):
            continue
        if first:
            if not line.startswith("2 ") or line[2:7] != first[2:7]:
                raise ElementsError(f"{where} is not the second line of satellite {first[2:7]}")
            _check(line, where)
            found.append(Elements(name or first[2:7].strip(), first, line))
            name, first = "", ""
        elif line.startswith("1 ") and len(line) >= 68:
            _check(line, where)
            first = line
        elif line.startswith("2 ") and len(line) >= 68:
            raise ElementsError(f"{where} is a second line without its first")
        else:
            name = line.removeprefix("0 ").strip()
    if first or not found:
        raise ElementsError(f"{source} ends without a whole pair of lines; give two-line elements (TLE)")
    return found


def _check(line: str, where: str) -> None:
    """Compare a line's checksum: the sum of its digits, a minus sign counting 1, modulo 10."""
    total = sum(int(c) if c.isdigit() else c == "-" for c in line[:68])
    if len(line) != 69 or not line[68].isdigit() or total % 10 != int(line[68]):
        raise ElementsError(f"{where} has a wrong length or checksum; download the elements again")


def read_elements(path: str | os.PathLike[str]) -> list[Elements]:
    """Read a TLE file; raise ElementsError also when it cannot be read."""
    try:
        text = Path(path).read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ElementsError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not ASCII'}") from error
    return parse_elements(text.splitlines(), str(path))


class Constellation:
    """Propagate satellites together; `drag=False` flies old elements on: the orbits keep their shape and never decay.

    mean_altitude_km: (satellites,) of the mean orbit.
    """

    def __init__(self, elements: list[Elements], *, drag: bool = True) -> None:
        self.elements = elements
        self._satellites = [Satrec.twoline2rv(each.first, each.second) for each in elements]
        if not drag:
            self._satellites = [_without_drag(satellite) for satellite in self._satellites]
        self._array = SatrecArray(self._satellites)
        self.mean_altitude_km = np.array([satellite.a - 1.0 for satellite in self._satellites]) * EARTH_RADIUS_KM

    def propagate(self, time_us: Int64s) -> tuple[Floats, Floats]:
        """Return positions (km) and velocities (km/s), each (satellites, times, 3) in TEME.

        time_us: (times,) microseconds since 1970 UTC. Raises ElementsError where elements do not reach that far.
        """
        errors, position, velocity = self._array.sgp4(*julian(time_us))
        if errors.any():
            satellite, moment = (int(index[0]) for index in np.nonzero(errors))
            reason = SGP4_ERRORS.get(int(errors[satellite, moment]), "unknown error")
            raise ElementsError(
                f"the elements of {self.elements[satellite].name} do not reach "
                f"{np.datetime64(int(time_us[moment]), 'us').astype('datetime64[s]')}: {reason}; use newer ones"
            )
        return position, velocity


class Ephemeris:
    """Give positions at whole steps of STEP_US since 1970, made a page of steps at a time, the last pages kept."""

    def __init__(self, constellation: Constellation) -> None:
        self._constellation = constellation
        self._pages: dict[int, tuple[Nodes, Nodes]] = {}

    def between(self, first: int, last: int) -> tuple[int, Nodes, Nodes]:
        """Return the step of the first column, positions (km) and velocities (km/s), (3, satellites, steps), TEME."""
        numbers = range(first // PAGE, (last - 1) // PAGE + 1)
        pages = [self._page(number) for number in numbers]
        return numbers[0] * PAGE, np.concatenate([p for p, _ in pages], 2), np.concatenate([v for _, v in pages], 2)

    def _page(self, number: int) -> tuple[Nodes, Nodes]:
        page = self._pages.pop(number, None)
        if page is None:
            steps = np.arange(number * PAGE, (number + 1) * PAGE, dtype=np.int64)
            position, velocity = (np.moveaxis(each, 2, 0) for each in self._constellation.propagate(steps * STEP_US))
            page = position.astype(np.float32), velocity.astype(np.float32)
        self._pages[number] = page
        while len(self._pages) > PAGES_KEPT:
            del self._pages[next(iter(self._pages))]
        return page


def _without_drag(satellite: Satrec) -> Satrec:
    """Return the same orbit with its drag term zero."""
    still = Satrec()
    epoch = satellite.jdsatepoch + satellite.jdsatepochF - 2_433_281.5
    still.sgp4init(
        WGS72, "i", satellite.satnum, epoch, 0.0, 0.0, 0.0, satellite.ecco, satellite.argpo, satellite.inclo,
        satellite.mo, satellite.no_kozai, satellite.nodeo,
    )  # fmt: skip
    return still


def julian(time_us: Int64s) -> tuple[Floats, Floats]:
    """Return Julian dates as day and fraction of a day, apart: together they would be exact to 40 us only."""
    day = time_us // DAY_US
    return day.astype(np.float64) + JULIAN_1970, (time_us - day * DAY_US) / DAY_US


def sidereal_angle(time_us: Int64s) -> Floats:
    """Return the Greenwich mean sidereal angle (IAU 1982) in radians, UT1 taken as UTC."""
    day, fraction = julian(time_us)
    days = (day - JULIAN_2000) + fraction
    century = days / 36_525.0
    seconds = 67_310.54841 + (876_600.0 * 3_600.0 + 8_640_184.812866) * century
    seconds += 0.093104 * century**2 - 6.2e-6 * century**3
    return np.asarray(np.remainder(seconds / 240.0 * (np.pi / 180.0), 2.0 * np.pi))


def turn(vectors: Floats, angle: Floats) -> Floats:
    """Turn vectors (..., 3) about the Earth's axis, eastward by `angle` (radians), which broadcasts over (...)."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y, z = np.moveaxis(vectors, -1, 0)
    return np.stack([x * cos - y * sin, x * sin + y * cos, np.broadcast_to(z, np.shape(x * cos))], axis=-1)


def earth_fixed(position: Floats, time_us: Int64s) -> Floats:
    """Return Earth-fixed vectors of TEME vectors (..., times, 3)."""
    return turn(position, -sidereal_angle(time_us))


def geodetic(position: Floats) -> tuple[Floats, Floats, Floats]:
    """Return latitude and longitude (degrees) and altitude (km) on WGS 84 of Earth-fixed positions (..., 3) in km.

    Bowring's formula, without a trigonometric function before the last step: exact to a millimetre in low orbits, to
    five centimetres in geostationary ones.
    """
    x, y, z = np.moveaxis(position, -1, 0)
    square = FLATTENING * (2.0 - FLATTENING)
    polar = EARTH_RADIUS_KM * (1.0 - FLATTENING)
    around = np.sqrt(x * x + y * y)
    opposite, adjacent = EARTH_RADIUS_KM * z, polar * around
    scale = 1.0 / np.sqrt(opposite * opposite + adjacent * adjacent)
    north = z + square / (1.0 - square) * polar * (opposite * scale) ** 3
    outward = around - square * EARTH_RADIUS_KM * (adjacent * scale) ** 3
    scale = 1.0 / np.sqrt(north * north + outward * outward)
    sin, cos = north * scale, outward * scale
    # Along the normal, in a form that neither pole nor equator divides by zero.
    altitude = around * cos + z * sin - EARTH_RADIUS_KM * np.sqrt(1.0 - square * sin * sin)
    return np.degrees(np.arctan2(north, outward)), np.degrees(np.arctan2(y, x)), altitude


def surface_point(latitude: float, longitude: float) -> Floats:
    """Return the Earth-fixed position (3,) in km of a place at sea level, given in degrees."""
    phi, lam = np.radians(latitude), np.radians(longitude)
    square = FLATTENING * (2.0 - FLATTENING)
    normal = EARTH_RADIUS_KM / np.sqrt(1.0 - square * np.sin(phi) ** 2)
    flat = normal * np.cos(phi)
    return np.array([flat * np.cos(lam), flat * np.sin(lam), normal * (1.0 - square) * np.sin(phi)])


def sun_direction(time_us: Int64s) -> Floats:
    """Return unit vectors (times, 3) to the sun, in TEME: the Astronomical Almanac's short series, good to 0.02 deg."""
    day, fraction = julian(time_us)
    days = (day - JULIAN_2000) + fraction
    mean = np.radians(357.528 + 0.9856003 * days)
    longitude = np.radians(280.460 + 0.9856474 * days + 1.915 * np.sin(mean) + 0.020 * np.sin(2.0 * mean))
    tilt = np.radians(23.439 - 4e-7 * days)
    return np.stack([np.cos(longitude), np.cos(tilt) * np.sin(longitude), np.sin(tilt) * np.sin(longitude)], axis=-1)
