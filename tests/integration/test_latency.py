"""Latency as a satellite would see it: a service that stands still makes those wait whose turn has come meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

from tests.service import Service, eventually, kill


def test_a_pause_of_one_second_shows_in_the_percentiles(service: Service) -> None:
    service.start()
    flags = ["--satellites", "100", "--rate", "5", "--duration", "4", "--connections", "2", "--quiet", "--json"]
    simulator = subprocess.Popen(
        [sys.executable, "-P", "-m", "simulator", "--api-url", f"http://127.0.0.1:{service.port}", *flags],
        stdout=subprocess.PIPE,
    )
    eventually(lambda: service.count() > 500, 20, "a quarter of the points stored")
    kill(service.workers(), signal.SIGSTOP)
    time.sleep(1.0)  # the fault itself
    kill(service.workers(), signal.SIGCONT)
    report = json.loads(simulator.communicate(timeout=60)[0])
    latency = report["latency_ms"]
    assert simulator.returncode == 0
    # A quarter of the posts fell due in the pause. A client that waits for each answer before it sends the next would
    # have met it with two of 2,000, and its p99 would not know.
    assert latency["p99"] > 800, latency
    assert latency["p90"] > 400, latency
    assert latency["p50"] < 200, latency
