"""What a process owes its parent: die with it, and be found by it.

The kernel's parent-death signal is cleared by a change of user and by fork, so it is asked for last, in the process
that is to carry it.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # prctl(2)

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` to this process when `parent` (a process id) ends.

    Call it after any fork, exec or change of user. If the parent ended before the call, exits at once: the signal
    would never come. Note that the kernel watches the parent's *thread*: spawn from a main thread.
    """
    if _libc.prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(code)}")
    if os.getppid() != parent:
        os._exit(0)
