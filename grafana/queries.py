"""SQL that several boards share. It runs on PostgreSQL alone as on TimescaleDB, hence date_bin and not $__timeGroup.

Every query reads tables that grow by processes and minutes, or is bounded by a LIMIT or by one satellite; none reads
the points of the whole fleet.
"""

from __future__ import annotations

from typing import Final

# `$__interval` can say things that PostgreSQL reads otherwise (1M) or date_bin refuses (1y); milliseconds cannot.
STEP: Final = "make_interval(secs => $__interval_ms / 1000.0)"
FROM: Final = "$__timeFrom()::timestamptz"
TO: Final = "$__timeTo()::timestamptz"
IN_RANGE: Final = "$__timeFilter(time)"
SAMPLED: Final = f"{IN_RANGE} AND (first_of_minute OR $__interval_ms < 60000)"
"""Of engine_stats: intervals of a minute or more need one row a minute."""


def bucket(column: str = "time") -> str:
    """Return SQL for the start of the interval that `column` lies in."""
    return f"date_bin({STEP}, {column}, 'epoch')"


def rates(table: str, counters: dict[str, str], where: str, by: tuple[str, ...] = (), *, metric: str = "") -> str:
    """Return SQL for counters as rates a second; counters maps the name of a series to a column that only grows.

    `by` names the columns that tell the counting processes apart: each starts again at 0 on its own. With `metric`,
    one of them names the series; without, their rates are added up.
    """
    keys = "".join(f", {key}" for key in by)
    totals = ", ".join(f"max({column}) AS {column}" for column in counters.values())
    steps = ", ".join(f"greatest({it} - lag({it}) OVER each, 0) AS {it}" for it in counters.values())
    shown = ",\n  ".join(
        f'coalesce(sum({column} / seconds), 0)::float8 AS "{name}"' for name, column in counters.items()
    )
    partition = f"PARTITION BY {', '.join(by)} " if by else ""
    named = f", {metric} AS metric" if metric else ""
    return (
        f'WITH sampled AS (\n  SELECT {bucket()} AS "time"{keys}, max(time) AS at, {totals}\n'
        f"  FROM {table}\n  WHERE {where}\n  GROUP BY {', '.join(map(str, range(1, len(by) + 2)))}\n),\n"
        f'steps AS (\n  SELECT "time"{keys}, extract(epoch FROM at - lag(at) OVER each) AS seconds, {steps}\n'
        f'  FROM sampled\n  WINDOW each AS ({partition}ORDER BY "time")\n)\n'
        f'SELECT "time"{named},\n  {shown}\nFROM steps\nWHERE seconds > 0\n'
        f"GROUP BY {'1, 2' if metric else '1'}\nORDER BY 1"
    )


def gauge(columns: dict[str, str], table: str, where: str, *, metric: str = "") -> str:
    """Return SQL for expressions in each interval, a series each, or a series for each value of `metric`."""
    shown = ",\n  ".join(f'{expression} AS "{name}"' for name, expression in columns.items())
    named = f", {metric} AS metric" if metric else ""
    return (
        f'SELECT\n  {bucket()} AS "time"{named},\n  {shown}\nFROM {table}\nWHERE {where}\n'
        f"GROUP BY {'1, 2' if metric else '1'}\nORDER BY {'1, 2' if metric else '1'}"
    )


def newest(columns: str, where: str, rest: str = "") -> str:
    """Return SQL over the rows of each node's newest moment in engine_stats within the last minute of the range."""
    recent = f"time > {TO} - interval '1 minute' AND time <= {TO}"
    return (
        f"SELECT {columns}\nFROM engine_stats\nWHERE {where} AND {recent} AND (node, time) IN (\n"
        f"  SELECT node, max(time) FROM engine_stats WHERE {recent} AND {where} GROUP BY node\n){rest}"
    )


def in_last(seconds: int, counter: str) -> str:
    """Return SQL for the growth of a counter in the last seconds of the range, a second, over all processes."""
    return (
        "SELECT sum(grown)::float8 FROM (\n"
        f"  SELECT (max({counter}) - min({counter})) / nullif(extract(epoch FROM max(time) - min(time)), 0) AS grown\n"
        f"  FROM engine_stats WHERE time > {TO} - interval '{seconds} seconds' AND time <= {TO}\n"
        "  GROUP BY node, name\n) AS processes"
    )


def levels(chosen: str, series: str) -> str:
    """Return SQL for the severity of episodes over time, 0 to 2, of the satellites that the SQL `chosen` finds.

    OFFSET 0 has each satellite's episodes found by the index, and unnest is planned for the few rows that there are: a
    plan for a thousand would be compiled (jit), which takes longer than the query.
    """
    return (
        f"WITH chosen AS (\n{chosen}\n),\n"
        f'steps AS (\n  SELECT generate_series({bucket(FROM)}, {TO}, {STEP}) AS "time"\n),\n'
        f'covered AS (\n  SELECT {series} AS metric, "time",\n'
        "    CASE severity WHEN 'critical' THEN 2 ELSE 1 END AS level\n"
        "  FROM chosen, LATERAL (\n    SELECT * FROM anomaly_event AS event\n"
        "    WHERE event.satellite_id = chosen.satellite_id\n"
        f"      AND (event.onset >= {FROM} - interval '1 day' OR event.cleared_at IS NULL) AND event.onset <= {TO}\n"
        "      AND (event.cleared_at IS NULL OR event.cleared_at >= $__timeFrom())\n    OFFSET 0\n  ) AS event,\n"
        f"  LATERAL unnest(ARRAY(SELECT generate_series(date_bin({STEP}, greatest(event.onset, {FROM}), 'epoch'),\n"
        f'    least(coalesce(event.cleared_at, {TO}), {TO}), {STEP}))) AS span("time")\n)\n'
        'SELECT "time", metric, max(level) AS "level" FROM (\n'
        '  SELECT "time", metric, level FROM covered\n'
        f'  UNION ALL SELECT "time", {series}, 0 FROM steps CROSS JOIN chosen\n) AS seen\n'
        "GROUP BY 1, 2\nORDER BY 1, 2"
    )
