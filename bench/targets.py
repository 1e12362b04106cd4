"""Every target with its result: runs the benchmarks whose results are missing, then writes the table into README.

python -m bench.targets --database-url postgresql://...     (TimescaleDB 2.24 or later, timescale license; CREATEDB)

Each benchmark writes results/NAME.json with commit, configuration and machine; `--again` measures all of them anew,
50 minutes on two cores. Without a URL (DATABASE_URL, or ORBITSTREAM_TEST_DATABASE_URL) what needs the columnstore
is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import results
from bench.ingest import STAGES

README: Final = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- targets: python -m bench.targets -->", "<!-- /targets -->"

# Results: the command that makes them, and whether it needs the columnstore.
RUNS: Final[dict[str, tuple[str, bool]]] = {
    "client": ("bench.client --seconds 3", False),
    "ingest-rowstore": ("bench.ingest --prepare --writers 2 --fleets 1000 --rounds 5 --seconds 8", False),
    "latency": ("bench.ingest --rate 10000 --batch 100 --fleets 1000 --seconds 30", False),
    "edge": ("bench.edge --seconds 4 --rounds 5", False),
    "ingest-columnstore": ("bench.ingest --prepare --writers 2 --fleets 1000 --rounds 9 --seconds 8", True),
    "ingest-fleets": ("bench.ingest --prepare --writers 2 --fleets 100 100000 --rounds 3 --seconds 8", True),
    "ingest-columnar": (
        "bench.ingest --prepare --writers 2 --format columnar --fleets 1000 --rounds 9 --seconds 8",
        True,
    ),
    "ingest-arrow": ("bench.ingest --prepare --writers 2 --format arrow --fleets 1000 --rounds 3 --seconds 8", True),
    "ingest-arrow-large": (
        "bench.ingest --prepare --writers 2 --format arrow --batch 10000 --fleets 1000 --rounds 5 --seconds 8",
        True,
    ),
    "memory": ("bench.ingest --fleets 1000 --seconds 150", True),
    "history": ("bench.ingest --fleets 1000 --seconds 8 --history 100000000", True),
    "storage": ("bench.storage", True),
    "query": ("bench.query", True),
}
NAMED: Final = ("bench.ingest",)
"""Commands whose results' name is given; the others have one of their own."""

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised, in words; whose results show it; how to read them: the result in words, and if it is met."""

    what: str
    promised: str
    run: str
    read: Callable[[Any], tuple[str, bool]]


def median(figures: Figures, name: str, satellites: int | None = None) -> float:
    """Return the median of a figure over the rounds of bench.ingest, of one fleet or of all."""
    return statistics.median(
        fleet[name] for fleet in figures["fleets"] if satellites is None or fleet["satellites"] == satellites
    )


def rate(least: float, share: float, *, straight: bool) -> Callable[[Figures], tuple[str, bool]]:
    """Read points/s committed and their share of COPY alone; `straight`: they must go to the columnstore.

    What the cores can do: the rate at which the CPU that a point takes of all processes would keep them all busy.
    """

    def read(figures: Figures) -> tuple[str, bool]:
        got, of_copy = median(figures, "committed_per_second"), median(figures, "committed_to_copy")
        there = median(figures, "straight_to_columnstore")
        words = (
            f"{got:,.0f} points/s, {of_copy:.2f}; {median(figures, 'committed_to_cpu'):.0%} of what the cores can do"
        )
        if straight and there < 0.5:
            return f"{words}; {there:.0%} of it into the columnstore", False
        return words, got >= least and of_copy >= share

    return read


def single(figures: Figures) -> tuple[str, bool]:
    runs = figures["runs"]["one point, event loop"]
    got = statistics.median(
        (run["requests"] - run["not_202"]) / run["requests"] * run["requests_per_second"] for run in runs
    )
    return f"{got:,.0f} requests/s, all stored", got >= 20_000


def latency(figures: Figures) -> tuple[str, bool]:
    found = figures["fleets"][0]["commit_ms"]
    return f"p50 {found['p50']:.0f} ms, p99 {found['p99']:.0f} ms", found["p50"] < 25 and found["p99"] < 100


def durable(figures: Figures) -> tuple[str, bool]:
    accepted, got = (figures["ratios"][f"disk to process, 1,000 points{which}"] for which in ("", ", committed"))
    return f"{got:.2f} committed; {accepted:.2f} accepted while it is overloaded", got >= 0.9


def memory(figures: Figures) -> tuple[str, bool]:
    found = figures["fleets"][0]["memory"]
    stages = {stage: found[stage] for stage in STAGES}
    steepest = max(each["percent_a_minute"] for each in stages.values())
    most = max(each["most_mb"] for each in stages.values())
    words = ", ".join(f"{stage} {each['most_mb']:.0f} MB" for stage, each in stages.items())
    return f"{words}; at most {steepest:+.1f} % a minute", steepest < 1.0 and most <= 150


def growth(figures: Figures) -> tuple[str, bool]:
    got, copy = (figures["last_to_first"][name] for name in ("committed_per_second", "copy_per_second"))
    return f"{got:.2f}; COPY alone {copy:.2f}", got >= 0.8


def history(figures: Figures) -> tuple[str, bool]:
    found = figures["fleets"][0]["filled_to_empty"]
    least, most = min(found["pairs"]), max(found["pairs"])
    return f"{found['median']:.2f} ({least:.2f} to {most:.2f})", found["median"] >= 0.9


def stored(figures: Figures) -> tuple[str, bool]:
    required, full = (figures[channels]["bytes_per_point"] for channels in ("required", "all"))
    words = f"{required['rewritten']} ({required['written']} as written)"
    return f"{words}; all nine channels {full['rewritten']}", required["rewritten"] <= 25


def questions(figures: Figures) -> tuple[str, bool]:
    """Read how long what the boards ask takes, over the plain table's time, and how much faster is what is kept."""
    found = figures["summary"]
    mean, worst = found["dashboards_over_plain_geometric_mean"], found["dashboards_over_plain_worst"]
    gain = found["plain_over_kept_geometric_mean"]
    words = f"{mean:.2f}, the slowest {worst:.2f}; {gain:.1f} times as fast"
    return words, mean <= 0.6 and worst <= 1.5 and gain >= 10


