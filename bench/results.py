"""Where figures go: JSON that says what was measured, with what configuration, of which commit, on which machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")


def machine() -> dict[str, Any]:
    """Describe this machine."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": f"{platform.python_version()} ({platform.python_build()[1]}, {platform.python_compiler()})",
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """Return the commit of this checkout, with a + when files differ from it."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return (found.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def save(name: str, configuration: dict[str, Any], figures: Any, output: Path | None = None) -> Path:
    """Write figures to results/NAME.json, or to another folder; return the file."""
    folder = output or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "configuration": configuration,
        "figures": figures,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def bars(name: str, title: str, unit: str, values: dict[str, float], output: Path | None = None) -> None:
    """Draw results/NAME.png where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 0.6 + 0.45 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(list(values), list(values.values()))
    axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=title, xlabel=unit)
    figure.savefig((output or FOLDER) / f"{name}.png", dpi=120)
