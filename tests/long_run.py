"""How hard the fault tests try, by one switch, and the report of what they did.

ORBITSTREAM_CRASH_LONG=1 (`make crash`) is the long run. ORBITSTREAM_CRASH_SEED repeats a run's random choices,
ORBITSTREAM_CRASH_KILLS sets the number of random kills, ORBITSTREAM_CRASH_REPORT names the JSON file of the summary.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, Final

LONG: Final = os.environ.get("ORBITSTREAM_CRASH_LONG") == "1"
SEED: Final = int(os.environ.get("ORBITSTREAM_CRASH_SEED") or random.SystemRandom().randrange(10**6))
KILLS: Final = int(os.environ.get("ORBITSTREAM_CRASH_KILLS") or (1000 if LONG else 50))
REPORT: Final = os.environ.get("ORBITSTREAM_CRASH_REPORT")

COUNTED: Final = ("kills", "hits", "cuts", "images", "sequences", "accepted", "unknown")
LONGEST: Final = ("longest_gap_s", "commit_gap_s")

_faults: dict[str, dict[str, Any]] = {}


def report(fault: str, **figures: float) -> None:
    """Note what was done and seen of a fault, after all checks of it: counts add up, of gaps the longest stays."""
    noted = _faults.setdefault(fault, {})
    for name, figure in figures.items():
        before = noted.get(name, 0)
        noted[name] = max(before, figure) if name in LONGEST or isinstance(figure, float) else before + figure


def summary(*, passed: bool) -> dict[str, Any]:
    """Return the figures of each fault and of all; a test that sees a point lost or doubled fails, `passed` with it.

    `longest_gap_s` is between two 202s of one client, `commit_gap_s` between two commits when the database's own
    processes were killed, stopped or cut off.
    """
    totals = {name: sum(each.get(name, 0) for each in _faults.values()) for name in COUNTED}
    gaps = {name: max((each.get(name, 0.0) for each in _faults.values()), default=0.0) for name in LONGEST}
    clean = {"lost": 0, "duplicated": 0} if passed else {}
    return {
        "passed": passed,
        "seed": SEED,
        "long": LONG,
        **clean,
        **totals,
        **gaps,
        "faults": dict(sorted(_faults.items())),
    }


def write(exit_status: int) -> None:
    """Write the summary to the file that ORBITSTREAM_CRASH_REPORT names."""
    if REPORT and _faults:
        Path(REPORT).write_text(json.dumps(summary(passed=exit_status == 0), indent=1) + "\n")
