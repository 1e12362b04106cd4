"""The fleet board: who reports, how the fleet is, who needs attention. And the channels that the boards show."""

from __future__ import annotations

from typing import Final, NamedTuple

from panels import SOURCE, Json, board, override, panel, row, stat, table, thresholds, timeseries, variable
from queries import IN_RANGE, TO, bucket, levels

UID: Final = "orbitstream-fleet"
SATELLITE_UID: Final = "orbitstream-satellite"
SILENT_S: Final = 60


class Channel(NamedTuple):
    """A channel with a default limit: column, name, unit, limit, colours of its values, further field settings."""

    column: str
    name: str
    unit: str
    limit: float
    cell: Json
    scale: Json


# The limits that the service has by default (ANOMALY_THRESHOLD_*). Grafana cannot read the service's settings: where
# those are changed, only the colours and lines here stay behind; is_anomaly and the episodes are what counts.
BATTERY: Final = Channel("battery_charge_percent", "Battery", "percent", 10,
                         thresholds(("red", None), ("green", 10)), {"min": 0, "max": 100})  # fmt: skip
STORAGE: Final = Channel("storage_usage_mb", "Storage used", "decmbytes", 95_000,
                         thresholds(("green", None), ("red", 95_000)), {"min": 0})  # fmt: skip
SIGNAL: Final = Channel("signal_strength_dbm", "Signal", "dBm", -100,
                        thresholds(("red", None), ("green", -100)), {})  # fmt: skip
SEVERITY: Final = thresholds(("green", None), ("orange", 1), ("red", 2))
WORST: Final = 25


def link_to_satellite() -> Json:
    return {
        "title": "${__value.text}",
        "url": f"/d/{SATELLITE_UID}?var-satellite=${{__value.text:percentencode}}&${{__url_time_range}}",
    }


def glance() -> list[Json]:
    return [
        stat(1, (5, 4), "Satellites reporting", f"Satellites with a reading from the last {SILENT_S} seconds of the "
             "range, of all that were ever heard of.",
             f"SELECT count(*) FILTER (WHERE time > {TO} - interval '{SILENT_S} seconds') AS \"reporting\",\n"
             '  count(*) AS "known"\nFROM satellite_latest', unit="short"),
        stat(2, (4, 4), "Silent", f"Satellites without a reading for {SILENT_S} seconds and more that had one in the "
             "day before.",
             f"SELECT count(*) AS \"silent\" FROM satellite_latest WHERE time <= {TO} - interval '{SILENT_S} seconds'\n"
             f"  AND time > {TO} - interval '1 day'", unit="short", limit=thresholds(("green", None), ("red", 1))),
        stat(3, (5, 4), "In an episode now", "Satellites with a channel beyond its limits now, by severity.",
             "SELECT count(DISTINCT satellite_id) FILTER (WHERE severity = 'warning') AS \"warning\",\n"
             "  count(DISTINCT satellite_id) FILTER (WHERE severity = 'critical') AS \"critical\"\n"
             "FROM anomaly_event WHERE cleared_at IS NULL", unit="short",
             overrides=[override("critical", thresholds=thresholds(("green", None), ("red", 1))),
                        override("warning", thresholds=thresholds(("green", None), ("orange", 1)))]),
        stat(4, (5, 4), "Median reading", "The median satellite's newest reading of the three channels that every "
             "point has.",
             "SELECT " + ",\n  ".join(
                 f'percentile_cont(0.5) WITHIN GROUP (ORDER BY {it.column}) AS "{it.name}"'
                 for it in (BATTERY, STORAGE, SIGNAL))
             + f"\nFROM satellite_latest WHERE time > {TO} - interval '{SILENT_S} seconds'",
             unit="none", overrides=[override(it.name, unit=it.unit) for it in (BATTERY, STORAGE, SIGNAL)],
             field={"decimals": 0}),
        stat(5, (5, 4), "Oldest delay", "From the reading to its reception by the service: the largest over the newest "
             "readings of all satellites that report.",
             'SELECT max(extract(epoch FROM received_at - time))::float8 AS "delay"\n'
             f"FROM satellite_latest WHERE time > {TO} - interval '{SILENT_S} seconds'", unit="s",
             limit=thresholds(("green", None), ("orange", 10), ("red", 60)), field={"decimals": 1}),
    ]  # fmt: skip


