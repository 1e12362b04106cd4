"""How much memory this process took at most. `ru_maxrss` would count what a parent had taken before the exec, too."""

from __future__ import annotations

from pathlib import Path


def forget_peak() -> None:
    """Let the peak start anew at what is taken now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Return the largest resident memory so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