def cpu(figures: Figures) -> tuple[str, bool]:
    got = median(figures, "cpu_to_orjson")
    database = statistics.median(
        fleet["cpu_us_per_point"]["database"] / fleet["orjson_us_per_point"] for fleet in figures["fleets"]
    )
    return f"{got:.1f}; the database {database:.1f}", got <= 3.5


def client(figures: Figures) -> tuple[str, bool]:
    json_, arrow, posts = (figures[case]["best"] for case in ("json", "arrow", "single posts"))
    words = f"{json_:.2f} us, {arrow:.2f} us, {posts:,.0f} requests/s"
    return words, all(figures[case]["met"] for case in ("json", "arrow", "single posts"))


TARGETS: Final = (
    Target("JSON batches of 1,000 as arrays of points, committed into the columnstore; share of COPY alone",
           ">= 400,000 points/s, >= 0.6", "ingest-columnstore", rate(400_000, 0.6, straight=True)),
    Target("the same as objects of columns", ">= 400,000 points/s, >= 0.6",
           "ingest-columnar", rate(400_000, 0.6, straight=True)),
    Target("the same as arrays of points, embedded PostgreSQL with its indexes", ">= 150,000 points/s, >= 0.65",
           "ingest-rowstore", rate(150_000, 0.65, straight=False)),
    Target("Arrow batches of 1,000, columnstore", ">= 550,000 points/s, >= 0.85",
           "ingest-arrow", rate(550_000, 0.85, straight=True)),
    Target("the same, of 10,000", ">= 550,000 points/s, >= 0.85",
           "ingest-arrow-large", rate(550_000, 0.85, straight=True)),
    Target("one point a request, wrk, 64 connections", ">= 20,000 requests/s", "edge", single),
    Target("arrival to commit at 10,000 points/s", "p50 < 25 ms, p99 < 100 ms", "latency", latency),
    Target("`disk` durability to `process`, batches", ">= 0.9", "edge", durable),
    Target("anonymous memory of a process at full load", "<= 150 MB, < 1 % a minute", "memory", memory),
    Target("rate at 100,000 satellites to that at 100", ">= 0.8", "ingest-fleets", growth),
    Target("rate after 100 M rows to that on an empty table", ">= 0.9", "history", history),
    Target("bytes a point in the columnstore, three channels", "<= 25", "storage", stored),
    Target("what the boards ask of 30 days, over a plain table's time; how much faster what is kept is",
           "<= 0.6 (geometric mean), none > 1.5; >= 10 times", "query", questions),
    Target("CPU a point of our processes to `orjson.loads`", "<= 3.5", "ingest-columnstore", cpu),
    Target("the simulator against nginx: CPU a point in JSON, in Arrow; single posts",
           "<= 1 us, <= 0.2 us, >= 20,000 requests/s", "client", client),
)  # fmt: skip


