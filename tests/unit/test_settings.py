"""Settings: defaults that work, and one line for each that does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import settings
from engine.settings import SettingError, load


def test_defaults() -> None:
    config = load({})
    assert (config.host, config.port, config.batch_size, config.batch_timeout) == ("127.0.0.1", 8080, 1000, 0.02)
    assert config.database_url is None
    assert config.workers == os.cpu_count()
    assert config.lane_bytes == 128 << 20
    assert config.given == {}


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("BATCH_TIMEOUT", "50ms", "batch_timeout", 0.05),
        ("BATCH_TIMEOUT", "2", "batch_timeout", 2.0),
        ("ORBITSTREAM_RETENTION", "7d", "retention", 7 * 86400.0),
        ("ORBITSTREAM_LANE_BYTES", "1 GiB", "lane_bytes", 1 << 30),
        ("ORBITSTREAM_LANE_DIR", "~/lanes", "lane_dir", Path.home() / "lanes"),
        ("ANOMALY_THRESHOLD_SIGNAL", "-95.5", "anomaly_signal", -95.5),
        ("LOG_LEVEL", "DEBUG", "log_level", "debug"),
        ("DATABASE_URL", "postgresql://u:p@h/d", "database_url", "postgresql://u:p@h/d"),
        ("DATABASE_URL", "", "database_url", None),
        ("ORBITSTREAM_HOST", "::1", "host", "::1"),
    ],
)
def test_a_value_is_read(variable: str, text: str, field: str, value: object) -> None:
    assert getattr(load({variable: text}), field) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("BATCH_SIZE", "0"),
        ("BATCH_SIZE", "many"),
        ("BATCH_TIMEOUT", "soon"),
        ("PORT", "70000"),
        ("MAX_CONNECTIONS", "0"),
        ("ORBITSTREAM_LANE_BYTES", "1KiB"),
        ("ORBITSTREAM_UNKNOWN_FIELDS", "maybe"),
        ("ANOMALY_THRESHOLD_BATTERY", "nan"),
        ("ORBITSTREAM_ALLOW_ANONYMOUS", "perhaps"),
        ("LOG_LEVEL", "loud"),
        ("ORBITSTREAM_HOST", "0.0.0.0"),
        ("ORBITSTREAM_NODE", " "),
    ],
)
def test_a_bad_value_names_its_variable(variable: str, text: str) -> None:
    with pytest.raises(SettingError, match=variable) as caught:
        load({variable: text})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variable", ["DATABASE_URL", "MIGRATION_DATABASE_URL"])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:s3cret@host:port:what/db",
        "postgresql://user:what@s3cret@host/db",  # libpq would look for the host s3cret@host, and say so
        "postgresql://user:12/s3cret@host/db",  # and here for the database s3cret@host/db on the host user
    ],
)
def test_a_bad_database_url_does_not_show_its_password(variable: str, url: str) -> None:
    with pytest.raises(SettingError, match=variable) as caught:
        load({variable: url})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:s3%40cret@host/db",
        "postgresql://:s3cret@host/db",
        "postgresql://user@host/db?application_name=a@b",
        "postgresql:///db?host=/run&user=u",
        "host=h user=u password=s3@cret",
    ],
)
def test_a_good_database_url_is_taken_as_it_is(url: str) -> None:
    assert load({"DATABASE_URL": url}).database_url == url


def test_a_flag_wins_over_the_environment_and_reaches_children() -> None:
    config = load({"BATCH_SIZE": "10", "PORT": "9"}, batch_size="20")
    assert config.batch_size == 20
    environment = settings.child_environment(config, EXTRA="1")
    assert (environment["BATCH_SIZE"], environment["PORT"], environment["EXTRA"]) == ("20", "9", "1")


def test_beyond_loopback_takes_a_decision() -> None:
    assert load({"ORBITSTREAM_HOST": "0.0.0.0", "ORBITSTREAM_ALLOW_ANONYMOUS": "1"}).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("writers", "connections", "count"), [("1", "1", 1), ("4", "2", 1), ("4", "3", 2), ("2", "10", 2)]
)
def test_max_connections_bounds_the_writers(writers: str, connections: str, count: int) -> None:
    assert load({"ORBITSTREAM_WRITERS": writers, "MAX_CONNECTIONS": connections}).writer_count == count


def test_a_password_is_not_taken_from_the_command_line() -> None:
    url = "postgresql://user:hidden@db/orbitstream"
    with pytest.raises(SettingError, match="DATABASE_URL has a password on the command line") as caught:
        settings.load({}, database_url=url)
    assert "hidden" not in str(caught.value)
    assert settings.load({"DATABASE_URL": url}).database_url == url
    assert settings.load({}, database_url="postgresql://user@db/orbitstream").database_url is not None
