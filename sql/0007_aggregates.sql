-- edition: timescale
-- Continuous aggregates per satellite: 5 minutes from the points, an hour from the 5 minutes, a day from the hours.
-- The coarser ones are made of sums and counts, since an average of averages is none. What is newer than the last
-- refresh is computed on the fly. Filled by their policies (see engine/policies.py), not here.
--
-- A new channel takes new aggregates: they cannot be altered.

DROP VIEW IF EXISTS satellite_stats, satellite_stats_hourly, satellite_stats_daily;  -- those of a lesser edition

DO $$
DECLARE
    -- The channels are the columns of telemetry that are numbers.
    of_points text := (
        SELECT string_agg(format(
            'sum(%1$I) / count(%1$I) AS %2$I, min(%1$I) AS %3$I, max(%1$I) AS %4$I, sum(%1$I) AS %5$I,'
            ' count(%1$I) AS %6$I',
            attname, 'avg_' || attname, 'min_' || attname, 'max_' || attname, 'sum_' || attname, 'count_' || attname
        ), ', ' ORDER BY attnum)
        FROM pg_attribute
        WHERE attrelid = 'telemetry'::regclass AND atttypid = 'double precision'::regtype AND NOT attisdropped
    );
    of_buckets text := (
        SELECT string_agg(format(
            'sum(%4$I) / sum(%5$I)::double precision AS %1$I, min(%2$I) AS %2$I, max(%3$I) AS %3$I,'
            ' sum(%4$I) AS %4$I, sum(%5$I)::bigint AS %5$I',
            'avg_' || attname, 'min_' || attname, 'max_' || attname, 'sum_' || attname, 'count_' || attname
        ), ', ' ORDER BY attnum)
        FROM pg_attribute
        WHERE attrelid = 'telemetry'::regclass AND atttypid = 'double precision'::regtype AND NOT attisdropped
    );
    coarser record;
BEGIN
    EXECUTE 'CREATE MATERIALIZED VIEW satellite_stats WITH (timescaledb.continuous,'
        ' timescaledb.materialized_only = false, timescaledb.chunk_interval = ''1 day'') AS'
        ' SELECT time_bucket(''5 minutes'', time) AS bucket, satellite_id, count(*) AS data_points,'
        ' count(*) FILTER (WHERE is_anomaly) AS anomaly_count, ' || of_points
        || ' FROM telemetry GROUP BY 1, 2 WITH NO DATA';
    FOR coarser IN
        SELECT * FROM (VALUES
            ('satellite_stats_hourly', 'satellite_stats', '1 hour', '14 days'),
            ('satellite_stats_daily', 'satellite_stats_hourly', '1 day', '180 days')
        ) AS coarser (name, source, width, chunk)
    LOOP
        EXECUTE format(
            'CREATE MATERIALIZED VIEW %I WITH (timescaledb.continuous, timescaledb.materialized_only = false,'
            ' timescaledb.chunk_interval = %L) AS'
            ' SELECT time_bucket(%L, bucket) AS bucket, satellite_id, sum(data_points)::bigint AS data_points,'
            ' sum(anomaly_count)::bigint AS anomaly_count, ',
            coarser.name, coarser.chunk, coarser.width
        ) || of_buckets || format(' FROM %I GROUP BY 1, 2 WITH NO DATA', coarser.source);
    END LOOP;
END
$$;

ALTER MATERIALIZED VIEW satellite_stats
    SET (timescaledb.compress, timescaledb.compress_segmentby = 'satellite_id', timescaledb.compress_orderby = 'bucket');
ALTER MATERIALIZED VIEW satellite_stats_hourly
    SET (timescaledb.compress, timescaledb.compress_segmentby = 'satellite_id', timescaledb.compress_orderby = 'bucket');
ALTER MATERIALIZED VIEW satellite_stats_daily
    SET (timescaledb.compress, timescaledb.compress_segmentby = 'satellite_id', timescaledb.compress_orderby = 'bucket');

-- Up to where points were ever dropped. A refresh that reaches before it would find less than was there when a bucket
-- was computed, and replace the bucket by that.
CREATE TABLE aggregate_floor (
    singleton       boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    raw_whole_from  timestamptz NOT NULL
);
INSERT INTO aggregate_floor (raw_whole_from) VALUES ('-infinity');
