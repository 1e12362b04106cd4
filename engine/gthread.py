"""gunicorn's thread worker, taught to take a listener that was shut down for the end of new connections."""

from __future__ import annotations

import errno
import socket

from gunicorn.workers.gthread import ThreadWorker


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """A ThreadWorker that survives the supervisor's shutdown of the shared listening socket.

    The supervisor refuses new clients at once when it stops, while requests under way are finished; gunicorn's own
    worker would die of the EINVAL that accept gives then, and its requests with it.
    """

    def accept(self, listener: socket.socket) -> None:
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.alive = False
