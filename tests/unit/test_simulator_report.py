"""The report: latencies within one percent, counts that add up, words that say what went wrong."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from simulator.control import Progress
from simulator.histogram import Latencies
from simulator.report import Report, Tally
from simulator.settings import Settings

SETTINGS = Settings(
    "http://h", 10, 1.0, 10.0, None, 0.01, "required", 1, 4, 1, 0.0, "json", 1, 10.0, None
)  # fmt: skip


def test_quantiles_have_three_digits() -> None:
    values = np.exp(np.random.default_rng(3).normal(-6, 2, 20_000))
    latencies = Latencies()
    latencies.add(values.tolist())
    for share in (0.01, 0.5, 0.9, 0.99, 0.999):
        assert latencies.quantile(share) == pytest.approx(
            np.quantile(values, share, method="inverted_cdf"), rel=0.001, abs=1e-6
        )
    assert latencies.quantile(1.0) <= values.max()  # type: ignore[operator]


def test_merging_exports_is_the_same_as_counting_together() -> None:
    together, merged = Latencies(), Latencies()
    for part in ([0.001, 0.002], [0.5], [], [0.0, 1e-9, 500.0]):
        one = Latencies()
        one.add(part)
        together.add(part)
        merged.merge(json.loads(json.dumps(one.export())))
    assert merged.export() == together.export()
    assert merged.milliseconds()["max"] == 500_000.0


def test_the_histogram_is_read_by_the_tools_of_hdrhistogram() -> None:
    values = [*np.exp(np.random.default_rng(3).normal(-6, 2, 5_000)).tolist(), 0.0, 1e-6, 0.002047, 0.002048, 3_599.0]
    latencies = Latencies()
    latencies.add(values)
    read = HdrHistogram.decode(latencies.encode())
    assert read.get_total_count() == len(values)
    for share in (1, 50, 90, 99, 99.9):
        ours = latencies.quantile(share / 100)
        assert ours is not None
        assert ours * 1e6 == pytest.approx(read.get_value_at_percentile(share), abs=1.01)


def test_no_requests_no_latency() -> None:
    assert Latencies().milliseconds() == {"p50": None, "p90": None, "p99": None, "p999": None, "max": None}
    assert "latency" not in Report(SETTINGS).to_words()


def test_tallies_add_counts_and_keep_the_longest_time() -> None:
    total = Tally()
    total.add(Tally(sent=3, accepted=2, unknown=1, scheduled=5, seconds=2.0, behind_seconds=0.5).export())
    total.add(Tally(sent=4, accepted=4, scheduled=4, seconds=1.0, behind_seconds=0.7).export())
    assert total == Tally(sent=7, accepted=6, unknown=1, scheduled=9, seconds=2.0, behind_seconds=0.7)


def test_the_words_tell_what_went_wrong_and_nothing_else() -> None:
    report = Report(SETTINGS, Tally(sent=1_000, accepted=1_000, scheduled=1_000, seconds=2.0))
    assert report.to_words() == "sent 1,000 points in 2.0 s: 1,000 accepted (500/s), 0 refused, 0 unknown, 0 anomalies"
    report.tally.scheduled, report.tally.behind_seconds, report.tally.retries = 1_200, 3.21, 4
    assert report.to_words().endswith("4 retries, up to 3.2 s behind schedule, 200 due but never sent")


def test_the_report_embeds_its_configuration() -> None:
    report = Report(SETTINGS, Tally(sent=10, accepted=10, seconds=2.0)).to_json()
    assert json.loads(json.dumps(report)) == report
    assert report["configuration"]["satellites"] == 10
    assert report["points_per_second"] == 5.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_a_second_rewritten_on_a_terminal() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        progress = Progress(stream, 100.0)
        for now, accepted in ((100.5, 10), (101.0, 1_000), (101.5, 1_100), (104.2, 4_200)):
            progress.show(now, Tally(sent=accepted + 5, accepted=accepted))
        progress.close()
    first = "  1 s  1,005 points sent  1,000 accepted  0 refused  1,000/s"
    second = "  4 s  4,205 points sent  4,200 accepted  0 refused  1,000/s"
    assert plain.getvalue() == f"{first}\n{second}\n"
    assert terminal.getvalue() == f"\r{first}\033[K\r{second}\033[K\n"
