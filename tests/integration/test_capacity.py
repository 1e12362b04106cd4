"""`orbitstream capacity`: a result that holds together, stored where it should be, and no trace elsewhere."""

from __future__ import annotations

import argparse
import json
import random

import psycopg
import pytest

from engine.rig import RigError
from engine.trial import Bench, Look, Overload, Trial, find_knee, steady
from tests.service import Service


class Machine(Bench):
    """A service that takes 0.7 of what COPY does, or 5 % more or less, and stumbles in every eighth trial, on a machine
    that gets slower and slower: COPY is slower by 5 % each time that it is measured."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.copy = 200_000.0

    def ceiling(self) -> float:
        self.copy *= 0.95
        return self.copy

    def trial(self, rate: float) -> Trial:
        keeps_up = rate <= 0.7 * self.copy * self.dice.gauss(1.0, 0.05) and self.dice.random() > 1 / 8
        return Trial(rate, rate, rate, 20.0, 80.0 if keeps_up else 3_000.0, 0, 0.0, 0.0, {}, self.copy)


def test_the_share_of_copy_at_the_knee_is_found_on_a_machine_that_stumbles_and_slows_down() -> None:
    options = argparse.Namespace(bound=500.0, trials=10)
    found = []
    for seed in range(200):
        machine = Machine(seed)
        knee, trials = find_knee(machine, machine.trial(machine.dice.uniform(1e5, 2e5)), options, machine.ceiling)
        assert knee.passes(options.bound) and knee in trials
        found.append(knee.share)
    found.sort()
    assert 0.66 < found[100] < 0.73 and 0.6 < found[20] < found[180] < 0.77, (found[20], found[180])


def test_an_overload_is_judged_while_it_lasts() -> None:
    def look(now: float) -> Look:  # from 1 s to 9 s 1,000 points/s, of which 400 drain; the lane has room for 3,600
        accepted = 1000.0 * min(max(now - 1, 0), 8)
        settled = 400.0 * max(now - 1, 0) if now < 9 else 3200 + 4000 * (now - 9)
        return Look(now, int(accepted), int(settled), (accepted - settled) / 3600, 0 if now < 7 else 1)

    over = steady([look(index / 20) for index in range(200)])
    assert abs(over.arriving - 1000) < 1 and abs(over.draining - 400) < 1
    assert over.seconds_until_full is not None and abs(over.seconds_until_full - 6) < 0.01
    assert Overload(1000.0, 1000.0, 0.0).seconds_until_full is None
    with pytest.raises(RigError, match="too short"):
        steady([look(0.0), look(0.5), look(1.5)])


def test_capacity_is_measured_beside_the_data_and_stored(service: Service) -> None:
    early = service.run("capacity")
    assert early.returncode == 1 and "orbitstream migrate" in early.stderr and early.stderr.count("\n") == 1
    none = service.run("capacity", "--trials", "0")
    assert none.returncode == 2 and "argument --trials: 0 is not above 0" in none.stderr
    assert service.run("migrate").returncode == 0
    left, used = "orbitstream_scratch_00000000", "orbitstream_scratch_ffffffff"  # by a killed run; of a running one
    with psycopg.connect(service.database, autocommit=True, application_name=used) as running:
        for name in (left, used):
            running.execute(f"CREATE DATABASE {name}".encode())
        done = service.run(
            "capacity", "--json", "--seconds", "0.5", "--trials", "1", "--satellites", "100", "--bound", "5000",
            ORBITSTREAM_DURABILITY="disk", ORBITSTREAM_MAX_POINTS="10",  # of the user's own service, not of this one
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        query = b"SELECT datname FROM pg_database WHERE starts_with(datname, 'orbitstream_scratch')"
        assert running.execute(query).fetchall() == [(used,)]
        running.execute(f"DROP DATABASE {used}".encode())
    result = json.loads(done.stdout)
    assert 0 < result["knee_to_copy"] <= 1.5 * result["committed_at_saturation_to_copy"]
    assert result["arriving_at_twice_the_knee"] > 0
    assert result["copy_points_per_second"] > 0 and result["lane_points"] > 500_000
    assert all(result["cpu_us_per_point"][stage] > 0 for stage in ("edge", "writer", "database", "simulator"))
    assert result["predicted"]["4"]["points_per_second"] > 3 * result["predicted"]["1"]["points_per_second"]
    assert any(trial["offered"] == result["knee_points_per_second"] for trial in result["trials"])
    ((knee, report),) = service.query("SELECT knee_points_per_second, report FROM capacity")
    assert knee == result["knee_points_per_second"] and report == result
    assert service.count() == 0, "the load went into the database that serves"
    assert list(service.lane_dir.glob("lane-*")) == []
