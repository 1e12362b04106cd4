"""deploy/SETTINGS.md is what engine/settings.py says. Write it anew: python -m tests.unit.test_settings_table"""

from __future__ import annotations

from pathlib import Path

from engine import data_folder, settings

HEAD = """# Settings

Each is an environment variable and a flag of `orbitstream serve` (`--batch-size` is `BATCH_SIZE`; all
names are in `orbitstream serve --help`). A flag wins. A password is taken from a variable
or from libpq's files only, since every user of a machine can read a command line. Durations: `50ms`, `1s`, `1h`, `30d`;
sizes: `128MiB`.

| variable | default | what it is |
|---|---|---|
"""


def table() -> str:
    rows = [f"| `{variable}` | {default} | {help} |\n" for _, variable, help, default in settings.options()]
    return HEAD + "".join(rows)


def path() -> Path:
    return data_folder("deploy") / "SETTINGS.md"


def test_every_setting_is_documented_with_its_default() -> None:
    assert path().read_text() == table(), "run: python -m tests.unit.test_settings_table"


if __name__ == "__main__":
    path().write_text(table())
