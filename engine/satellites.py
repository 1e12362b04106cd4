"""Satellites by number: what a writer keeps of each of them lies in arrays, at the place of its number.

A dictionary costs a lookup for every id, and where a hundred thousand satellites have one point each in a transaction
that is most of what a writer does. Given that, ids are looked at as columns of 64-bit words: a table has for each hash
the satellite that was met last of those that share it, whose words say whether it is this one. The dictionary answers
for the rest. All of it grows with the fleet, by some 300 bytes a satellite, until the writer ends.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.channels import MAX_ID_BYTES
from engine.rows import Columns, Ids

Places = NDArray[np.int64]
Words = NDArray[np.uint64]
Kept = TypeVar("Kept", bound=np.generic)

FIRST_ROOM: Final = 1024
SPREAD: Final = 16
"""Places of the table for each satellite there is room for: one in sixteen or fewer shares its place with another."""
_GOLDEN: Final = 0x9E37_79B9_7F4A_7C15
"""2^64 divided by the golden ratio, for multiplicative hashing (Knuth, The Art of Computer Programming, 6.4)."""
_FACTORS: Final = np.array([pow(_GOLDEN, power, 1 << 64) for power in range(1, 1 + -(-MAX_ID_BYTES // 8))], np.uint64)
_HALF: Final = np.uint64(32)


class Runs(NamedTuple):
    """Neighbouring rows of one satellite: where each run begins and ends, and the number of its satellite."""

    begins: Places
    ends: Places
    numbers: Places

    def holding(self, rows: NDArray[np.bool_]) -> list[int]:
        """Return the runs, by index, that hold at least one of the rows marked."""
        marked = rows.nonzero()[0]
        if len(marked) and len(self.begins) < len(rows):
            marked = np.unique(np.searchsorted(self.begins, marked, "right") - 1)
        indexes: list[int] = marked.tolist()
        return indexes

    def span(self, index: int) -> slice:
        return slice(int(self.begins[index]), int(self.ends[index]))


class Satellites:
    """Numbers for satellites, from 0 up in the order in which they are met; `names` has the id of each."""

    def __init__(self) -> None:
        self.names: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._words: Words = np.zeros((1, FIRST_ROOM), np.uint64)  # of each id, NUL behind it; by word, then number
        self._table = np.zeros(FIRST_ROOM * SPREAD, np.int32)

    @property
    def room(self) -> int:
        """Satellites that arrays have to have room for; grows, but not with each new one."""
        return len(self._words[0])

    def runs(self, columns: Columns) -> Runs:
        """Return where the runs of one satellite are in points that are sorted by satellite."""
        ids = columns.satellite_id
        words = self._as_words(ids)
        cuts = (words[:, 1:] != words[:, :-1]).any(axis=0).nonzero()[0]
        edges = np.empty(len(cuts) + 2, np.int64)
        edges[0], edges[1:-1], edges[-1] = 0, cuts + 1, len(ids)
        begins = edges[:-1]
        if len(begins) < len(ids):
            ids, words = ids[begins], words[:, begins]
        return Runs(begins, edges[1:], self._numbers_of(ids, words))

    def number(self, name: bytes) -> int:
        """Return the number of one satellite."""
        ids = np.array([name])
        return int(self._numbers_of(ids, self._as_words(ids))[0])

    def _as_words(self, ids: Ids) -> Words:
        """Return the bytes of ids as 64-bit words, a row for each place, as many as the longest id so far has."""
        count = max(len(self._words), -(-ids.dtype.itemsize // 8))
        if count > len(self._words):
            self._words = np.pad(self._words, ((0, count - len(self._words)), (0, 0)))
        padded = ids.astype(f"S{8 * count}")
        return np.ascontiguousarray(padded.view(np.uint64).reshape(len(ids), count).T)

    def _numbers_of(self, ids: Ids, words: Words) -> Places:
        places = self._places(words)
        numbers = self._table[places].astype(np.int64)
        others = (self._words.take(numbers, axis=1) != words).any(axis=0).nonzero()[0]
        if not len(others):
            return numbers
        names: list[bytes] = ids[others].tolist()
        try:
            numbers[others] = [self._numbers[name] for name in names]
        except KeyError:
            for name in names:
                if self._numbers.setdefault(name, len(self.names)) == len(self.names):
                    self.names.append(name)
            numbers[others] = [self._numbers[name] for name in names]
            if len(self.names) > self.room:
                self._make_room()
                places = self._places(words)
            self._words[:, numbers[others]] = words[:, others]
            self._table[places[others]] = numbers[others]
        return numbers

    def _places(self, words: Words) -> Places:
        """Return the place in the table of each id: zero words change no hash, so that it does not matter how many."""
        mixed: Words = _FACTORS[: len(words)] @ words
        mixed ^= mixed >> _HALF
        mixed *= _FACTORS[0]
        return (mixed >> np.uint64(65 - len(self._table).bit_length())).astype(np.int64)

    def _make_room(self) -> None:
        room = self.room
        while room < len(self.names):
            room *= 2
        numbers = np.arange(self.room)
        self._table = np.zeros(room * SPREAD, np.int32)
        self._table[self._places(self._words)] = numbers
        self._words = np.pad(self._words, ((0, 0), (0, room - len(numbers))))


def extended(kept: NDArray[Kept], room: int, nothing: Any = 0) -> NDArray[Kept]:
    """Return what is kept by number with room for so many satellites; `nothing` stands for those without any."""
    if len(kept) >= room:
        return kept
    return np.append(kept, np.full(room - len(kept), nothing, kept.dtype))
