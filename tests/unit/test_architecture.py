"""The directions of import that `engine/__init__.py` draws, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# What each module of ours may import. Everything may import what is in ANYWHERE.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "settings": {"embedded"},
    "process": set(),
    "logs": set(),
    "timestamps": set(),
    "channels": set(),
    "ring": set(),
    "heartbeat": set(),
    "gthread": {"http_answer", "problems"},
    "failpoints": set(),
    "producer": {"ring"},
    "consumer": {"ring"},
    "lanes": {"consumer", "producer", "ring"},
    "rows": {"channels"},
    "points": {"channels", "rows", "timestamps"},
    "arrow_columns": {"channels", "points", "rows"},
    "arrow_ipc": {"arrow_columns", "points", "rows"},
    "decode": {"arrow_ipc", "channels", "points", "rows"},
    "limits": {"channels", "rows"},
    "satellites": {"channels", "rows"},
    "episodes": {"limits", "rows", "satellites"},
    "copy_format": {"rows"},
    "problems": {"points"},
    "body": {"problems"},
    "prefer": set(),
    "tokens": set(),
    "guard": {"problems", "tokens"},
    "openapi": {"body", "channels", "keys", "points", "problems", "tokens"},
    "health": {"heartbeat", "lanes", "timestamps"},
    "stats": {"heartbeat", "lanes", "ring"},
    "metrics": {"heartbeat", "stats"},
    "top": {"heartbeat", "lanes", "recorder", "stats"},
    "recorder": {"episodes", "heartbeat", "limits", "stats"},
    "answers": {"prefer", "producer"},
    "http_head": {"problems"},
    "http_connection": {"body", "http_head", "problems"},
    "http_answer": {"problems"},
    "listeners": set(),
    "http_client": {"http_connection"},
    "commit_group": {"answers", "http_answer", "http_client"},
    "event_loop": {
        "answers", "commit_group", "http_answer", "http_client", "http_connection", "http_head", "listeners",
        "problems",
    },
    "http_worker": {"event_loop"},
    "app": {
        "answers", "body", "decode", "guard", "health", "keys", "lanes", "metrics", "openapi", "points", "prefer",
        "problems", "producer", "ring", "rows", "stats", "timestamps", "tokens",
    },
    "dead_letters": {"rows"},
    "keys": set(),
    "settlement": {"dead_letters", "keys"},
    "columnstore": {"copy_format", "rows"},
    "latest": {"rows", "satellites"},
    "ledger": set(),
    "drain": {"columnstore", "copy_format", "dead_letters", "ledger", "rows", "settlement", "timestamps"},
    "policies": set(),
    "migrate": {"policies"},
    "samples": set(),
    "maintenance": {"migrate", "policies", "samples", "settlement"},
    "connection": set(),
    "summary": {"drain", "episodes", "limits"},
    "backlog": {"columnstore", "consumer", "drain", "lanes"},
    "follower": {"connection", "drain", "episodes", "latest", "limits", "recorder", "rows", "satellites"},
    "writer": {
        "backlog", "columnstore", "connection", "consumer", "drain", "follower", "heartbeat", "lanes", "ledger",
        "migrate", "ring", "rows", "summary", "timestamps",
    },
    "installations": set(),
    "embedded_home": {"installations"},
    "embedded": {"embedded_home", "installations"},
    "supervisor": {"heartbeat", "lanes"},
    "verify": {"consumer", "lanes", "ledger", "ring"},
    "archive": {"columnstore", "copy_format", "rows"},
    "operate": {
        "archive", "consumer", "dead_letters", "embedded", "lanes", "ledger", "migrate", "policies", "ring", "tokens",
        "verify",
    },
    "rig": {"embedded"},
    "demo": {"heartbeat", "rig"},
    "trial": {"columnstore", "copy_format", "heartbeat", "lanes", "migrate", "rig", "rows"},
    "capacity": {"rig", "trial"},
    "__main__": {
        "capacity", "demo", "embedded", "health", "heartbeat", "installations", "lanes", "limits", "migrate",
        "operate", "ring", "supervisor", "tokens", "top", "writer",
    },
}  # fmt: skip
ANYWHERE = {"settings", "process", "logs", "failpoints", "__init__"}


def imported(path: Path) -> set[str]:
    """Return the names of packages and modules that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def ours(path: Path) -> set[str]:
    modules = {module.stem for module in (REPOSITORY / "engine").glob("*.py")}
    return {name.split(".")[1] for name in imported(path) if name.startswith("engine.")} & modules


@pytest.mark.parametrize("module", sorted(path.stem for path in (REPOSITORY / "engine").glob("*.py")))
def test_a_module_imports_only_what_lies_behind_it(module: str) -> None:
    assert ours(REPOSITORY / "engine" / f"{module}.py") - ANYWHERE <= ALLOWED[module]


def test_the_web_side_and_the_writer_do_not_know_each_other() -> None:
    reachable: dict[str, set[str]] = {}

    def reach(module: str) -> set[str]:
        if module not in reachable:
            reachable[module] = set()
            for each in ALLOWED[module]:
                reachable[module] |= {each} | reach(each)
        return reachable[module]

    assert not {"writer", "drain", "copy_format"} & reach("app")
    assert not {"app", "decode"} & reach("writer")
    assert "limits" not in reach("app"), "what is anomalous is decided where the points of all workers meet"


def test_the_simulator_knows_the_service_by_http_alone() -> None:
    for path in (REPOSITORY / "simulator").glob("*.py"):
        assert not any(name.split(".")[0] == "engine" for name in imported(path)), path


def test_only_settings_reads_the_environment() -> None:
    for path in (REPOSITORY / "engine").glob("*.py"):
        if path.stem != "settings":
            assert "os.environ" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path
