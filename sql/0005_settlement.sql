-- edition: any
-- What becomes of a record besides rows: deduplicated by its idempotency key, or set aside because the database refuses
-- a point. The ledger counts both, so that published = committed + deduplicated + dead-lettered + queued.

ALTER TABLE ingest_progress
    ADD COLUMN deduplicated_points   bigint NOT NULL DEFAULT 0,
    ADD COLUMN dead_lettered_points  bigint NOT NULL DEFAULT 0;

-- A key is known from the transaction that settles its record on; kept 7 days, promised for 24 hours.
CREATE TABLE idempotency_key (
    scope       text COLLATE "C" NOT NULL,
    key         text COLLATE "C" NOT NULL,
    body_hash   bytea       NOT NULL,
    lane        uuid        NOT NULL,
    position    bigint      NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope, key)
);
CREATE INDEX idempotency_key_age ON idempotency_key USING brin (created_at);
COMMENT ON COLUMN idempotency_key.position IS 'End of the record that came first with this key, in its lane.';

CREATE TABLE dead_letter (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at   timestamptz NOT NULL DEFAULT now(),
    reason       text        NOT NULL,
    sqlstate     text,
    detail       text        NOT NULL,
    point        jsonb       NOT NULL,
    lane         uuid        NOT NULL,
    position     bigint      NOT NULL,
    replayed_at  timestamptz
);
COMMENT ON TABLE dead_letter IS 'Accepted points that did not become rows: orbitstream dead-letters list|replay|purge.';
COMMENT ON COLUMN dead_letter.point IS 'The row that was to be stored: the names are the columns of telemetry.';
