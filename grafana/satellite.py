"""The satellite board, one of the fleet in every channel; and the anomalies board."""

from __future__ import annotations

from typing import Final

from fleet import BATTERY, SATELLITE_UID, SIGNAL, STORAGE, Channel, link_to_satellite, satellite_variable, timeline
from panels import Json, board, override, row, stat, table, thresholds, timeseries
from queries import FROM, IN_RANGE, SAMPLED, STEP, TO, bucket, levels, rates

ANOMALIES_UID: Final = "orbitstream-anomalies"
RAW_WITHIN: Final = "1 hour"
"""Ranges up to this are answered from the points, longer ones from the 5-minute aggregates."""
CHOSEN: Final = "satellite_id IN (${satellite:sqlstring})"

OTHERS: Final = (
    ("temperature_c", "Temperature", "celsius"),
    ("bus_voltage_v", "Bus voltage", "volt"),
    ("altitude_km", "Altitude", "lengthkm"),
    ("velocity_kmph", "Velocity", "velocitykmh"),
    ("latitude", "Latitude", "degree"),
    ("longitude", "Longitude", "degree"),
)


def history(column: str) -> str:
    """Return SQL for mean, least and most of a channel of one satellite: points, or aggregates over long ranges."""
    short = f"$__timeTo()::timestamptz - $__timeFrom()::timestamptz <= interval '{RAW_WITHIN}'"
    return (
        f'SELECT "time", sum(total) / nullif(sum(points), 0) AS "mean", min(low) AS "least", max(high) AS "most"\n'
        f'FROM (\n  SELECT {bucket()} AS "time", sum({column}) AS total, count({column}) AS points,\n'
        f"    min({column}) AS low, max({column}) AS high\n"
        f"  FROM telemetry WHERE {IN_RANGE} AND {CHOSEN} AND {short} GROUP BY 1\n  UNION ALL\n"
        f"  SELECT {bucket('bucket')}, sum(sum_{column}), sum(count_{column}), min(min_{column}), max(max_{column})\n"
        f"  FROM satellite_stats WHERE $__timeFilter(bucket) AND {CHOSEN} AND NOT {short} GROUP BY 1\n"
        ") AS readings\nGROUP BY 1\nHAVING sum(points) > 0\nORDER BY 1"
    )


def trend(id: int, column: str, name: str, unit: str, channel: Channel | None = None) -> Json:
    thin = {"custom__lineWidth": 0, "custom__fillOpacity": 0}
    area = {}
    if channel is not None:
        area = {"area": "below" if channel.limit != STORAGE.limit else "above", "lines": (("red", channel.limit),)}
    return timeseries(
        id, (8, 8), name,
        "Mean of each interval, in the band from the least to the most"
        + (", and the default anomaly limit as an area. " if channel else ". ")
        + f"From the points in ranges up to {RAW_WITHIN}, from the 5-minute aggregates in longer ones.",
        history(column), unit=unit, field=channel.scale if channel else {}, **area,
        overrides=[override("least", **thin), override("most", **{**thin, "custom__fillOpacity": 20},
                                                       custom__fillBelowTo="least")],
    )  # fmt: skip


def episodes(id: int, where: str, title: str, description: str) -> Json:
    return table(
        id, (24, 9), title, description,
        'SELECT onset AS "Onset", satellite_id AS "Satellite", channel AS "Channel", severity AS "Severity",\n'
        '  kind AS "Kind", limit_value AS "Limit", peak AS "Peak",\n'
        '  extract(epoch FROM coalesce(cleared_at, now()) - onset)::float8 AS "Lasted",\n'
        '  cleared_at IS NULL AS "Lasts", points AS "Points"\n'
        f"FROM anomaly_event\nWHERE $__timeFilter(onset){where}\nORDER BY onset DESC\nLIMIT 200",
        overrides=[override("Satellite", links=[link_to_satellite()]), override("Lasted", unit="s"),
                   override("Points", unit="short")],
    )  # fmt: skip


def satellite() -> Json:
    """Return the board of one satellite."""
    newest = f"FROM satellite_latest WHERE {CHOSEN}"
    own = (
        "  SELECT DISTINCT satellite_id, channel AS shown FROM anomaly_event\n  WHERE "
        + CHOSEN
        + (" AND onset >= $__timeFrom()::timestamptz - interval '1 day' LIMIT 20")
    )
    severities = levels(own, "chosen.shown").replace(
        "event.satellite_id = chosen.satellite_id",
        "event.satellite_id = chosen.satellite_id AND event.channel = chosen.shown",
    )
    panels = [
        *(stat(number, (5, 4), it.name, f"The newest reading of {it.name.lower()}, coloured by the default limit.",
               f'SELECT {it.column} AS "{it.name}" {newest}', unit=it.unit, limit=it.cell, field={"decimals": 1})
          for number, it in enumerate((BATTERY, STORAGE, SIGNAL), 1)),
        stat(4, (5, 4), "Last heard", "How long before the end of the range the newest reading was taken.",
             f'SELECT greatest(0, extract(epoch FROM {TO} - time))::float8 AS "ago" {newest}', unit="s",
             limit=thresholds(("green", None), ("orange", 10), ("red", 60)), field={"decimals": 0}),
        stat(5, (4, 4), "Episodes", "Episodes of this satellite that began in the range, and those that last.",
             'SELECT count(*) AS "in range", count(*) FILTER (WHERE cleared_at IS NULL) AS "now"\n'
             f"FROM anomaly_event WHERE $__timeFilter(onset) AND {CHOSEN}", unit="short"),
        *row(10, "With limits", *(trend(11 + number, it.column, it.name, it.unit, it)
                                  for number, it in enumerate((BATTERY, STORAGE, SIGNAL)))),
        *row(20, "Further channels", *(trend(21 + number, *it) for number, it in enumerate(OTHERS))),
        *row(30, "Episodes",
             timeline(31, (24, 6), "state-timeline", "State by channel", "Severity over time of each channel of this "
                      "satellite that had an episode in the range or the day before it.", severities),
             episodes(32, f" AND {CHOSEN}", "Episodes", "Episodes of this satellite that began in the range, the "
                      "newest first; 200 at most.")),
    ]  # fmt: skip
    return board(SATELLITE_UID, "OrbitStream satellite", "One satellite: every channel, its limits, its episodes.",
                 panels, [satellite_variable(multi=False)], span="now-1h", refresh="10s")  # fmt: skip


