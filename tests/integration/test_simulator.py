"""What the simulator sends against the real service: each format and encoding arrives, point for point."""

from __future__ import annotations

import http.client
import socket
import time

import numpy as np

from simulator.bodies import ENCODINGS, MEDIA_TYPES
from simulator.control import make_jobs
from simulator.flags import build_parser, settings_from
from simulator.fleet import Fleet
from simulator.load import Plan
from tests.service import Service, eventually

BODIES = [("json", "identity", 1), *((form, encoding, 100) for form in MEDIA_TYPES for encoding in ENCODINGS)]
FLEET = Fleet(0, 20, seed=1, anomaly_rate=0.2, channels="all")
Row = tuple[object, ...]


def send(port: int, form: str, encoding: str, batch: int) -> set[Row]:
    """Post 250 points, or what of them is not silent, as a sender process would; return their rows."""
    flags = ["--satellites", "20", "--rate", "0", "--points", "250", "--processes", "1", "--channels", "all",
             "--anomaly-rate", "0.2", "--format", form, "--encoding", encoding, "--batch", str(batch)]  # fmt: skip
    settings = settings_from(build_parser().parse_args(flags))
    address = ("127.0.0.1", port)
    plan = Plan(make_jobs(settings, socket.AF_INET, address, host="localhost", path="", token=None)[0])
    sent: set[Row] = set()
    with socket.create_connection(address, 10) as connection:
        while made := plan.next_block(time.monotonic()):
            block, requests = made
            for request in requests:
                connection.sendall(request.data)
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                assert (answer.status, bool(answer.read())) == (202, True), (form, encoding)
                block.outcome[request.rows] = 1
            rows = np.flatnonzero(block.outcome == 1)
            values = FLEET.read(block.satellite[rows], block.time_us[rows]).values
            scales = [[10.0**channel.decimals] for channel in FLEET.channels]
            names = [f"SAT-{satellite:05d}" for satellite in block.satellite[rows]]
            sent |= set(zip(names, block.time_us[rows].tolist(), *(values / scales).tolist(), strict=True))
    return sent


def test_every_format_and_encoding_arrives_as_the_set_that_was_sent(service: Service) -> None:
    service.start()
    sent: set[Row] = set()
    for form, encoding, batch in BODIES:
        points = send(service.port, form, encoding, batch)
        assert len(points) > 200 and not points & sent
        sent |= points
    eventually(lambda: service.count() >= len(sent), 20, "every point is a row")
    names = ", ".join(channel.name for channel in FLEET.channels)
    stored = service.query(f"SELECT satellite_id, (extract(epoch FROM time) * 1000000)::bigint, {names} FROM telemetry")
    assert len(stored) == len(sent) and set(stored) == sent
