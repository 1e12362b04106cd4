-- edition: any
-- Samples of each minute, so that a board over days reads thousands of rows and not the points: the fleet as its newest
-- readings are, and the database.

CREATE TABLE fleet_stats (
    time        timestamptz  NOT NULL,
    channel     text         NOT NULL,
    satellites  bigint       NOT NULL,
    reporting   bigint       NOT NULL,
    low         double precision,
    p5          double precision,
    p50         double precision,
    p95         double precision,
    high        double precision,
    histogram   bigint[],
    PRIMARY KEY (time, channel)
);
COMMENT ON TABLE fleet_stats IS 'Distribution of the newest readings over the satellites that report.';
COMMENT ON COLUMN fleet_stats.reporting IS 'Satellites with a reading from the last minute; the rest is of these.';
COMMENT ON COLUMN fleet_stats.histogram IS 'Of battery_charge_percent: satellites by steps of 5 %, the last one with 100 %.';

CREATE TABLE database_stats (
    time             timestamptz PRIMARY KEY,
    connections      bigint NOT NULL,
    max_connections  bigint NOT NULL,
    commits          bigint NOT NULL,
    rollbacks        bigint NOT NULL,
    blocks_hit       bigint NOT NULL,
    blocks_read      bigint NOT NULL,
    deadlocks        bigint NOT NULL,
    temp_bytes       bigint NOT NULL,
    locks_waiting    bigint NOT NULL,
    wal_bytes        bigint NOT NULL,
    raw_ms           double precision,
    five_minutes_ms  double precision,
    hourly_ms        double precision
);
COMMENT ON TABLE database_stats IS 'Counters only grow, but for a new start at 0; wal_bytes is the position in the log.';
COMMENT ON COLUMN database_stats.raw_ms IS 'Time to average the last 3 hours of one satellite: points, 5-minute, hourly aggregates.';

-- The jobs of TimescaleDB, in one shape on every edition.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        CREATE VIEW background_job AS
            SELECT jobs.job_id::bigint AS job, jobs.proc_name::text AS does, jobs.hypertable_name::text AS relation,
                jobs.schedule_interval AS every, stats.last_run_status AS last_status,
                stats.last_successful_finish AS last_success, stats.next_start,
                coalesce(stats.total_runs, 0)::bigint AS runs, coalesce(stats.total_failures, 0)::bigint AS failures
            FROM timescaledb_information.jobs AS jobs
            LEFT JOIN timescaledb_information.job_stats AS stats USING (job_id)
            WHERE jobs.job_id >= 1000;
    ELSE
        CREATE VIEW background_job AS
            SELECT NULL::bigint AS job, NULL::text AS does, NULL::text AS relation, NULL::interval AS every,
                NULL::text AS last_status, NULL::timestamptz AS last_success, NULL::timestamptz AS next_start,
                NULL::bigint AS runs, NULL::bigint AS failures
            WHERE false;
    END IF;
END
$$;
