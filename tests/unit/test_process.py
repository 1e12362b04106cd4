"""What a process asks of the C library, seen in a process of its own."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, sys
import numpy as np
from engine import process

def transaction():
    return sum(len(np.ones(100_000)) for _ in range(8)) + len(np.concatenate([np.ones(100_000) for _ in range(8)]))

if sys.argv[1] == "keep":
    process.keep_freed_memory()
for _ in range(3):
    transaction()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    transaction()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


def test_arrays_that_are_freed_are_not_fetched_again_page_by_page() -> None:
    kept, given_back = page_faults("keep"), page_faults("")
    assert kept < 500 < given_back, (kept, given_back)
