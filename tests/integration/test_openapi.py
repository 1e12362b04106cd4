"""GET /openapi.json says what the service does: schemathesis sends what it allows and what it forbids, and compares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engine.channels import POINT_FIELDS
from engine.problems import PROBLEMS, TYPE_BASE
from tests.service import Service


def test_the_service_keeps_to_its_document(service: Service, tmp_path: Path) -> None:
    """Not checked: that all is taken which the schema allows; it cannot say how old a timestamp may be, say."""
    service.start()
    _, document, _ = service.get("/openapi.json")
    assert set(document["components"]["schemas"]["Point"]["properties"]) == {*POINT_FIELDS, "is_anomaly"}
    shown = document["components"]["schemas"]["Problem"]["properties"]["type"]["enum"]
    assert set(shown) == {TYPE_BASE + code for code in PROBLEMS}
    ran = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run", f"http://127.0.0.1:{service.port}/openapi.json",
         "--seed", "1", "--max-examples", "30", "--generation-database", "none", "--no-color",
         "--exclude-checks", "positive_data_acceptance"],
        cwd=tmp_path, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "6 passed" in ran.stdout, ran.stdout
