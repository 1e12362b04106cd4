"""Power loss: a lane file of which the disk holds a mix of old and new pages, and a machine that booted anew."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine import ring
from engine.consumer import SealedConsumer
from engine.producer import Producer
from engine.ring import HEADER_BYTES, Lane, LaneFullError
from tests.long_run import LONG, SEED, report

PAGE = 4096
IMAGES = 4000 if LONG else 400  # of each of the five seeds


def snapshot(lane: Lane) -> bytes:
    return lane.path.read_bytes()


def torn(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """Return a file whose pages are each from before or after: the file system writes back what it likes."""
    pages = range(0, len(new), PAGE)
    return b"".join((new if rng.random() < 0.5 else old)[page : page + PAGE] for page in pages)


@pytest.mark.parametrize("seed", range(5))
def test_what_was_synced_survives_and_nothing_is_invented_or_doubled(lane_dir: Path, seed: int) -> None:
    """In `disk` mode each record that was answered is found again from the ledger's position on, in every image."""
    rng = random.Random(SEED + seed)
    ring.create(lane_dir / "lane", ring.MIN_CAPACITY, b"", ring.boot_id())
    lane = Lane(lane_dir / "lane")
    producer = Producer(lane, durable=True)
    published: dict[int, bytes] = {}  # by end
    ledger = 0
    for _ in range(IMAGES):
        synced = snapshot(lane)
        answered = dict(published)
        # What the kernel may or may not have written when the power goes: a few records more, and a drain.
        for _ in range(rng.randrange(4)):
            body = rng.randbytes(rng.randrange(0, 9000, 8))
            try:
                end = producer._publish([body], 1, 0, b"")
            except LaneFullError:
                break
            published[end] = body
        if rng.random() < 0.6 and published:
            ledger = rng.choice([end for end in published if end >= ledger] or [ledger])
            lane.words[ring.TAIL] = ledger
            published = {end: body for end, body in published.items() if end > ledger}
        image = lane_dir / "image"
        image.write_bytes(torn(synced, snapshot(lane), rng))
        after = Lane(image)
        found = {record.end: bytes(record.payload) for record in SealedConsumer(after).read(ledger, 1 << 40, 1 << 40)}
        for end, body in answered.items():
            if end > ledger:
                assert found.get(end) == body, "a record that was on the disk is lost"
        for end, body in found.items():
            assert published.get(end) == body, "a record that nobody published, or that is settled"
        after.close()
    report("power loss", images=IMAGES)


def test_each_truncation_and_flipped_byte_of_the_last_record_keeps_the_prefix(lane_dir: Path, tmp_path: Path) -> None:
    ring.create(lane_dir / "lane", ring.MIN_CAPACITY, b"", bytes(16))
    lane = Lane(lane_dir / "lane")
    producer = Producer(lane)
    ends = [producer.publish([b"payload%d" % number * 3], 1, number).end for number in range(4)]
    whole = snapshot(lane)
    expected = [b"payload%d" % number * 3 for number in range(3)]
    for byte in range(ends[2], ends[3]):
        for damaged in (
            whole[: HEADER_BYTES + byte] + bytes(len(whole) - HEADER_BYTES - byte),
            whole[: HEADER_BYTES + byte]
            + bytes([whole[HEADER_BYTES + byte] ^ 0xFF])
            + whole[HEADER_BYTES + byte + 1 :],
        ):
            path = tmp_path / "lane"
            path.write_bytes(damaged)
            torn_lane = Lane(path)
            consumer = SealedConsumer(torn_lane)
            found = [bytes(record.payload)[:24] for record in consumer.read(0, 1 << 40, 1 << 40)]
            if damaged != whole:
                assert found == expected, byte
                assert consumer.holes(0)
            torn_lane.close()
    report("torn last record", images=2 * (ends[3] - ends[2]))


def test_a_failed_sync_stops_the_lane_and_is_not_repeated(lane_dir: Path) -> None:
    import os

    ring.create(lane_dir / "lane", ring.MIN_CAPACITY, b"", ring.boot_id())
    lane = Lane(lane_dir / "lane")
    producer = Producer(lane, durable=True)
    producer.publish([b"on disk_"], 1, 0).sync()
    assert lane.synced == lane.head
    good, lane.fd = lane.fd, os.open("/dev/null", os.O_WRONLY)  # a descriptor that cannot be synced
    unknown = producer.publish([b"unknown_"], 1, 0)
    with pytest.raises(OSError, match="Invalid argument"):
        unknown.sync()
    os.close(lane.fd)
    lane.fd = good
    with pytest.raises(OSError, match="an earlier fdatasync"):
        unknown.sync()
    with pytest.raises(ring.LaneFailedError):
        producer.publish([b"refused_"], 1, 0)
    assert lane.synced < lane.head


def test_a_durable_producer_does_not_adopt_what_is_not_on_the_disk(lane_dir: Path) -> None:
    from engine import lanes

    first, lock = lanes.claim_producer(lane_dir, ring.MIN_CAPACITY, b"", durable=False)
    first.publish([b"not sync"], 1, 0)
    lock.release()
    second, lock = lanes.claim_producer(lane_dir, ring.MIN_CAPACITY, b"", durable=True)
    assert second.lane.path != first.lane.path
    assert first.lane.closed
    second.publish([b"synced__"], 1, 0).sync()
    lock.release()
    third, lock = lanes.claim_producer(lane_dir, ring.MIN_CAPACITY, b"", durable=True)
    assert third.lane.path == second.lane.path
    lock.release()
