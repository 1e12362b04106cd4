"""Reading answers: however the bytes arrive, and what each status means for the points."""

from __future__ import annotations

import pytest

from simulator.connection import Answer, AnswerReader, BadAnswer, Verdict, judge

ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n3;x=y\r\nabc\r\n0\r\n\r\n"
TRAILER = b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nA: b\r\n\r\n"
LATER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json; charset=utf-8\r\n"
    b"retry-after: 3\r\nContent-Length: 0\r\n\r\n"
)


def read(*pieces: bytes) -> Answer | None:
    reader = AnswerReader({})
    answers = [reader.feed(piece) for piece in pieces]
    assert answers[:-1] == [None] * (len(pieces) - 1)
    return answers[-1]


@pytest.mark.parametrize("text", [ACCEPTED, CHUNKED, TRAILER], ids=["length", "chunked", "trailer"])
def test_an_answer_is_complete_with_its_last_byte_however_it_is_cut(text: bytes) -> None:
    whole = read(text)
    assert whole is not None and whole.verdict == Verdict.ACCEPTED and whole.keep_alive
    for cut in range(1, len(text)):
        assert read(text[:cut], text[cut:]) == whole
    assert read(*(text[i : i + 1] for i in range(len(text)))) == whole


def test_answers_follow_each_other_on_one_connection() -> None:
    reader = AnswerReader({})
    for text, verdict in ((ACCEPTED, Verdict.ACCEPTED), (LATER, Verdict.RETRY), (CHUNKED, Verdict.ACCEPTED)):
        answer = reader.feed(text)
        assert answer is not None and answer.verdict == verdict


def test_interim_answers_are_passed_over() -> None:
    answer = read(b"HTTP/1.1 100 Continue\r\n\r\n" + ACCEPTED)
    assert answer is not None and answer.verdict == Verdict.ACCEPTED
    answer = read(b"HTTP/1.1 100 Continue\r\n\r\n", ACCEPTED)
    assert answer is not None and answer.verdict == Verdict.ACCEPTED


def test_an_answer_without_a_length_ends_with_the_connection() -> None:
    reader = AnswerReader({})
    assert reader.feed(b"HTTP/1.0 202 Accepted\r\n\r\n{") is None
    assert reader.feed(b"}") is None
    answer = reader.end()
    assert answer is not None and answer.verdict == Verdict.ACCEPTED and not answer.keep_alive


def test_an_answer_cut_off_is_no_answer() -> None:
    for cut in (5, 30, len(ACCEPTED) - 1):
        reader = AnswerReader({})
        assert reader.feed(ACCEPTED[:cut]) is None
        assert reader.end() is None


def test_bytes_beyond_an_answer_end_the_use_of_the_connection() -> None:
    answer = read(ACCEPTED + b"HTTP")
    assert answer is not None and answer.verdict == Verdict.ACCEPTED and not answer.keep_alive


def test_connection_close_is_honoured() -> None:
    answer = read(ACCEPTED.replace(b"Content-Type", b"Connection: Close\r\nContent-Type"))
    assert answer is not None and not answer.keep_alive


def test_retry_after_is_read_in_seconds() -> None:
    answer = read(LATER)
    assert answer is not None and (answer.verdict, answer.retry_after) == (Verdict.RETRY, 3.0)
    answer = read(LATER.replace(b"3\r\n", b"Sun, 22 Nov 2026 00:00:00 GMT\r\n"))
    assert answer is not None and (answer.verdict, answer.retry_after) == (Verdict.RETRY, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2x2 What\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 202 A\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 202 A\r\nX: " + b"x" * (2 << 20),
    ],
)
def test_what_is_not_http_is_an_error(text: bytes) -> None:
    with pytest.raises(BadAnswer):
        read(text)


@pytest.mark.parametrize(
    ("status", "problem", "retry_after", "verdict"),
    [
        (200, False, False, Verdict.ACCEPTED),
        (202, False, False, Verdict.ACCEPTED),
        (201, False, False, Verdict.UNKNOWN),
        (302, False, False, Verdict.UNKNOWN),
        (400, True, False, Verdict.REFUSED),
        (401, False, False, Verdict.REFUSED),
        (413, True, False, Verdict.REFUSED),
        (422, True, True, Verdict.REFUSED),
        (429, True, True, Verdict.RETRY),
        (429, False, True, Verdict.RETRY),
        (429, True, False, Verdict.REFUSED),
        (500, False, False, Verdict.UNKNOWN),
        (500, True, False, Verdict.UNKNOWN),
        (502, False, True, Verdict.UNKNOWN),
        (503, True, True, Verdict.RETRY),
        (503, True, False, Verdict.REFUSED),
        (503, False, True, Verdict.UNKNOWN),  # a proxy's: it does not tell that nothing was stored
        (503, False, False, Verdict.UNKNOWN),
    ],
)
def test_what_a_status_means(status: int, problem: bool, retry_after: bool, verdict: Verdict) -> None:
    assert judge(status, problem, retry_after) is verdict
