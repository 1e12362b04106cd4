-- edition: plain
-- Without chunks, queries over a span of time need an index on time. Rows arrive roughly in order of time, so a block
-- range index answers them at next to no cost for ingest (a b-tree would halve the rate).

CREATE INDEX telemetry_time_range ON telemetry USING brin (time) WITH (pages_per_range = 32, autosummarize = on);
