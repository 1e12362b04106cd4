-- edition: any
-- After a restore, what a live lane was drained of since the backup is neither in the database nor in the lane. `lanes
-- resume` counts those points, so that published = committed + deduplicated + dead-lettered + forgone + queued holds on.

ALTER TABLE ingest_progress ADD COLUMN forgone_points bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN ingest_progress.forgone_points IS 'Points that went with a restore of the database.';
