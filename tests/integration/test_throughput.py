"""The whole engine under the simulator's full load: nothing lost, and memory that stays where it is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from engine.demo import compare
from tests.service import Service, children, command_line, eventually


def anonymous_kb(pid: int) -> int:
    """Return the anonymous memory of a process: what is its own, without lanes and libraries."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1])
    raise AssertionError("smaps_rollup has no Anonymous line")


def processes(service: Service) -> dict[str, int]:
    """Return our processes by a name: supervisor, workers, writer, maintenance."""
    named = {"supervisor": service.pid, "arbiter": service.arbiter()}
    named |= {f"worker {number}": pid for number, pid in enumerate(sorted(service.workers()))}
    named |= {f"writer {number}": pid for number, pid in enumerate(service.writers())}
    (named["maintenance"],) = (pid for pid in children(service.pid) if "engine.maintenance" in command_line(pid))
    return named


@pytest.mark.slow
def test_full_load_loses_nothing_and_memory_is_flat_after_the_first_lap(service: Service, tmp_path: Path) -> None:
    service.start(ORBITSTREAM_LANE_BYTES="4MiB", LOG_LEVEL="error")
    sent_log = tmp_path / "sent.parquet"

    def settled() -> list[int]:
        lanes = json.loads(service.run("status", "--json").stdout)["lanes"]
        return [int(lane["settled_points"]) for lane in lanes]

    # A worker that comes later than the simulator finds all connections with the other one, and they last.
    eventually(lambda: len(settled()) == 2, 20, "both workers")
    simulator = subprocess.Popen(
        [sys.executable, "-P", "-m", "simulator", "--api-url", f"http://127.0.0.1:{service.port}", "--rate", "0",
         "--duration", "90", "--batch", "1000", "--quiet", "--json", "--sent-log", str(sent_log)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    pids = processes(service)

    # 42 bytes a point with a nine-byte id: a lap of 4 MiB is 100,000 points.
    eventually(lambda: min(settled()) > 200_000, 60, "two laps of the lanes")
    samples: list[dict[str, int]] = []
    for _ in range(80):
        samples.append({name: anonymous_kb(pid) for name, pid in pids.items()})
        time.sleep(0.1)  # samples over eight seconds: the slope of memory is what is asked
    simulator.send_signal(signal.SIGINT)
    assert simulator.stdout is not None
    report = json.loads(simulator.stdout.read())
    simulator.stdout.close()
    simulator.wait(10)
    assert service.stop() == 0
    with psycopg.connect(service.database, autocommit=True) as connection:
        comparison = compare(sent_log, connection)
    assert comparison.clean, comparison.first_keys
    assert comparison.accepted == report["accepted"] > 200_000
    print(f"{comparison.committed} points; anonymous kB in two times 4 s:")
    for name in pids:
        sizes = [sample[name] for sample in samples]
        early, late = sizes[:40], sizes[40:]
        print(f"  {name:12} {min(early)}..{max(early)}, then {min(late)}..{max(late)}")
        assert max(late) <= max(early) * 1.1 + 2048, f"{name} grows: {sizes}"
        assert max(sizes) < 150 * 1024, f"{name} is large: {sizes}"
