"""Every query of every dashboard on a real database, expanded as Grafana's backend expands it.

No Grafana runs here: `expand` is its macro engine for PostgreSQL, rule by rule.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from typing import Any

import psycopg
import pytest

from engine import data_folder, settings
from engine.migrate import Edition, migrate
from tests.conftest import EDITIONS, GIVEN_URL
from tests.servers import editions

ROWS, SATELLITES = 50_000, 100
SLOWEST_MS = 200
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# What Grafana's backend makes of a column; anything else arrives as text or not at all.
SHOWN_TYPES = {"bool", "int2", "int4", "int8", "float4", "float8", "text", "timestamptz"}
NUMBERS = {"int2", "int4", "int8", "float4", "float8"}


# -- Grafana's expansion of SQL


@dataclass(frozen=True)
class View:
    """What a query is expanded for: the range and interval of a panel, chosen values, the data source's setting."""

    begin: datetime
    end: datetime
    interval: timedelta = timedelta(seconds=10)
    satellites: tuple[str, ...] = ("SAT-00001", "SAT-00002")
    timescaledb: bool = True


def expand(sql: str, view: View) -> str:
    """Return the SQL that reaches the database: variables, then intervals and epochs, then comments, then macros."""
    chosen = ",".join("'" + name.replace("'", "''") + "'" for name in view.satellites)
    sql = sql.replace("${satellite:sqlstring}", chosen)
    assert "${" not in sql, f"a variable that is not interpolated as a list of quoted strings: {sql}"
    sql = sql.replace("$__interval_ms", str(round(view.interval / timedelta(milliseconds=1))))
    sql = sql.replace("$__interval", interval_name(view.interval))
    sql = sql.replace("$__unixEpochFrom()", str(int(view.begin.timestamp())))
    sql = sql.replace("$__unixEpochTo()", str(int(view.end.timestamp())))
    sql = re.sub(r"--[^\n]*|/\*.*?\*/", "", sql, flags=re.DOTALL)

    def macro(match: re.Match[str]) -> str:
        name = match[1]
        if name == "__timeGroup" and sql[match.end() : match.end() + 1] == ",":
            name = "__timeGroupAlias"
        return evaluate(name, [argument.strip(" ") for argument in match[2].split(",")], view)

    return re.sub(r"\$([_a-zA-Z0-9]+)\(([^\)]*)\)", macro, sql)


def evaluate(name: str, arguments: list[str], view: View) -> str:
    """Return what one macro becomes; raises ValueError for one that Grafana does not know."""
    column = arguments[0]
    begin, end = (f"'{moment:%Y-%m-%dT%H:%M:%S.%fZ}'" for moment in (view.begin, view.end))
    first, last = int(view.begin.timestamp()), int(view.end.timestamp())
    if name.endswith("Alias"):
        return evaluate(name.removesuffix("Alias"), arguments, view) + ' AS "time"'
    if name == "__timeGroup":
        seconds = parse_interval(arguments[1])
        if view.timescaledb:
            return f"time_bucket('{seconds:.3f}s',{column})"
        return f"floor(extract(epoch from {column})/{seconds:g})*{seconds:g}"
    if name == "__unixEpochGroup":
        seconds = parse_interval(arguments[1])
        return f"floor(({column})/{seconds:g})*{seconds:g}"
    known = {
        "__time": f'{column} AS "time"',
        "__timeEpoch": f'extract(epoch from {column}) as "time"',
        "__timeFilter": f"{column} BETWEEN {begin} AND {end}",
        "__timeFrom": begin,
        "__timeTo": end,
        "__unixEpochFilter": f"{column} >= {first} AND {column} <= {last}",
        "__unixEpochNanoFrom": f"{first * 10**9}",
        "__unixEpochNanoTo": f"{last * 10**9}",
    }
    if name not in known:
        raise ValueError(f"unknown macro {name!r}")
    return known[name]


