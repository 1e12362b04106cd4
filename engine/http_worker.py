"""The gunicorn worker class `eventloop`: one event loop a process, which calls the application inline."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from gunicorn.workers.base import Worker as BaseWorker

from engine import settings
from engine.event_loop import Bounds, Loop

STOP_MARGIN_S = 1.0
"""The worker ends so long before the arbiter would kill it (graceful_timeout)."""
COLLECT_AFTER = 20_000
"""Objects more than were freed until garbage is looked for. With Python's own 700 that is done in the midst of each
batch of as many points, each of them an object for a moment: 4 % of what decoding takes."""


class Worker(BaseWorker):  # type: ignore[misc]  # gunicorn has no types
    """What gunicorn asks of a worker, around a Loop."""

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Refuse to start with what this class does not do."""
        if cfg.is_ssl:
            raise RuntimeError(
                "the event loop speaks no TLS: set ORBITSTREAM_WORKER_CLASS=gthread, or leave out certfile and keyfile "
                "and put a proxy before it"
            )

    def run(self) -> None:
        """Serve until the arbiter says stop."""
        for listener in self.sockets:
            listener.setblocking(False)
        bounds = Bounds(
            max_body=settings.load().max_body_bytes,
            max_connections=self.cfg.worker_connections,
            max_requests=self.max_requests,
            keepalive=self.cfg.keepalive,
            graceful=max(0.0, self.cfg.graceful_timeout - STOP_MARGIN_S),
        )
        access_log = self._log_access if self.cfg.accesslog else None
        loop = Loop(self.wsgi, self.sockets, bounds, wake=self.PIPE[0], access_log=access_log)
        gc.collect()
        gc.freeze()  # what is here now stays: a collection among requests need not look at it
        gc.set_threshold(COLLECT_AFTER)
        loop.run(self._keep_going)

    def _keep_going(self) -> bool:
        self.notify()
        return bool(self.alive) and self.ppid == os.getppid()

    def _log_access(
        self, environ: dict[str, Any], status: str, headers: list[tuple[str, str]], sent: int, seconds: float
    ) -> None:
        answer = SimpleNamespace(status=status, headers=headers, sent=sent)
        request = SimpleNamespace(headers=[])
        self.log.access(answer, request, environ, timedelta(seconds=seconds))
