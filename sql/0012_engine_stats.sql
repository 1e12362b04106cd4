-- edition: any
-- What the engine says of itself, a row a second for each worker and each writer; read by the boards.

CREATE TABLE engine_stats (
    time             timestamptz       NOT NULL,
    node             text COLLATE "C"  NOT NULL,
    process          text              NOT NULL CHECK (process IN ('worker', 'writer')),
    name             text COLLATE "C"  NOT NULL,
    first_of_minute  boolean           NOT NULL,
    alive            boolean           NOT NULL,
    accepted         bigint,
    refused          bigint,
    settled          bigint,
    residual         bigint,
    queue_points     bigint,
    queue_bytes      bigint,
    capacity_bytes   bigint,
    committed        bigint,
    dead_lettered    bigint,
    anomalies        bigint,
    flushes          bigint,
    failures         bigint,
    stopped_lanes    bigint,
    busy_s           double precision,
    flush_p50_ms     double precision,
    flush_p99_ms     double precision,
    arrival_p50_ms   double precision,
    arrival_p99_ms   double precision,
    cpu_s            double precision,
    memory_bytes     bigint
);
CREATE INDEX engine_stats_time ON engine_stats (time DESC);
COMMENT ON TABLE engine_stats IS 'One row a second for each worker (its lane) and each writer, rows of a minute after a day.';
COMMENT ON COLUMN engine_stats.accepted IS 'accepted, refused, settled, committed, dead_lettered, anomalies, flushes, failures, busy_s and cpu_s only grow, but for a new start at 0.';
COMMENT ON COLUMN engine_stats.residual IS 'Points published and neither settled nor queued: 0, or NULL when it could not be told.';
COMMENT ON COLUMN engine_stats.flush_p50_ms IS 'Quantiles are of what happened since the row before; NULL when nothing did.';
