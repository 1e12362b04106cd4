"""What a process asks of kernel and C library: to die with its parent, to keep the memory that it frees.

The kernel's parent-death signal is cleared by a change of user and by fork, so it is asked for last, in the process
that is to carry it.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from typing import Final

PR_SET_PDEATHSIG = 1  # prctl(2)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT_BYTES: Final = 64 << 20
KEPT_AT_ONCE: Final = 32 << 20
"""The largest that glibc takes for M_MMAP_THRESHOLD on 64-bit machines."""

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


def keep_freed_memory() -> None:
    """Have malloc keep up to KEPT_BYTES of what is freed for the next arrays of that size.

    Otherwise glibc gives arrays of some 100 kB and more back to the kernel, which fills the next ones with zeros, page
    by page: that took a quarter of a writer's time. Does nothing where the C library has no mallopt.
    """
    with suppress(AttributeError):
        _libc.mallopt(M_MMAP_THRESHOLD, KEPT_AT_ONCE)
        _libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
