"""Every query of every dashboard on a real database, expanded as Grafana's backend expands it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import psycopg
import pytest

from bench import hour
from bench.boards import Boards, Query, View, all_queries, expand, opened, timed
from engine import data_folder, samples, settings
from engine.migrate import migrate
from tests.conftest import EDITIONS, GIVEN_URL
from tests.servers import editions

ROWS, SATELLITES, EPISODES = 50_000, 100, 300
SLOWEST_MS = 2000
"""What they take is written out: tens of milliseconds; this holds on a loaded machine, and in WebAssembly."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# What Grafana's backend makes of a column; anything else arrives as text or not at all.
SHOWN_TYPES = {"bool", "int2", "int4", "int8", "float4", "float8", "text", "timestamptz"}
NUMBERS = {"int2", "int4", "int8", "float4", "float8"}


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


QUERIES = {query.name: query for query in all_queries()}

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


def fill(url: str, end: datetime) -> None:
    """Store an hour of everything that the boards read."""
    with psycopg.connect(url, autocommit=True) as connection:
        hour.insert_points(connection, end, SATELLITES, ROWS)
        hour.surround(connection, end, SATELLITES, EPISODES)
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


def test_a_point_that_nobody_can_account_for_is_on_the_board_and_an_alert(boards: Boards) -> None:
    """Two lanes, one with a point too many and one with a point too few, do not make up for each other."""
    boards.connection.execute("RESET ROLE")
    with boards.connection.transaction(force_rollback=True):
        boards.connection.execute(
            "INSERT INTO engine_stats (time, node, process, name, first_of_minute, alive, residual)"
            " SELECT now(), 'other', 'worker', 'lane-' || residual, true, true, residual FROM unnest('{2,-2}'::int[])"
            " AS residual"
        )
        boards.connection.execute("SET LOCAL ROLE orbitstream_read")
        end = boards.end + timedelta(minutes=5)
        assert boards.one("capacity / 6 Residual", end=end) == [{"points": 4}]
        assert max(row["points"] for row in boards.one("capacity / 23 Conservation residual", end=end)) == 2
        [alert] = boards.one("alert / orbitstream-residual", end=end)
        assert alert["value"] == 4
    boards.connection.execute("SET ROLE orbitstream_read")


def test_maintenance_samples_what_the_boards_read(fresh: Fresh) -> None:
    with fresh() as url:
        migrate(settings.load({}), url, lambda _: None)
        fill(url, datetime.now(UTC).replace(microsecond=0))
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("TRUNCATE fleet_stats, database_stats, slow_query")
            connection.execute("DO 'BEGIN PERFORM ''PASSWORD''; END'")  # kept with its text, as no query's is
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
            slow = connection.execute("SELECT query, calls > 0 AND mean_ms <= worst_ms FROM slow_query").fetchall()
            loaded = connection.execute("SELECT to_regclass('pg_stat_statements') IS NOT NULL").fetchone()
            assert (bool(slow),) == loaded and all(right for _, right in slow)
            assert not any("PASSWORD" in query for query, _ in slow)


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM telemetry", "UPDATE ingest_progress SET flushes = 0", "CREATE TABLE mine ()", "DROP TABLE telemetry"],
)
def test_grafanas_role_can_only_read(statement: str, boards: Boards) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        boards.connection.execute(statement.encode())
