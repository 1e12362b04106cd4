"""Deaths while a process takes over what another one left: attaching, skipping, archiving, making a lane."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import lanes, ring, rows
from engine.producer import Producer
from engine.timestamps import now_us
from tests.long_run import LONG, report
from tests.service import Service

pytestmark = pytest.mark.crash

HITS = 20 if LONG else 2
SKIP = ["recover-before-skip", "recover-after-skip"]
VALUES = dict.fromkeys(rows.CHANNEL_NAMES[:3], 50.0)


def leave_a_lane(folder: Path, number: int, boot: bytes) -> set[str]:
    """Make a lane that no process has, with three points in it; returns their names."""
    path = folder / f"lane-{number:04d}.ring"
    ring.create(path, ring.MIN_CAPACITY, rows.layout(), boot)
    lane = ring.Lane(path)
    producer = Producer(lane)
    names = {f"{number}-{index}" for index in range(3)}
    for name in sorted(names):
        producer.publish(rows.pack_point(now_us(), name.encode(), VALUES, False), 1, now_us())
        producer.answered(1)
    lane.close()
    return names


def writer(service: Service, failpoint: str = "") -> int:
    """Run a writer until its lanes are drained, or it dies at `failpoint`; returns its exit code."""
    armed = {"ORBITSTREAM_FAILPOINT": f"{failpoint}:1"} if failpoint else {}
    command = ("-m", "engine.writer", "--index", "0", "--parent", str(os.getpid()), "--drain")
    return service.spawn(*command, **armed).wait(30)


@pytest.mark.parametrize(
    "name",
    [
        "attach-before-row", "attach-before-database", "attach-after-database", *SKIP,
        "archive-before-move", "archive-after-move",
    ],
)  # fmt: skip
def test_a_death_at_each_step_of_recovery(service: Service, lane_dir: Path, name: str) -> None:
    """Each time one lane more, of this boot (to be skipped in) or of an earlier one, and a writer that dies there."""
    assert service.run("migrate").returncode == 0
    boot = ring.boot_id() if name in SKIP else bytes(16)
    expected: set[str] = set()
    for number in range(HITS):
        expected |= leave_a_lane(lane_dir, number, boot)
        if name in SKIP:
            assert writer(service, "drain-after-commit") == -signal.SIGKILL
        assert writer(service, name) == -signal.SIGKILL
    assert writer(service) == 0
    stored = [satellite for (satellite,) in service.query("SELECT satellite_id FROM telemetry")]
    assert sorted(stored) == sorted(expected)
    assert len(lanes.lane_files(lane_dir)) == (HITS if name in SKIP else 0)
    assert len(lanes.archived(lane_dir)) == (0 if name in SKIP else HITS)
    assert service.run("verify", "--deep").returncode == 0
    report(f"SIGKILL at {name}", hits=HITS, accepted=len(expected))


@pytest.mark.parametrize("name", ["create-before-link", "create-after-link"])
def test_a_death_while_a_lane_is_made_leaves_no_file_behind(lane_dir: Path, name: str) -> None:
    claim = (
        "import sys; from pathlib import Path; from engine.lanes import claim_producer;"
        f"claim_producer(Path(sys.argv[1]), {ring.MIN_CAPACITY}, b'')"
    )
    for _ in range(HITS):
        died = subprocess.run(
            [sys.executable, "-c", claim, str(lane_dir)], env={**os.environ, "ORBITSTREAM_FAILPOINT": f"{name}:1"}
        )
        assert died.returncode == -signal.SIGKILL
        first, lock = lanes.claim_producer(lane_dir, ring.MIN_CAPACITY, b"")
        first.close()
        lock.release()
        consumer, lock = lanes.claim_consumer(first.lane.path) or pytest.fail("the lane is not free")
        assert lanes.retire(consumer, b"")
        lock.release()
        # What the dead process left may be a second name of the lane that is archived now.
        second, lock = lanes.claim_producer(lane_dir, ring.MIN_CAPACITY, b"")
        lock.release()
        assert second.lane.path == first.lane.path
        assert ring.Lane(lane_dir / "archive" / f"{first.lane.uuid}.ring").uuid == first.lane.uuid
        second.lane.path.unlink()
    assert not [path for path in lane_dir.iterdir() if path.name.startswith(".")]
    report(f"SIGKILL at {name}", hits=HITS)
