"""Measurements: what each stage costs, and what the whole does against COPY alone and against simpler designs.

test_path.py    pytest-benchmark: limits, ring, COPY encoding, COPY
ingest.py       end to end with real processes, at 100 / 10,000 / 100,000 satellites
peers.py        the same load against what one would otherwise write
soak.py         long: load, kills, memory, latency, exactly once
results/        JSON, each with its configuration, commit and machine
"""