def anomalies() -> Json:
    """Return the board of what is beyond its limits."""
    # Interval by interval, each by the index: one GROUP BY over them all is planned as a sort of every episode.
    begun = (
        'SELECT steps."time", begun.channel AS metric, begun.episodes AS "episodes"\n'
        f'FROM generate_series({bucket(FROM)}, {TO}, {STEP}) AS steps("time"), LATERAL (\n'
        "  SELECT channel, count(*) AS episodes FROM anomaly_event\n"
        f'  WHERE onset >= greatest(steps."time", {FROM}) AND onset < steps."time" + {STEP} AND onset <= {TO}\n'
        "  GROUP BY channel\n) AS begun\nORDER BY 1, 2"
    )
    lasted = "date_part('epoch', coalesce(cleared_at, now()) - onset)"
    share = rates("engine_stats", {"anomalies": "anomalies", "points": "committed"},
                  f"{SAMPLED} AND process = 'writer'", ("node", "name"))  # fmt: skip
    panels = [
        stat(1, (6, 4), "Open now", "Episodes that have not cleared, by severity.",
             "SELECT count(*) FILTER (WHERE severity = 'warning') AS \"warning\",\n"
             "  count(*) FILTER (WHERE severity = 'critical') AS \"critical\"\n"
             "FROM anomaly_event WHERE cleared_at IS NULL", unit="short"),
        stat(2, (6, 4), "Began in range", "Episodes that began in the range, and the satellites they are of.",
             'SELECT count(*) AS "episodes", count(DISTINCT satellite_id) AS "satellites"\n'
             "FROM anomaly_event WHERE $__timeFilter(onset)", unit="short"),
        stat(3, (12, 4), "How long", "Duration of the episodes that began in the range and are over: median, 95th "
             "percentile, longest.",
             'SELECT at[1] AS "median", at[2] AS "p95", at[3] AS "longest" FROM (\n'
             f"  SELECT percentile_disc(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY {lasted}) AS at\n"
             "  FROM anomaly_event WHERE $__timeFilter(onset) AND cleared_at IS NOT NULL\n) AS over",
             unit="s", field={"decimals": 1}),
        *row(10, "Over time",
             timeseries(11, (12, 9), "Episodes by channel", "Episodes that began in each interval, by channel.", begun,
                        unit="short", bars=True, interval="1m", points=120, field={"min": 0}),
             timeseries(12, (12, 9), "Anomalous points", "Share of the committed points that are beyond a critical "
                        "limit or a critical spike; no value where nothing was committed.",
                        f'SELECT "time", anomalies / nullif(points, 0) AS "share" FROM (\n{share}\n) AS each_second',
                        unit="percentunit", lines=(("orange", 0.02), ("red", 0.05)), field={"min": 0})),
        *row(20, "Who",
             table(21, (24, 9), "Most affected satellites", "The 25 satellites with the most episodes that began in "
                   "the range, and how long they were in one.",
                   'SELECT satellite_id AS "Satellite", sum(episodes)::float8 AS "Episodes",\n'
                   '  sum(critical)::float8 AS "Critical", sum(seconds) AS "Time in them",\n'
                   "  string_agg(channel, ', ') AS \"Channels\", max(newest) AS \"Last onset\"\nFROM (\n"
                   "  SELECT satellite_id, channel, count(*) AS episodes, max(onset) AS newest,\n"
                   f"    count(*) FILTER (WHERE severity = 'critical') AS critical, sum({lasted}) AS seconds\n"
                   "  FROM anomaly_event WHERE $__timeFilter(onset)\n  GROUP BY 1, 2\n) AS by_channel\n"
                   "GROUP BY 1\nORDER BY 2 DESC, 4 DESC\nLIMIT 25",
                   overrides=[override("Satellite", links=[link_to_satellite()]), override("Time in them", unit="s")]),
             episodes(22, "", "Episodes", "Episodes that began in the range, the newest first; 200 at most.")),
    ]  # fmt: skip
    return board(ANOMALIES_UID, "OrbitStream anomalies", "What is beyond its limits: how often, how long, who.", panels,
                 [], span="now-3h", refresh="30s")  # fmt: skip
