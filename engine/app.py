"""The web side: Falcon resources over one lane, and `create_app()` for gunicorn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import falcon
import orjson

from engine import keys, lanes, metrics, problems, rows, settings, stats
from engine.decode import DecodeError, Decoder
from engine.health import describe
from engine.problems import Problem
from engine.producer import Producer
from engine.ring import LaneClosedError, LaneFailedError, LaneFullError, RecordTooLargeError
from engine.rows import Columns
from engine.settings import Settings
from engine.timestamps import now_us

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
READ_STEP: Final = 1 << 20
DURABILITY: Final = "OrbitStream-Durability"


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
        try:
            piece = stream.read(min(READ_STEP, wanted - got))
        except Exception as error:  # whatever the server raises for broken chunks or a client that left
            raise Problem("bad-request", "the body cannot be read to its end") from error
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


def idempotency_key(request: falcon.Request, body: bytes) -> bytes:
    """Return what the record carries of the Idempotency-Key, empty without one; raises Problem for a bad one."""
    key = request.get_header("Idempotency-Key")
    if key is None:
        return b""
    if not (0 < len(key) <= keys.MAX_KEY_BYTES and key.isascii() and key.isprintable()):
        raise Problem("bad-request", f"Idempotency-Key must be 1 to {keys.MAX_KEY_BYTES} printable ASCII characters")
    return keys.record_key("", key, body)


class Lane:
    """The lane of this worker as its resources see it: points go in, or one Problem comes out."""

    def __init__(self, claim: Callable[[], tuple[Producer, lanes.Lock]]) -> None:
        self._claim = claim
        self._producer, self._lock = claim()  # the lock is held as long as this object lives
        self._mutex = threading.Lock()

    def has_room(self) -> bool:
        """Tell whether the largest record there may be has room now."""
        lane = self._producer.lane
        return lane.capacity - (lane.head - lane.tail) >= self._producer.largest_record

    def retry_after(self) -> dict[str, str]:
        """Return the header that says when a refused request will find room, at the current drain rate."""
        return {"Retry-After": str(self._producer.retry_after())}

    def publish(self, payload: list[bytes], points: int, time_us: int, key: bytes) -> None:
        """Commit one request as one record. Any other exception than Problem leaves its outcome unknown."""
        producer = self._producer
        try:
            try:
                producer.publish(payload, points, time_us, key)
            except LaneClosedError:  # a writer closed it: it is of another database, say
                producer = self._take_another(producer)
                producer.publish(payload, points, time_us, key)
        except LaneFullError as error:
            raise Problem("lane-full", str(error), headers=self.retry_after()) from error
        except LaneFailedError as error:
            raise Problem("lane-failed", str(error)) from error
        except RecordTooLargeError as error:
            raise Problem("too-large", str(error)) from error
        producer.answered(points)

    def _take_another(self, closed: Producer) -> Producer:
        with self._mutex:
            if self._producer is closed:
                self._lock.release()
                self._producer, self._lock = self._claim()
            return self._producer


class TelemetryResource:
    """POST /telemetry: one point, a JSON object."""

    def __init__(self, lane: Lane, decoder: Decoder, config: Settings) -> None:
        self._lane, self._decoder = lane, decoder
        self._max_body_bytes, self._durability = config.max_body_bytes, config.durability

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        media_type(request, JSON)
        body = read_body(request, self._max_body_bytes)
        key = idempotency_key(request, body)
        received = now_us()
        try:
            point = self._decoder.point(body, received)
        except DecodeError as error:
            raise Problem.of(error) from error
        payload = rows.pack_point(point.time_us, point.satellite_id, point.values, is_anomaly=False)
        self._lane.publish(payload, 1, received, key)
        response.status = falcon.HTTP_202
        response.set_header(DURABILITY, self._durability)
        response.data = b'{"status":"accepted","satellite_id":%b}' % orjson.dumps(point.satellite_id.decode())


class BatchResource:
    """POST /telemetry/batch: many points, a JSON array or one JSON object a line."""

    def __init__(self, lane: Lane, decoder: Decoder, config: Settings) -> None:
        self._lane = lane
        self._max_body_bytes, self._durability = config.max_body_bytes, config.durability
        self._decoders: dict[str, Callable[[bytes, int], Columns]] = {
            JSON: decoder.json_batch,
            NDJSON: decoder.ndjson_batch,
        }

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        decode = self._decoders[media_type(request, *self._decoders)]
        body = read_body(request, self._max_body_bytes)
        key = idempotency_key(request, body)
        received = now_us()
        try:
            columns = decode(body, received)
        except DecodeError as error:
            raise Problem.of(error) from error
        self._lane.publish(rows.pack(columns), len(columns), received, key)
        response.status = falcon.HTTP_202
        response.set_header(DURABILITY, self._durability)
        response.data = b'{"status":"accepted","count":%d}' % len(columns)


class HealthResource:
    """GET /health: what the writers' heartbeats and the lanes' words say; no database connection is opened."""

    def __init__(self, config: Settings) -> None:
        self._config = config

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        report = describe(self._config)
        response.status = falcon.HTTP_200 if report["status"] == "healthy" else falcon.HTTP_503
        response.data = orjson.dumps(report)


class MetricsResource:
    """GET /metrics: the counters of the lanes and the writers, in Prometheus' text format."""

    def __init__(self, config: Settings) -> None:
        self._folder = config.lane_dir

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        response.content_type = metrics.CONTENT_TYPE
        response.data = metrics.render(stats.take(self._folder))


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
            raise Problem("not-ready", "the lane of this worker is full", headers=self._lane.retry_after())
        response.data = b'{"status":"ready"}'


def build(config: Settings, lane: Lane) -> falcon.App[falcon.Request, falcon.Response]:
    """Return the WSGI app over an open lane."""
    decoder = Decoder(
        max_points=config.max_points,
        oldest_us=int(config.retention * 1e6),
        ignore_unknown=config.unknown_fields == "ignore",
    )
    app = falcon.App(media_type=JSON)
    app.add_route("/telemetry", TelemetryResource(lane, decoder, config))
    app.add_route("/telemetry/batch", BatchResource(lane, decoder, config))
    app.add_route("/health", HealthResource(config))
    app.add_route("/metrics", MetricsResource(config))
    app.add_route("/health/live", LiveResource())
    app.add_route("/health/ready", ReadyResource(lane))
    app.add_error_handler(Exception, problems.answer_crash)
    app.add_error_handler(falcon.HTTPError, problems.answer_http)
    app.add_error_handler(Problem, problems.answer)
    return app


def create_app() -> falcon.App[falcon.Request, falcon.Response]:
    """Return the WSGI app of one worker process; takes a lane, so call it after the fork."""
    config = settings.load()
    lanes.prepare(config.lane_dir, config.durability)
    durable = config.durability == "disk"
    claim = partial(lanes.claim_producer, config.lane_dir, config.lane_bytes, rows.layout(), durable=durable)
    return build(config, Lane(claim))
