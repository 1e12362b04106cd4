"""From body bytes to lane-ready rows, by format: `python -m pytest bench` prints the table, the last test the ratios.

Points of a hundred satellites with a timestamp and the three required channels, as clients send them.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from engine import rows
from engine.decode import Decoder
from engine.timestamps import now_us

NOW = now_us()
DECODER = Decoder(max_points=100_000, oldest_us=30 * 86_400_000_000)
FORMATS = ("json", "columnar", "ndjson", "arrow", "arrow-dictionary")
TURNS, TURN_S = 40, 0.01


def points(count: int) -> list[dict[str, Any]]:
    return [
        {
            "satellite_id": f"SAT-{index % 100:05d}",
            "timestamp": f"{np.datetime64(NOW - index * 1000, 'us')}Z",
            "battery_charge_percent": 50.25 + index % 40,
            "storage_usage_mb": 1000.5 + index % 999,
            "signal_strength_dbm": -70.25,
        }
        for index in range(count)
    ]


def arrow(given: list[dict[str, Any]], *, dictionary: bool) -> bytes:
    columns = {name: pa.array([point[name] for point in given]) for name in given[0]}
    columns["timestamp"] = pa.array([NOW - index * 1000 for index in range(len(given))], pa.timestamp("us", "UTC"))
    if dictionary:
        columns["satellite_id"] = columns["satellite_id"].dictionary_encode()
    sink = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def case(form: str, count: int) -> Callable[[], list[bytes]]:
    """Return what turns one body of a format into the payload of a lane record."""
    given = points(count)
    body, decode = {
        "json": lambda: (orjson.dumps(given), DECODER.json_batch),
        "columnar": lambda: (orjson.dumps({name: [p[name] for p in given] for name in given[0]}), DECODER.json_batch),
        "ndjson": lambda: (b"\n".join(map(orjson.dumps, given)), DECODER.ndjson_batch),
        "arrow": lambda: (arrow(given, dictionary=False), DECODER.arrow_batch),
        "arrow-dictionary": lambda: (arrow(given, dictionary=True), DECODER.arrow_batch),
    }[form]()

    def run() -> list[bytes]:
        return rows.pack(decode(body, NOW))

    return run


@pytest.mark.benchmark
@pytest.mark.parametrize("count", [1_000, 10_000])
@pytest.mark.parametrize("form", FORMATS)
def test_bytes_to_rows(benchmark: Any, form: str, count: int) -> None:
    benchmark.group = f"{count} points"
    run = case(form, count)
    payload = benchmark(run)
    assert b"".join(payload) == b"".join(case("json", count)())
    benchmark.extra_info["points_per_second"] = round(count / benchmark.stats.stats.min)


@pytest.mark.benchmark
@pytest.mark.parametrize("count", [1_000, 10_000])
def test_ratios(count: int) -> None:
    """Processor time, in turns, so that what else the machine does meets all alike; the best of each counts.

    A turn lasts TURN_S, be it one run or a hundred: what another format left in the caches and in the processor's
    memory of branches is not counted, as a client sends only one.
    """
    runs = {form: case(form, count) for form in FORMATS}
    best = dict.fromkeys(FORMATS, float("inf"))
    for _ in range(TURNS):
        for form, run in runs.items():
            begun = ended = time.thread_time()
            while ended < begun + TURN_S:
                started = ended
                run()
                ended = time.thread_time()
                best[form] = min(best[form], ended - started)
    ratios = {form: best["json"] / seconds for form, seconds in best.items()}
    for form in FORMATS:
        print(f"\n{count:>6} points  {form:<17} {count / best[form] / 1e6:6.2f} M/s {ratios[form]:6.2f} x JSON", end="")
    assert min(ratios["arrow"], ratios["arrow-dictionary"]) >= 8
    assert ratios["columnar"] >= 1.8
