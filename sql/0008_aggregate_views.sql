-- edition: apache, plain
-- The aggregates as views, with the names and columns that the timescale license has as continuous aggregates: the same
-- queries give the same answers, computed from the points, so for as long as there are points.

DO $$
DECLARE
    of_points text := (
        SELECT string_agg(format(
            'sum(%1$I) / count(%1$I) AS %2$I, min(%1$I) AS %3$I, max(%1$I) AS %4$I, sum(%1$I) AS %5$I,'
            ' count(%1$I) AS %6$I',
            attname, 'avg_' || attname, 'min_' || attname, 'max_' || attname, 'sum_' || attname, 'count_' || attname
        ), ', ' ORDER BY attnum)
        FROM pg_attribute
        WHERE attrelid = 'telemetry'::regclass AND atttypid = 'double precision'::regtype AND NOT attisdropped
    );
    -- A bound on time_bucket() is also one on time, so that chunks are left out; plain PostgreSQL has an index on each
    -- date_bin() instead (0009).
    bucket text := CASE
        WHEN EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN 'time_bucket(%L::interval, time)'
        ELSE 'date_bin(%L::interval, time, timestamptz ''2000-01-01 00:00:00+00'')'
    END;
    view record;
BEGIN
    FOR view IN
        SELECT * FROM (VALUES
            ('satellite_stats', '5 minutes'), ('satellite_stats_hourly', '1 hour'), ('satellite_stats_daily', '1 day')
        ) AS view (name, width)
    LOOP
        EXECUTE format('CREATE VIEW %I AS SELECT ', view.name) || format(bucket, view.width)
            || ' AS bucket, satellite_id, count(*) AS data_points,'
            ' count(*) FILTER (WHERE is_anomaly) AS anomaly_count, ' || of_points
            || ' FROM telemetry GROUP BY 1, 2';
    END LOOP;
END
$$;
