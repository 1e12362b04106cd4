-- edition: any
-- Three roles without login: grant them to the accounts that the service, its migrations and Grafana use. Creating
-- roles takes CREATEROLE; where the migrating account lacks it, the roles are left to the administrator.

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['orbitstream_owner', 'orbitstream_ingest', 'orbitstream_read'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', name);
            EXCEPTION
                WHEN insufficient_privilege THEN
                    RAISE NOTICE 'role % is missing and this account may not create it', name;
                WHEN duplicate_object OR unique_violation THEN
                    NULL;  -- another database of this cluster was migrated at the same moment
            END;
        END IF;
    END LOOP;

    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'orbitstream_owner') THEN
        GRANT ALL ON telemetry, ingest_progress, orbitstream_database TO orbitstream_owner;
    END IF;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'orbitstream_ingest') THEN
        GRANT SELECT, INSERT ON telemetry TO orbitstream_ingest;
        GRANT SELECT, INSERT, UPDATE ON ingest_progress TO orbitstream_ingest;
        GRANT SELECT ON orbitstream_database TO orbitstream_ingest;
    END IF;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'orbitstream_read') THEN
        GRANT SELECT ON telemetry, ingest_progress, orbitstream_database TO orbitstream_read;
    END IF;
EXCEPTION
    WHEN insufficient_privilege THEN
        RAISE NOTICE 'rights of the orbitstream roles were not all granted: %', SQLERRM;
END
$$;
