"""OrbitStream: telemetry from HTTP to TimescaleDB rows, exactly once.

Data flows one way, and each module is one room on that way:

    body --> decode --> rows --> ring  (shared memory)  ring --> rows --> copy_format --> COPY --> telemetry
                                                            writer; follower: limits, episodes

    orbitstream serve (supervisor)        owns the lane directory, starts and restarts the rest
      gunicorn arbiter                    deploy/gunicorn.conf.py
        worker 0..W-1  (http_worker)      one event loop each, which calls the application (app) inline; each
                                          appends to one lane, as its only producer
      writer 0..N-1    (writer)           each drains lanes, as their only consumer; one database connection
      maintenance      (maintenance)      the chores that need the tables' owner
    PostgreSQL / TimescaleDB              DATABASE_URL, or an embedded server (embedded)

A 202 means: committed in a lane. The writer moves a lane's records and its position in the ledger in one transaction,
and frees their room only after COMMIT: so every accepted point becomes a row exactly once, whichever process dies.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"


def data_folder(name: str) -> Path:
    """Return the folder `sql`, `grafana` or `deploy`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