def band(id: int, channel: Channel) -> Json:
    """Return the panel of a channel over the whole fleet: the median in a band from the 5th to the 95th percentile."""
    blue = {"mode": "fixed", "fixedColor": "blue"}
    shown = ", ".join(f'avg({name}) AS "{name}"' for name in ("p5", "p50", "p95"))
    return timeseries(
        id, (8, 8), f"{channel.name} of the fleet",
        "Over the newest readings of the satellites that report, sampled each minute: the median (p50), in the band "
        "that holds nine satellites of ten (p5 to p95). The dashed line is the default anomaly limit.",
        f'SELECT {bucket()} AS "time", {shown}\nFROM fleet_stats\n'
        f"WHERE {IN_RANGE} AND channel = '{channel.column}'\nGROUP BY 1\nORDER BY 1",
        unit=channel.unit, lines=(("red", channel.limit),), interval="1m", field=channel.scale,
        overrides=[
            override("p5", color=blue, custom__lineWidth=0, custom__fillOpacity=0),
            override("p95", color=blue, custom__lineWidth=0, custom__fillOpacity=25, custom__fillBelowTo="p5"),
            override("p50", color=blue, custom__lineWidth=2, custom__fillOpacity=0),
        ],
    )  # fmt: skip


def heatmap(id: int) -> Json:
    shown = ",\n  ".join(f'avg(histogram[{step + 1}])::float8 AS "{step * 5 + 5}"' for step in range(20))
    return panel(
        "heatmap", id, (8, 8), "Battery of every satellite",
        "How many satellites are at which charge, in steps of 5 %, sampled each minute. A constellation that drains "
        "moves down as a whole; a few that fail separate from it.",
        f'SELECT {bucket()} AS "time",\n  {shown}\nFROM fleet_stats\n'
        f"WHERE {IN_RANGE} AND channel = 'battery_charge_percent' AND histogram IS NOT NULL\nGROUP BY 1\nORDER BY 1",
        format="time_series", unit="short", limit=thresholds(("blue", None)), interval="1m", maxDataPoints=300,
        options={"calculate": False, "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
                 "cellGap": 0, "yAxis": {"unit": "percent"}, "legend": {"show": True}, "rowsFrame": {"layout": "le"},
                 "tooltip": {"mode": "single"}},
    )  # fmt: skip


def timeline(id: int, size: tuple[int, int], kind: str, title: str, description: str, sql: str) -> Json:
    """Return a panel of severities over time, a line for each series."""
    names = [{"type": "value", "options": {str(level): {"text": name, "index": level}
              for level, name in enumerate(("nominal", "warning", "critical"))}}]  # fmt: skip
    return panel(
        kind, id, size, title, description, sql, format="time_series", unit="none", limit=SEVERITY, interval="1m",
        maxDataPoints=120, custom={"fillOpacity": 80, "lineWidth": 0}, field={"mappings": names},
        options={"showValue": "never", "rowHeight": 0.9, "legend": {"showLegend": False},
                 "tooltip": {"mode": "single"}},
    )  # fmt: skip


def worst() -> str:
    """Return SQL for the satellites that were longest in an episode in the range."""
    return (
        "  SELECT satellite_id FROM anomaly_event\n"
        "  WHERE (onset >= $__timeFrom()::timestamptz - interval '1 day' OR cleared_at IS NULL)\n"
        "    AND onset <= $__timeTo()::timestamptz\n"
        "    AND coalesce(cleared_at, $__timeTo()) >= $__timeFrom()\n"
        "  GROUP BY 1\n"
        "  ORDER BY sum(date_part('epoch', least(coalesce(cleared_at, $__timeTo()), $__timeTo()::timestamptz)\n"
        f"    - greatest(onset, $__timeFrom()::timestamptz))) DESC, 1\n  LIMIT {WORST}"
    )


