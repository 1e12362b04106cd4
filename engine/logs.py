"""Log lines: one format for every process, on standard error."""

from __future__ import annotations

import logging
import logging.config
import time
from typing import Any


class Formatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO writer-0: message`, in UTC."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")


def _configuration(level: str, process: str) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": Formatter, "process": process}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": level.upper()},
    }


def configure(level: str, process: str) -> None:
    """Send log records of `level` and above to standard error."""
    logging.config.dictConfig(_configuration(level, process))


def for_gunicorn(level: str) -> dict[str, Any]:
    """Return the same for gunicorn's `logconfig_dict`; its loggers and ours go the same way, without an access log."""
    loggers = {"gunicorn.error": {"level": level.upper(), "handlers": [], "propagate": True}}
    return {**_configuration(level, "web"), "loggers": loggers}


class Limited:
    """Pass at most `burst` warnings in `interval` seconds, and count the others for a line of their own."""

    def __init__(self, log: logging.Logger, burst: int = 5, interval: float = 1.0) -> None:
        self._log, self._burst, self._interval = log, burst, interval
        self._since = float("-inf")
        self._passed = 0
        self._held = 0

    def room(self) -> int:
        """Return how many lines may be written now."""
        self.flush()
        return self._burst - self._passed

    def warning(self, message: str, *arguments: object) -> None:
        if self.room() > 0:
            self._passed += 1
            self._log.warning(message, *arguments)
        else:
            self._held += 1

    def hold(self, count: int) -> None:
        """Count `count` lines as not written."""
        self._held += count

    def flush(self, *, final: bool = False) -> None:
        """Begin a new interval if the last one is over, saying how many lines it held back."""
        now = time.monotonic()
        if final or now - self._since >= self._interval:
            if self._held:
                self._log.warning("and %d more like these", self._held)
            self._since, self._passed, self._held = now, 0, 0
