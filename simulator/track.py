"""What a satellite's orbit does to it: sunlight, shadow and ground passes, and from them each channel's calm course.

The course is worked out at nodes STEP_US apart and read between them by straight lines (positions: by cubics). Nodes of
a chunk of satellites are made a window at a time:

    warm-up (WARM_UP steps)        window (STEPS steps), kept
    |------------------------------|------------------|
                                   start              start + WINDOW_US

Invariant: a course is a pure function of seed, satellite and time. Given that, no window may depend on the one before:
each starts from a full battery and a half-full recorder WARM_UP steps earlier, two low orbits, after which a battery
has been full again and a recorder emptied or full, so that neither remembers where it began. Chunks begin their windows
at different times, or 100,000 satellites would all need new nodes at one moment.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from simulator import orbits
from simulator.anomalies import Disturbance
from simulator.orbits import STEP_US, Constellation, Ephemeris, Floats, Int64s, Nodes
from simulator.traits import Traits

STEP_S: Final = STEP_US / 1e6
STEPS: Final = 60
WINDOW_US: Final = STEPS * STEP_US
WARM_UP: Final = 90
CHUNK: Final = 512
"""Satellites whose nodes are made together: under 10 ms of work, the longest that a schedule is held up by it."""
SHIFTS: Final = 48
"""Satellites beyond the number of elements fly the same orbits, up to so many steps (96 min) ahead."""

STATIONS: Final = np.array(
    [
        orbits.surface_point(latitude, longitude)
        for latitude, longitude in (
            (78.23, 15.39),  # Svalbard
            (64.86, -147.85),  # Fairbanks
            (-72.01, 2.53),  # Troll
            (-52.94, -70.85),  # Punta Arenas
            (19.01, -155.66),  # South Point, Hawaii
            (-25.89, 27.69),  # Hartebeesthoek
            (-29.05, 115.35),  # Dongara
        )
    ]
)
LOWEST_SINE: Final = 0.09
"""A station hears a satellite 5 degrees above its horizon, well from 8 degrees on."""
WELL_SINE: Final = 0.05
PENUMBRA_KM: Final = 60.0

# The columns of a node. Hundredths of %, MB and dBm; whether an episode touches the step from here to the next node;
# hundredths of km/h, degrees Celsius and V; Earth-fixed position in km and its change in km/s.
BATTERY, STORAGE, SIGNAL, EPISODE, SPEED, TEMPERATURE, VOLTAGE, PLACE, MOTION = 0, 1, 2, 3, 4, 5, 6, 7, 10
REQUIRED_COLUMNS: Final = 4
ALL_COLUMNS: Final = 13


class Track:
    """Follow the satellites of `traits` over `constellation`; positions: also where they are.

    Satellite i flies the orbit of elements i modulo their number; the first round of the fleet flies them as they are,
    each further one turned about the Earth's axis and ahead on its orbit.
    """

    def __init__(
        self, constellation: Constellation, traits: Traits, disturbance: Disturbance, *, positions: bool
    ) -> None:
        self._traits = traits
        self._disturbance = disturbance
        self._count = traits.count
        self._ephemeris = Ephemeris(constellation)
        satellites = np.arange(traits.first, traits.first + traits.count)
        known = len(constellation.elements)
        self._orbit = satellites % known
        copies = satellites >= known
        self._turn = np.where(copies, traits.draw(30, 0.0, 2.0 * np.pi), 0.0).astype(np.float32)
        self._ahead = np.where(copies, traits.draw(31, 0.0, SHIFTS), 0.0).astype(np.int64)
        self._reference_km = np.maximum(constellation.mean_altitude_km, 200.0)[self._orbit].astype(np.float32)
        self._chunk = satellites // CHUNK
        # Chunk numbers are those of the whole fleet, so that the split into processes changes no window.
        self.offset_us = (self._chunk * 7_919 % STEPS) * STEP_US
        self._start_us = np.full(traits.count, -(2**62), dtype=np.int64)
        columns = ALL_COLUMNS if positions else REQUIRED_COLUMNS
        self._nodes = np.zeros(((STEPS + 1) * traits.count, columns), dtype=np.float32)

    def read(self, local: Int64s, time_us: Int64s) -> tuple[Nodes, Floats | None]:
        """Return the calm course at n points, (n, columns), and the places (n, 3), None without positions.

        Points are given by satellite, counted from the first, and microseconds since 1970. Raises ElementsError.
        """
        within = time_us - self._start_us[local]
        if within.min() >= 0 and within.max() < WINDOW_US:
            return self._read(local, within)
        course = np.empty((len(local), self._nodes.shape[1]), dtype=np.float32)
        places = np.empty((len(local), 3)) if self._nodes.shape[1] == ALL_COLUMNS else None
        left = np.arange(len(local))
        # Points of one satellite may lie more than a window apart: one window after the other then.
        while len(left):
            self._make_missing(local[left], time_us[left])
            within = time_us[left] - self._start_us[local[left]]
            ready = (within >= 0) & (within < WINDOW_US)
            now = left[ready]
            course[now], where = self._read(local[now], within[ready])
            if places is not None:
                places[now] = where
            left = left[~ready]
        return course, places

    def _read(self, local: Int64s, within: Int64s) -> tuple[Nodes, Floats | None]:
        steps = within * (1.0 / STEP_US)
        whole = steps.astype(np.int64)
        share = (steps - whole).astype(np.float32)
        whole *= self._count
        whole += local
        here = np.take(self._nodes, whole, axis=0)
        whole += self._count
        there = np.take(self._nodes, whole, axis=0)
        places = _between(here, there, share.astype(np.float64)) if here.shape[1] == ALL_COLUMNS else None
        episode = here[:, EPISODE].copy()
        there -= here
        there *= share[:, None]
        there += here
        there[:, EPISODE] = episode
        return there, places

    def _make_missing(self, local: Int64s, time_us: Int64s) -> None:
        """Make the window of the first point of each chunk that lacks its nodes."""
        within = time_us - self._start_us[local]
        missing = np.flatnonzero((within < 0) | (within >= WINDOW_US))
        chunks, firsts = np.unique(self._chunk[local[missing]], return_index=True)
        for chunk, index in zip(chunks, missing[firsts], strict=True):
            offset = self.offset_us[local[index]]
            self._make(int(chunk), int((time_us[index] - offset) // WINDOW_US * WINDOW_US + offset))

    def _make(self, chunk: int, start_us: int) -> None:
        """Fill the window of a chunk that starts at `start_us`, a whole step since 1970."""
        rows = np.flatnonzero(self._chunk == chunk)
        mine = slice(int(rows[0]), int(rows[-1]) + 1)
        first = start_us // STEP_US - WARM_UP
        steps = np.arange(first, first + WARM_UP + STEPS + 1, dtype=np.int64)
        base, position, velocity = self._ephemeris.between(first, int(steps[-1]) + 1 + SHIFTS)
        # Steps run along the first axis from here on, so that each step's satellites lie side by side.
        columns = (steps - base)[:, None] + self._ahead[None, mine]
        orbit = self._orbit[None, mine]
        where = turned(position[:, orbit, columns], self._turn[mine])
        lit = sunlit(where, steps * STEP_US)
        heard, range_km = hearing(where, steps * STEP_US)
        nodes = self._nodes.reshape(STEPS + 1, self._count, -1)[:, mine]
        charge, load = self._charge_and_load(mine, lit, heard)
        nodes[..., BATTERY] = charge * self._traits.battery_full[mine]
        nodes[..., STORAGE] = load
        nodes[..., SIGNAL] = self._signal(mine, heard[WARM_UP:], range_km[WARM_UP:])
        nodes[:-1, :, EPISODE] = self._disturbance.steps_touched(mine, start_us - self.offset_us[mine], STEPS, STEP_US)
        if nodes.shape[-1] == ALL_COLUMNS:
            motion = turned(velocity[:, orbit, columns], self._turn[mine])
            self._fill_optional(mine, nodes, charge, lit, where, motion, steps)
        self._start_us[mine] = start_us

    def _charge_and_load(self, mine: slice, lit: Nodes, heard: Nodes) -> tuple[Nodes, Nodes]:
        """Return the battery's charge (0 to 1) and the recorder's load (hundredths of MB) at the window's nodes.

        The charge falls in shadow and rises in sunlight; instruments fill the recorder, a ground pass empties it.
        """
        t = self._traits
        satellites = lit.shape[1]
        low = np.array([np.full(satellites, 0.3), t.storage_low[mine]], dtype=np.float32)
        high = np.array([np.ones(satellites), t.storage_high[mine]], dtype=np.float32)
        change = np.empty((len(lit) - 1, 2, satellites), dtype=np.float32)
        gain, drain = t.battery_gain[mine] * STEP_S, t.battery_drain[mine] * STEP_S
        change[:, 0] = 0.5 * (lit[:-1] + lit[1:]) * (gain + drain).astype(np.float32) - drain.astype(np.float32)
        fill, empty = t.storage_fill[mine] * STEP_S, t.storage_drain[mine] * STEP_S
        change[:, 1] = fill.astype(np.float32) - 0.5 * (heard[:-1] + heard[1:]) * empty.astype(np.float32)
        state = np.empty((len(lit), 2, satellites), dtype=np.float32)
        state[0] = high
        state[0, 1] = 0.5 * (low[1] + high[1])
        for step in range(len(change)):
            after = state[step + 1]
            np.add(state[step], change[step], out=after)
            np.maximum(after, low, out=after)
            np.minimum(after, high, out=after)
        return state[WARM_UP:, 0], state[WARM_UP:, 1]

    def _signal(self, mine: slice, heard: Nodes, range_km: Nodes) -> Nodes:
        """Return the strength: by free-space loss to the nearest station, else that of a relay satellite."""
        loss = 2_000.0 * np.log10(np.maximum(range_km / self._reference_km[mine], 1.0))
        near = self._traits.signal_near[mine].astype(np.float32) - loss
        relay = self._traits.signal_relay[mine].astype(np.float32)
        return np.asarray(relay + heard * (np.maximum(near, relay) - relay), dtype=np.float32)

    def _fill_optional(
        self, mine: slice, nodes: Nodes, charge: Nodes, lit: Nodes, where: Nodes, motion: Nodes, steps: Int64s
    ) -> None:
        """Fill speed, temperature, voltage, place and motion."""
        nodes[..., SPEED] = 360_000.0 * np.sqrt((motion[:, WARM_UP:] ** 2).sum(axis=0))
        heat = np.full(lit.shape, 0.5, dtype=np.float32)
        for step in range(1, len(heat)):
            heat[step] = heat[step - 1] + np.float32(0.1) * (lit[step] - heat[step - 1])
        cold, warm = self._traits.cold[mine], self._traits.warm[mine]
        nodes[..., TEMPERATURE] = cold + (warm - cold) * heat[WARM_UP:]
        nodes[..., VOLTAGE] = 2_550.0 + 400.0 * charge + 80.0 * lit[WARM_UP:]
        spin = -orbits.sidereal_angle(steps[WARM_UP:] * STEP_US)[:, None]
        place = turned(where[:, WARM_UP:], spin)
        ground = turned(motion[:, WARM_UP:], spin)
        ground[0] += orbits.EARTH_TURN * place[1]
        ground[1] -= orbits.EARTH_TURN * place[0]
        nodes[..., PLACE : PLACE + 3] = np.moveaxis(place, 0, -1)
        nodes[..., MOTION : MOTION + 3] = np.moveaxis(ground, 0, -1)


def _between(here: Nodes, there: Nodes, t: Floats) -> Floats:
    """Return places (n, 3), in km, `t` (0 to 1) of the way between two nodes: the cubic through both places and
    motions. Over two minutes of a low orbit it is within 10 m of the orbit."""
    rest = 1.0 - t
    place, motion = slice(PLACE, PLACE + 3), slice(MOTION, MOTION + 3)
    return np.asarray(
        ((1.0 + 2.0 * t) * rest**2)[:, None] * here[:, place]
        + (t**2 * (3.0 - 2.0 * t))[:, None] * there[:, place]
        + (STEP_S * t * rest**2)[:, None] * here[:, motion]
        - (STEP_S * t**2 * rest)[:, None] * there[:, motion]
    )


def turned(vectors: Nodes, angle: npt.ArrayLike) -> Nodes:
    """Turn vectors (3, ...) eastward about the Earth's axis by `angle` (radians), which broadcasts over (...)."""
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return np.stack([vectors[0] * cos - vectors[1] * sin, vectors[0] * sin + vectors[1] * cos, vectors[2]])


