-- edition: timescaledb
-- Chunks of one hour (ORBITSTREAM_CHUNK_INTERVAL when this is first applied); the indexes of 0001 carry over to chunks.

SELECT create_hypertable(
    'telemetry',
    by_range('time', current_setting('orbitstream.chunk_interval')::interval),
    create_default_indexes => false
);
