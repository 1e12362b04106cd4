"""Draw the boards: python -m bench.pictures [--database-url postgresql://...] [--out grafana/pictures]

Each panel's SQL is asked as Grafana asks it and drawn by matplotlib in the panel's place. This is not Grafana's
renderer: it shows what is on the boards, not how Grafana paints it. Without --database-url a service and the simulator
run on a private database for a while first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from numbers import Number
from pathlib import Path
from typing import Any

from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import boards
from engine import data_folder, migrate, rig, settings

Table = tuple[list[str], list[tuple[Any, ...]]]
CELL = (0.62, 0.37)
"""Inches of a cell of Grafana's grid."""
COLORS = {"green": "tab:green", "orange": "tab:orange", "red": "tab:red", "blue": "tab:blue"}
SCALED = {"bytes": (1e6, "MB"), "Bps": (1e6, "MB/s"), "decmbytes": (1e3, "GB"), "percentunit": (0.01, "%")}
SUFFIX = {"percent": "%", "rowsps": "/s", "ops": "/s", "dBm": "dBm", "s": "s", "ms": "ms", "µs": "µs", "celsius": "°C",
          "volt": "V", "lengthkm": "km", "velocitykmh": "km/h", "degree": "°"}  # fmt: skip


def in_unit(unit: str) -> tuple[float, str]:
    """Return what a value is divided by, and what is written behind it."""
    return SCALED.get(unit, (1, unit.removeprefix("suffix: ") if ":" in unit else SUFFIX.get(unit, "")))


def words(value: Any, unit: str = "") -> str:
    """Return a value as a reader wants it: three digits, its unit."""
    if isinstance(value, datetime):
        return f"{value:%H:%M:%S}"
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)[:26]
    scale, suffix = in_unit(unit)
    value = float(value) / scale
    return f"{value:,.0f} {suffix}" if abs(value) >= 100 or value == int(value) else f"{value:.3g} {suffix}"


def unit_of(panel: dict[str, Any], column: str) -> str:
    for each in panel["fieldConfig"]["overrides"]:
        if each["matcher"]["options"] == column:
            for item in each["properties"]:
                if item["id"] == "unit":
                    return str(item["value"])
    return str(panel["fieldConfig"]["defaults"]["unit"])


def color_of(panel: dict[str, Any], value: Any) -> str:
    """Return the colour that the panel's thresholds give a value."""
    color = "green" if value is None else "blue"
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if value is not None and (step["value"] is None or (isinstance(value, Number) and value >= step["value"])):
            color = step["color"]
    return COLORS.get(color, "black")


def numbers(axes: Axes, panel: dict[str, Any], table: Table) -> None:
    columns, rows = table
    axes.axis("off")
    for place, name in enumerate(columns if rows else []):
        value = rows[0][place]
        at = (place + 0.5) / len(columns)
        shown = (
            panel["fieldConfig"]["defaults"].get("noValue", "-")
            if value is None
            else words(value, unit_of(panel, name))
        )
        axes.text(at, 0.55, shown, ha="center", va="center", fontsize=15 if len(columns) < 3 else 11,
                  color=color_of(panel, value))  # fmt: skip
        axes.text(at, 0.12, name, ha="center", va="center", fontsize=8, color="grey")


def curves(axes: Axes, panel: dict[str, Any], table: Table) -> None:
    columns, rows = table
    series: dict[str, tuple[list[Any], list[Any]]] = {}
    scale, suffix = in_unit(panel["fieldConfig"]["defaults"]["unit"])
    for row in rows:
        named = dict(zip(columns, row, strict=True))
        at, name = named.pop("time"), named.pop("metric", None)
        for column, value in named.items():
            times, values = series.setdefault(name or column, ([], []))
            times.append(at)
            values.append(None if value is None else float(value) / scale)
    for name, (times, values) in series.items():
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(times, shown, linewidth=1, label=name, marker="." if len(times) < 4 else "")
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        low, high = axes.get_ylim()
        if step["value"] is not None and low <= step["value"] / scale <= high:
            axes.axhline(step["value"] / scale, color=COLORS.get(step["color"], "grey"), linestyle="--", linewidth=0.8)
    if 0 < len(series) < 7:
        axes.legend(fontsize=7, loc="best", frameon=False)
    axes.set_ylabel(suffix or None, fontsize=8)
    if panel["fieldConfig"]["defaults"].get("min") == 0:
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
    _clock(axes)


