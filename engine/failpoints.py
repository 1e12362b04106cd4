"""Places where a test makes this process kill itself: `if ARMED: hit("name")` in publish, drain and recovery.

ORBITSTREAM_FAILPOINT=name:n is read once, at import. Unset, ARMED is a false constant: a few nanoseconds at each place.
"""

from __future__ import annotations

import os
import signal
from typing import Final

from engine import settings

_NAME, _NTH = settings.failpoint()
ARMED: Final = bool(_NAME)

_passed = 0


def hit(name: str) -> None:
    """SIGKILL this process at the n-th passing of the failpoint that was asked for."""
    global _passed
    if name == _NAME:
        _passed += 1
        if _passed == _NTH:
            os.kill(os.getpid(), signal.SIGKILL)
