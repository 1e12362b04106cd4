"""Latencies as an HdrHistogram of microseconds: three significant digits from 1 us to an hour.

The layout and the encoding are those of hdrhistogram.org (V2), so that its tools read what a run reports. Counting is
vectorised here, which its Python package is not: bin i holds

    values [0, 2048)                          i = value
    values of 11 + b bits, b = 1 ..           i = (b << 10) + (value >> b)
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

DIGITS = 3
HALF_BITS = 10
HIGHEST_US = 3_600_000_000
BINS = ((HIGHEST_US.bit_length() - HALF_BITS) << HALF_BITS) + (1 << HALF_BITS)
COOKIE = 0x1C849313
PACKED_COOKIE = 0x1C849314


class Latencies:
    """Count latencies; what lies beyond an hour counts as one hour, the maximum is exact.

    A latency runs from when a request was due (a batch: its last point) to its last answer, retries included, or to
    when it was given up. Every request that was sent counts, whatever became of it.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, dtype=np.int64)
        self._max = 0.0

    def add(self, seconds: list[float]) -> None:
        """Count latencies, in seconds."""
        if not seconds:
            return
        values = np.array(seconds)
        self._max = max(self._max, float(values.max()))
        micros = np.clip(values * 1e6, 1, HIGHEST_US).astype(np.int64)
        shift = np.maximum(np.frexp(micros.astype(np.float64))[1] - HALF_BITS - 1, 0)
        self._counts += np.bincount((shift << HALF_BITS) + (micros >> shift), minlength=BINS)

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another process exported."""
        self._counts[other["bins"]] += np.array(other["counts"], dtype=np.int64)
        self._max = max(self._max, other["max"])

    def export(self) -> dict[str, Any]:
        """Return the bins in use, as JSON-ready values."""
        used: npt.NDArray[np.int64] = np.flatnonzero(self._counts)
        return {"bins": used.tolist(), "counts": self._counts[used].tolist(), "max": self._max}

    def quantile(self, share: float) -> float | None:
        """Return the latency in seconds that `share` (0 to 1) of the requests did not exceed, None without requests."""
        total = int(self._counts.sum())
        if not total:
            return None
        rank = max(1, int(np.ceil(share * total - 1e-9)))
        index = int(np.searchsorted(np.cumsum(self._counts), rank))
        return min((_highest(index) + 1) * 1e-6, self._max)

    def milliseconds(self) -> dict[str, float | None]:
        """Return percentiles and maximum in milliseconds, None without requests."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
        values = {name: self.quantile(share) for name, share in shares.items()} | {"max": self._max or None}
        return {name: None if value is None else round(value * 1e3, 3) for name, value in values.items()}

    def encode(self) -> str:
        """Return the histogram in its standard form: V2, deflated, in base64."""
        counts = np.trim_zeros(self._counts, "b").tolist()
        payload = bytearray()
        zeros = 0
        for count in [*counts, None]:
            if count == 0:
                zeros += 1
                continue
            if zeros:
                _write_varint(payload, -zeros)
                zeros = 0
            if count is not None:
                _write_varint(payload, count)
        head = struct.pack(">iiiiqqd", COOKIE, len(payload), 0, DIGITS, 1, HIGHEST_US, 1.0)
        packed = zlib.compress(head + payload)
        return base64.b64encode(struct.pack(">ii", PACKED_COOKIE, len(packed)) + packed).decode()


def _highest(index: int) -> int:
    """Return the highest number of microseconds that is counted in a bin."""
    shift = max((index >> HALF_BITS) - 1, 0)
    return ((index - (shift << HALF_BITS) + 1) << shift) - 1


def _write_varint(output: bytearray, value: int) -> None:
    """Append a number, sign in the lowest bit, seven bits a byte, lowest first."""
    rest = value * 2 if value >= 0 else -value * 2 - 1
    while rest > 0x7F:
        output.append(rest & 0x7F | 0x80)
        rest >>= 7
    output.append(rest)
