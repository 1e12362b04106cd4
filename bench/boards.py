"""The queries of every board and alert, and how Grafana asks them.

No Grafana runs here: `expand` is its macro engine for PostgreSQL, rule by rule.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import psycopg

from engine import data_folder
from engine.migrate import Edition


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


@dataclass(frozen=True)
class Query:
    """One query of a board."""

    name: str
    sql: str
    format: str
    shortest: timedelta = timedelta(seconds=1)
    """The least time between two points of a curve that its panel allows."""

    @property
    def interval(self) -> timedelta:
        """Between two points of a curve, of an hour on a screen."""
        return max(timedelta(seconds=10), self.shortest)


@cache
def all_queries() -> tuple[Query, ...]:
    """Collect the queries of every panel, variable and annotation of every board, and of every alert."""
    found = []
    for path in sorted((data_folder("grafana") / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                name = f"{path.stem} / {panel['id']} {panel['title']}"
                shortest = timedelta(seconds=parse_interval(panel.get("interval", "1s")))
                found.append(Query(name, target["rawSql"], target["format"], shortest))
        for variable in board["templating"]["list"]:
            found.append(Query(f"{path.stem} / variable {variable['name']}", variable["query"], "table"))
        for annotation in board["annotations"]["list"]:
            found.append(Query(f"{path.stem} / annotation", annotation["target"]["rawSql"], "table"))
    [rules] = json.loads((data_folder("grafana") / "provisioning/alerting/orbitstream.yaml").read_text())["groups"]
    for rule in rules["rules"]:
        found.append(Query(f"alert / {rule['uid']}", rule["data"][0]["model"]["rawSql"], "time_series"))
    return tuple(found)


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
        """Run the query of that name; returns its rows by column."""
        [query] = [query for query in all_queries() if query.name == name]
        columns, rows = self.ask(query.sql, self.view(**changes))
        return [dict(zip([column for column, _ in columns], row, strict=True)) for row in rows]


@contextmanager
def opened(url: str, edition: Edition, end: datetime) -> Iterator[Boards]:
    """Connect as a member of the role that Grafana's account has."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET timezone = 'UTC'")
        connection.execute("SET ROLE orbitstream_read")
        yield Boards(connection, edition, end)


def timed(work: Callable[[], object]) -> float:
    """Return the milliseconds that `work` takes."""
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000
