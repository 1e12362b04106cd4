"""Two nodes behind deploy/nginx.conf, one database: restarted one after the other under load, and one of them lost.

Takes nginx (Debian's package of that name).
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from engine import data_folder
from tests.load import Load, assert_exactly_once
from tests.service import Service, eventually, kill

pytestmark = pytest.mark.crash

SITE = "telemetry.example.com"


class Front(Service):
    """The nodes as a client sees them: through nginx, over TLS. Counts what it was answered; 0 is a cut connection."""

    def __init__(self, database: str, folder: Path, authority: trustme.CA) -> None:
        super().__init__(database, folder)
        self.context = ssl.create_default_context()
        authority.configure_trust(self.context)
        self.mine = threading.local()  # a client keeps its connection
        self.connections: list[http.client.HTTPSConnection] = []
        self.answers: Counter[int] = Counter()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
        connection = getattr(self.mine, "connection", None)
        if connection is None:
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=self.context)
            self.mine.connection = connection
            self.connections.append(connection)
        status = 0
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            raw = response.read()
            status = response.status
            return status, raw, dict(response.getheaders())
        finally:
            self.answers[status] += 1
            if not status:
                connection.close()  # the next request opens it again


@dataclass(frozen=True)
class Site:
    """Two nodes and the way to them."""

    nodes: list[Service]
    front: Front

    def start(self, node: Service) -> None:
        """Start a node again, on the port at which nginx looks for it."""
        node.start(PORT=str(node.port))

    def loads(self) -> list[Load]:
        """A client that does not repeat a request whose outcome it does not know, and one that does, with keys."""
        loads = [Load(self.front, f"L{index}", 10, keyed=index == 1) for index in range(2)]
        progress(loads)
        return loads

    def settle(self, loads: list[Load]) -> None:
        """Stop everything, and check that each point is there once, in the ledgers of both nodes."""
        for load in loads:
            load.stop()
        for connection in self.front.connections:
            connection.close()
        for node in self.nodes:
            assert node.stop() == 0
        assert_exactly_once(self.nodes[0], loads)
        keyed = loads[1]
        assert len(keyed.unknown) <= keyed.batch, "of a keyed request only the last can be unknown: it was being sent"
        for node in self.nodes:
            verified = node.run("verify", "--deep")
            assert verified.returncode == 0, verified.stdout + verified.stderr
        drained = "SELECT node FROM ingest_progress WHERE committed_points > 0 GROUP BY node ORDER BY node"
        assert self.nodes[0].query(drained) == [("node-1",), ("node-2",)]


def progress(loads: list[Load]) -> None:
    """Wait until every load got some batches through from now on."""
    marks = [len(load.accepted) + 50 for load in loads]
    eventually(lambda: all(len(load.accepted) > mark for load, mark in zip(loads, marks, strict=True)), 20, "202s")


@pytest.fixture
def site(database: str) -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="os-nodes-", dir="/dev/shm"))
    nodes = []
    for name in ("node-1", "node-2"):
        (folder / name).mkdir(mode=0o700)
        nodes.append(Service(database, folder / name))
        nodes[-1].environment |= {"ORBITSTREAM_NODE": name, "ORBITSTREAM_WORKERS": "1"}
    authority = trustme.CA()
    with nodes[0], nodes[1]:
        for node in nodes:
            node.start()
        front = Front(database, folder, authority)
        nginx = start_nginx(folder, nodes, front, authority.issue_cert("127.0.0.1", SITE))
        try:
            yield Site(nodes, front)
        finally:
            nginx.terminate()
            nginx.wait(10)
    shutil.rmtree(folder)


def start_nginx(folder: Path, nodes: list[Service], front: Front, certificate: trustme.LeafCert) -> Any:
    """Run the site of deploy/ as it is, but for ports and files."""
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "site.pem")
    text = (data_folder("deploy") / "nginx.conf").read_text()
    front.port = free_port()
    for pattern, ours in (
        (r"127\.0\.0\.1:8080", f"127.0.0.1:{nodes[0].port}"),
        (r"127\.0\.0\.1:8081", f"127.0.0.1:{nodes[1].port}"),
        (r"listen 443 ssl", f"listen 127.0.0.1:{front.port} ssl"),
        (r"/etc/orbitstream/tls/\w+\.pem", str(folder / "site.pem")),
    ):
        text, count = re.subn(pattern, ours, text)
        assert count, pattern
    (folder / "site.conf").write_text(text)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("proxy", "client_body", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user}daemon off;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\nworker_processes 1;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{paths}include {folder}/site.conf;\n}}\n"
    )
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert nginx, "these tests take nginx: apt-get install nginx"
    command = [nginx, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert tested.returncode == 0 and "warn" not in tested.stderr, tested.stderr
    started = subprocess.Popen(command)
    eventually(lambda: answers_on(front.port), 10, "nginx")
    return started


def answers_on(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_nodes_are_restarted_one_after_the_other_under_load(site: Site) -> None:
    loads = site.loads()
    for node in site.nodes:
        assert node.stop() == 0
        progress(loads)
        site.start(node)
        progress(loads)
    site.settle(loads)
    answers = dict(site.front.answers)
    gap = max(load.longest_gap for load in loads)
    print(f"answers {answers}, longest gap {gap:.2f} s")
    assert set(answers) <= {202, 502, 503}
    assert answers[202] > 100 * (answers.get(502, 0) + answers.get(503, 0))
    assert gap < 10.0


def test_a_lost_node_keeps_its_points_until_it_returns(site: Site) -> None:
    """Its writers stand still when everything of it is killed: what it accepted since is in its lanes alone."""
    lost, other = site.nodes
    loads = site.loads()
    kill(lost.writers(), signal.SIGSTOP)
    eventually(lambda: lost.get("/health")[1]["queue"]["points"] >= 100, 10, "a backlog")
    lost.kill_everything()
    progress(loads)
    waiting = sum(lane["queued_points"] for lane in json.loads(lost.run("lanes", "list", "--json").stdout))
    assert waiting >= 100
    assert other.get("/health")[0] == 200
    site.start(lost)
    eventually(lambda: lost.get("/health")[1]["queue"]["oldest_s"] < 1, 20, "the backlog stored")
    progress(loads)
    site.settle(loads)
    print(f"{waiting} points waited, answers {dict(site.front.answers)}")
