"""The lane directory: who may take which end of which lane."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import lanes, ring, rows
from engine.consumer import SealedConsumer
from engine.lanes import LaneDirError, claim_consumer, claim_producer, lane_files, retire
from engine.producer import Producer
from tests.service import eventually

LAYOUT = rows.layout()
CAPACITY = ring.MIN_CAPACITY


def test_two_producers_get_two_lanes_and_a_freed_one_is_taken_again(lane_dir: Path) -> None:
    first, first_lock = claim_producer(lane_dir, CAPACITY, LAYOUT)
    second, second_lock = claim_producer(lane_dir, CAPACITY, LAYOUT)
    assert first.lane.path != second.lane.path
    first.publish([b"kept____"], 1, 0)
    first_lock.release()
    again, again_lock = claim_producer(lane_dir, CAPACITY, LAYOUT)
    assert again.lane.path == first.lane.path
    assert again.lane.queued_points == 1
    assert len(lane_files(lane_dir)) == 2
    again_lock.release()
    second_lock.release()


def test_a_lock_is_free_once_its_holder_was_killed(lane_dir: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, sys; from pathlib import Path; from engine.lanes import claim_producer;"
            f"claim = claim_producer(Path(sys.argv[1]), {CAPACITY}, {LAYOUT!r}); print(flush=True); signal.pause()",
            str(lane_dir),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with holder.stdout:
        path = lane_files(lane_dir)[0]
        lock = lanes.Lock(path.with_suffix(".producer"))
        assert not lock.acquire()
        assert lock.holder() == str(holder.pid)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    eventually(lock.acquire, 5)
    lock.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
def test_root_resumes_a_lane_for_the_owner_of_the_folder(lane_dir: Path) -> None:
    service = pwd.getpwnam("nobody")
    producer, producer_lock = claim_producer(lane_dir, CAPACITY, LAYOUT)
    archive = lane_dir / lanes.ARCHIVE
    archive.mkdir()
    archived = archive / f"{producer.lane.uuid}.ring"
    producer.lane.path.rename(archived)
    producer_lock.release()
    for path in [lane_dir, archive, archived]:
        os.chown(path, service.pw_uid, service.pw_gid)
    for left in lane_dir.glob("lane-*"):
        left.unlink()
    brought = lanes.bring_back(archived)
    claimed = claim_consumer(brought)
    assert claimed is not None
    claimed[1].release()
    made = sorted(path.name for path in lane_dir.glob("lane-*"))
    assert made == ["lane-0000.consumer", "lane-0000.producer", "lane-0000.ring"]
    assert {(lane_dir / name).stat().st_uid for name in made} == {service.pw_uid}, "the service could not open it"


def test_a_lock_follows_no_link(lane_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("kept")
    (lane_dir / "lane-0000.consumer").symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        lanes.Lock(lane_dir / "lane-0000.consumer").acquire()
    assert other.read_text() == "kept"


def test_only_one_consumer(lane_dir: Path) -> None:
    _, producer_lock = claim_producer(lane_dir, CAPACITY, LAYOUT)
    path = lane_files(lane_dir)[0]
    claimed = claim_consumer(path)
    assert claimed is not None
    assert claim_consumer(path) is None
    claimed[1].release()
    assert claim_consumer(path) is not None
    producer_lock.release()


def test_a_lane_of_an_earlier_boot_is_sealed_and_archived(lane_dir: Path) -> None:
    path = lane_dir / "lane-0000.ring"
    ring.create(path, CAPACITY, LAYOUT, bytes(16))
    Producer(ring.Lane(path)).publish([b"old_____"], 1, 0)
    producer, lock = claim_producer(lane_dir, CAPACITY, LAYOUT)
    assert producer.lane.path.name == "lane-0001.ring"
    claimed = claim_consumer(path)
    assert claimed is not None
    consumer, _ = claimed
    assert isinstance(consumer, SealedConsumer)
    assert [bytes(record.payload) for record in consumer.read(0, 10, 1 << 30)] == [b"old_____"]
    assert retire(consumer, LAYOUT)
    assert not path.exists()
    assert (lane_dir / "archive" / f"{consumer.lane.uuid}.ring").exists()
    lock.release()


def test_a_lane_of_another_layout_is_retired_once_it_is_empty(lane_dir: Path) -> None:
    old = rows.layout(["battery_charge_percent"])
    producer, lock = claim_producer(lane_dir, CAPACITY, old)
    producer.publish([b"waiting_"], 1, 0)
    claimed = claim_consumer(producer.lane.path)
    assert claimed is not None
    consumer, _ = claimed
    assert not retire(consumer, LAYOUT), "its producer lives"
    lock.release()
    assert not retire(consumer, LAYOUT), "it is not empty"
    consumer.free(consumer.end, 1)
    assert not retire(consumer, old), "its layout is the current one"
    assert retire(consumer, LAYOUT)


@pytest.mark.parametrize("lost", [0, 8], ids=["whole", "its last record is damaged"])
def test_a_resumed_lane_may_be_behind_a_restore_again_once_it_is_drained(lane_dir: Path, lost: int) -> None:
    path = lane_dir / "lane-0000.ring"
    ring.create(path, CAPACITY, LAYOUT, bytes(16))
    Producer(ring.Lane(path)).publish([b"waiting_"], 1, 0)
    claimed = claim_consumer(path)
    assert claimed is not None
    consumer, lock = claimed
    consumer.resume()
    consumer.free(consumer.end + lost, 1)
    assert retire(consumer, LAYOUT)
    lock.release()
    (archived,) = lanes.archived(lane_dir)
    assert ring.Lane(archived).resumed == bool(lost), "what was not found of it must not be missed again"


def test_the_lane_directory_must_be_ours_alone(tmp_path: Path) -> None:
    lanes.prepare(tmp_path / "new" / "lanes")
    assert (tmp_path / "new" / "lanes").stat().st_mode & 0o777 == 0o700
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(LaneDirError, match="name a folder of its own"):
        lanes.prepare(open_to_all)
    (tmp_path / "file").touch()
    with pytest.raises(LaneDirError, match=str(tmp_path / "file")):
        lanes.prepare(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(LaneDirError, match="not a directory"):
        lanes.prepare(tmp_path / "link")


def test_a_lane_that_does_not_fit_names_the_variable(lane_dir: Path) -> None:
    for _ in range(3):
        with pytest.raises(LaneDirError, match="ORBITSTREAM_LANE_BYTES"):
            claim_producer(lane_dir, 1 << 50, LAYOUT)
    producer, _ = claim_producer(lane_dir, CAPACITY, LAYOUT)
    assert producer.lane.path.name == "lane-0000.ring", "the attempts that failed hold no lane"