def sunlit(position: Nodes, time_us: Int64s) -> Nodes:
    """Return how much of the sun positions (3, times, satellites) in TEME see, 0 to 1: (times, satellites).

    The Earth's shadow is a cylinder with a soft edge.
    """
    sun = orbits.sun_direction(time_us).astype(np.float32)
    along = sum(position[axis] * sun[:, axis, None] for axis in range(3))
    square = sum(position[axis] ** 2 for axis in range(3))
    off_axis = np.sqrt(np.maximum(square - along**2, np.float32(0.0)))
    edge = np.clip((off_axis - orbits.EARTH_RADIUS_KM) * (1.0 / PENUMBRA_KM) + 0.5, 0.0, 1.0)
    return np.where(along > 0.0, np.float32(1.0), edge)


def hearing(position: Nodes, time_us: Int64s) -> tuple[Nodes, Nodes]:
    """Return how well the best ground station hears positions (3, times, satellites) in TEME, 0 to 1, and the range
    to the nearest in km: each (times, satellites)."""
    angle = orbits.sidereal_angle(time_us)[None, :]
    stations = orbits.turn(STATIONS[:, None, :], angle).astype(np.float32)
    square = sum(position[axis] ** 2 for axis in range(3))
    best = np.zeros(position.shape[1:], dtype=np.float32)
    nearest = np.full(position.shape[1:], np.inf, dtype=np.float32)
    for station in stations:
        radius = np.linalg.norm(station[0])
        up = (station / radius).astype(np.float32)
        height = sum(position[axis] * up[:, axis, None] for axis in range(3)) - radius
        range_km = np.sqrt(square - (radius * radius) - (2.0 * radius) * height)
        np.minimum(nearest, range_km, out=nearest)
        well = (height / range_km - np.float32(LOWEST_SINE)) * np.float32(1.0 / WELL_SINE)
        np.maximum(best, well, out=best)
    return np.minimum(best, np.float32(1.0)), nearest
