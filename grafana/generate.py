"""Write the dashboards and the alert rules: python grafana/generate.py [--check]

A board is a plain dict of Grafana's classic dashboard JSON. The JSON is committed, since Grafana reads files; what is
edited are these programs, and `--check` exits 1 when the files are not what they would write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from alerts import alerting
from capacity import capacity
from database import database
from fleet import fleet
from satellite import anomalies, satellite

FOLDER: Final = Path(__file__).resolve().parent


def files() -> Iterator[tuple[Path, str]]:
    """Yield each generated file and its text. JSON is YAML too, which is what Grafana takes alert rules for."""
    for make in (capacity, fleet, satellite, anomalies, database):
        yield FOLDER / "dashboards" / f"{make.__name__}.json", json.dumps(make(), indent=2) + "\n"
    yield FOLDER / "provisioning" / "alerting" / "orbitstream.yaml", json.dumps(alerting(), indent=2) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with --check compare them."""
    parser = argparse.ArgumentParser(description="Write the dashboards and alert rules under grafana/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not up to date")
    options = parser.parse_args(argv)
    stale = [(path, text) for path, text in files() if not path.exists() or path.read_text() != text]
    for path, text in stale:
        if options.check:
            print(f"{path} is not what grafana/generate.py writes: run it", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(f"wrote {path}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
