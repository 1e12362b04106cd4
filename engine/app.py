"""The web side: Falcon resources over one lane, and `create_app()` for gunicorn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Final

import falcon
import orjson

from engine import answers, body, keys, lanes, metrics, openapi, problems, rows, settings, stats
from engine.body import ARROW, JSON, NDJSON
from engine.decode import Content, Decoder
from engine.guard import Guard
from engine.health import describe
from engine.points import DecodeError, Rejects
from engine.prefer import is_lenient
from engine.problems import Problem
from engine.producer import Producer, Receipt
from engine.ring import LaneClosedError, LaneFailedError, LaneFullError, RecordTooLargeError
from engine.rows import Columns
from engine.settings import Settings
from engine.timestamps import now_us
from engine.tokens import Tokens

POINT_BODY_BYTES: Final = 64 << 10
"""A point takes a few hundred bytes; what parsing a larger body may cost is bounded for batches only."""
DURABILITY: Final = "OrbitStream-Durability"


def idempotency_key(request: falcon.Request, content: Content) -> bytes:
    """Return what the record carries of the Idempotency-Key, empty without one; raises Problem for a bad one.

    A key is its token's own: the same key under another token is another key.
    """
    key = request.get_header("Idempotency-Key")
    if key is None:
        return b""
    if not (0 < len(key) <= keys.MAX_KEY_BYTES and key.isascii() and key.isprintable()):
        raise Problem("bad-request", f"Idempotency-Key must be 1 to {keys.MAX_KEY_BYTES} printable ASCII characters")
    token = getattr(request.context, "token", None)
    return keys.record_key(token.name if token else "", key, content)


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

    def publish(self, payload: list[bytes], points: int, time_us: int, key: bytes) -> Receipt:
        """Commit one request as one record. Any other exception than Problem leaves its outcome unknown."""
        producer = self._producer
        try:
            try:
                return producer.publish(payload, points, time_us, key)
            except LaneClosedError:  # a writer closed it: it is of another database, say
                return self._take_another(producer).publish(payload, points, time_us, key)
        except LaneFullError as error:
            raise Problem("lane-full", str(error), headers=self.retry_after()) from error
        except LaneFailedError as error:
            raise Problem("lane-failed", str(error)) from error
        except RecordTooLargeError as error:
            raise Problem("too-large", str(error)) from error

    def _take_another(self, closed: Producer) -> Producer:
        with self._mutex:
            if self._producer is closed:
                self._lock.release()
                self._producer, self._lock = self._claim()
            return self._producer


class TelemetryResource:
    """POST /telemetry: one point, a JSON object."""

    scope = "write"

    def __init__(self, lane: Lane, decoder: Decoder, config: Settings, guard: Guard | None) -> None:
        self._lane, self._decoder, self._guard = lane, decoder, guard
        self._max_body_bytes, self._durability = min(config.max_body_bytes, POINT_BODY_BYTES), config.durability

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        body.media_type(request, JSON)
        content = body.read(request, self._max_body_bytes)
        key = idempotency_key(request, content)
        received = now_us()
        try:
            point = self._decoder.point(content, received)
        except DecodeError as error:
            raise Problem.of(error) from error
        payload = rows.pack_point(point.time_us, point.satellite_id, point.values, is_anomaly=False)
        receipt = self._lane.publish(payload, 1, received, key)
        if self._guard is not None:
            self._guard.charge(request, 1)
        response.status = falcon.HTTP_202
        response.set_header(DURABILITY, self._durability)
        name = orjson.dumps(point.satellite_id.decode())
        response.data = b'{"status":"accepted","satellite_id":%b}' % name
        answers.release(
            request, response, receipt, lambda: b'{"status":"committed","count":1,"satellite_id":%b}' % name
        )


class BatchResource:
    """POST /telemetry/batch: many points, as JSON (array or columns), one JSON object a line, or an Arrow stream."""

    scope = "write"

    def __init__(self, lane: Lane, decoder: Decoder, config: Settings, guard: Guard | None) -> None:
        self._lane, self._guard = lane, guard
        self._max_body_bytes, self._durability = config.max_body_bytes, config.durability
        self._decoders: dict[str, Callable[[Content, int, Rejects | None], Columns]] = {
            JSON: decoder.json_batch,
            NDJSON: decoder.ndjson_batch,
            ARROW: decoder.arrow_batch,
        }

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        decode = self._decoders[body.media_type(request, *self._decoders)]
        rejects = Rejects() if is_lenient(request.env.get("HTTP_PREFER")) else None
        content = body.read(request, self._max_body_bytes)
        key = idempotency_key(request, content)
        if key and rejects is not None:
            raise Problem("bad-request", "send an Idempotency-Key or Prefer: handling=lenient: verdicts may change")
        received = now_us()
        try:
            columns = decode(content, received, rejects)
        except DecodeError as error:
            raise Problem.of(error) from error
        count = len(columns)
        receipt = self._lane.publish(rows.pack(columns), count, received, key)
        if self._guard is not None:
            self._guard.charge(request, count)
        response.status = falcon.HTTP_202
        response.set_header(DURABILITY, self._durability)
        if rejects is not None:
            response.append_header("Preference-Applied", "handling=lenient")
        response.data = batch_answer("accepted", count, rejects)
        answers.release(request, response, receipt, lambda: batch_answer("committed", count, rejects))


def batch_answer(status: str, count: int, rejects: Rejects | None) -> bytes:
    """Return the body of the answer to a batch: how many were accepted, and of a lenient one which were not."""
    if rejects is None:
        return b'{"status":"%b","count":%d}' % (status.encode(), count)
    errors = [problems.describe(fault) for fault in rejects.faults]
    return orjson.dumps(
        {"status": status, "count": count, "accepted": count, "rejected": rejects.indexes, "errors": errors}
    )


class HealthResource:
    """GET /health: what the writers' heartbeats and the lanes' words say; no database connection is opened."""

    scope = "read"

    def __init__(self, config: Settings) -> None:
        self._config = config

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        report = describe(self._config)
        response.status = falcon.HTTP_200 if report["status"] == "healthy" else falcon.HTTP_503
        response.data = orjson.dumps(report)

    on_head = on_get


class MetricsResource:
    """GET /metrics: the counters of the lanes and the writers, in Prometheus' text format."""

    scope = "read"

    def __init__(self, config: Settings) -> None:
        self._folder = config.lane_dir

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        response.content_type = metrics.CONTENT_TYPE
        response.data = metrics.render(stats.take(self._folder))

    on_head = on_get


