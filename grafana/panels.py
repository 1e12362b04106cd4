"""The parts of a dashboard as plain dicts of Grafana's classic JSON: panels, thresholds, their places on the grid."""

from __future__ import annotations

from typing import Any, Final

Json = dict[str, Any]

SCHEMA_VERSION: Final = 42
SOURCE: Final[Json] = {"type": "grafana-postgresql-datasource", "uid": "orbitstream"}
CODE: Final[Json] = {"rawQuery": True, "editorMode": "code"}
WIDTH: Final = 24
"""Columns of Grafana's grid."""


def thresholds(*steps: tuple[str, float | None]) -> Json:
    """Return thresholds; the first step has no lower bound (None)."""
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}


NO_LIMIT: Final = thresholds(("blue", None))


def override(column: str, **properties: Any) -> Json:
    """Return an override for the column of a query; `custom__x` stands for the property `custom.x`."""
    return {
        "matcher": {"id": "byName", "options": column},
        "properties": [{"id": name.replace("__", "."), "value": value} for name, value in properties.items()],
    }


def panel(
    kind: str, id: int, size: tuple[int, int], title: str, description: str, sql: str,
    *, format: str, unit: str, limit: Json, custom: Json | None = None, options: Json,
    overrides: list[Json] | None = None, field: Json | None = None, **more: Any,
) -> Json:  # fmt: skip
    """Return a panel over one query.

    `size` is width and height, `place` settles where it goes; `field` holds further defaults of the values (`min`,
    `max`, `decimals`, `noValue`), `custom` those of this kind of panel, `more` further keys of the panel itself.
    """
    defaults: Json = {"color": {"mode": "thresholds"}, "noValue": "-", "thresholds": limit, "unit": unit}
    defaults |= {"custom": custom} if custom else {}
    defaults |= field or {}
    return {
        "id": id,
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"w": size[0], "h": size[1]},
        "targets": [{"refId": "A", "datasource": SOURCE, "format": format, "rawSql": sql} | CODE],
        "fieldConfig": {"defaults": defaults, "overrides": overrides or []},
        "options": options,
        **more,
    }


def stat(id: int, size: tuple[int, int], title: str, description: str, sql: str, *, unit: str, limit: Json = NO_LIMIT,
         **more: Any) -> Json:  # fmt: skip
    """Return a panel of one big number for each column of a query with one row."""
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    }
    return panel("stat", id, size, title, description, sql, format="table", unit=unit, limit=limit, options=options,
                 **more)  # fmt: skip


def timeseries(
    id: int, size: tuple[int, int], title: str, description: str, sql: str, *, unit: str,
    lines: tuple[tuple[str, float], ...] = (), area: str = "", points: int = 300, interval: str = "1s",
    bars: bool = False,
    field: Json | None = None, **more: Any,
) -> Json:  # fmt: skip
    """Return a panel of curves.

    `lines` are (colour, value) to be drawn across; with `area` (above, below) what is beyond is coloured.
    `points` bounds the number of intervals, `interval` their length.
    """
    custom = {
        "axisLabel": "",
        "axisPlacement": "auto",
        "drawStyle": "bars" if bars else "line",
        "fillOpacity": 60 if bars else 10,
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "scaleDistribution": {"type": "linear"},
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "none"},
        "thresholdsStyle": {"mode": "line+area" if area else "dashed" if lines else "off"},
    }
    options = {
        "legend": {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    field = {"color": {"mode": "palette-classic"}, **(field or {})}
    return panel("timeseries", id, size, title, description, sql, format="time_series", unit=unit,
                 limit=_areas(lines, area), custom=custom, options=options, field=field,
                 interval=interval, maxDataPoints=points, **more)  # fmt: skip


def _areas(lines: tuple[tuple[str, float], ...], area: str) -> Json:
    if area == "below":
        [(color, value)] = lines
        return thresholds((color, None), ("transparent", value))
    return thresholds(("transparent", None), *lines)


def table(id: int, size: tuple[int, int], title: str, description: str, sql: str, *, overrides: list[Json],
          **more: Any) -> Json:  # fmt: skip
    """Return a panel of rows; units come by column, in `overrides`."""
    custom = {"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True, "inspect": False}
    return panel("table", id, size, title, description, sql, format="table", unit="none", limit=NO_LIMIT, custom=custom,
                 options={"cellHeight": "sm", "showHeader": True}, overrides=overrides, **more)  # fmt: skip


def row(id: int, title: str, *panels: Json) -> list[Json]:
    """Return a headline and the panels under it."""
    return [
        {"id": id, "type": "row", "title": title, "collapsed": False, "gridPos": {"w": WIDTH, "h": 1}, "panels": []},
        *panels,
    ]


def place(panels: list[Json]) -> list[Json]:
    """Set each panel's place: from left to right, a new line where the next does not fit."""
    x = y = line = 0
    for item in panels:
        size = item["gridPos"]
        if x + size["w"] > WIDTH:
            x, y, line = 0, y + line, 0
        item["gridPos"] = {"x": x, "y": y, **size}
        x, line = x + size["w"], max(line, size["h"])
    return panels


def variable(name: str, label: str, description: str, sql: str, *, multi: bool) -> Json:
    """Return a variable whose options are asked for whenever the range changes."""
    return {
        "name": name,
        "label": label,
        "description": description,
        "type": "query",
        "datasource": SOURCE,
        "definition": sql,
        "query": sql,
        "refresh": 2,
        "multi": multi,
        "includeAll": False,
        "sort": 0,
        "regex": "",
        "hide": 0,
        "current": {},
        "options": [],
    }


def board(
    uid: str, title: str, description: str, panels: list[Json], variables: list[Json],
    *, span: str = "now-15m", refresh: str = "5s",
) -> Json:  # fmt: skip
    """Return a dashboard: provisioned, so not editable; fast enough to watch; in UTC as the data are."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["orbitstream"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "timezone": "utc",
        "refresh": refresh,
        "time": {"from": span, "to": "now"},
        "timepicker": {"refresh_intervals": ["5s", "10s", "30s", "1m", "5m"]},
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "title": "OrbitStream", "tags": ["orbitstream"], "asDropdown": True,
                   "includeVars": False, "keepTime": True}],
        "templating": {"list": variables},
        "panels": place(panels),
    }  # fmt: skip
