-- edition: any
-- What is kept beside the points: the newest of each satellite, and how the storage grows. Neither is part of the
-- promise of delivery; both are written outside of the transactions that store points.

CREATE TABLE satellite_latest (LIKE telemetry, PRIMARY KEY (satellite_id)) WITH (fillfactor = 50);
COMMENT ON TABLE satellite_latest IS 'The newest point of each satellite, some seconds behind telemetry.';
INSERT INTO satellite_latest
    SELECT DISTINCT ON (satellite_id) * FROM telemetry ORDER BY satellite_id, time DESC, received_at DESC;

CREATE TABLE storage_stats (
    sampled_at         timestamptz PRIMARY KEY DEFAULT now(),
    database_bytes     bigint NOT NULL,
    telemetry_bytes    bigint NOT NULL,
    aggregate_bytes    bigint NOT NULL,
    points             bigint NOT NULL,
    chunks             bigint,
    compressed_chunks  bigint,
    disk_total_bytes   bigint,
    disk_free_bytes    bigint
);
COMMENT ON TABLE storage_stats IS 'A sample each minute, kept as long as the 5-minute aggregates.';
COMMENT ON COLUMN storage_stats.points IS 'Rows of telemetry, as the planner estimates them.';
COMMENT ON COLUMN storage_stats.disk_free_bytes IS 'Of the disk of the database; NULL where the service runs elsewhere.';
