-- edition: any
-- The queries that took most, sampled each minute from pg_stat_statements where the server has it loaded. Only a superuser
-- can make that extension; without it the table stays empty.

CREATE TABLE slow_query (
    query_id    bigint PRIMARY KEY,
    query       text             NOT NULL,
    calls       bigint           NOT NULL,
    rows        bigint           NOT NULL,
    total_ms    double precision NOT NULL,
    mean_ms     double precision NOT NULL,
    worst_ms    double precision NOT NULL,
    sampled_at  timestamptz      NOT NULL
);
COMMENT ON TABLE slow_query IS 'The newest sample alone; its counters began when those of pg_stat_statements did.';

DO $$
BEGIN
    IF 'pg_stat_statements' = ANY (string_to_array(replace(current_setting('shared_preload_libraries'), ' ', ''), ','))
        AND EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_stat_statements')
    THEN
        CREATE EXTENSION IF NOT EXISTS pg_stat_statements;
    END IF;
EXCEPTION
    WHEN insufficient_privilege THEN NULL;
END
$$;