def interval_name(interval: timedelta) -> str:
    """Return an interval as `$__interval` spells it: in the largest unit that it reaches, cut to a whole number."""
    units = (("y", 365 * 86400), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    for unit, seconds in units:
        if interval >= timedelta(seconds=seconds):
            return f"{interval // timedelta(seconds=seconds)}{unit}"
    return f"{interval // timedelta(milliseconds=1)}ms"


def parse_interval(text: str) -> float:
    match = re.fullmatch(r"'?(\d+)(ms|s|m|h|d|w)'?", text)
    if match is None:
        raise ValueError(f"error parsing interval {text}")
    return int(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]


@pytest.mark.parametrize(
    ("sql", "expanded"),
    [
        ("$__timeGroup(time,'5m') AS t", "time_bucket('300.000s',time) AS t"),
        ("$__timeGroup(time, '5m'), 1", "time_bucket('300.000s',time) AS \"time\", 1"),
        ("$__timeGroupAlias(time,'30s')", "time_bucket('30.000s',time) AS \"time\""),
        ("$__timeFilter(t.time)", "t.time BETWEEN '1970-01-01T00:00:00.000000Z' AND '1970-01-01T01:00:00.000000Z'"),
        ("$__timeTo()::timestamptz", "'1970-01-01T01:00:00.000000Z'::timestamptz"),
        ("$__unixEpochFilter(n)", "n >= 0 AND n <= 3600"),
        ("$__interval_ms ms is $__interval -- $__no(x)\n", "10000 ms is 10s \n"),
        ("x IN (${satellite:sqlstring})", "x IN ('SAT-00001','O''Neill')"),
    ],
)
def test_macros_expand_as_in_grafana(sql: str, expanded: str) -> None:
    assert expand(sql, View(EPOCH, EPOCH + timedelta(hours=1), satellites=("SAT-00001", "O'Neill"))) == expanded


def test_a_time_group_without_timescaledb_is_arithmetic() -> None:
    view = View(EPOCH, EPOCH, timescaledb=False)
    assert expand("$__timeGroup(time,'5m')", view) == "floor(extract(epoch from time)/300)*300"


def test_an_unknown_macro_is_an_error() -> None:
    with pytest.raises(ValueError, match="__timeGroupp"):
        expand("$__timeGroupp(time,'5m')", View(EPOCH, EPOCH))


# -- the boards on a database


@dataclass(frozen=True)
class Query:
    """One query of a board."""

    name: str
    sql: str
    format: str


def all_queries() -> list[Query]:
    """Collect the queries of every panel and variable of every board."""
    found = []
    for path in sorted((data_folder("grafana") / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                name = f"{path.stem} / {panel['id']} {panel['title']}"
                found.append(Query(name, target["rawSql"], target["format"]))
        for variable in board["templating"]["list"]:
            found.append(Query(f"{path.stem} / variable {variable['name']}", variable["query"], "table"))
    return found


QUERIES = {query.name: query for query in all_queries()}


@dataclass
class Boards:
    """A migrated database and what the boards ask of it, with the rights that Grafana has."""

    connection: psycopg.Connection[Any]
    edition: Edition
    end: datetime
    """The newest row is of this moment, the oldest an hour earlier."""

    def view(self, **changes: Any) -> View:
        return View(**{"begin": self.end - timedelta(hours=1), "end": self.end, **changes})

    def ask(self, sql: str, view: View) -> tuple[list[tuple[str, str]], list[tuple[Any, ...]]]:
        """Run a query; returns (name, type) of its columns, and its rows."""
        cursor = self.connection.execute(expand(sql, view).encode(), prepare=False)
        types = self.connection.adapters.types
        shown = cursor.description or []
        return [(it.name, getattr(types.get(it.type_code), "name", "?")) for it in shown], cursor.fetchall()

    def one(self, name: str, **changes: Any) -> list[dict[str, Any]]:
        columns, rows = self.ask(QUERIES[name].sql, self.view(**changes))
        return [dict(zip([column for column, _ in columns], row, strict=True)) for row in rows]


Fresh = Callable[[], AbstractContextManager[str]]
"""Makes an empty database and yields its URL."""


@pytest.fixture(scope="module", params=["given"] if GIVEN_URL else EDITIONS)
def fresh(request: pytest.FixtureRequest) -> Iterator[Fresh]:
    """A maker of databases of each edition asked for; that in WebAssembly is a server for each, of one connection."""
    with ExitStack() as stack:
        if request.param == "timescale":
            yield editions.timescale
        else:
            server = GIVEN_URL or stack.enter_context(getattr(editions, request.param)())
            numbers = count()
            yield lambda: database_on(server, f"boards_{os.getpid()}_{next(numbers)}")


@contextmanager
def database_on(server: str, name: str) -> Iterator[str]:
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield psycopg.conninfo.make_conninfo(server, dbname=name)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def opened(url: str, edition: Edition, end: datetime) -> Iterator[Boards]:
    """Connect as a member of the role that Grafana's account has."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET timezone = 'UTC'")
        connection.execute("SET ROLE orbitstream_read")
        yield Boards(connection, edition, end)


def fill(url: str, end: datetime) -> None:
    """Store ROWS readings of SATELLITES over the hour before `end`, one in a hundred an anomaly, and two lanes."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
            "  received_at, is_anomaly)"
            " SELECT %(end)s - n * interval '1 hour' / %(rows)s, 'SAT-' || lpad((n %% %(satellites)s)::text, 5, '0'),"
            "  CASE WHEN n %% 97 = 0 THEN 5 ELSE 20 + n %% 71 END, (n %% 1000) * 80, -60 - n %% 30,"
            "  %(end)s - n * interval '1 hour' / %(rows)s + interval '20 ms', n %% 97 = 0"
            " FROM generate_series(1, %(rows)s) AS n",
            {"end": end, "rows": ROWS, "satellites": SATELLITES},
        )
        for lane in range(2):
            connection.execute(
                "INSERT INTO ingest_progress (lane, position, committed_points, flushes, node)"
                " VALUES (gen_random_uuid(), 4096, %s, 50, %s)",
                [ROWS // 2, f"node-{lane}"],
            )
        connection.execute("ANALYZE")


def say(config: pytest.Config, *lines: str) -> None:
    """Write lines to the terminal, also while output is captured."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    assert reporter is not None and capture is not None
    with capture.global_and_fixture_disabled():
        for line in ("", *lines):
            reporter.write_line(line)


@pytest.fixture(scope="module")
def milliseconds(fresh: Fresh, request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """What each query took, written out when all have run."""
    taken: dict[str, float] = {}
    yield taken
    slowest_first = sorted(taken.items(), key=lambda item: -item[1])
    say(request.config, *(f"  {best:7.1f} ms  {name}" for name, best in slowest_first))


@pytest.fixture(scope="module")
def boards(fresh: Fresh, request: pytest.FixtureRequest) -> Iterator[Boards]:
    """A database with an hour of points."""
    with fresh() as url:
        edition = migrate(settings.load({}), url, lambda _: None)
        say(request.config, f"the dashboards ask {edition}")
        end = datetime.now(UTC).replace(microsecond=0)
        fill(url, end)
        with opened(url, edition, end) as filled:
            yield filled


@pytest.fixture(scope="module")
def empty_boards(fresh: Fresh) -> Iterator[Boards]:
    """A database that has just been migrated."""
    with fresh() as url:
        edition = migrate(settings.load({}), url, lambda _: None)
        with opened(url, edition, datetime.now(UTC)) as empty:
            yield empty


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_finds_rows_and_soon(name: str, boards: Boards, milliseconds: dict[str, float]) -> None:
    """The data source says timescaledb, whatever the server is: both expansions must run on both."""
    query = QUERIES[name]
    for timescaledb in (False, True):
        columns, rows = boards.ask(query.sql, boards.view(timescaledb=timescaledb))
        assert rows
        check_frame(query, columns, rows)
    milliseconds[name] = min(timed(lambda: boards.ask(query.sql, boards.view())) for _ in range(3))
    assert milliseconds[name] < SLOWEST_MS


def check_frame(query: Query, columns: list[tuple[str, str]], rows: list[tuple[Any, ...]]) -> None:
    """Check that Grafana can show the result: known types; in a time series a `time`, numbers, at most one name."""
    assert {kind for _, kind in columns} <= SHOWN_TYPES
    assert len({name for name, _ in columns}) == len(columns)
    if query.format == "time_series":
        kinds = dict(columns)
        assert kinds.pop("time") == "timestamptz"
        assert kinds.pop("metric", "text") == "text"
        assert set(kinds.values()) <= NUMBERS
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def timed(work: Callable[[], object]) -> float:
    """Return the milliseconds that `work` takes."""
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


@pytest.mark.parametrize("seconds", [0.5, 1, 30, 300, 3600, 86_400, 31_536_000])
def test_every_query_runs_at_every_interval(seconds: float, boards: Boards) -> None:
    for query in QUERIES.values():
        boards.ask(query.sql, boards.view(interval=timedelta(seconds=seconds)))


def test_every_query_runs_before_the_first_point(empty_boards: Boards) -> None:
    for query in QUERIES.values():
        empty_boards.ask(query.sql, empty_boards.view())
    assert empty_boards.one("overview / variable satellite") == [{"satellite_id": "-"}]


def test_the_numbers_at_the_top_are_right(boards: Boards) -> None:
    anomalous = ROWS // 97
    assert boards.one("overview / 4 Points in range") == [
        {"points": ROWS, "anomalies": anomalous, "anomaly share": anomalous / ROWS}
    ]
    assert boards.one("overview / 2 Satellites reporting") == [{"satellites": SATELLITES}]
    [stored] = boards.one("overview / 1 Stored now")
    assert stored["points/s"] == pytest.approx(ROWS / 3600, rel=0.01)
    [newest] = boards.one("overview / 3 Newest row")
    assert 0 <= newest["ago"] < 120
    [total] = boards.one("overview / 12 Since the beginning")
    assert total == {"points": ROWS, "flushes": 100, "points per flush": ROWS / 100, "lanes": 2}


def test_throughput_has_whole_intervals_only_and_zeros_in_silence(boards: Boards) -> None:
    end, step = boards.end + timedelta(minutes=10, seconds=3), timedelta(seconds=30)
    begin = end - timedelta(minutes=20)
    rows = boards.one("overview / 11 Points stored", begin=begin, end=end, interval=step)
    times = [row["time"] for row in rows]
    assert begin <= times[0] < begin + step and end - 2 * step < times[-1] <= end - step
    assert {later - earlier for earlier, later in pairwise(times)} == {step}
    before = [row["stored"] for row in rows if row["time"] < boards.end - step]
    after = [row["stored"] for row in rows if row["time"] > boards.end]
    assert before and all(rate == pytest.approx(ROWS / 3600, rel=0.05) for rate in before)
    assert len(after) >= 18 and set(after) == {0}


def test_anomalies_per_minute_add_up(boards: Boards) -> None:
    rows = boards.one("overview / 21 Anomalies", interval=timedelta(minutes=1))
    assert sum(row["anomalies"] for row in rows) == pytest.approx(ROWS // 97, abs=20)
    shares = boards.one("overview / 22 Anomaly share", interval=timedelta(minutes=1))
    assert all(row["share"] == pytest.approx(1 / 97, abs=0.003) for row in shares[1:-1])


def test_the_newest_anomalies_come_first(boards: Boards) -> None:
    rows = boards.one("overview / 23 Most recent anomalies")
    assert len(rows) == 100
    assert [row["time"] for row in rows] == sorted((row["time"] for row in rows), reverse=True)
    assert rows[0]["Battery"] == 5 and rows[0]["Delay"] == pytest.approx(0.02)


def test_bands_hold_the_median(boards: Boards) -> None:
    rows = boards.one("overview / 31 Battery of the fleet")
    assert all(row["p5"] <= row["p50"] <= row["p95"] for row in rows)


@pytest.mark.parametrize("name", ["O'Neill", "a\\b", "ürbit", "x'); SELECT ('"])
def test_a_satellite_is_chosen_whatever_its_name(name: str, boards: Boards) -> None:
    assert boards.one("overview / 41 Battery", satellites=(name,)) == []
    rows = boards.one("overview / 41 Battery", satellites=(name, "SAT-00007"))
    assert {row["metric"] for row in rows} == {"SAT-00007"}


def test_the_variable_lists_the_satellites_in_order(boards: Boards) -> None:
    rows = boards.one("overview / variable satellite")
    assert [row["satellite_id"] for row in rows] == [f"SAT-{number:05}" for number in range(SATELLITES)]


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM telemetry", "UPDATE ingest_progress SET flushes = 0", "CREATE TABLE mine ()", "DROP TABLE telemetry"],
)
def test_grafanas_role_can_only_read(statement: str, boards: Boards) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        boards.connection.execute(statement.encode())