def attention() -> Json:
    columns = ",\n  ".join(f'{it.column} AS "{it.name}"' for it in (BATTERY, STORAGE, SIGNAL))
    return table(
        31, (14, 10), "Attention", "Satellites in an episode or silent, the worst first; a click on a name opens its "
        "board. Values beyond the default limits are red.",
        'SELECT\n  latest.satellite_id AS "Satellite", coalesce(episode.channels, \'silent\') AS "What",\n'
        '  coalesce(episode.level, 1) AS "Severity", extract(epoch FROM now() - episode.since)::float8 AS "For",\n'
        f'  extract(epoch FROM {TO} - latest.time)::float8 AS "Last heard",\n  {columns}\n'
        "FROM satellite_latest AS latest\nLEFT JOIN (\n"
        "  SELECT satellite_id, string_agg(DISTINCT channel, ', ') AS channels, min(onset) AS since,\n"
        "    max(CASE severity WHEN 'critical' THEN 2 ELSE 1 END) AS level\n"
        "  FROM anomaly_event WHERE cleared_at IS NULL GROUP BY 1\n) AS episode USING (satellite_id)\n"
        f"WHERE episode.level IS NOT NULL OR latest.time <= {TO} - interval '{SILENT_S} seconds'\n"
        "ORDER BY 3 DESC, episode.since NULLS LAST, latest.time\nLIMIT 100",
        overrides=[
            override("Satellite", links=[link_to_satellite()]),
            override("Severity", thresholds=SEVERITY, custom__cellOptions={"type": "color-background"}),
            override("For", unit="s"),
            override("Last heard", unit="s"),
            *(override(it.name, unit=it.unit, thresholds=it.cell, custom__cellOptions={"type": "color-text"})
              for it in (BATTERY, STORAGE, SIGNAL)),
        ],
    )  # fmt: skip


def filling() -> Json:
    return table(
        32, (10, 10), "Storage fills", "The 50 fullest satellites: by how much their storage grew in the 10 minutes "
        "before their newest reading, and when it reaches the default limit at that rate.",
        "WITH fullest AS (\n  SELECT satellite_id, time, storage_usage_mb FROM satellite_latest\n"
        f"  WHERE time > {TO} - interval '1 day' ORDER BY storage_usage_mb DESC LIMIT 50\n)\n"
        'SELECT fullest.satellite_id AS "Satellite", fullest.storage_usage_mb AS "Storage used",\n'
        '  growth * 3600 AS "An hour",\n'
        f'  CASE WHEN growth > 0 THEN greatest(0, {STORAGE.limit:g} - fullest.storage_usage_mb) / growth END '
        'AS "Limit in"\n'
        "FROM fullest LEFT JOIN LATERAL (\n"
        "  SELECT (fullest.storage_usage_mb - storage_usage_mb)\n"
        "    / nullif(extract(epoch FROM fullest.time - time), 0)::float8 AS growth\n"
        "  FROM telemetry WHERE satellite_id = fullest.satellite_id\n"
        "    AND time BETWEEN fullest.time - interval '20 minutes' AND fullest.time - interval '10 minutes'\n"
        "  ORDER BY time DESC LIMIT 1\n) AS earlier ON true\nORDER BY 4 NULLS LAST, 2 DESC",
        overrides=[override("Satellite", links=[link_to_satellite()]), override("Storage used", unit="decmbytes"),
                   override("An hour", unit="decmbytes"), override("Limit in", unit="s")],
    )  # fmt: skip


