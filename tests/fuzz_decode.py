"""Feed the decoders what coverage leads to: pip install atheris; python -m tests.fuzz_decode -max_total_time=600

Ends with a traceback and the input at anything but a DecodeError. Not collected by pytest.
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["engine"]):
    from engine.decode import Decoder
    from engine.points import DecodeError, Rejects

DECODER = Decoder(max_points=1000, oldest_us=10**18)
DECODERS = (DECODER.json_batch, DECODER.ndjson_batch, DECODER.arrow_batch)


def decode(data: bytes) -> None:
    """Try one input, whose first byte chooses the decoder, strict or lenient."""
    if data:
        with contextlib.suppress(DecodeError):
            DECODERS[data[0] % 3](data[1:], 0, Rejects() if data[0] & 128 else None)


if __name__ == "__main__":
    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()
