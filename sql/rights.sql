-- Who may do what. No migration: `orbitstream migrate` applies it each time, after them, so that a role which was
-- created later, or a table of a later version, has its rights as well.
--
--   orbitstream_owner   an operator's: everything with the data. (Schema and chunks belong to the account that migrates.)
--   orbitstream_ingest  the service's: adds points and moves the ledger, and can take nothing away
--   orbitstream_read    Grafana's: reads
--
-- They have no login: grant them to accounts. Creating them takes CREATEROLE; without it they are the administrator's
-- to create, and what is not there is passed over.

DO $$
DECLARE
    name text;
    entry record;
BEGIN
    FOREACH name IN ARRAY ARRAY['orbitstream_owner', 'orbitstream_ingest', 'orbitstream_read'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', name);
            EXCEPTION
                WHEN insufficient_privilege THEN NULL;
                WHEN duplicate_object OR unique_violation THEN NULL; -- for another database of the server, just now
            END;
        END IF;
    END LOOP;

    FOR entry IN
        SELECT role, rights, relation
        FROM (VALUES
            -- relation               what the service does with it    read by Grafana
            ('telemetry',              'SELECT, INSERT',               true),
            ('ingest_progress',        'SELECT, INSERT, UPDATE',       true),
            ('orbitstream_database',   'SELECT',                       true),
            ('idempotency_key',        'SELECT, INSERT, UPDATE',       false), -- keys are the clients' own
            ('dead_letter',            'SELECT, INSERT',               true),
            ('satellite_latest',       'SELECT, INSERT, UPDATE',       true),
            ('anomaly_event',          'SELECT, INSERT, UPDATE',       true),
            ('engine_stats',           'INSERT',                       true),
            ('storage_stats',          NULL,                           true),
            ('fleet_stats',            NULL,                           true),
            ('database_stats',         NULL,                           true),
            ('slow_query',             NULL,                           true),
            ('background_job',         NULL,                           true),
            ('aggregate_floor',        NULL,                           true),
            ('satellite_stats',        NULL,                           true),
            ('satellite_stats_hourly', NULL,                           true),
            ('satellite_stats_daily',  NULL,                           true),
            ('capacity',               NULL,                           true)
        ) AS listed (relation, ingest, read)
        CROSS JOIN LATERAL (VALUES
            ('orbitstream_owner', 'ALL'),
            ('orbitstream_ingest', ingest),
            ('orbitstream_read', CASE WHEN read THEN 'SELECT' END)
        ) AS wanted (role, rights)
        WHERE rights IS NOT NULL AND to_regclass(relation) IS NOT NULL
          AND EXISTS (SELECT FROM pg_roles WHERE rolname = role)
    LOOP
        EXECUTE format('GRANT %s ON %I TO %I', entry.rights, entry.relation, entry.role);
    END LOOP;
END
$$;
