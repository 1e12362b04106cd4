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
from itertools import count
from typing import Any

import psycopg
import pytest

from engine import data_folder, samples, settings
from engine.migrate import Edition, migrate
from tests.conftest import EDITIONS, GIVEN_URL
from tests.servers import editions

ROWS, SATELLITES = 50_000, 100
SLOWEST_MS = 2000
"""What they take is written out: tens of milliseconds; this holds on a loaded machine, and in WebAssembly."""
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


AN_HOUR = timedelta(seconds=10)


@dataclass(frozen=True)
class Query:
    """One query of a board."""

    name: str
    sql: str
    format: str
    interval: timedelta = AN_HOUR
    """Between two points of a curve: of an hour on a screen, or the shortest that its panel allows."""


def all_queries() -> list[Query]:
    """Collect the queries of every panel, variable and annotation of every board, and of every alert."""
    found = []
    for path in sorted((data_folder("grafana") / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                name = f"{path.stem} / {panel['id']} {panel['title']}"
                shortest = timedelta(seconds=parse_interval(panel.get("interval", "1s")))
                interval = max(AN_HOUR, shortest)
                found.append(Query(name, target["rawSql"], target["format"], interval))
        for variable in board["templating"]["list"]:
            found.append(Query(f"{path.stem} / variable {variable['name']}", variable["query"], "table"))
        for annotation in board["annotations"]["list"]:
            found.append(Query(f"{path.stem} / annotation", annotation["target"]["rawSql"], "table"))
    [rules] = json.loads((data_folder("grafana") / "provisioning/alerting/orbitstream.yaml").read_text())["groups"]
    for rule in rules["rules"]:
        found.append(Query(f"alert / {rule['uid']}", rule["data"][0]["model"]["rawSql"], "time_series"))
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
    """Store an hour of everything that the boards read: points, stats of the engine, samples, episodes, two lanes."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO telemetry (time, satellite_id, battery_charge_percent, storage_usage_mb, signal_strength_dbm,"
            "  received_at, is_anomaly, latitude, longitude, altitude_km, velocity_kmph, temperature_c, bus_voltage_v)"
            " SELECT %(end)s - n * interval '1 hour' / %(rows)s, 'SAT-' || lpad((n %% %(satellites)s)::text, 5, '0'),"
            "  CASE WHEN n %% 97 = 0 THEN 5 ELSE 20 + n %% 71 END, (n %% 1000) * 80, -60 - n %% 30,"
            "  %(end)s - n * interval '1 hour' / %(rows)s + interval '20 ms', n %% 97 = 0,"
            "  n %% 180 - 90, n %% 360 - 180, 550, 27000, 20, 28"
            " FROM generate_series(1, %(rows)s) AS n",
            {"end": end, "rows": ROWS, "satellites": SATELLITES},
        )
        connection.execute(
            "INSERT INTO satellite_latest SELECT DISTINCT ON (satellite_id) * FROM telemetry"
            " ORDER BY satellite_id, time DESC ON CONFLICT DO NOTHING"
        )
        for lane in range(2):
            connection.execute(
                "INSERT INTO ingest_progress (lane, position, committed_points, flushes, node)"
                " VALUES (gen_random_uuid(), 4096, %s, 50, %s)",
                [ROWS // 2, f"node-{lane}"],
            )
        for statement in ";".join((STATS_OF_AN_HOUR, SAMPLES_OF_AN_HOUR, EPISODES_OF_AN_HOUR)).split(";"):
            connection.execute(statement.encode(), {"end": end, "satellites": SATELLITES})
        connection.execute("ANALYZE")


# A worker takes 1,000 points a second, of which a writer, busy a quarter of its time, stores all in 10 transactions.
STATS_OF_AN_HOUR = """
    INSERT INTO engine_stats (time, node, process, name, first_of_minute, alive, accepted, refused, settled, residual,
        queue_points, queue_bytes, capacity_bytes, cpu_s, memory_bytes)
    SELECT %(end)s - (3600 - n) * interval '1 second', 'one', 'worker', 'lane-000' || lane, n %% 60 = 0, true, n * 500,
        0, n * 500 - 10, 0, 10 + n, 100000 + n * 1000, 16000000, n * 0.2, 40000000
    FROM generate_series(1::bigint, 3600) AS n, generate_series(0, 1) AS lane;
    INSERT INTO engine_stats (time, node, process, name, first_of_minute, alive, committed, dead_lettered, anomalies,
        flushes, failures, stopped_lanes, busy_s, flush_p50_ms, flush_p99_ms, arrival_p50_ms, arrival_p99_ms, cpu_s,
        memory_bytes)
    SELECT %(end)s - (3600 - n) * interval '1 second', 'one', 'writer', 'writer-0', n %% 60 = 0, true, n * 1000, 0,
        n * 10, n * 10, 0, 0, n * 0.25, 5, 20, 15, CASE WHEN n %% 200 = 0 THEN 150 ELSE 60 END, n * 0.3, 60000000
    FROM generate_series(1::bigint, 3600) AS n"""
SAMPLES_OF_AN_HOUR = """
    INSERT INTO capacity VALUES (%(end)s, 'one', 40000, 50000, 80000, 60, 2, '{}');
    INSERT INTO storage_stats SELECT %(end)s - (60 - n) * interval '1 minute', 1000000000 + n * 60000000,
        800000000 + n * 60000000, 100000000, n * 1000000, 10, 4, 100000000000, 90000000000 - n * 60000000
    FROM generate_series(1::bigint, 60) AS n ON CONFLICT DO NOTHING;
    INSERT INTO fleet_stats SELECT %(end)s - (60 - n) * interval '1 minute', channel, 100, 90 + n %% 10, 1, 10, 50, 90,
        99, array_fill(5, ARRAY[20])
    FROM generate_series(1::bigint, 60) AS n, unnest(ARRAY['battery_charge_percent', 'storage_usage_mb',
        'signal_strength_dbm']) AS channel;
    INSERT INTO database_stats SELECT %(end)s - (60 - n) * interval '1 minute', 5, 100, n * 600, n, n * 9000, n * 1000,
        0, n * 60, 0, n * 60000000, 30, 5, 1
    FROM generate_series(1::bigint, 60) AS n"""
EPISODES_OF_AN_HOUR = """
    INSERT INTO anomaly_event (satellite_id, channel, severity, kind, limit_value, onset, cleared_at, peak, peak_at,
        points)
    SELECT 'SAT-' || lpad((n %% %(satellites)s)::text, 5, '0'), 'battery_charge_percent',
        CASE WHEN n %% 2 = 0 THEN 'critical' ELSE 'warning' END, 'below', 10, onset,
        CASE WHEN n > 10 THEN onset + n * interval '1 second' END, 5, onset, 7
    FROM generate_series(1, 300) AS n, LATERAL (SELECT %(end)s - n * interval '10 seconds') AS begun (onset)"""


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
        columns, rows = boards.ask(query.sql, boards.view(timescaledb=timescaledb, interval=query.interval))
        # Background jobs are the policies, which a lesser license does not have.
        assert rows or ("Background jobs" in name and boards.edition.name != "timescale")
        check_frame(query, columns, rows)
    view = boards.view(interval=query.interval)
    milliseconds[name] = min(timed(lambda: boards.ask(query.sql, view)) for _ in range(2))
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
    assert empty_boards.one("fleet / variable satellite") == [{"satellite_id": "-"}]


def test_the_capacity_board_is_right(boards: Boards) -> None:
    assert boards.one("capacity / 1 Committed now") == [{"points/s": pytest.approx(1000, rel=0.01)}]
    assert boards.one("capacity / 2 Refused") == [{"points/s": 0}]
    room = {"by the writers": pytest.approx(4, rel=0.01), "to the knee": pytest.approx(40, rel=0.01)}
    assert boards.one("capacity / 3 Head-room") == [room]
    assert boards.one("capacity / 4 Fullest lane") == [{"full": pytest.approx(3_700_000 / 16_000_000)}]
    assert boards.one("capacity / 5 Seconds until full") == [{"until full": pytest.approx(12_300, rel=0.01)}]
    assert boards.one("capacity / 6 Residual") == [{"points": 0}]
    assert boards.one("capacity / 52 Disk full in") == [{"until full": pytest.approx(86_400, rel=0.05)}]
    # 18 of 3,600 seconds are over: half of the 1 % that may be.
    assert boards.one("capacity / 33 Error budget left") == [{"left": pytest.approx(0.5, abs=0.01)}]


@pytest.mark.parametrize("seconds", [1, 10, 60, 300])
def test_rates_are_the_same_at_every_interval(seconds: int, boards: Boards) -> None:
    rows = boards.one("capacity / 11 Points a second", interval=timedelta(seconds=seconds))
    assert len(rows) > 3000 / seconds
    for row in rows:
        assert (row["accepted"], row["refused"], row["committed"]) == (pytest.approx(1000), 0, pytest.approx(1000))
    busy = boards.one("capacity / 41 Writers busy", interval=timedelta(seconds=seconds))
    assert {row["metric"] for row in busy} == {"one writer-0"}
    assert all(row["busy"] == pytest.approx(0.25) for row in busy)


def test_a_short_range_reads_points_and_a_long_one_aggregates(boards: Boards) -> None:
    name = "satellite / 11 Battery"
    near = boards.one(name, satellites=("SAT-00007",), interval=timedelta(minutes=5))
    wide = boards.one(
        name, satellites=("SAT-00007",), begin=boards.end - timedelta(hours=6), interval=timedelta(minutes=5)
    )
    inner = [row for row in wide if row in near]
    assert len(inner) >= len(near) - 2 > 8, "the same numbers, but for the buckets that the range cuts"


def test_a_severity_is_shown_while_it_lasts(boards: Boards) -> None:
    rows = boards.one("fleet / 22 Chosen satellites", interval=timedelta(seconds=10))
    assert {row["metric"] for row in rows} == {"SAT-00001", "SAT-00002"} and {row["level"] for row in rows} <= {0, 1, 2}
    last = {row["metric"]: row["level"] for row in rows}
    assert last == {"SAT-00001": 1, "SAT-00002": 2}
    assert len({row["metric"] for row in boards.one("fleet / 21 The 25 worst")}) == 25


@pytest.mark.parametrize("name", ["O'Neill", "a\\b", "ürbit", "x'); SELECT ('"])
def test_a_satellite_is_chosen_whatever_its_name(name: str, boards: Boards) -> None:
    assert boards.one("satellite / 11 Battery", satellites=(name,)) == []
    assert boards.one("satellite / 11 Battery", satellites=(name, "SAT-00007"))


def test_alerts_are_quiet_when_all_is_well_and_loud_when_it_is_not(boards: Boards) -> None:
    [group] = json.loads((data_folder("grafana") / "provisioning/alerting/orbitstream.yaml").read_text())["groups"]
    firing = set()
    for rule in group["rules"]:
        [row] = boards.one(f"alert / {rule['uid']}")
        if (
            row["value"] is not None
            and row["value"] > rule["data"][2]["model"]["conditions"][0]["evaluator"]["params"][0]
        ):
            firing.add(rule["uid"])
    assert firing <= {"orbitstream-disk-full", "orbitstream-satellite-silent", "orbitstream-database-down"}
    assert "orbitstream-disk-full" in firing


def test_maintenance_samples_what_the_boards_read(fresh: Fresh) -> None:
    with fresh() as url:
        migrate(settings.load({}), url, lambda _: None)
        fill(url, datetime.now(UTC).replace(microsecond=0))
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("TRUNCATE fleet_stats, database_stats")
            samples.take(connection)
            fleet = connection.execute(
                "SELECT channel, satellites, reporting, low <= p5 AND p5 <= p50 AND p50 <= p95 AND p95 <= high,"
                " (SELECT sum(number) FROM unnest(histogram) AS number) FROM fleet_stats ORDER BY 1"
            ).fetchall()
            assert [(row[0], row[3]) for row in fleet] == [(channel, True) for channel in sorted(samples.CHANNELS)]
            assert {row[1] for row in fleet} == {SATELLITES} and fleet[0][4] == fleet[0][2] > 0
            taken = connection.execute(
                "SELECT connections >= 0, raw_ms > 0, five_minutes_ms > 0, hourly_ms > 0 FROM database_stats"
            ).fetchall()
            assert taken == [(True, True, True, True)]


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM telemetry", "UPDATE ingest_progress SET flushes = 0", "CREATE TABLE mine ()", "DROP TABLE telemetry"],
)
def test_grafanas_role_can_only_read(statement: str, boards: Boards) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        boards.connection.execute(statement.encode())
