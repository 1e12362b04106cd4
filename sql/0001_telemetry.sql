-- edition: any
-- What is stored, and how far each lane has come.

CREATE TABLE telemetry (
    time                    timestamptz      NOT NULL,
    satellite_id            text COLLATE "C" NOT NULL CHECK (octet_length(satellite_id) BETWEEN 1 AND 50),
    battery_charge_percent  double precision NOT NULL,
    storage_usage_mb        double precision NOT NULL,
    signal_strength_dbm     double precision NOT NULL,
    received_at             timestamptz      NOT NULL,
    is_anomaly              boolean          NOT NULL,
    latitude                double precision,
    longitude               double precision,
    altitude_km             double precision,
    velocity_kmph           double precision,
    temperature_c           double precision,
    bus_voltage_v           double precision
);
COMMENT ON TABLE telemetry IS 'One row per accepted point.';
COMMENT ON COLUMN telemetry.time IS 'Generation time: when the satellite took the reading.';
COMMENT ON COLUMN telemetry.received_at IS 'Reception time: when the service accepted it.';

CREATE INDEX telemetry_satellite_time ON telemetry (satellite_id, time DESC);
CREATE INDEX telemetry_anomaly ON telemetry (time DESC) WHERE is_anomaly;

-- The delivery ledger. A row moves in the transaction that copies the points it counts; rows are never deleted.
CREATE TABLE ingest_progress (
    lane              uuid        PRIMARY KEY,
    position          bigint      NOT NULL DEFAULT 0,
    committed_points  bigint      NOT NULL DEFAULT 0,
    flushes           bigint      NOT NULL DEFAULT 0,
    node              text        NOT NULL,
    first_drain_at    timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
COMMENT ON TABLE ingest_progress IS 'Delivery ledger: the byte position up to which each lane is in the database.';

-- A lane remembers which database it drains into, and never drains into another.
CREATE TABLE orbitstream_database (
    singleton   boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    id          uuid        NOT NULL DEFAULT gen_random_uuid(),
    created_at  timestamptz NOT NULL DEFAULT now()
);
INSERT INTO orbitstream_database DEFAULT VALUES;
