-- edition: plain
-- The block range index of 0003, widened by what the views of 0008 are bounded by.

DROP INDEX telemetry_time_range;
CREATE INDEX telemetry_time_range ON telemetry USING brin (
    time,
    date_bin('5 minutes', time, timestamptz '2000-01-01 00:00:00+00'),
    date_bin('1 hour', time, timestamptz '2000-01-01 00:00:00+00'),
    date_bin('1 day', time, timestamptz '2000-01-01 00:00:00+00')
) WITH (pages_per_range = 32, autosummarize = on);