class LiveResource:
    """GET /health/live: this process answers."""

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        response.data = b'{"status":"live"}'

    on_head = on_get


class ReadyResource:
    """GET /health/ready: points are accepted now, that is, the lane of this worker has room."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        if not self._lane.has_room():
            raise Problem("not-ready", "the lane of this worker is full", headers=self._lane.retry_after())
        response.data = b'{"status":"ready"}'

    on_head = on_get


class OpenApiResource:
    """GET /openapi.json: what this service takes and answers."""

    def on_get(self, _: falcon.Request, response: falcon.Response) -> None:
        response.data = openapi.document()

    on_head = on_get


def build(config: Settings, lane: Lane) -> falcon.App[falcon.Request, falcon.Response]:
    """Return the WSGI app over an open lane."""
    decoder = Decoder(
        max_points=config.max_points,
        oldest_us=int(config.retention * 1e6),
        ignore_unknown=config.unknown_fields == "ignore",
    )
    guard = None if config.tokens_file is None else Guard(Tokens(config.tokens_file), config.workers)
    app = falcon.App(media_type=JSON, middleware=[guard] if guard else [])
    app.add_route("/telemetry", TelemetryResource(lane, decoder, config, guard))
    app.add_route("/telemetry/batch", BatchResource(lane, decoder, config, guard))
    app.add_route("/openapi.json", OpenApiResource())
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
