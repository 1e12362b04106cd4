"""The ring: laws of publish, read and free, and what a kill between two stores leaves."""

from __future__ import annotations

import math
import os
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ring
from engine.consumer import Consumer, SealedConsumer
from engine.producer import Producer
from engine.ring import (
    HEADER_BYTES,
    RECORD_HEADER,
    Lane,
    LaneCorruptError,
    LaneError,
    LaneFullError,
    RecordTooLargeError,
)

CAPACITY = ring.MIN_CAPACITY
LIMIT = 1 << 40


@pytest.fixture
def lane(lane_dir: Path) -> Lane:
    ring.create(lane_dir / "lane", CAPACITY, b"layout", ring.boot_id())
    return Lane(lane_dir / "lane")


def payloads(consumer: Consumer, position: int | None = None) -> list[bytes]:
    start = consumer.lane.tail if position is None else position
    return [bytes(record.payload) for record in consumer.read(start, LIMIT, LIMIT)]


def drain(consumer: Consumer) -> list[bytes]:
    records = consumer.read(consumer.lane.tail, LIMIT, LIMIT)
    found = [bytes(record.payload) for record in records]
    if records:
        consumer.free(records[-1].end, consumer.lane.settled_points + sum(record.points for record in records))
    return found


def test_what_is_published_is_read_in_order_and_once(lane: Lane) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    producer.publish([b"12345678", b"abcdefgh"], 2, 1_000)
    producer.publish([b"second__"], 1, 2_000)
    first, second = consumer.read(lane.tail, LIMIT, LIMIT)
    assert (bytes(first.payload), first.points, first.time_us) == (b"12345678abcdefgh", 2, 1_000)
    assert (bytes(second.payload), second.points, second.time_us) == (b"second__", 1, 2_000)
    assert lane.published == (3, 2)
    assert lane.queued_points == 3
    consumer.free(second.end, 3)
    assert lane.queued_points == 0
    assert consumer.read(lane.tail, LIMIT, LIMIT) == []


def test_a_key_travels_with_its_record(lane: Lane) -> None:
    Producer(lane).publish([b"payload_"], 1, 0, key=b"0123456789")
    (record,) = Consumer(lane).read(0, LIMIT, LIMIT)
    assert record.key == b"0123456789"
    assert bytes(record.payload) == b"payload_"


def test_a_full_lane_refuses_and_stays_as_it_was(lane: Lane) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    record = b"x" * 4096
    published = 0
    with pytest.raises(LaneFullError):
        while True:
            producer.publish([record], 1, 0)
            published += 1
    before = (lane.head, lane.tail, lane.published)
    with pytest.raises(LaneFullError):
        producer.publish([record], 1, 0)
    assert (lane.head, lane.tail, lane.published) == before
    assert len(drain(consumer)) == published
    producer.publish([record], 1, 0)
    assert drain(consumer) == [record]


