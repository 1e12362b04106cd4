"""The web side: Falcon resources over one lane, and `create_app()` for gunicorn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import falcon
import orjson

from engine import lanes, problems, rows, settings
from engine.decode import DecodeError, Decoder
from engine.health import describe
from engine.limits import Limits
from engine.problems import Problem
from engine.ring import LaneFullError, Producer, RecordTooLargeError
from engine.rows import Columns
from engine.settings import Settings
from engine.timestamps import now_us

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
READ_STEP: Final = 1 << 20


class Input(Protocol):
    """`wsgi.input`."""

    def read(self, size: int, /) -> bytes: ...


def read_body(request: falcon.Request, limit: int) -> bytes:
    """Return the whole body, of known length or chunked; raises Problem for one over `limit` bytes or cut short."""
    length = request.content_length
    too_large = Problem("too-large", f"the body is over {limit} bytes: send fewer points a request")
    if length is not None and length > limit:
        raise too_large
    if length is None and "chunked" not in (request.get_header("Transfer-Encoding") or "").lower():
        return b""
    stream: Input = request.env["wsgi.input"]
    wanted = limit + 1 if length is None else length
    pieces, got = [], 0
    while got < wanted:
        piece = stream.read(min(READ_STEP, wanted - got))
        if not piece:
            break
        pieces.append(piece)
        got += len(piece)
    if got > limit:
        raise too_large
    if length is not None and got < length:
        raise Problem("bad-request", "the body is shorter than its Content-Length")
    return b"".join(pieces)


def media_type(request: falcon.Request, *known: str) -> str:
    """Return which of the `known` media types the body is; raises Problem for another, or for an encoded body."""
    given = (request.content_type or JSON).partition(";")[0].strip().lower()
    if given not in known:
        raise Problem("unsupported-media-type", f"send {' or '.join(known)}", headers={"Accept": ", ".join(known)})
    if (request.get_header("Content-Encoding") or "identity").lower() != "identity":
        raise Problem("unsupported-media-type", "send the body as it is, without Content-Encoding")
    return given


class Lane:
    """The lane of this worker as its resources see it: points go in, or one Problem comes out."""

    def __init__(self, producer: Producer, lock: lanes.Lock) -> None:
        self._producer = producer
        self._lock = lock  # held as long as this object lives

    def has_room(self) -> bool:
        """Tell whether the largest record there may be has room now."""
        lane = self._producer.lane
        return lane.capacity - (lane.head - lane.tail) >= self._producer.largest_record

    def publish(self, payload: list[bytes], points: int, time_us: int) -> None:
        """Commit one request as one record. Any other exception than Problem leaves its outcome unknown."""
        try:
            self._producer.publish(payload, points, time_us)
        except LaneFullError as error:
            raise Problem("lane-full", str(error), headers={"Retry-After": "1"}) from error
        except RecordTooLargeError as error:
            raise Problem("too-large", str(error)) from error


class TelemetryResource:
    """POST /telemetry: one point, a JSON object."""

    def __init__(self, lane: Lane, decoder: Decoder, limits: Limits, max_body_bytes: int) -> None:
        self._lane, self._decoder, self._limits, self._max_body_bytes = lane, decoder, limits, max_body_bytes

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        media_type(request, JSON)
        body = read_body(request, self._max_body_bytes)
        received = now_us()
        try:
            point = self._decoder.point(body, received)
        except DecodeError as error:
            raise Problem.of(error) from error
        payload = rows.pack_point(point.time_us, point.satellite_id, point.values, self._limits.flag(point.values))
        self._lane.publish(payload, 1, received)
        response.status = falcon.HTTP_202
        response.data = b'{"status":"accepted","satellite_id":%b}' % orjson.dumps(point.satellite_id.decode())


class BatchResource:
    """POST /telemetry/batch: many points, a JSON array or one JSON object a line."""

    def __init__(self, lane: Lane, decoder: Decoder, limits: Limits, max_body_bytes: int) -> None:
        self._lane, self._limits, self._max_body_bytes = lane, limits, max_body_bytes
        self._decoders: dict[str, Callable[[bytes, int], Columns]] = {
            JSON: decoder.json_batch,
            NDJSON: decoder.ndjson_batch,
        }

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        decode = self._decoders[media_type(request, *self._decoders)]
        body = read_body(request, self._max_body_bytes)
        received = now_us()
        try:
            columns = decode(body, received)
        except DecodeError as error:
            raise Problem.of(error) from error
        columns.is_anomaly = self._limits.flags(columns)
        self._lane.publish(rows.pack(columns), len(columns), received)
        response.status = falcon.HTTP_202
        response.data = b'{"status":"accepted","count":%d}' % len(columns)


class HealthResource:
    """GET /health: what the writers' heartbeats and the lanes' words say; no database connection is opened."""

    def __init__(self, config: Settings) -> None:
        self._config = config

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        report = describe(self._config)
        response.status = falcon.HTTP_200 if report["status"] == "healthy" else falcon.HTTP_503
        response.data = orjson.dumps(report)


class LiveResource:
    """GET /health/live: this process answers."""

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        response.data = b'{"status":"live"}'


class ReadyResource:
    """GET /health/ready: points are accepted now, that is, the lane of this worker has room."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        if not self._lane.has_room():
            raise Problem("not-ready", "the lane of this worker is full", headers={"Retry-After": "1"})
        response.data = b'{"status":"ready"}'


def build(config: Settings, lane: Lane) -> falcon.App[falcon.Request, falcon.Response]:
    """Return the WSGI app over an open lane."""
    decoder = Decoder(
        max_points=config.max_points,
        oldest_us=int(config.retention * 1e6),
        ignore_unknown=config.unknown_fields == "ignore",
    )
    limits = Limits(
        battery_below=config.anomaly_battery,
        storage_above=config.anomaly_storage,
        signal_below=config.anomaly_signal,
    )
    app = falcon.App(media_type=JSON)
    app.add_route("/telemetry", TelemetryResource(lane, decoder, limits, config.max_body_bytes))
    app.add_route("/telemetry/batch", BatchResource(lane, decoder, limits, config.max_body_bytes))
    app.add_route("/health", HealthResource(config))
    app.add_route("/health/live", LiveResource())
    app.add_route("/health/ready", ReadyResource(lane))
    app.add_error_handler(Exception, problems.answer_crash)
    app.add_error_handler(falcon.HTTPError, problems.answer_http)
    app.add_error_handler(Problem, problems.answer)
    return app


def create_app() -> falcon.App[falcon.Request, falcon.Response]:
    """Return the WSGI app of one worker process; takes a lane, so call it after the fork."""
    config = settings.load()
    lanes.prepare(config.lane_dir)
    return build(config, Lane(*lanes.claim_producer(config.lane_dir, config.lane_bytes, rows.layout())))
