-- edition: any
-- What `orbitstream capacity` measured: one row a measurement. The boards read head-room against the newest knee.

CREATE TABLE capacity (
    measured_at              timestamptz      NOT NULL DEFAULT now(),
    node                     text             NOT NULL,
    knee_points_per_second   double precision NOT NULL,
    drain_points_per_second  double precision NOT NULL,
    copy_points_per_second   double precision NOT NULL,
    seconds_until_full       double precision,
    cores                    integer          NOT NULL,
    report                   jsonb            NOT NULL,
    PRIMARY KEY (measured_at, node)
);
COMMENT ON COLUMN capacity.knee_points_per_second IS
    'Highest rate with nothing refused and the p99 from arrival to commit under the bound.';
COMMENT ON COLUMN capacity.drain_points_per_second IS 'Commits while the lanes were never empty.';
COMMENT ON COLUMN capacity.copy_points_per_second IS 'The same rows by COPY alone, in the same run.';
COMMENT ON COLUMN capacity.seconds_until_full IS 'At twice the knee; null: the edge cannot take that much.';
