"""deploy/: what compose.yaml and the Dockerfile are meant to keep, without a container engine."""

from __future__ import annotations

import importlib.metadata
import json
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from psycopg import conninfo

from engine import data_folder, settings, supervisor, tokens
from engine.__main__ import USAGE

DEPLOY = data_folder("deploy")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
STAGES = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
ONE_SHOT = {"migrate", "simulator"}

each_service = pytest.mark.parametrize("name", SERVICES)


def last_stage() -> dict[str, str]:
    """Return the instructions of the image itself, the last of each kind, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).rpartition("\nFROM ")[2]
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in joined.splitlines()[1:] if line}


IMAGE = last_stage()


def environment(name: str) -> dict[str, str]:
    """Return what a service is given; `${NAME:-default}` as where NAME is unset, without what is only passed on."""
    given = SERVICES[name].get("environment", {})
    return {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for key, value in given.items() if value is not None}


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


# -- compose.yaml


@each_service
def test_a_service_tells_its_health_or_ends(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
        assert service["healthcheck"] == {"disable": True}, "that of the image asks a server"
    else:
        assert service["restart"] == "unless-stopped"
        assert "test" in service.get("healthcheck", {}) or ("build" in service and "HEALTHCHECK" in IMAGE)


@each_service
def test_images_are_of_an_exact_version(name: str) -> None:
    image = SERVICES[name]["image"]
    if "build" in SERVICES[name]:
        assert image == "orbitstream:local"
        assert (DEPLOY / SERVICES[name]["build"]["context"] / SERVICES[name]["build"]["dockerfile"]).samefile(
            DEPLOY / "Dockerfile"
        )
    else:
        assert re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+(-pg17)?", image)


@each_service
def test_no_password_stands_in_a_service(name: str) -> None:
    for key, value in environment(name).items():
        if re.search(r"PASSWORD|SECRET|TOKEN", key):
            assert key.endswith("_FILE") and value.startswith("/run/secrets/")
        if value.startswith("postgresql://"):
            assert "password" not in conninfo.conninfo_to_dict(value)
        if value.startswith("/run/secrets/"):
            assert value.removeprefix("/run/secrets/") in SERVICES[name]["secrets"]


@each_service
def test_ports_are_published_on_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))
    assert "network_mode" not in SERVICES[name] and "privileged" not in SERVICES[name]


@each_service
def test_services_gain_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if "build" in service:
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["tmpfs"] == ["/tmp"]
        assert "user" not in service, "the image's own"


@each_service
def test_nothing_takes_all_the_memory(name: str) -> None:
    limit = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", SERVICES[name]["mem_limit"])
    assert re.fullmatch(r"\d+[gm]", limit)


def test_the_database_cannot_be_reached_from_outside() -> None:
    assert "ports" not in SERVICES["db"]
    assert SERVICES["db"]["networks"] == ["database"]
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert "database" not in SERVICES["simulator"]["networks"]


def test_everything_waits_for_what_it_needs() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"db": {"condition": "service_healthy"}}
    for name in ("orbitstream", "grafana"):
        assert SERVICES[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert SERVICES["orbitstream"]["command"] == ["serve", "--no-migrate"]
    assert "--host=127.0.0.1" in SERVICES["db"]["healthcheck"]["test"], "the server of initdb has the socket alone"


def test_the_simulator_starts_only_when_asked_for() -> None:
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"simulator"}
    assert set(SERVICES["simulator"]["profiles"]) == {"testing", "simulator"}


@pytest.mark.parametrize("name", ["migrate", "orbitstream"])
def test_the_settings_exist_and_hold_together(name: str) -> None:
    known = {variable for _, variable, *_ in settings.options()}
    assert set(SERVICES[name]["environment"]) <= known | {"PGSERVICEFILE"}
    config = settings.load(environment(name))
    for url in filter(None, (config.database_url, config.migration_database_url)):
        assert urlsplit(url).hostname in SERVICES
        assert urlsplit(url).path == f"/{SERVICES['db']['environment']['POSTGRES_DB']}"


def test_a_stop_has_time_to_empty_the_lanes() -> None:
    config = settings.load(environment("orbitstream"))
    needed = supervisor.WEB_GRACE_S + config.drain_timeout + 2 * supervisor.KILL_GRACE_S
    assert seconds(SERVICES["orbitstream"]["stop_grace_period"]) >= needed + 10


def test_the_lanes_are_on_a_volume_that_the_user_of_the_image_owns() -> None:
    folder = environment("orbitstream")["ORBITSTREAM_LANE_DIR"]
    assert f"lanes:{folder}" in SERVICES["orbitstream"]["volumes"]
    assert f"ORBITSTREAM_LANE_DIR={folder}" in IMAGE["ENV"]
    assert re.search(rf"install -d -o orbitstream -g orbitstream -m 0700 .*{folder}$", IMAGE["RUN"])
    assert {"db", "lanes", "grafana"} == set(COMPOSE["volumes"])


def test_the_database_loads_timescaledb_first() -> None:
    [loaded] = [part for part in SERVICES["db"]["command"] if part.startswith("--shared_preload_libraries=")]
    assert loaded.partition("=")[2].split(",") == ["timescaledb", "pg_stat_statements"]


@each_service
def test_files_that_are_mounted_are_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            assert (DEPLOY / source).exists()
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]
            assert target.startswith("/var/lib/")


def test_grafana_finds_what_it_is_provisioned_with() -> None:
    mounted = {target: source for source, target, *_ in (v.split(":") for v in SERVICES["grafana"]["volumes"])}
    provisioning = data_folder("grafana") / "provisioning"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "orbitstream.yaml").read_text())["providers"]
    boards = provider["options"]["path"]
    assert (DEPLOY / mounted[boards]).samefile(data_folder("grafana") / "dashboards")
    home = environment("grafana")["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / mounted[boards] / home.removeprefix(boards + "/")).exists()
    [source] = yaml.safe_load((provisioning / "datasources" / "orbitstream.yaml").read_text())["datasources"]
    assert source["url"].partition(":")[0] in SERVICES
    secret = source["secureJsonData"]["password"].removeprefix("$__file{/run/secrets/").removesuffix("}")
    assert secret in SERVICES["grafana"]["secrets"]
    assert f"ALTER ROLE {source['user']} LOGIN" in (DEPLOY / "accounts.sql").read_text()


# -- the passwords


def password_command() -> str:
    """Return the command of README.md that makes the passwords."""
    [command] = re.findall(r"```sh\n(mkdir .*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    return str(command)


def make_passwords(checkout: Path) -> int:
    return subprocess.run(["sh", "-ec", password_command()], cwd=checkout, stderr=subprocess.DEVNULL).returncode


def test_the_command_of_the_readme_makes_every_secret(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    assert make_passwords(tmp_path) == 0
    folder = tmp_path / "deploy" / "secrets"
    wanted = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    assert {path.name for path in folder.iterdir()} == wanted | {".gitignore"}
    assert (folder / ".gitignore").read_text() == "*\n"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in wanted} == {0o644}, "three users read them"
    found = re.findall(r"\b[0-9a-f]{48}\b", "\n".join((folder / name).read_text() for name in sorted(wanted)))
    assert len(set(found)) == 6
    [token] = tokens.load(folder / "tokens").values()
    assert (token.name, token.sha256) == ("operator", tokens.digest((folder / "token").read_text()))
    assert re.fullmatch(
        r"\[migrator\]\npassword=[0-9a-f]{48}\n\n\[service\]\npassword=[0-9a-f]{48}\n",
        (folder / "pg_service.conf").read_text(),
    )


def test_passwords_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    assert make_passwords(tmp_path) == 0
    before = {path.name: path.read_text() for path in (tmp_path / "deploy" / "secrets").iterdir()}
    assert make_passwords(tmp_path) != 0
    assert {path.name: path.read_text() for path in (tmp_path / "deploy" / "secrets").iterdir()} == before


@each_service
def test_a_service_has_no_secret_that_is_not_declared(name: str) -> None:
    assert set(SERVICES[name].get("secrets", [])) <= set(COMPOSE["secrets"])


# -- the unit of systemd: the same service without containers


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "orbitstream.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            found.setdefault(line.partition("=")[0], []).append(line.partition("=")[2])
    return found


def test_the_unit_gives_the_same_settings_and_time_as_compose() -> None:
    given = dict(text.split("=", 1) for text in unit()["Environment"])
    assert given.pop("PGSERVICEFILE") == "%d/pg_service.conf"
    assert given.pop("ORBITSTREAM_TOKENS_FILE") == "%d/tokens"
    names = ("pg_service.conf", "tokens")
    assert unit()["LoadCredential"] == [f"{name}:/etc/orbitstream/{name}" for name in names]
    compose = environment("orbitstream")
    assert {name: compose[name] for name in given} == given
    config = settings.load(given)
    assert str(config.lane_dir).startswith(f"/var/lib/{unit()['StateDirectory'][0]}/")
    assert seconds(unit()["TimeoutStopSec"][0] + "s") == seconds(SERVICES["orbitstream"]["stop_grace_period"])
    assert unit()["RestartPreventExitStatus"] == [str(USAGE)]
    assert unit()["KillMode"] == ["mixed"], "the supervisor stops the others in order"


# -- the Dockerfile


def test_the_image_is_of_an_exact_version() -> None:
    assert len(STAGES) == 2
    assert all(re.fullmatch(r"python:3\.11\.\d+(-slim)?-bookworm( AS build)?", stage) for stage in STAGES)
    assert len({re.sub(r"-slim", "", stage) for stage in STAGES}) == 1, "a wheel of one is for the other"


def test_the_image_runs_as_nobody_in_particular_and_stops_in_order() -> None:
    assert re.fullmatch(r"\d{5}:\d{5}", IMAGE["USER"])
    assert json.loads(IMAGE["ENTRYPOINT"]) == ["orbitstream"]
    assert json.loads(IMAGE["CMD"]) == ["serve"]
    assert IMAGE["STOPSIGNAL"] == "SIGTERM"


def test_nothing_unlocked_gets_into_the_image() -> None:
    """Each `pip` of the Dockerfile has hashes to check, or no index to ask; each requirement of ours is locked."""
    joined = re.sub(r"\s*\\\n\s*", " ", DOCKERFILE)
    commands = re.findall(r"pip (?:--python \S+ )?(?:install|wheel) [^&\n]*", joined)
    assert len(commands) == 4
    assert all("--require-hashes" in it or "--no-deps" in it for it in commands), commands
    assert all("--no-build-isolation" in it for it in commands if it.startswith("pip wheel"))
    locked = {
        canonicalize_name(name): version
        for name, version in re.findall(r"^(\S+)==(\S+)", (DEPLOY / "requirements.txt").read_text(), re.MULTILINE)
    }
    wanted = [Requirement(text) for text in importlib.metadata.requires("orbitstream") or []]
    wanted = [it for it in wanted if it.marker is None or it.marker.evaluate({"extra": "fast"})]
    assert len(wanted) >= 6
    for requirement in wanted:
        version = locked.get(canonicalize_name(requirement.name), "0")
        assert requirement.specifier.contains(version), f"{requirement} is not locked: run `make lock`"
    for name in ("requirements.txt", "requirements-build.txt"):
        blocks = re.split(r"^(?=[a-z])", (DEPLOY / name).read_text(), flags=re.MULTILINE)[1:]
        assert blocks and all("--hash=sha256:" in block for block in blocks)


def test_no_secret_gets_into_a_layer() -> None:
    copied = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert not {".", "./", "deploy", "deploy/", "deploy/*"} & set(copied)


@pytest.fixture
def health() -> Iterator[HTTPServer]:
    """A server that answers /health/live with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(server.status if self.path == "/health/live" else 404)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_whether_the_service_lives(health: HTTPServer, status: int, healthy: bool) -> None:
    health.status = status  # type: ignore[attr-defined]
    program, *arguments = json.loads(IMAGE["HEALTHCHECK"].partition(" CMD ")[2])
    assert program == "python"
    port = {"PORT": str(health.server_port)}
    ended = subprocess.run([sys.executable, *arguments], env=port, stderr=subprocess.DEVNULL)
    assert (ended.returncode == 0) is healthy
