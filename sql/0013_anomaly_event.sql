-- edition: any
-- Episodes: a channel of a satellite beyond its limits, from the onset to the clear.

CREATE TABLE anomaly_event (
    id            bigint            GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    satellite_id  text COLLATE "C"  NOT NULL,
    channel       text              NOT NULL,
    severity      text              NOT NULL CHECK (severity IN ('warning', 'critical')),
    kind          text              NOT NULL CHECK (kind IN ('below', 'above', 'rate')),
    limit_value   double precision  NOT NULL,
    onset         timestamptz       NOT NULL,
    cleared_at    timestamptz,
    peak          double precision  NOT NULL,
    peak_at       timestamptz       NOT NULL,
    points        bigint            NOT NULL
);
CREATE UNIQUE INDEX anomaly_event_open ON anomaly_event (satellite_id, channel) WHERE cleared_at IS NULL;
CREATE INDEX anomaly_event_onset ON anomaly_event (onset DESC);
CREATE INDEX anomaly_event_satellite ON anomaly_event (satellite_id, onset DESC);
COMMENT ON TABLE anomaly_event IS 'One row an episode; without cleared_at it lasts. Telemetry keeps the points (is_anomaly).';
COMMENT ON COLUMN anomaly_event.kind IS 'What the value violated first: a lower or upper limit, or the rate of change (a spike).';
COMMENT ON COLUMN anomaly_event.peak IS 'The value furthest beyond the limit, as known at the clear or at a change of severity.';
