-- The accounts of compose.yaml. The database's container runs this once, as superuser, when it makes its files; run it
-- again after a password was changed (README.md). psql takes the passwords from the secret files, so they are in no
-- environment and in no process list.
--
--   orbitstream_migrator   migrations and maintenance; owns the database and the tables (the jobs of TimescaleDB run as
--                          the owner of a table, so that has to be an account that can log in)
--   orbitstream_service    the writers: orbitstream_ingest
--   orbitstream_grafana    the dashboards: orbitstream_read

\set ON_ERROR_STOP on
\if :{?secrets}
\else
    \set secrets /run/secrets
\endif
\set migrator `sed -n '/^\[migrator\]/,/^\[/s/^password=//p' :'secrets'/pg_service.conf`
\set service `sed -n '/^\[service\]/,/^\[/s/^password=//p' :'secrets'/pg_service.conf`
\set grafana `cat :'secrets'/grafana_database_password`

-- Neither the log nor pg_stat_statements, where it is loaded, shall keep a statement with a password in it.
SET log_statement = 'none';
SET log_min_error_statement = 'panic';
SET pg_stat_statements.track = 'none';

SELECT :'migrator' <> '' AND :'service' <> '' AND :'grafana' <> '' AS complete \gset
\if :complete
\else
    DO $$ BEGIN RAISE 'a password is missing in deploy/secrets: make them as deploy/README.md says'; END $$;
\endif

SELECT format('CREATE ROLE %I', name)
FROM unnest(ARRAY[
    'orbitstream_owner', 'orbitstream_ingest', 'orbitstream_read',
    'orbitstream_migrator', 'orbitstream_service', 'orbitstream_grafana'
]) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

-- CREATEROLE: migrations set up the three roles; since PostgreSQL 16 it reaches no role that is not granted here.
ALTER ROLE orbitstream_migrator LOGIN CREATEROLE PASSWORD :'migrator';
ALTER ROLE orbitstream_service LOGIN PASSWORD :'service';
ALTER ROLE orbitstream_grafana LOGIN PASSWORD :'grafana';

GRANT orbitstream_owner, orbitstream_ingest, orbitstream_read TO orbitstream_migrator WITH ADMIN OPTION;
GRANT orbitstream_ingest TO orbitstream_service;
GRANT orbitstream_read TO orbitstream_grafana;

-- Maintenance samples the slowest queries of all accounts; what is no query, as ALTER ROLE .. PASSWORD, it leaves aside.
SELECT 'CREATE EXTENSION IF NOT EXISTS pg_stat_statements'
WHERE EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_stat_statements') \gexec
GRANT pg_read_all_stats TO orbitstream_migrator;

-- Maintenance looks up the data folder, whose disk it measures where that is on the same machine.
GRANT pg_read_all_settings TO orbitstream_migrator;

-- A setting of a role is not inherited by its members, hence on the account.
ALTER ROLE orbitstream_grafana SET statement_timeout = '30s';
ALTER ROLE orbitstream_grafana SET default_transaction_read_only = on;

SELECT format('ALTER DATABASE %I OWNER TO orbitstream_migrator', current_database()) \gexec
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()) \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO orbitstream_ingest, orbitstream_read', current_database()) \gexec
REVOKE CREATE ON SCHEMA public FROM PUBLIC; -- PostgreSQL 14 still lets everybody
