"""What an unset failpoint costs: `publish` as it is, against the same source without its failpoints, in turns.

python -m pytest -s bench/test_failpoints.py
"""

from __future__ import annotations

import ast
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from engine import failpoints, producer, ring

pytestmark = pytest.mark.benchmark

ROUNDS, CALLS = 400, 500


class WithoutFailpoints(ast.NodeTransformer):
    """Remove every `if ARMED: ...`."""

    removed = 0

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "ARMED":
            self.removed += 1
            return None
        return self.generic_visit(node)


def without_failpoints(module: ModuleType) -> ModuleType:
    stripper = WithoutFailpoints()
    tree = ast.fix_missing_locations(stripper.visit(ast.parse(inspect.getsource(module))))
    assert stripper.removed >= 5
    bare = ModuleType(f"{module.__name__}_bare")
    exec(compile(tree, f"{module.__file__} (bare)", "exec"), bare.__dict__)
    return bare


def publisher(module: ModuleType, path: Path) -> Callable[[], float]:
    """Return what times CALLS publications of a point's record into a lane of its own, in ns for each."""
    ring.create(path, 8 << 20, b"", ring.boot_id())
    lane = ring.Lane(path)
    publish = module.Producer(lane).publish
    payload = [bytes(56)]

    def timed() -> float:
        lane.words[ring.TAIL] = lane.words[ring.HEAD]  # all of it is drained: there is always room
        begun = time.perf_counter_ns()
        for _ in range(CALLS):
            publish(payload, 1, 0)
        return (time.perf_counter_ns() - begun) / CALLS

    return timed


def test_unset_failpoints_cost_nothing_that_can_be_measured() -> None:
    assert not failpoints.ARMED
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        armed = publisher(producer, Path(folder) / "armed")
        bare = publisher(without_failpoints(producer), Path(folder) / "bare")
        same = publisher(without_failpoints(producer), Path(folder) / "same")  # how far two equal ones differ
        pairs = [(armed(), bare(), same()) for _ in range(ROUNDS)]
    ratio = statistics.median(with_points / without for with_points, without, _ in pairs)
    noise = statistics.median(other / without for _, without, other in pairs)
    nanoseconds = statistics.median(without for _, without, _ in pairs)
    print(f"publish: {nanoseconds:.0f} ns without failpoints, {ratio:.4f} times that with; two equal ones: {noise:.4f}")
    assert ratio < 1.05