def test_retry_after_is_what_draining_takes_not_what_a_lull_took(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("engine.producer.time.monotonic", lambda: now)
    producer, consumer = Producer(lane), Consumer(lane)

    def fill() -> int:
        with pytest.raises(LaneFullError):
            while True:
                producer.publish([bytes(1000)], 1, 0)
        return producer.retry_after()

    producer.publish([bytes(1000)], 1, 0)
    drain(consumer)
    now = 1000.0
    assert fill() == 1, "nothing is known yet: in the lull there was nothing to drain"
    now += 2.0
    assert fill() == 5, "nothing drains"
    drain(consumer)
    now += 2.0
    assert fill() == 1, "it was drained after all, nobody knows how fast"
    tail, freed = lane.tail, consumer.read(lane.tail, 10, LIMIT)[-1].end
    consumer.free(freed, lane.settled_points + 10)
    now += 4.0
    waiting = fill()
    missing = producer.largest_record - (lane.capacity - (lane.head - lane.tail))
    assert waiting == math.ceil(missing / ((freed - tail) / 4.0)) > 1, "ten records in four seconds"


def test_a_record_over_a_quarter_of_the_lane_is_refused(lane: Lane) -> None:
    producer = Producer(lane)
    fits = CAPACITY // 4 - RECORD_HEADER.size
    with pytest.raises(RecordTooLargeError):
        producer.publish([bytes(fits + 1)], 1, 0)
    assert lane.head == 0
    producer.publish([bytes(fits)], 1, 0)


def test_an_empty_lane_takes_the_largest_record_wherever_its_head_is(lane: Lane) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    largest = bytes(CAPACITY // 4 - RECORD_HEADER.size)
    for size in range(0, 16_000, 776):
        producer.publish([bytes(size)], 1, 0)
        producer.publish([largest], 1, 0)
        assert drain(consumer)[-1] == largest


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, CAPACITY // 4 - 32), min_size=1, max_size=200), seed=st.integers(0, 2**32))
def test_any_sequence_of_sizes_and_drains_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    path = tmp_path_factory.mktemp("ring") / "lane"
    ring.create(path, CAPACITY, b"", ring.boot_id())
    lane = Lane(path)
    producer, consumer, rng = Producer(lane), Consumer(lane), random.Random(seed)
    expected: list[bytes] = []
    for number, size in enumerate(sizes):
        body = struct.pack("<Q", number) + rng.randbytes(size // 8 * 8)
        body = body[: CAPACITY // 4 - RECORD_HEADER.size]
        try:
            producer.publish([body], number % 7, number)
            expected.append(body)
        except LaneFullError:
            assert payloads(consumer) == expected
            drain(consumer)
            expected.clear()
        if rng.random() < 0.2:
            assert drain(consumer) == expected
            expected.clear()
    # A new boot finds the same records without trusting head or tail.
    assert payloads(SealedConsumer(lane), lane.tail) == expected
    assert drain(consumer) == expected
    lane.close()
    os.unlink(path)


def test_a_producer_that_died_before_the_head_store_published_nothing(lane: Lane) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    producer.publish([b"first___"], 1, 0)
    head, counters = lane.head, lane.published
    # The state a kill leaves after everything but the last store of the next publish.
    producer.publish([b"second__"], 5, 0)
    lane.words[ring.HEAD] = head
    again = Lane(lane.path)
    assert again.published == counters
    assert payloads(Consumer(again)) == [b"first___"]
    Producer(again).publish([b"third___"], 1, 0)
    assert payloads(consumer) == [b"first___", b"third___"]
    assert again.published == (2, 2)


def test_reading_stops_at_its_bounds_but_gives_one_record(lane: Lane) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    for _ in range(10):
        producer.publish([bytes(80)], 10, 0)
    assert len(consumer.read(0, 25, LIMIT)) == 2
    assert len(consumer.read(0, 1, LIMIT)) == 1
    assert len(consumer.read(0, LIMIT, 1)) == 1


@pytest.mark.parametrize("byte", range(0, 48))
def test_a_flipped_byte_below_head_is_an_alarm_not_a_record(lane: Lane, byte: int) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    producer.publish([b"0123456789abcdef"], 1, 7)
    lane.data[byte] ^= 0x40
    with pytest.raises(LaneCorruptError):
        consumer.read(0, LIMIT, LIMIT)
    assert payloads(SealedConsumer(lane), 0) == []


def test_the_records_before_a_damaged_one_are_read_first(lane: Lane) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    ends = [producer.publish([b"record_%d" % number], 1, 0).end for number in range(3)]
    lane.data[ends[1] + 36] ^= 1
    assert [record.end for record in consumer.read(0, LIMIT, LIMIT)] == ends[:2]
    with pytest.raises(LaneCorruptError):
        consumer.read(ends[1], LIMIT, LIMIT)


def test_a_sealed_lane_is_read_across_a_hole(lane: Lane) -> None:
    producer = Producer(lane)
    ends = [producer.publish([b"record_%d" % number], 1, 0).end for number in range(5)]
    lane.data[ends[1] + 36] ^= 1  # within the third record
    sealed = SealedConsumer(lane)
    assert payloads(sealed, 0) == [b"record_0", b"record_1", b"record_3", b"record_4"]
    assert sealed.holes(0)
    assert not sealed.holes(ends[2])
    assert payloads(sealed, ends[3]) == [b"record_4"]


def test_bytes_of_an_earlier_lap_are_not_records(lane: Lane) -> None:
    producer, consumer = Producer(lane), Consumer(lane)
    for number in range(40):
        producer.publish([bytes(4000)], 1, number)
        if number < 39:
            drain(consumer)
    tail = lane.tail
    assert len(payloads(SealedConsumer(lane), tail)) == 1


@pytest.mark.parametrize("damage", ["empty", "short", "magic", "version", "crc"])
def test_a_file_that_is_no_lane_is_refused_with_its_name(lane_dir: Path, damage: str) -> None:
    path = lane_dir / "lane"
    ring.create(path, CAPACITY, b"layout", ring.boot_id())
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content = bytearray()
    elif damage == "short":
        content = content[: HEADER_BYTES + 100]
    else:
        content[{"magic": 0, "version": 8, "crc": 20}[damage]] ^= 1
    path.write_bytes(content)
    with pytest.raises(LaneError, match=str(path)):
        Lane(path)


def test_a_lane_is_made_whole_or_not_at_all(lane_dir: Path) -> None:
    ring.create(lane_dir / "lane", CAPACITY, b"", ring.boot_id())
    with pytest.raises(FileExistsError):
        ring.create(lane_dir / "lane", CAPACITY, b"", ring.boot_id())
    with pytest.raises(OSError, match="No space left"):
        ring.create(lane_dir / "huge", 1 << 50, b"", ring.boot_id())
    assert [path.name for path in lane_dir.iterdir()] == ["lane"]
