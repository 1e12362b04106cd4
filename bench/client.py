"""The simulator alone, against nginx that answers 202: CPU a point that the load itself takes, single posts a second.

python -m bench.client --seconds 3        (nginx: apt install nginx)
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import results
from engine import rig

CONFIGURATION = """
daemon off; worker_processes 1; pid {home}/pid; error_log stderr error; user root;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_max_body_size 0; keepalive_requests 100000000; default_type application/json;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  server {{ listen 127.0.0.1:{port}; location / {{ return 202 '{{"status":"accepted"}}'; }} }}
}}
"""

# name: flags of the simulator, what is asked of it
BATCHES = {"--rate": 0, "--batch": 1000, "--processes": 1}
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "json": (BATCHES, "cpu_us_per_point", 1.0),
    "arrow": (BATCHES | {"--format": "arrow"}, "cpu_us_per_point", 0.2),
    "single posts": ({"--rate": 0, "--batch": 1, "--processes": 2}, "requests_per_second", 20_000.0),
}


@contextmanager
def nginx() -> Iterator[str]:
    """Run an nginx of one's own; yield its URL."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        raise SystemExit("bench.client needs nginx: apt install nginx")
    with tempfile.TemporaryDirectory(prefix="orbitstream-nginx-") as home:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            port = reserved.getsockname()[1]
        Path(home, "conf").write_text(CONFIGURATION.format(home=home, port=port))
        server = subprocess.Popen([program, "-p", home, "-c", f"{home}/conf", "-e", "stderr"])
        try:
            _await(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(10)


def _await(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise rig.RigError(f"nginx does not answer on port {port}: {error}") from error
            time.sleep(0.05)  # nothing tells when nginx listens; until the deadline above


def measure(url: str, flags: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Run the simulator once; everything it sends has to be answered 202."""
    load = {"--duration": options.seconds, "--satellites": options.satellites, "--quiet": True}
    report = rig.simulate(url, {**load, **flags})
    if report["accepted"] != report["sent"]:
        raise rig.RigError(f"{report['sent'] - report['accepted']} points of {report['sent']} were not answered 202")
    return {
        "points_per_second": round(report["points_per_second"]),
        "requests_per_second": round(report["requests"] / report["seconds"]),
        "cpu_us_per_point": round(report["cpu_seconds"] / report["sent"] * 1e6, 3),
    }


def main() -> int:
    """Measure each case, the best of some rounds; write results/client.json; exit code 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.client", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=3.0)
    add("--rounds", type=int, default=3)
    add("--satellites", type=int, default=1000)
    add("--output", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    met = True
    with nginx() as url:
        for name, (flags, what, target) in CASES.items():
            runs = [measure(url, flags, options) for _ in range(options.rounds)]
            at_most = what.startswith("cpu")
            best = (min if at_most else max)(run[what] for run in runs)
            ok = best <= target if at_most else best >= target
            met &= ok
            figures[name] = {"runs": runs, "measure": what, "best": best, "target": target, "met": ok}
            print(f"{name:12} {what} {best:,.2f}, target {'<=' if at_most else '>='} {target:,g}: "
                  f"{'met' if ok else 'MISSED'}", flush=True)  # fmt: skip
    configuration = {name: getattr(options, name) for name in ("seconds", "rounds", "satellites")}
    print(results.save("client", configuration, figures, options.output))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
