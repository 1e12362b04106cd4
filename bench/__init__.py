"""Measurements: what each stage costs, and what the whole does against COPY alone and against simpler designs.

targets.py      every target with its result: runs what is missing of the following, writes the table into README
ingest.py       end to end with real processes: rate, share of COPY alone, latency, CPU a point, memory, a full table
bare.py         the chain without HTTP, checks, checksums and ledger, in turns with the engine
edge.py         the HTTP edge under wrk
storage.py      bytes a point in the columnstore
client.py       the simulator alone, against nginx
memory.py       how much memory processes take, and how it grows
query.py        the boards' queries on a month of points
peers.py        the same load against what one would otherwise write
soak.py         long: load, kills, memory, latency, exactly once
test_*.py       pytest-benchmark: decoding, limits, ring, COPY encoding, COPY
results/        JSON, each with its configuration, commit and machine
"""