def positions() -> Json:
    layer = {
        "type": "markers", "name": "Satellites", "tooltip": True,
        "location": {"mode": "coords", "latitude": "latitude", "longitude": "longitude"},
        "config": {"showLegend": False, "style": {"size": {"fixed": 4}, "opacity": 0.7,
                   "color": {"field": "severity", "fixed": "green"}, "symbol": {"fixed": "img/icons/marker/circle.svg",
                                                                               "mode": "fixed"}}},
    }  # fmt: skip
    return panel(
        "geomap", 41, (24, 12), "Where they are",
        "The newest position of each satellite that sends one, coloured by the severity of its episodes; 2,000 at "
        "most.",
        "SELECT latest.satellite_id, latitude, longitude, altitude_km,\n"
        "  coalesce((SELECT max(CASE severity WHEN 'critical' THEN 2 ELSE 1 END) FROM anomaly_event\n"
        '    WHERE satellite_id = latest.satellite_id AND cleared_at IS NULL), 0) AS "severity"\n'
        "FROM satellite_latest AS latest\nWHERE latitude IS NOT NULL AND longitude IS NOT NULL\n"
        f"  AND time > {TO} - interval '1 hour'\nORDER BY 1\nLIMIT 2000",
        format="table", unit="none", limit=SEVERITY,
        options={"basemap": {"type": "default", "name": "World"}, "layers": [layer],
                 "view": {"id": "zero", "lat": 0, "lon": 0, "zoom": 1}, "controls": {"showZoom": True},
                 "tooltip": {"mode": "details"}},
    )  # fmt: skip


def satellite_variable(*, multi: bool) -> Json:
    """Return the variable `satellite`: those that were ever heard of, 5,000 at most.

    An empty list of options would make `IN ()` of the panels' SQL, which is an error: before the first point there is
    one option that is no satellite's name.
    """
    sql = (
        "SELECT satellite_id FROM (SELECT satellite_id FROM satellite_latest ORDER BY 1 LIMIT 5000) AS known\n"
        "UNION ALL\nSELECT '-' WHERE NOT EXISTS (SELECT FROM satellite_latest)"
    )
    return variable("satellite", "Satellites" if multi else "Satellite", "Whose readings to show.", sql, multi=multi)


def fleet() -> Json:
    """Return the board of the constellation as a whole."""
    chosen = "  SELECT satellite_id FROM satellite_latest WHERE satellite_id IN (${satellite:sqlstring})"
    reporting = (
        f'SELECT {bucket()} AS "time", min(reporting) AS "reporting", max(satellites - reporting) AS "not reporting"\n'
        f"FROM fleet_stats\nWHERE {IN_RANGE} AND channel = 'battery_charge_percent'\nGROUP BY 1\nORDER BY 1"
    )
    made = board(
        UID, "OrbitStream fleet", "Who reports, how the fleet is, and which satellites need attention.",
        [
            *glance(),
            *row(10, "Fleet",
                 timeseries(11, (16, 8), "Reporting", "Satellites with a reading in the minute before each sample, and "
                            "all others that were ever heard of.", reporting, unit="short", interval="1m",
                            field={"min": 0}),
                 heatmap(12), band(13, BATTERY), band(14, STORAGE), band(15, SIGNAL)),
            *row(20, "Episodes",
                 timeline(21, (12, 10), "status-history", f"The {WORST} worst", "Of the satellites that were longest "
                          "in an episode within the range: the severity over time.",
                          levels(worst(), "chosen.satellite_id")),
                 timeline(22, (12, 10), "state-timeline", "Chosen satellites", "Severity over time of the satellites "
                          "chosen at the top.", levels(chosen, "chosen.satellite_id"))),
            *row(30, "Attention", attention(), filling()),
            *row(40, "Positions", positions()),
        ],
        [satellite_variable(multi=True)], span="now-1h",
    )  # fmt: skip
    made["annotations"]["list"].append(episodes_annotation())
    return made


def episodes_annotation() -> Json:
    sql = (
        'SELECT onset AS "time", coalesce(cleared_at, $__timeTo()::timestamptz) AS timeend,\n'
        "  satellite_id || ' ' || channel AS text, severity AS tags\nFROM anomaly_event\n"
        "WHERE severity = 'critical' AND $__timeFilter(onset)\nORDER BY onset DESC\nLIMIT 100"
    )
    return {"name": "Critical episodes", "datasource": SOURCE, "enable": False, "iconColor": "red",
            "target": {"refId": "Anno", "rawSql": sql, "format": "table", "rawQuery": True, "editorMode": "code"},
            }  # fmt: skip
