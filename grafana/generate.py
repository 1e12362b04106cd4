"""Write the dashboards of dashboards/*.json: python grafana/generate.py [--check]

A board is a plain dict of Grafana's classic dashboard JSON. The JSON is committed, since Grafana reads files; what is
edited is this program, and `--check` exits 1 when the files are not what it would write.

The SQL runs on PostgreSQL alone as on TimescaleDB, hence date_bin and not $__timeGroup, which Grafana turns into
time_bucket for a data source with TimescaleDB. Every query is bounded by the range of the board or by a LIMIT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from panels import SOURCE, Json, board, override, row, stat, table, thresholds, timeseries

FOLDER: Final = Path(__file__).resolve().parent / "dashboards"


class Channel(NamedTuple):
    """A channel of the fleet: its column, name and unit, its default anomaly limit, and what the scale needs."""

    column: str
    name: str
    unit: str
    limit: float
    cell: Json
    scale: Json


# The limits that the service has by default (ANOMALY_THRESHOLD_*). Grafana cannot read the service's settings: where
# those are changed, only the colours and lines here stay behind; is_anomaly in the database is what counts.
BATTERY: Final = Channel("battery_charge_percent", "Battery", "percent", 10,
                         thresholds(("red", None), ("green", 10)), {"min": 0, "max": 100})  # fmt: skip
STORAGE: Final = Channel("storage_usage_mb", "Storage used", "decmbytes", 95_000,
                         thresholds(("green", None), ("red", 95_000)), {"min": 0})  # fmt: skip
SIGNAL: Final = Channel("signal_strength_dbm", "Signal", "dBm", -100,
                        thresholds(("red", None), ("green", -100)), {})  # fmt: skip

SILENCE: Final = thresholds(("green", None), ("orange", 10), ("red", 60))
"""Seconds without a commit: the service commits every few ms while points arrive."""

# -- SQL

# `$__interval` can say things that PostgreSQL reads otherwise (1M) or date_bin refuses (1y); milliseconds cannot.
STEP: Final = "make_interval(secs => $__interval_ms / 1000.0)"
TO: Final = "$__timeTo()::timestamptz"
IN_RANGE: Final = "$__timeFilter(time)"


def bucket(column: str) -> str:
    """Return SQL for the start of the interval that `column` lies in."""
    return f"date_bin({STEP}, {column}, 'epoch')"


def per_bucket(column: str, where: str, name: str, per_ms: int) -> str:
    """Return SQL for the rows in each interval as a rate `per_ms` milliseconds, 0 where there are none.

    Silence must look like silence, so the intervals come from the range and not from the rows. Those that the ends of
    the range cut are left out: they would look like a drop.
    """
    return (
        f"WITH whole AS (\n  SELECT {STEP} AS step,\n    {bucket('$__timeFrom()::timestamptz')} + {STEP} AS begins,\n"
        f"    {bucket(TO)} AS ends\n),\n"
        f"counted AS (\n  SELECT date_bin(step, {column}, 'epoch') AS \"time\", count(*) AS points\n"
        f"  FROM telemetry, whole\n  WHERE {where} AND {column} >= begins AND {column} < ends\n  GROUP BY 1\n)\n"
        f'SELECT "time", coalesce(points, 0) * {per_ms} / $__interval_ms::float8 AS "{name}"\n'
        'FROM whole\nCROSS JOIN generate_series(begins, ends - step, step) AS span("time")\n'
        'LEFT JOIN counted USING ("time")\nORDER BY 1'
    )


def walk(where: str) -> str:
    """Return SQL for the CTE `walk(satellite_id)`: the satellites with a row that fits, in order, NULL at the end.

    It goes from one satellite to the next along the index (satellite_id, time), so that it costs a probe a satellite;
    DISTINCT would read every row.
    """
    probe = f"SELECT satellite_id FROM telemetry WHERE {{}}{where} ORDER BY satellite_id LIMIT 1"
    return (
        f"WITH RECURSIVE walk(satellite_id) AS (\n  ({probe.format('')})\n  UNION ALL\n"
        f"  SELECT ({probe.format('satellite_id > walk.satellite_id AND ')}) FROM walk\n"
        "  WHERE walk.satellite_id IS NOT NULL\n)\n"
    )


def percentiles(column: str) -> str:
    """Return SQL for the 5th, 50th and 95th percentile of a column over the fleet, for each interval."""
    shown = ",\n".join(
        f'  percentile_cont({share}) WITHIN GROUP (ORDER BY {column}) AS "{name}"'
        for name, share in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95))
    )
    return f'SELECT\n  {bucket("time")} AS "time",\n{shown}\nFROM telemetry\nWHERE {IN_RANGE}\nGROUP BY 1\nORDER BY 1'


def of_chosen(column: str) -> str:
    """Return SQL for the mean of a column in each interval, a series for each satellite chosen."""
    return (
        f'SELECT {bucket("time")} AS "time", satellite_id AS metric, avg({column}) AS "mean"\n'
        f"FROM telemetry\nWHERE {IN_RANGE} AND satellite_id IN (${{satellite:sqlstring}})\n"
        "GROUP BY 1, 2\nORDER BY 1, 2"
    )


# -- the overview


def satellite_variable() -> Json:
    """Return the variable `satellite`: one or several of those heard from in the range.

    An empty list of options would make `IN ()` of the panels' SQL, which is an error: before the first point there is
    one option that is no satellite's name.
    """
    sql = (
        walk(IN_RANGE) + "SELECT satellite_id FROM walk WHERE satellite_id IS NOT NULL\n"
        "UNION ALL\nSELECT '-' WHERE NOT EXISTS (SELECT FROM walk WHERE satellite_id IS NOT NULL)"
    )
    return {
        "name": "satellite",
        "label": "Satellites",
        "description": "Whose trends to show at the bottom.",
        "type": "query",
        "datasource": SOURCE,
        "definition": sql,
        "query": sql,
        "refresh": 2,
        "multi": True,
        "includeAll": False,
        "sort": 0,
        "regex": "",
        "hide": 0,
        "current": {},
        "options": [],
    }


def at_a_glance() -> list[Json]:
    return [
        stat(
            1, (5, 4), "Stored now",
            "Points per second that the service received in the last minute of the range and has committed. Points "
            "whose own time lies outside of the range are not counted.",
            f'SELECT count(*) / 60.0::float8 AS "points/s"\nFROM telemetry\n'
            f"WHERE {IN_RANGE} AND received_at > {TO} - interval '1 minute' AND received_at <= {TO}",
            unit="rowsps", field={"decimals": 1},
        ),
        stat(
            2, (4, 4), "Satellites reporting", "Satellites with a reading from the last minute of the range.",
            walk(f"time > {TO} - interval '1 minute' AND time <= {TO}")
            + 'SELECT count(satellite_id) AS "satellites" FROM walk',
            unit="short", limit=thresholds(("red", None), ("green", 1)), field={"decimals": 0},
        ),
        stat(
            3, (5, 4), "Newest row",
            "How long ago the service last committed points, by its delivery ledger, whatever the range. It grows "
            "while nothing arrives and while the database is away.",
            'SELECT greatest(0, extract(epoch FROM now() - max(updated_at)))::float8 AS "ago"\n'
            "FROM ingest_progress\nWHERE committed_points > 0\nHAVING count(*) > 0",
            unit="s", limit=SILENCE, field={"decimals": 1, "noValue": "never"},
        ),
        stat(
            4, (10, 4), "Points in range",
            "Committed points whose own time lies in the range, how many of them the service marked as anomalies, "
            "and the share of these.",
            'SELECT\n  count(*) AS "points",\n  count(*) FILTER (WHERE is_anomaly) AS "anomalies",\n'
            '  count(*) FILTER (WHERE is_anomaly) / nullif(count(*), 0)::float8 AS "anomaly share"\n'
            f"FROM telemetry\nWHERE {IN_RANGE}",
            unit="short",
            overrides=[
                override("anomaly share", unit="percentunit", decimals=2,
                         thresholds=thresholds(("green", None), ("orange", 0.02), ("red", 0.05))),
            ],
        ),
    ]  # fmt: skip


def throughput() -> list[Json]:
    return row(
        10, "Throughput",
        timeseries(
            11, (17, 8), "Points stored",
            "Committed points per second by the time the service received them. An interval is shown when it is over. "
            "Points whose own time lies outside of the range are not counted.",
            per_bucket("received_at", IN_RANGE, "stored", 1000),
            unit="rowsps", field={"min": 0},
        ),
        stat(
            12, (7, 8), "Since the beginning",
            "What the delivery ledger has counted since the database was made: points committed, transactions, points "
            "in one transaction on average, lanes ever drained. The range does not matter.",
            'SELECT\n  sum(committed_points)::float8 AS "points",\n  sum(flushes)::float8 AS "flushes",\n'
            '  sum(committed_points)::float8 / nullif(sum(flushes), 0) AS "points per flush",\n'
            '  count(*) AS "lanes"\nFROM ingest_progress',
            unit="short",
        ),
    )  # fmt: skip


def anomalies() -> list[Json]:
    return row(
        20, "Anomalies",
        timeseries(
            21, (12, 8), "Anomalies",
            "Points per minute that the service marked as anomalies, by the time of the reading. An interval is shown "
            "when it is over.",
            per_bucket("time", f"is_anomaly AND {IN_RANGE}", "anomalies", 60_000),
            unit="suffix: /min", points=120, interval="5s", bars=True, field={"min": 0},
        ),
        timeseries(
            22, (12, 8), "Anomaly share",
            "Anomalies as a share of all points of the interval; no value where there are no points. The dashed lines "
            "at 2 % and 5 % are a starting point: the simulator makes 1 %.",
            f'SELECT\n  {bucket("time")} AS "time",\n'
            '  count(*) FILTER (WHERE is_anomaly) / count(*)::float8 AS "share"\n'
            f"FROM telemetry\nWHERE {IN_RANGE}\nGROUP BY 1\nORDER BY 1",
            unit="percentunit", lines=(("orange", 0.02), ("red", 0.05)), points=120, interval="5s", field={"min": 0},
        ),
        recent_anomalies(),
    )  # fmt: skip


def recent_anomalies() -> Json:
    link = {
        "title": "Trends of ${__value.text}",
        "url": "/d/orbitstream-overview?var-satellite=${__value.text:percentencode}&${__url_time_range}",
    }
    columns = ",\n  ".join(f'{channel.column} AS "{channel.name}"' for channel in (BATTERY, STORAGE, SIGNAL))
    return table(
        23, (24, 8), "Most recent anomalies",
        "The last 100 anomalies of the range, newest first. A value beyond the default limits is red. A click on a "
        "satellite shows its trends below. Delay is from the reading to its arrival.",
        f'SELECT\n  time, satellite_id AS "Satellite",\n  {columns},\n'
        '  extract(epoch FROM received_at - time)::float8 AS "Delay"\n'
        f"FROM telemetry\nWHERE is_anomaly AND {IN_RANGE}\nORDER BY time DESC\nLIMIT 100",
        overrides=[
            override("Satellite", links=[link]),
            *(
                override(channel.name, unit=channel.unit, thresholds=channel.cell,
                         custom__cellOptions={"type": "color-text"})
                for channel in (BATTERY, STORAGE, SIGNAL)
            ),
            override("Delay", unit="s"),
        ],
    )  # fmt: skip


def band(id: int, title: str, channel: Channel) -> Json:
    """Return the panel of a channel over the whole fleet: the median in a band from the 5th to the 95th percentile."""
    blue = {"mode": "fixed", "fixedColor": "blue"}
    return timeseries(
        id, (8, 8), title,
        "Median over all points of the fleet (p50), in the band that holds nine points of ten (p5 to p95). The dashed "
        "line is the default anomaly limit. Computed from every point of the range: the longer it is, the slower.",
        percentiles(channel.column), unit=channel.unit, lines=(("red", channel.limit),), points=120, interval="5s",
        field=channel.scale,
        overrides=[
            override("p5", color=blue, custom__lineWidth=0, custom__fillOpacity=0),
            override("p95", color=blue, custom__lineWidth=0, custom__fillOpacity=25, custom__fillBelowTo="p5"),
            override("p50", color=blue, custom__lineWidth=2, custom__fillOpacity=0),
        ],
    )  # fmt: skip


def trend(id: int, channel: Channel) -> Json:
    """Return the panel of a channel for the satellites chosen."""
    return timeseries(
        id, (8, 8), channel.name,
        "Mean in each interval for the satellites chosen at the top. The dashed line is the default anomaly limit.",
        of_chosen(channel.column), unit=channel.unit, lines=(("red", channel.limit),), field=channel.scale,
    )  # fmt: skip


def lanes() -> Json:
    return table(
        51, (24, 8), "Lanes",
        "The delivery ledger: up to which byte each lane is in the database, and what it brought. The 100 lanes that "
        "moved last; one that was replaced stays in the ledger for ever.",
        'SELECT\n  lane::text AS "Lane", node AS "Node", position AS "Position", committed_points AS "Points",\n'
        '  flushes AS "Flushes", committed_points / nullif(flushes, 0)::float8 AS "Points per flush",\n'
        '  greatest(0, extract(epoch FROM now() - updated_at))::float8 AS "Idle for",\n'
        '  updated_at AS "Last commit", first_drain_at AS "First drain"\n'
        "FROM ingest_progress\nORDER BY updated_at DESC\nLIMIT 100",
        overrides=[
            override("Position", unit="decbytes"),
            *(override(name, unit="short") for name in ("Points", "Flushes", "Points per flush")),
            override("Idle for", unit="s", thresholds=SILENCE, custom__cellOptions={"type": "color-text"}),
        ],
    )  # fmt: skip


def overview() -> Json:
    """Return the board of first sight: does it work, how fast, and how is the fleet."""
    return board(
        "orbitstream-overview", "OrbitStream overview",
        "Live throughput, anomalies, and battery, storage and signal of the fleet, from the rows themselves.",
        [
            *at_a_glance(),
            *throughput(),
            *anomalies(),
            *row(30, "Fleet", band(31, "Battery of the fleet", BATTERY), band(32, "Storage of the fleet", STORAGE),
                 band(33, "Signal of the fleet", SIGNAL)),
            *row(40, "Chosen satellites", trend(41, BATTERY), trend(42, STORAGE), trend(43, SIGNAL)),
            *row(50, "Delivery", lanes()),
        ],
        [satellite_variable()],
    )  # fmt: skip


def files() -> Iterator[tuple[Path, str]]:
    """Yield each dashboard file and its text."""
    boards: dict[str, Json] = {"overview": overview()}
    for name, made in boards.items():
        yield FOLDER / f"{name}.json", json.dumps(made, indent=2) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the dashboards, or with --check compare them."""
    parser = argparse.ArgumentParser(description="Write the dashboards under grafana/dashboards.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not up to date")
    options = parser.parse_args(argv)
    stale = [(path, text) for path, text in files() if not path.exists() or path.read_text() != text]
    for path, text in stale:
        if options.check:
            print(f"{path} is not what grafana/generate.py writes: run it", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"wrote {path}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