def states(axes: Axes, panel: dict[str, Any], table: Table) -> None:
    columns, rows = table
    names = sorted({row[columns.index("metric")] for row in rows}, reverse=True)
    for row in rows:
        named = dict(zip(columns, row, strict=True))
        color = ("tab:green", "tab:orange", "tab:red")[int(named["level"])]
        axes.barh(names.index(named["metric"]), timedelta(minutes=1), left=named["time"], color=color, height=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    _clock(axes)


def heat(axes: Axes, panel: dict[str, Any], table: Table) -> None:
    columns, rows = table
    if rows:
        axes.imshow([[row[place] or 0 for row in rows] for place in range(len(columns) - 1, 0, -1)], aspect="auto",
                    cmap="Oranges", extent=(0, len(rows), 0, 100))  # fmt: skip
    axes.set_xlabel("samples", fontsize=7)


def grid(axes: Axes, panel: dict[str, Any], table: Table) -> None:
    columns, rows = table
    axes.axis("off")
    most = max(1, round(panel["gridPos"]["h"] * 1.9) - 4)
    cells = [
        [words(value, unit_of(panel, name)) for name, value in zip(columns, row, strict=True)] for row in rows[:most]
    ]
    if cells:
        drawn = axes.table(cells, colLabels=columns, loc="upper left", cellLoc="left", edges="horizontal")
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(7)
        drawn.auto_set_column_width(range(len(columns)))


def globe(axes: Axes, panel: dict[str, Any], table: Table) -> None:
    columns, rows = table
    at = {name: [row[columns.index(name)] for row in rows] for name in ("longitude", "latitude", "severity")}
    colors = [("tab:green", "tab:orange", "tab:red")[int(level)] for level in at["severity"]]
    axes.scatter(at["longitude"], at["latitude"], s=8, c=colors)
    axes.set(xlim=(-180, 180), ylim=(-90, 90))
    axes.grid(alpha=0.3)


KINDS = {"stat": numbers, "timeseries": curves, "status-history": states, "state-timeline": states, "heatmap": heat,
         "table": grid, "geomap": globe}  # fmt: skip


def _clock(axes: Axes) -> None:
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=7))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M", tz=UTC))
    axes.grid(alpha=0.3)


def draw(board: dict[str, Any], asked: boards.Boards, view: boards.View, path: Path) -> None:
    """Draw one board, each panel at its place."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    width, height = 24 * CELL[0], rows * CELL[1] + 0.6
    figure = Figure(figsize=(width, height))
    figure.suptitle(f"{board['title']}: data of the panels, drawn by matplotlib, not by Grafana", fontsize=11,
                    y=1 - 0.2 / height)  # fmt: skip
    for panel in board["panels"]:
        at = panel["gridPos"]
        left, top = at["x"] / 24, 1 - (at["y"] * CELL[1] + 0.45) / height
        if panel["type"] == "row":
            figure.text(left + 0.01, top - 0.02 * 6 / height, panel["title"], fontsize=11, weight="bold", va="top")
            continue
        w, h = at["w"] / 24, at["h"] * CELL[1] / height
        margin = (0.05, 0.36 / height) if panel["type"] not in ("stat", "table") else (0.004, 0.05 / height)
        axes = figure.add_axes((left + margin[0], top - h + margin[1], w - margin[0] - 0.008,
                                h - margin[1] - 0.34 / height))  # fmt: skip
        axes.set_title("\n".join(textwrap.wrap(panel["title"], 40)), fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        shortest = timedelta(seconds=boards.parse_interval(panel.get("interval", "1s")))
        columns, found = asked.ask(
            panel["targets"][0]["rawSql"], boards.View(**{**vars(view), "interval": max(shortest, view.interval)})
        )
        KINDS[panel["type"]](axes, panel, ([name for name, _ in columns], found))
    figure.savefig(path, dpi=80)


def pictures(dsn: str, out: Path, minutes: float) -> None:
    """Draw every board over the last minutes of a database."""
    with migrate.connect(dsn, "orbitstream-bench") as connection:
        edition = migrate.find_edition(connection)
        rows = connection.execute(
            "SELECT satellite_id FROM satellite_latest LEFT JOIN anomaly_event USING (satellite_id)"
            " GROUP BY 1 ORDER BY max(cleared_at - onset) DESC NULLS LAST LIMIT 3"
        ).fetchall()
        [(end,)] = connection.execute("SELECT coalesce(max(time), now()) FROM engine_stats").fetchall()
    chosen = tuple(name for (name,) in rows) or ("-",)
    out.mkdir(parents=True, exist_ok=True)
    with boards.opened(dsn, edition, end) as asked:
        for path in sorted((data_folder("grafana") / "dashboards").glob("*.json")):
            satellites = chosen[:1] if path.stem == "satellite" else chosen
            begin = end - timedelta(minutes=minutes)
            view = boards.View(begin, end, timedelta(seconds=max(1, minutes / 5)), satellites)
            draw(json.loads(path.read_text()), asked, view, out / f"{path.stem}.png")
            print(out / f"{path.stem}.png")


def run(options: argparse.Namespace) -> None:
    """Run service and simulator on a private database, sampled as each minute, and draw what they left."""
    lane_dir = rig.private_folder(Path("/dev/shm"), "orbitstream-pictures", 0o700)
    home = rig.private_folder(settings.load({}).home, "pictures")
    try:
        with ExitStack() as stack:
            dsn = stack.enter_context(rig.private_database(home, lambda _: None)).dsn
            config = settings.load({"DATABASE_URL": dsn})
            migrate.migrate(config, dsn, lambda _: None)
            _, url = stack.enter_context(rig.service(rig.overrides(dsn, lane_dir, 2, 1), lane_dir))
            flags = {"--satellites": 200, "--rate": 5, "--duration": options.minutes * 60, "--batch": 100,
                     "--channels": "all", "--anomaly-rate": 0.03, "--quiet": True}  # fmt: skip
            rig.simulate(url, flags)
            pictures(dsn, options.out, options.minutes)
    finally:
        shutil.rmtree(lane_dir, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.pictures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database-url", help="draw this database as it is")
    parser.add_argument("--minutes", type=float, default=6, help="how long to run, and to draw (%(default)g)")
    parser.add_argument("--out", type=Path, default=Path("grafana/pictures"), help="folder (%(default)s)")
    options = parser.parse_args()
    if options.database_url:
        pictures(options.database_url, options.out, options.minutes)
    else:
        run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
