"""Numbers for satellites: the same as a dictionary gives, however ids come and whatever hash they share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import satellites
from engine.channels import MAX_ID_BYTES
from engine.rows import Columns
from engine.satellites import FIRST_ROOM, Satellites, extended

IDS = st.binary(min_size=1, max_size=MAX_ID_BYTES).filter(lambda name: b"\0" not in name)


def columns(names: list[bytes]) -> Columns:
    return Columns(np.arange(len(names)), np.array(names), {}, np.zeros(len(names), np.bool_))


@given(st.lists(st.lists(IDS, min_size=1, max_size=30), min_size=1, max_size=8))
def test_runs_and_numbers_are_those_of_a_dictionary(transactions: list[list[bytes]]) -> None:
    known, expected = Satellites(), {}
    for names in transactions:
        names.sort()
        found = known.runs(columns(names))
        for name in names:
            expected.setdefault(name, len(expected))
        begins = [index for index in range(len(names)) if index == 0 or names[index] != names[index - 1]]
        assert found.begins.tolist() == begins
        assert found.ends.tolist() == [*begins[1:], len(names)]
        assert found.numbers.tolist() == [expected[names[index]] for index in begins]
        marked = np.array([name < b"\x80" for name in names])
        assert found.holding(marked) == [
            index for index in range(len(begins)) if marked[found.span(index)].any()
        ]  # fmt: skip
    assert known.names == list(expected)
    assert [known.number(name) for name in expected] == list(expected.values())


def test_ids_that_share_a_place_in_the_table_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(satellites, "_FACTORS", np.zeros(8, np.uint64))
    known, names = Satellites(), [b"S%03d" % number for number in range(100)]
    for _ in range(3):
        assert known.runs(columns(names)).numbers.tolist() == [*range(100)]
        assert known.runs(columns(names[50:51])).numbers.tolist() == [50]


@pytest.mark.parametrize("count", [1, FIRST_ROOM, FIRST_ROOM + 1, 5 * FIRST_ROOM])
def test_there_is_room_for_any_number(count: int) -> None:
    known, names = Satellites(), [b"SAT-%05d" % number for number in range(count)]
    kept = np.full(known.room, 7.0)
    for _ in range(2):
        assert known.runs(columns(names)).numbers.tolist() == [*range(count)]
    kept = extended(kept, known.room, np.nan)
    assert known.room >= count and kept.shape == (known.room,)
    assert (kept[:FIRST_ROOM] == 7).all() and np.isnan(kept[FIRST_ROOM:]).all()
    wider = [name + b"-of-a-longer-name" for name in names]
    assert known.runs(columns(wider)).numbers.tolist() == [*range(count, 2 * count)]
    assert known.runs(columns(names)).numbers.tolist() == [*range(count)]
