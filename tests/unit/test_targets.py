"""The table of targets in README: a row for each, from results as the benchmarks write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import results, targets


def ingested(committed: float, straight: float = 1.0) -> dict[str, Any]:
    fleet = {
        "satellites": 1000,
        "committed_per_second": committed,
        "committed_to_copy": 0.9,
        "committed_to_cpu": 0.97,
        "straight_to_columnstore": straight,
    }
    return {"fleets": [fleet, {**fleet, "committed_per_second": 0}, {**fleet, "committed_per_second": committed}]}


def test_results_become_rows_that_say_whether_a_target_is_met(tmp_path: Path) -> None:
    results.save("ingest-rowstore", {}, ingested(160_000), tmp_path)
    results.save("ingest-arrow", {}, ingested(900_000, straight=0.1), tmp_path)
    results.save(
        "history", {}, {"fleets": [{"filled_to_empty": {"median": 0.89, "pairs": [0.95, 0.89, 0.8]}}]}, tmp_path
    )
    rows = {target.run: row for target, row in zip(targets.TARGETS, targets.table(tmp_path), strict=True)}
    assert rows["ingest-rowstore"][2:4] == ("160,000 points/s, 0.90; 97% of what the cores can do", "yes")
    assert rows["ingest-arrow"][3] == "no", "what went into the row store is no figure of the columnstore"
    assert rows["history"][2:4] == ("0.89 (0.80 to 0.95)", "no")
    assert rows["latency"][2:4] == ("not measured", "")
    readme = tmp_path / "README.md"
    for _ in range(2):  # what was written is replaced
        readme.write_text(readme.read_text() if readme.exists() else f"before\n{targets.BEGIN}\n{targets.END}\nafter\n")
        targets.write_readme(list(rows.values()), targets.footnote(tmp_path), readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("| 0.89 (0.80 to 0.95) | no |") == 1


def test_readme_has_a_row_for_every_target_and_the_results_behind_it() -> None:
    table = targets.README.read_text().partition(targets.BEGIN)[2].partition(targets.END)[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [target.what for target in targets.TARGETS]
    for name in {target.run for target in targets.TARGETS}:
        if (results.FOLDER / f"{name}.json").exists():
            assert json.loads((results.FOLDER / f"{name}.json").read_text())["commit"] in table
