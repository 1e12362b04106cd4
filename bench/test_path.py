"""What each stage between decoding and the table costs, by pytest-benchmark: `make bench`.

A round handles POINTS points; divide by them for the cost of one.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from engine import copy_format, migrate, rig, ring, rows, settings
from engine.channels import CHANNELS
from engine.consumer import Consumer
from engine.producer import Producer
from engine.ring import Lane
from engine.rows import Columns

pytestmark = pytest.mark.benchmark
POINTS = 1_000
COPIED = 10_000
FAR = 1 << 40


def columns(count: int, start: int = 0) -> Columns:
    """Return readings of the required channels as the decoder hands them on."""
    dice = np.random.default_rng(start)
    index = np.arange(start, start + count)
    required = [channel.name for channel in CHANNELS if channel.required]
    return Columns(
        time=time.time_ns() // 1_000 + index,
        satellite_id=np.array([b"SAT-%05d" % (number % 1_000) for number in index]),
        values={name: dice.uniform(20.0, 90.0, count) for name in required},
        is_anomaly=np.zeros(count, np.bool_),
    )


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[Lane]:
    ring.create(tmp_path / "lane", 16 << 20, b"layout", ring.boot_id())
    lane = Lane(tmp_path / "lane")
    yield lane
    lane.close()


def test_ring_publish_and_read(benchmark: Any, lane: Lane) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    payload = rows.pack(columns(POINTS))

    def lap() -> int:
        producer.publish(payload, POINTS, 1)
        (record,) = consumer.read(lane.tail, FAR, FAR)
        end = record.end
        record.payload.release()
        consumer.free(end, lane.settled_points + POINTS)
        return end

    assert benchmark(lap) > 0


def test_sort_for_copy(benchmark: Any) -> None:
    points = columns(COPIED)
    assert len(benchmark(lambda: rows.take(points, copy_format.order(points)))) == COPIED


def test_copy_encoding(benchmark: Any) -> None:
    points = columns(COPIED)
    received = np.full(COPIED, points.time[0])
    assert len(benchmark(copy_format.encode, points, received)) > 50 * COPIED


@pytest.fixture(scope="module")
def database() -> Iterator[psycopg.Connection[Any]]:
    home = rig.private_folder(Path("/tmp"), "orbitstream-bench")
    try:
        with rig.private_database(home, lambda message: None) as server:
            migrate.migrate(settings.load({}), server.dsn, lambda message: None)
            with psycopg.connect(server.dsn, autocommit=True) as connection:
                yield connection
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_copy(benchmark: Any, database: psycopg.Connection[Any]) -> None:
    bodies = []
    for number in range(20):
        points = columns(COPIED, number * COPIED)
        points = rows.take(points, copy_format.order(points))
        bodies.append(copy_format.encode(points, np.full(COPIED, points.time[0])))
    names = ", ".join(copy_format.column_names(columns(1)))
    turns = itertools.cycle(bodies)

    def copy() -> None:
        with database.transaction(), database.cursor() as cursor:
            statement = f"COPY telemetry ({names}) FROM STDIN (FORMAT BINARY)"
            with cursor.copy(statement.encode()) as stream:
                stream.write(next(turns))

    benchmark.pedantic(copy, rounds=20, warmup_rounds=1)
    row = database.execute("SELECT count(*) FROM telemetry").fetchone()
    assert row is not None and row[0] == COPIED * 21
