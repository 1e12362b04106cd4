-- edition: timescale
-- Chunks in the columnstore, in the order in which the writers send rows. No segments: a COPY of 50,000 rows of 1,000
-- satellites would make a thousand short ones, while ordered by satellite it makes fifty full ones. When a chunk is
-- converted, and when its policy (see engine/policies.py) rewrites it as a whole, is settled by each `migrate`.

ALTER TABLE telemetry SET (
    timescaledb.compress,
    timescaledb.compress_segmentby = '',
    timescaledb.compress_orderby = 'satellite_id, time'
);
