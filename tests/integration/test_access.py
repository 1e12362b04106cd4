"""Bearer tokens: who gets in, how the file is kept, and that a token's value shows up nowhere."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from engine import data_folder
from engine.problems import MEDIA_TYPE
from tests.service import POINT, Service, command_line, eventually


@pytest.fixture(scope="module")
def service(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service with tokens for the module, one worker so that a quota is whole."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS test_access WITH (FORCE)")
        connection.execute("CREATE DATABASE test_access")
    url = psycopg.conninfo.make_conninfo(server, dbname="test_access")
    folder = tmp_path_factory.mktemp("access")
    with Service(url, folder) as running:
        running.environment |= {"ORBITSTREAM_TOKENS_FILE": str(folder / "tokens"), "ORBITSTREAM_HOST": "0.0.0.0"}
        create(running, "reader", "--scope", "read")
        running.start(healthy=False, ORBITSTREAM_WORKERS="1")
        yield running
        assert running.stop() == 0


def create(service: Service, name: str, *flags: str) -> str:
    made = service.run("token", "create", name, *flags)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def get_in(service: Service, token: str) -> None:
    eventually(lambda: service.post("/telemetry", POINT, bearer(token))[0] == 202, 5, "the new token holds")


def test_a_token_opens_what_its_scopes_name(service: Service) -> None:
    writer, both = create(service, "writer"), create(service, "both", "--scope", "read", "--scope", "write")
    get_in(service, both)
    for path, body in (("/telemetry", POINT), ("/telemetry/batch", [POINT])):
        assert service.post(path, body, bearer(writer))[0] == 202
    for path in ("/health", "/metrics"):
        assert service.request("GET", path, None, bearer(both))[0] in (200, 503)
        status, problem, headers = service.request("GET", path, None, bearer(writer))
        assert (status, problem["type"].rpartition(":")[2]) == (403, "forbidden")
        assert 'error="insufficient_scope", scope="read"' in headers["www-authenticate"]
    for path in ("/health/live", "/health/ready", "/openapi.json"):
        assert service.get(path)[0] == 200
    listed = service.run("token", "list").stdout
    assert "writer  write  no quota" in listed and "both  write,read" in listed
    assert writer not in listed


@pytest.mark.parametrize(
    ("header", "challenge"),
    [
        (None, 'Bearer realm="orbitstream"'),
        ("Bearer wrong", 'Bearer realm="orbitstream", error="invalid_token"'),
        ("Bearer ", 'Bearer realm="orbitstream", error="invalid_token"'),
        ("Bearer \xe9", 'Bearer realm="orbitstream", error="invalid_token"'),
        ("Basic dXNlcjpwYXNz", 'Bearer realm="orbitstream", error="invalid_token"'),
    ],
)
def test_no_token_or_a_bad_one_is_401(service: Service, header: str | None, challenge: str) -> None:
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("POST", "/telemetry"), ("POST", "/telemetry/batch"), ("GET", "/health"), ("GET", "/metrics")):
        status, problem, names = service.request(method, path, b"not json", headers)
        assert (status, names["content-type"]) == (401, MEDIA_TYPE)
        assert names["www-authenticate"] == challenge
        assert (problem["accepted"], problem["retryable"]) == (0, False)


def test_a_quota_is_waited_for(service: Service) -> None:
    token = create(service, "slow", "--quota", "100")
    get_in(service, token)
    assert service.post("/telemetry/batch", [POINT] * 250, bearer(token))[0] == 202  # may overdraw once
    status, problem, headers = service.post("/telemetry", POINT, bearer(token))
    assert (status, problem["type"].rpartition(":")[2], problem["retryable"]) == (429, "quota-exceeded", True)
    assert headers["retry-after"] == "2"
    eventually(lambda: service.post("/telemetry", POINT, bearer(token))[0] == 202, 5, "the quota is refilled")


def test_an_idempotency_key_is_its_tokens_own(service: Service) -> None:
    one, other = create(service, "one"), create(service, "other")
    get_in(service, other)
    for token, name in ((one, "KEYED-1"), (one, "KEYED-1"), (other, "KEYED-2")):
        headers = {**bearer(token), "Idempotency-Key": "same"}
        assert service.post("/telemetry", {**POINT, "satellite_id": name}, headers)[0] == 202
    stored = "SELECT satellite_id FROM telemetry WHERE satellite_id LIKE 'KEYED-%%' ORDER BY 1"
    eventually(lambda: service.query(stored) == [("KEYED-1",), ("KEYED-2",)], 10, "one row each")


def test_a_change_of_the_file_holds_without_a_restart(service: Service) -> None:
    path = Path(service.environment["ORBITSTREAM_TOKENS_FILE"])
    token = create(service, "brief")
    get_in(service, token)
    good = path.read_text()
    path.write_text(good + "{broken\n")
    try:
        still = "the tokens of before still hold"
        answers = []  # the file is looked at when a request comes
        while still not in service.output():
            answers.append(service.post("/telemetry", POINT, bearer(token))[0])
            assert len(answers) < 5000, "the broken file is not noticed"
        assert set(answers) == {202}
    finally:
        path.write_text(good)
    assert service.run("token", "revoke", "brief").stdout == "revoked brief\n"
    eventually(lambda: service.post("/telemetry", POINT, bearer(token))[0] == 401, 5, "revoked")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = service.run("token", "revoke", "brief")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)


def test_a_token_shows_up_nowhere(service: Service) -> None:
    token = create(service, "secret")
    get_in(service, token)
    service.post("/telemetry", b"{", bearer(token))
    service.request("GET", "/nowhere", None, bearer(token + "x"))
    assert token not in service.output()
    assert all(token not in command_line(pid) for pid in service.everything())
    assert token not in Path(service.environment["ORBITSTREAM_TOKENS_FILE"]).read_text()


def test_a_token_that_nobody_could_see_is_none(service: Service, tmp_path: Path) -> None:
    others = {"ORBITSTREAM_TOKENS_FILE": str(tmp_path / "tokens")}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "engine", "token", "create", "a"],
            env={**os.environ, **service.environment, **others},
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            cwd="/",
        )
    assert ended.returncode == 1 and b"No space left" in ended.stderr
    assert service.run("token", "list", **others).stdout == ""
    assert service.run("token", "create", "a", **others).returncode == 0


def test_the_simulator_gets_in_with_a_token(service: Service) -> None:
    token = create(service, "simulator")
    get_in(service, token)
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "simulator", "--api-url", f"http://127.0.0.1:{service.port}", "--points", "200",
         "--batch", "100", "--rate", "0", "--anomaly-rate", "0", "--json", "--quiet"],
        env={**os.environ, "ORBITSTREAM_TOKEN": token}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["accepted"] == 200


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ORBITSTREAM_HOST": "0.0.0.0"}, "ORBITSTREAM_HOST='0.0.0.0' lets anybody in"),
        ({"ORBITSTREAM_TOKENS_FILE": "/nowhere/tokens"}, "orbitstream token create NAME"),
        ({"ORBITSTREAM_TOKENS_FILE": "{open}"}, "can be written by others: chmod 600 it"),
        ({"ORBITSTREAM_TOKENS_FILE": "{broken}"}, "line 1 is no token"),
        ({"GUNICORN_CMD_ARGS": "-b 0.0.0.0:0"}, "ORBITSTREAM_HOST='0.0.0.0' lets anybody in"),
    ],
)
def test_an_open_door_is_refused_at_the_start(lane_dir: Path, environment: dict[str, str], said: str) -> None:
    (lane_dir / "open").touch()
    (lane_dir / "open").chmod(0o666)
    (lane_dir / "broken").write_text('{"name": "x"}\n')
    (lane_dir / "broken").chmod(0o600)
    service = Service("postgresql://nobody@127.0.0.1:1/none", lane_dir / "lanes")
    given = {
        name: text.format(open=lane_dir / "open", broken=lane_dir / "broken") for name, text in environment.items()
    }
    gunicorn = ["gunicorn", "-c", str(data_folder("deploy") / "gunicorn.conf.py"), "engine.app:create_app()"]
    starts = [gunicorn] if "GUNICORN_CMD_ARGS" in given else [["engine", "serve"], gunicorn]
    for start in starts:
        ran = subprocess.run(
            [sys.executable, "-P", "-m", *start], env={**os.environ, **service.environment, **given},
            capture_output=True, text=True, timeout=30, cwd="/",
        )  # fmt: skip
        assert ran.returncode == 2, ran.stderr
        (line,) = [line for line in ran.stderr.splitlines() if line.startswith("orbitstream:")]
        assert said in line
        assert "Traceback" not in ran.stderr
