"""The schedule: how many points, when, under which keys, in which requests."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import orjson
import pytest

from simulator.control import make_jobs
from simulator.load import GRACE_S, MAX_AHEAD_S, Plan, Request
from simulator.schedule import PROFILES, STEEPEST, ClosedClock, OpenLoop, Start
from simulator.settings import Job, Settings, default_processes, share

NOW_US = 1_795_306_200_000_000
SETTINGS = Settings(
    api_url="http://127.0.0.1:8080",
    satellites=10,
    rate=100.0,
    duration=2.0,
    points=None,
    anomaly_rate=0.0,
    channels="required",
    processes=1,
    connections=4,
    batch=100,
    single_share=0.0,
    format="json",
    seed=1,
    timeout=10.0,
    sent_log=None,
)


def jobs(settings: Settings) -> list[Job]:
    return make_jobs(settings, 2, ("127.0.0.1", 8080), host="127.0.0.1:8080", path="/v1", token="secret")


def all_requests(job: Job, *, now: float = 1_000.0) -> list[Request]:
    """Return what a process would send, from a start at 1,000 s."""
    plan = Plan(job)
    plan.begin(Start(1_000.0, NOW_US))
    requests = []
    while made := plan.next_block(now):
        requests += made[1]
    return requests


def split(request: Request) -> tuple[list[bytes], list[dict[str, object]]]:
    """Return the head's lines and the points of a request, checking its length."""
    head, _, body = bytes(request.data).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert f"Content-Length: {len(body)}".encode() in lines
    points = orjson.loads(body)
    return lines, points if isinstance(points, list) else [points]


def keys(requests: list[Request]) -> list[tuple[object, object]]:
    return [(point["satellite_id"], point["timestamp"]) for r in requests for point in split(r)[1]]


@pytest.mark.parametrize(
    ("satellites", "rate", "duration", "limit", "expected"),
    [
        (100, 100.0, 10.0, None, 100_000),
        (3, 0.1, 10.0, None, 3),
        (1, 0.1, 1.0, None, 1),  # the first point is due at the start
        (7, 0.3, 10.0, None, 21),
        (100, 100.0, 10.0, 50, 50),
        (100, 100.0, None, 50, 50),
        (100, 100.0, None, None, math.inf),
    ],
)
def test_an_open_loop_schedules_rate_times_duration(
    satellites: int, rate: float, duration: float | None, limit: int | None, expected: float
) -> None:
    assert OpenLoop(satellites, rate, duration, limit).left(0) == expected


def test_points_are_due_evenly_and_counted_as_they_fall_due() -> None:
    schedule = OpenLoop(4, 2.5, 10.0, None)
    assert schedule.offsets(0, 3).tolist() == [0.0, 0.1, 0.2]
    assert schedule.offsets(50, 1).tolist() == [5.0]
    assert [schedule.due(t) for t in (0.0, 0.05, 0.25, 9.99, 10.0, 11.0)] == [1, 1, 3, 100, 100, 100]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_keeps_the_mean_and_its_points_in_order(profile: str) -> None:
    schedule = OpenLoop(10, 100.0, 20.0, None, profile)
    assert schedule.left(0) == 20_000
    offsets = schedule.offsets(0, 20_000)
    gaps = np.diff(offsets)
    assert offsets[0] == 0 and offsets[-1] < 20.0 and gaps.min() > 1 / (1.02 * STEEPEST * 1_000)
    for moment in (0.0, 0.3, 5.0, 11.0, 19.99):
        assert abs(schedule.due(moment) - int(np.searchsorted(offsets, moment, "right"))) <= 1
    assert schedule.seconds == pytest.approx(20.0)
    by_second = np.bincount(offsets.astype(int), minlength=20)
    peak = {"constant": 1_000, "ramp": 1_950, "burst": 5_000, "diurnal": 1_900}[profile]
    assert by_second.max() == pytest.approx(peak, rel=0.02)


def test_batches_leave_when_their_last_point_is_due_and_points_carry_their_due_time() -> None:
    requests = all_requests(jobs(SETTINGS)[0])
    assert [r.points for r in requests] == [100] * 20
    assert np.allclose([r.due for r in requests], [1_000 + 0.1 * n - 0.001 for n in range(1, 21)])
    first = requests[0].block
    assert first.time_us[:100].tolist() == [NOW_US + 1_000 * n for n in range(100)]
    assert first.satellite[:100].tolist() == list(range(10)) * 10


def test_a_batch_is_sent_smaller_rather_than_wait_longer_than_a_second() -> None:
    requests = all_requests(jobs(replace(SETTINGS, rate=3.0, batch=1_000))[0])
    assert [r.points for r in requests] == [30, 30]


@pytest.mark.parametrize("single_share", [0.0, 0.05, 0.3, 0.5, 0.99, 1.0])
def test_single_posts_take_their_share_of_the_points(single_share: float) -> None:
    requests = all_requests(jobs(replace(SETTINGS, single_share=single_share))[0])
    single = [r for r in requests if split(r)[0][0] == b"POST /v1/telemetry HTTP/1.1"]
    batches = [r for r in requests if split(r)[0][0] == b"POST /v1/telemetry/batch HTTP/1.1"]
    assert len(single) + len(batches) == len(requests)
    assert abs(len(single) - 2_000 * single_share) <= 1
    assert sum(r.points for r in requests) == len(set(keys(requests))) == 2_000
    assert all(r.points <= 100 for r in batches)
    assert [r.due for r in requests] == sorted(r.due for r in requests)


