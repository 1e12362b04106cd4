"""The command line: every wrong flag is one clear line and exit code 2, before anything is sent."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulator.__main__ import main
from simulator.flags import build_parser, parse_url, settings_from

NOWHERE = ["--api-url", "http://127.0.0.1:1"]


@pytest.fixture
def listener() -> Iterator[str]:
    """Listen, so that the service looks reachable; nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--satellites", "0"], "0 is not between 1 and 1,000,000"),
        (["--satellites", "many"], "'many' is not a whole number"),
        (["--satellites", "1.5"], "'1.5' is not a whole number"),
        (["--rate", "-1"], "-1 is not between 0 and 100,000"),
        (["--rate", "nan"], "nan is not between"),
        (["--rate", "1e9"], "1e9 is not between"),
        (["--duration", "0"], "--duration"),
        (["--duration", "10s"], "'10s' is not a number"),
        (["--points", "0"], "--points"),
        (["--anomaly-rate", "1.1"], "1.1 is not between 0 and 1"),
        (["--single-share", "-0.1"], "-0.1 is not between 0 and 1"),
        (["--batch", "0"], "--batch"),
        (["--connections", "0"], "--connections"),
        (["--timeout", "0"], "--timeout"),
        (["--processes", "0"], "--processes"),
        (["--processes", "5", "--satellites", "4"], "--processes 5 is more than --satellites 4"),
        (["--format", "ndjson"], "--format ndjson is for batches"),
        (["--encoding", "gzip"], "--encoding gzip is for batches"),
        (["--profile", "ramp", "--rate", "0"], "--profile ramp needs a --rate"),
        (["--profile", "diurnal", "--points", "9"], "--profile diurnal spans the run; add --duration"),
        (["--start", "2026-11-22T00:00:00"], "has no offset; write 2026-11-22T00:00:00Z"),
        (["--start", "noon"], "'noon' is not a time"),
        (["--prepare", "--points", "9"], "add --rate 0 --points N"),
        (["--prepare", "--rate", "0"], "add --rate 0 --points N"),
        (["--prepare", "--rate", "0", "--points", "900000000000"], "half of what is free has room for"),
        (["--tle", "/no/such/file"], "/no/such/file cannot be read: No such file"),
        (["--format", "xml"], "invalid choice: 'xml'"),
        (["--channels", "none"], "invalid choice: 'none'"),
        (["--token", "secret"], "unrecognized arguments"),
        (["--sat", "5"], "unrecognized arguments"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--api-url", "https://127.0.0.1"], "is not an http:// URL"),
        (["--api-url", "127.0.0.1:8080"], "is not an http:// URL"),
        (["--api-url", "http://"], "is not an http:// URL"),
        (["--api-url", "http://h:99999"], "Port out of range"),
        (["--api-url", "http://user:secret@h"], "more than host, port and path"),
        (["--api-url", "http://h/a b"], "more than host, port and path"),
        (["--api-url", "http://h/?x=1"], "more than host, port and path"),
        (["--token-file", "/no/such/file"], "--token-file /no/such/file cannot be read: No such file"),
        ([], "cannot reach 127.0.0.1 port 1: connection refused; start the service or give its --api-url"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag_is_one_clear_line(flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NOWHERE, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("orbitstream-simulator: ")
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


def test_a_log_that_cannot_be_written_is_found_before_anything_is_sent(
    listener: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for log in (tmp_path, tmp_path / "no" / "such.parquet"):
        assert main(["--api-url", listener, "--sent-log", str(log)]) == 2
        error = capsys.readouterr().err
        assert f"--sent-log {log} cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["two words", "line\nbreak", "", "caf\u00e9"])
def test_a_token_that_cannot_be_a_header_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    assert main([*NOWHERE, "--token-file", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"--token-file {file}" in error and error.count("\n") == 1


def test_the_url_may_have_a_path_and_no_port() -> None:
    assert parse_url("http://h") == ("h", 80, "h", "")
    assert parse_url("http://h:81/a/b/") == ("h", 81, "h:81", "/a/b")
    assert parse_url("http://[::1]:81") == ("::1", 81, "[::1]:81", "")


def test_defaults_follow_from_the_other_flags() -> None:
    def settings(*flags: str) -> tuple[float | None, int, int]:
        made = settings_from(build_parser().parse_args(flags))
        return made.duration, made.processes, made.connections

    assert settings() == (10.0, 1, 32)
    assert settings("--points", "5") == (None, 1, 32)
    assert settings("--points", "5", "--duration", "3") == (3.0, 1, 32)
    assert settings("--batch", "100") == (10.0, 1, 16)
    assert settings("--batch", "100", "--single-share", "0.1", "--processes", "7") == (10.0, 7, 32)


def test_the_help_names_every_flag_with_its_default_and_the_columns_of_the_log() -> None:
    command = [sys.executable, "-m", "simulator", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("--api-url", "(http://127.0.0.1:8080)", "--sent-log", "satellite_id", "outcome", "examples:", "130"):
        assert word in text
    flags = build_parser()._option_string_actions
    assert all(flag in text for flag in flags)
