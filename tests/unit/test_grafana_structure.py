"""The dashboards and the provisioning files as Grafana will read them, without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from typing import Any

import pytest
import yaml

from engine import data_folder, settings

GRAFANA = data_folder("grafana")
SOURCE = {"type": "grafana-postgresql-datasource", "uid": "orbitstream"}

# Of Grafana's units (packages/grafana-data/src/valueFormats/categories.ts) those in use; a text after `suffix:` is
# shown as it is.
UNITS = {
    "none", "short", "percent", "percentunit", "bytes", "decmbytes", "dBm", "s", "ms", "µs", "rowsps", "ops", "Bps",
    "celsius", "volt", "lengthkm", "velocitykmh", "degree",
}  # fmt: skip

# Macros of the PostgreSQL data source that mean the same with and without TimescaleDB. $__timeGroup does not.
MACROS = {"__timeFilter", "__timeFrom", "__timeTo"}

BOARDS: dict[str, dict[str, Any]] = {
    path.name: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
QUERIES = [panel["targets"][0]["rawSql"] for _, panel in PANELS] + [
    variable["query"] for board in BOARDS.values() for variable in board["templating"]["list"]
]

each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))
each_panel = pytest.mark.parametrize(
    "panel", [panel for _, panel in PANELS], ids=[f"{name}-{panel['id']}" for name, panel in PANELS]
)
each_query = pytest.mark.parametrize("sql", QUERIES)


def provisioned(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((GRAFANA / "provisioning" / name / "orbitstream.yaml").read_text())
    assert loaded["apiVersion"] == 1
    return loaded


def test_the_committed_dashboards_are_what_the_generator_writes() -> None:
    program = [sys.executable, "-B", str(GRAFANA / "generate.py"), "--check"]
    checked = subprocess.run(program, capture_output=True, text=True, cwd="/")
    assert checked.returncode == 0, checked.stderr


def test_uids_are_unique_and_fit() -> None:
    uids = [board["uid"] for board in BOARDS.values()]
    assert len(set(uids)) == len(uids) > 0
    assert all(re.fullmatch(r"orbitstream-[a-z-]{1,28}", uid) for uid in uids)  # Grafana takes 40 characters


@each_board
def test_a_board_is_read_only_and_live(board: dict[str, Any]) -> None:
    assert board["schemaVersion"] == 42
    assert board["editable"] is False
    assert board["refresh"] == ("5s" if board["uid"].endswith(("capacity", "fleet")) else board["refresh"]) != ""
    assert board["title"] and board["description"]
    assert "orbitstream" in board["tags"]
    assert "id" not in board  # of one installation: provisioning gives it


@each_board
def test_panels_have_ids_and_places_of_their_own(board: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


@each_panel
def test_a_panel_is_described_and_has_a_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 40 and panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    overrides = [property for item in panel["fieldConfig"]["overrides"] for property in item["properties"]]
    for unit in [defaults["unit"], *(item["value"] for item in overrides if item["id"] == "unit")]:
        assert unit in UNITS or unit.startswith("suffix:")
    for steps in [defaults["thresholds"], *(item["value"] for item in overrides if item["id"] == "thresholds")]:
        values = [step["value"] for step in steps["steps"]]
        assert values[0] is None and values[1:] == sorted(values[1:])


@each_panel
def test_a_panel_asks_our_data_source_once(panel: dict[str, Any]) -> None:
    [target] = panel["targets"]
    assert panel["datasource"] == target["datasource"] == SOURCE
    assert target["format"] == (
        "time_series" if panel["type"] in ("timeseries", "heatmap", "status-history", "state-timeline") else "table"
    )
    assert target["rawQuery"] is True


@each_panel
def test_overrides_name_columns_of_the_query(panel: dict[str, Any]) -> None:
    for item in panel["fieldConfig"]["overrides"]:
        assert item["matcher"]["id"] == "byName"
        assert f'"{item["matcher"]["options"]}"' in panel["targets"][0]["rawSql"]


@each_board
def test_variables_follow_the_range(board: dict[str, Any]) -> None:
    for variable in board["templating"]["list"]:
        assert variable["refresh"] == 2
        assert variable["includeAll"] is False, "thousands of satellites in one panel help nobody"
        assert variable["datasource"] == SOURCE


@each_query
def test_queries_use_macros_that_every_edition_runs(sql: str) -> None:
    assert set(re.findall(r"\$(\w+)\(", sql)) <= MACROS
    assert "time_bucket" not in sql
    assert "--" not in sql and "/*" not in sql, "Grafana strips comments"
    assert re.sub(r"\$__interval_ms\b", "", sql).count("$__interval") == 0, "PostgreSQL reads 1M as a minute"
    assert sql.count("${") == sql.count(" IN (${satellite:sqlstring})")


@each_query
def test_queries_are_bounded(sql: str) -> None:
    """The points are read for single satellites only; what grows by seconds, minutes or episodes, within the range."""
    for reading in re.split(r"\bFROM telemetry\b", sql)[1:]:
        assert "satellite_id IN (${satellite:sqlstring})" in reading or "satellite_id = fullest" in reading
        assert "$__timeFilter(time)" in reading or "LIMIT 1" in reading
    for table in ("engine_stats", "fleet_stats", "database_stats", "storage_stats", "satellite_stats"):
        for reading in re.split(rf"\bFROM {table}\b", sql)[1:]:
            assert "$__time" in reading or "AND time = (" in reading
    for reading in re.split(r"\bFROM anomaly_event\b", sql)[1:]:
        assert "onset" in reading or "cleared_at IS NULL" in reading


def test_the_colours_follow_the_default_limits() -> None:
    config = settings.load({})
    limits = {
        "Battery": config.anomaly_battery,
        "Storage used": config.anomaly_storage,
        "Signal": config.anomaly_signal,
    }
    shown = [
        (panel["title"].removesuffix(" of the fleet"), panel["fieldConfig"]["defaults"]["thresholds"]["steps"])
        for _, panel in PANELS
    ]
    found = [(title, steps[1]["value"]) for title, steps in shown if title in limits]
    assert len(found) == 9 and all(value == limits[title] for title, value in found)


RULES: list[dict[str, Any]] = provisioned("alerting")["groups"][0]["rules"]


@pytest.mark.parametrize("rule", RULES, ids=[rule["uid"] for rule in RULES])
def test_an_alert_names_its_panel_and_its_runbook(rule: dict[str, Any]) -> None:
    board = next(board for board in BOARDS.values() if board["uid"] == rule["dashboardUid"])
    assert rule["panelId"] in {panel["id"] for panel in board["panels"] if panel["type"] != "row"}
    notes = rule["annotations"]
    assert (notes["__dashboardUid__"], notes["__panelId__"]) == (rule["dashboardUid"], str(rule["panelId"]))
    file, _, anchor = notes["runbook_url"].partition("#")
    headings = re.findall(r"^## (.+)$", (GRAFANA / file.removeprefix("grafana/")).read_text(), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    assert rule["title"] and notes["summary"].endswith(".") and rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.parametrize("rule", RULES, ids=[rule["uid"] for rule in RULES])
def test_an_alert_is_one_query_its_last_value_and_a_threshold(rule: dict[str, Any]) -> None:
    query, reduce, threshold = rule["data"]
    assert rule["condition"] == threshold["refId"] == "C"
    assert query["datasourceUid"] == SOURCE["uid"] and query["model"]["format"] == "time_series"
    assert reduce["datasourceUid"] == threshold["datasourceUid"] == "__expr__"
    assert (reduce["model"]["expression"], threshold["model"]["expression"]) == ("A", "B")
    assert "$" not in query["model"]["rawSql"], "an alert has no range and no variables"
    assert rule["noDataState"] == "OK" and rule["execErrState"] in ("Error", "Alerting")
    assert re.fullmatch(r"\d+[sm]", rule["for"])


def test_alert_uids_are_unique_and_fit() -> None:
    uids = [rule["uid"] for rule in RULES]
    assert len(set(uids)) == len(uids) == 10 and all(len(uid) <= 40 for uid in uids)


def test_the_data_source_reads_as_an_account_that_can_only_read() -> None:
    [source] = provisioned("datasources")["datasources"]
    assert (source["type"], source["uid"], source["editable"]) == ("postgres", "orbitstream", False)
    assert source["user"] == "orbitstream_grafana"
    assert source["secureJsonData"]["password"].startswith("$__file{/run/secrets/")
    options = source["jsonData"]
    assert options["database"] == "orbitstream"
    assert options["timescaledb"] is True
    assert options["timeInterval"] == "1s"
    assert {"sslmode", "postgresVersion"} <= set(options)


def test_the_dashboards_are_provisioned_for_good() -> None:
    [provider] = provisioned("dashboards")["providers"]
    assert provider["type"] == "file"
    assert provider["allowUiUpdates"] is False
    assert provider["disableDeletion"] is True