def test_every_request_names_host_token_type_and_length() -> None:
    for batch in (1, 10):
        lines, _ = split(all_requests(jobs(replace(SETTINGS, batch=batch))[0])[0])
        assert {b"Host: 127.0.0.1:8080", b"Authorization: Bearer secret", b"Content-Type: application/json"} <= set(
            lines
        )


@pytest.mark.parametrize("processes", [1, 3, 10])
@pytest.mark.parametrize("rate", [0.0, 100.0])
def test_keys_are_unique_across_processes(processes: int, rate: float) -> None:
    settings = replace(SETTINGS, processes=processes, rate=rate, points=2_500, duration=None, single_share=0.1)
    found = [key for job in jobs(settings) for key in keys(all_requests(job))]
    assert len(found) == len(set(found)) == 2_500


@pytest.mark.parametrize("satellites", [1, 3, 7, 1_000, 5_000])
@pytest.mark.parametrize("count", [1, 10, 1_000])
def test_closed_loop_times_rise_and_never_repeat_for_a_satellite(satellites: int, count: int) -> None:
    clock = ClosedClock(satellites, NOW_US * 1_000)
    now_ns = NOW_US * 1_000
    seen: set[tuple[int, int]] = set()
    point = last = 0
    for elapsed_ns in (0, 0, 1, 500, 10**6, 0, 3 * 10**9, 7):
        now_ns += elapsed_ns
        times = clock.times_us(count, now_ns)
        assert (np.diff(times) >= 0).all() and times[0] >= last
        last = int(times[-1])
        seen |= {((point + i) % satellites, int(t)) for i, t in enumerate(times)}
        point += count
    assert len(seen) == 8 * count


def test_a_closed_loop_faster_than_a_microsecond_a_point_is_held_back_not_sent_from_the_future(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_us = time.time_ns() // 1_000
    monkeypatch.setattr(time, "time_ns", lambda: now_us * 1_000)  # points are made in no time
    plan = Plan(jobs(replace(SETTINGS, satellites=1, rate=0.0, duration=1e6, batch=50_000))[0])
    for _ in range(50):
        made = plan.next_block(1_000.0)
        assert made is not None
        request = made[1][0]
        wait = request.due - 1_000.0
        assert request.block.time_us[-1] <= now_us + (wait + MAX_AHEAD_S) * 1e6
    assert wait > 0


def test_an_open_loop_still_sends_what_it_is_late_with_and_a_closed_one_stops() -> None:
    late = all_requests(jobs(SETTINGS)[0], now=1_002.0 + GRACE_S - 0.1)
    assert sum(r.points for r in late) == 2_000
    assert not all_requests(jobs(SETTINGS)[0], now=1_002.0 + GRACE_S)
    assert not all_requests(jobs(replace(SETTINGS, rate=0.0))[0], now=1_002.0)


def test_what_was_prepared_is_what_would_have_been_made_and_ends_with_the_run() -> None:
    settings = replace(SETTINGS, rate=0.0, points=1_000, start_us=NOW_US, anomaly_rate=0.2)
    plan = Plan(jobs(settings)[0])
    plan.prepare(stopped=lambda: False)
    plan.begin(Start(1_000.0, NOW_US))
    prepared = []
    while made := plan.next_block(1_000.0):
        prepared += made[1]
    made_then = all_requests(jobs(settings)[0])
    assert sum(request.points for request in prepared) == sum(request.points for request in made_then) > 900
    for one, other in zip(prepared, made_then, strict=True):
        assert [point["satellite_id"] for point in split(one)[1]] == [
            point["satellite_id"] for point in split(other)[1]
        ]

    late = Plan(jobs(settings)[0])
    late.prepare(stopped=lambda: False)
    late.begin(Start(1_000.0, NOW_US))
    assert late.next_block(1_001.9) and not late.next_block(1_002.0)


def test_a_limit_of_points_ends_an_open_loop_early() -> None:
    """Or a service that refuses for ever would be tried for ever."""
    for duration in (None, 100.0):
        plan = Plan(jobs(replace(SETTINGS, points=500, duration=duration))[0])
        plan.begin(Start(1_000.0, NOW_US))
        assert plan.end == 1_000.5


def test_shares_are_disjoint_and_complete() -> None:
    parts = [share(10, part, 3) for part in range(3)]
    assert [n for first, last in parts for n in range(first, last)] == list(range(10))


def test_processes_are_as_many_as_the_rate_needs() -> None:
    common = {"batch": 1_000, "single_share": 0.0, "cores": 8}
    assert default_processes(satellites=100, rate=100.0, **common) == 1  # type: ignore[arg-type]
    assert default_processes(satellites=100_000, rate=10.0, **common) == 2  # type: ignore[arg-type]
    assert default_processes(satellites=100_000, rate=1_000.0, **common) == 8  # type: ignore[arg-type]
    assert default_processes(satellites=100, rate=0.0, **common) == 4  # type: ignore[arg-type]
    assert default_processes(satellites=1, rate=0.0, **common) == 1  # type: ignore[arg-type]
    assert default_processes(satellites=100, rate=400.0, batch=1, single_share=0.0, cores=8) == 3


def test_a_job_survives_the_pipe() -> None:
    job = jobs(replace(SETTINGS, sent_log="log"))[0]
    assert Job.from_line(job.to_line()) == job