def measure(name: str, url: str | None, folder: Path) -> None:
    """Run the benchmark that makes results/NAME.json; one that fails leaves its row without a result."""
    command, columnstore = RUNS[name]
    words = [*command.split(), "--output", str(folder)]
    words += ["--name", name] if words[0] in NAMED else []
    environ = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    if columnstore:
        environ["DATABASE_URL"] = str(url)  # not on the command line, where everybody reads it
    ended = subprocess.run([sys.executable, "-m", *words], cwd=README.parent, env=environ, check=False)
    if ended.returncode:
        print(f"targets: {command} ended with exit code {ended.returncode}", file=sys.stderr, flush=True)


def table(folder: Path) -> list[tuple[str, str, str, str, str]]:
    """Return what, target, result, met and command of each row."""
    found = []
    for target in TARGETS:
        path = folder / f"{target.run}.json"
        words, verdict = "not measured", ""
        if path.exists():
            words, met = target.read(json.loads(path.read_text())["figures"])
            verdict = "yes" if met else "no"
        found.append((target.what, target.promised, words, verdict, RUNS[target.run][0]))
    return found


def footnote(folder: Path) -> str:
    """Say of which commits and on which machines the results are."""
    documents = [json.loads(path.read_text()) for name in RUNS if (path := folder / f"{name}.json").exists()]
    if not documents:
        return "Not measured yet."
    commits = sorted({document["commit"] for document in documents})
    machines = sorted({f"{d['machine']['cores']} x {d['machine']['cpu']}, {d['machine']['memory_gib']:.0f} GiB"
                       for d in documents})  # fmt: skip
    return f"Commit {', '.join(commits)}; {'; '.join(machines)}, everything on it. Details: `bench/results/`."


def write_readme(rows: list[tuple[str, str, str, str, str]], note: str, readme: Path = README) -> None:
    """Put the table between its markers."""
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise SystemExit(f"{readme} lacks the lines {BEGIN} and {END}")
    lines = ["| what | target | result | met | `python -m` |", "|---|---|---|---|---|"]
    lines += [f"| {what} | {promised} | {words} | {met} | `{run}` |" for what, promised, words, met, run in rows]
    readme.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{note}\n{END}{after}")


def main() -> int:
    """Measure what is missing, print the table, write it; exit code 1 when a target is missed or not measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--database-url", default=os.environ.get("DATABASE_URL") or os.environ.get("ORBITSTREAM_TEST_DATABASE_URL"))
    add("--again", nargs="*", metavar="NAME", help=f"measure these anew, or all: {', '.join(RUNS)}")
    add("--only-table", action="store_true", help="measure nothing")
    add("--output", type=Path, default=results.FOLDER, help="the folder of the results (bench/results)")
    options = parser.parse_args()
    again = set(RUNS) if options.again == [] else set(options.again or ())
    wanted = [name for name in RUNS if name in again or not (options.output / f"{name}.json").exists()]
    wanted = [name for name in wanted if options.database_url or not RUNS[name][1]]
    begin = time.monotonic()
    for number, name in enumerate([] if options.only_table else wanted, 1):
        elapsed = time.monotonic() - begin
        print(f"targets: {number} of {len(wanted)}, {name} ({elapsed:.0f} s so far)", file=sys.stderr, flush=True)
        measure(name, options.database_url, options.output.resolve())
    rows = table(options.output)
    for what, promised, words, met, _ in rows:
        print(f"{what}\n    target {promised}\n    result {words}{f' -> {met}' if met else ''}")
    if options.output.resolve() == results.FOLDER:
        write_readme(rows, footnote(options.output))
    return 0 if all(met == "yes" for _, _, _, met, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
