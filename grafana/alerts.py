"""The alert rules, each with the panel that shows it and a paragraph of RUNBOOKS.md that says what to do."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import capacity
import database
import fleet
import satellite
from panels import SOURCE, Json

RUNBOOKS: Final = "grafana/RUNBOOKS.md"
RECENT: Final = "time > now() - interval '2 minutes'"


class Alert(NamedTuple):
    """A rule: it fires when the value of the query is above `above` for so long; `board` and `panel` show why."""

    uid: str
    title: str
    severity: str
    summary: str
    value: str
    source: str
    above: float
    lasting: str
    board: str
    panel: int
    on_error: str = "Error"


ALERTS: Final = (
    Alert("lane-filling", "Lane above 80 %", "warning",
          "A lane is over 80 % full: the database takes less than arrives.",
          "max(queue_bytes / nullif(capacity_bytes, 0)::float8)", f"engine_stats WHERE {RECENT}",
          0.8, "30s", capacity.UID, 21),
    Alert("lane-full", "Lane full", "critical", "Points are answered 503 for want of room.",
          "coalesce(sum(grown), 0)::float8",
          f"(SELECT max(refused) - min(refused) AS grown FROM engine_stats WHERE {RECENT}"
          " GROUP BY node, name) AS lanes",
          0, "0s", capacity.UID, 11),
    # The first writer of a node writes the rows of all: nobody else tells that it is gone.
    Alert("writer-stale", "Writer stale", "critical",
          "A writer has not beaten for 5 seconds or has ended, or nothing was heard of its node for 90 seconds.",
          "(count(*) FILTER (WHERE NOT up))::float8",
          "(SELECT DISTINCT ON (node, name) alive AND time > now() - interval '90 seconds' AS up FROM engine_stats"
          " WHERE time > now() - interval '10 minutes' AND process = 'writer'"
          " ORDER BY node, name, time DESC) AS writers", 0, "30s", capacity.UID, 41),
    Alert("database-down", "Database down", "critical",
          "The engine has written nothing for a minute, not even its own stats: the database, or the way to it.",
          "coalesce(extract(epoch FROM now() - max(time)), 86400)::float8",
          "engine_stats WHERE time > now() - interval '1 day'", 60, "30s", database.UID, 11, "Alerting"),
    Alert("dead-letters", "Dead letters rising", "warning", "The database refuses points; they are set aside.",
          "count(*)::float8", "dead_letter WHERE created_at > now() - interval '10 minutes'",
          0, "0s", database.UID, 3),
    Alert("residual", "Conservation broken", "critical",
          "Published points are neither stored nor queued: some were lost or invented.",
          "coalesce(sum(points), 0)::float8",
          f"(SELECT DISTINCT ON (node, name) abs(residual) AS points FROM engine_stats WHERE {RECENT}"
          " AND residual IS NOT NULL ORDER BY node, name, time DESC) AS lanes", 0, "1m", capacity.UID, 23),
    Alert("satellite-silent", "Satellite silent", "warning",
          "A satellite that reported within the last hour has been silent for 5 minutes.",
          "count(*)::float8", "satellite_latest WHERE time < now() - interval '5 minutes'"
          " AND time > now() - interval '1 hour'", 0, "1m", fleet.UID, 31),
    Alert("anomaly-spike", "Anomaly rate spike", "warning",
          "Three times as many episodes began in the last 10 minutes as in 10 minutes of the 2 hours before.",
          "(count(*) FILTER (WHERE onset > now() - interval '10 minutes')"
          " / greatest(5, count(*) FILTER (WHERE onset <= now() - interval '10 minutes') / 12.0))::float8",
          "anomaly_event WHERE onset > now() - interval '130 minutes'", 3, "0s", satellite.ANOMALIES_UID, 11),
    Alert("disk-full", "Disk full within 3 days", "critical",
          "At the growth of the last day the disk of the database is full within 3 days.",
          "(3 * 86400 * regr_slope(database_bytes, extract(epoch FROM sampled_at))"
          " / nullif((array_agg(disk_free_bytes ORDER BY sampled_at DESC))[1], 0))::float8",
          "storage_stats WHERE sampled_at > now() - interval '1 day'", 1, "10m", capacity.UID, 51),
    Alert("job-failing", "Background job failing", "warning", "The last run of a policy of TimescaleDB failed.",
          "(count(*) FILTER (WHERE last_status = 'Failed'))::float8", "background_job", 0, "5m", database.UID, 22),
)  # fmt: skip


def rule(alert: Alert) -> Json:
    """Return one rule of Grafana's file provisioning: the query, its last value, the comparison."""
    query = {
        "refId": "A", "datasource": SOURCE, "format": "time_series", "rawQuery": True, "editorMode": "code",
        "rawSql": f'SELECT now() AS "time", {alert.value} AS "value"\nFROM {alert.source}',
        "intervalMs": 1000, "maxDataPoints": 100,
    }  # fmt: skip
    expression = {"type": "__expr__", "uid": "__expr__"}

    def step(ref: str, **model: Any) -> Json:
        return {"refId": ref, "relativeTimeRange": {"from": 0, "to": 0}, "datasourceUid": "__expr__",
                "model": {"refId": ref, "datasource": expression, **model}}  # fmt: skip

    return {
        "uid": f"orbitstream-{alert.uid}",
        "title": alert.title,
        "condition": "C",
        "data": [
            {"refId": "A", "relativeTimeRange": {"from": 600, "to": 0}, "datasourceUid": SOURCE["uid"], "model": query},
            step("B", type="reduce", expression="A", reducer="last"),
            step("C", type="threshold", expression="B",
                 conditions=[{"evaluator": {"type": "gt", "params": [alert.above]}}]),
        ],
        "dashboardUid": alert.board,
        "panelId": alert.panel,
        "noDataState": "OK",
        "execErrState": alert.on_error,
        "for": alert.lasting,
        "annotations": {
            "summary": alert.summary,
            "runbook_url": f"{RUNBOOKS}#{alert.title.lower().replace(' %', '').replace(' ', '-')}",
            "__dashboardUid__": alert.board,
            "__panelId__": str(alert.panel),
        },
        "labels": {"severity": alert.severity},
        "isPaused": False,
    }  # fmt: skip


def alerting() -> Json:
    """Return the file that provisions every rule."""
    group = {"orgId": 1, "name": "orbitstream", "folder": "OrbitStream", "interval": "30s",
             "rules": [rule(alert) for alert in ALERTS]}  # fmt: skip
    return {"apiVersion": 1, "groups": [group]}
