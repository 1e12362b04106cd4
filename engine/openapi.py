"""The OpenAPI document of the service, made from the channels and the problems, so that it says what they say."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import orjson

from engine import __version__
from engine.body import ARROW, ENCODINGS, JSON, NDJSON
from engine.channels import CHANNELS, MAX_ID_BYTES, POINT_FIELDS, REQUIRED
from engine.keys import MAX_KEY_BYTES
from engine.points import MAX_ERRORS
from engine.problems import MEDIA_TYPE, PROBLEMS, TYPE_BASE
from engine.tokens import SCOPES

_POINT: Final = "#/components/schemas/Point"
_POSTED: Final = (
    "malformed-json", "bad-request", "unauthorized", "forbidden", "too-large", "unsupported-media-type",
    "invalid-point", "quota-exceeded", "lane-failed", "lane-full", "not-ready",
    "overloaded",
)  # fmt: skip


@lru_cache(maxsize=1)
def document() -> bytes:
    """Return the document as JSON."""
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "OrbitStream",
                "version": __version__,
                "description": "Telemetry in; every point answered with 202 becomes a row exactly once.",
                "license": {"name": "MIT", "identifier": "MIT"},
            },
            "paths": _paths(),
            "components": {
                "schemas": {"Point": _point(), "Columns": _columns(), "Problem": _problem(), "Fault": _fault()},
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer", "description": f"Scopes: {', '.join(SCOPES)}"}
                },
            },
        }
    )


def _paths() -> dict[str, Any]:
    lenient = {
        "name": "Prefer", "in": "header", "schema": {"type": "string"},
        "description": "handling=lenient: good points are accepted, the answer lists the bad ones. "
        "Not together with an Idempotency-Key.",
    }  # fmt: skip
    text = {"type": "string", "enum": ["accepted"]}
    one = {
        "type": "object", "required": ["status", "satellite_id"],
        "properties": {"status": text, "satellite_id": {"type": "string"}},
    }  # fmt: skip
    many = {
        "type": "object",
        "required": ["status", "count"],
        "properties": {
            "status": text,
            "count": {"type": "integer", "minimum": 1, "description": "points accepted"},
            "accepted": {"type": "integer", "minimum": 1, "description": "the same, of a lenient request"},
            "rejected": {"type": "array", "items": {"type": "integer", "minimum": 0}, "description": "their indexes"},
            "errors": {"type": "array", "maxItems": MAX_ERRORS, "items": {"$ref": "#/components/schemas/Fault"}},
        },
    }
    batch = {
        JSON: {"schema": {"anyOf": [
            {"type": "array", "items": {"$ref": _POINT}, "minItems": 1}, {"$ref": "#/components/schemas/Columns"},
        ]}},
        NDJSON: {"schema": {"type": "string", "description": "one point a line"}},
        ARROW: {"schema": {"type": "string", "format": "binary", "description": "a column for each field of a point"}},
    }  # fmt: skip
    return {
        "/telemetry": {"post": _post("post_point", "Store one point", {JSON: {"schema": {"$ref": _POINT}}}, one)},
        "/telemetry/batch": {
            "post": _post(
                "post_batch", "Store many points", batch, many, (lenient,), ("malformed-arrow", "too-many-points")
            )
        },
        "/health": {"get": {
            "operationId": "health", "summary": "Tell how database, queue and writers are", "security": [{}, _BEARER],
            "responses": {"200": _answer("healthy", _STATUS), "503": _answer("degraded", _STATUS),
                          **_refusals("unauthorized", "forbidden")},
        }},
        "/metrics": {"get": {
            "operationId": "metrics", "summary": "Show counters, queue and latency to Prometheus",
            "security": [{}, _BEARER],
            "responses": {
                "200": {"description": "text format 0.0.4", "content": {"text/plain": {"schema": {"type": "string"}}}},
                **_refusals("unauthorized", "forbidden"),
            },
        }},
        "/health/live": {"get": {
            "operationId": "live", "summary": "Tell that this process answers",
            "responses": {"200": _answer("alive", _STATUS)},
        }},
        "/health/ready": {"get": {
            "operationId": "ready", "summary": "Tell whether points are accepted now",
            "responses": {"200": _answer("ready", _STATUS), **_refusals("not-ready")},
        }},
        "/openapi.json": {"get": {
            "operationId": "openapi", "summary": "Show this document",
            "responses": {"200": _answer("OpenAPI 3.1", {"type": "object"})},
        }},
    }  # fmt: skip


_BEARER: Final[dict[str, list[str]]] = {"bearer": []}
_STATUS: Final = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}


def _post(
    name: str,
    summary: str,
    content: dict[str, Any],
    answer: dict[str, Any],
    parameters: tuple[dict[str, Any], ...] = (),
    problems: tuple[str, ...] = (),
) -> dict[str, Any]:
    accepted = _answer("committed in a lane: will be rows exactly once", answer)
    accepted["headers"] = {
        "OrbitStream-Durability": {
            "description": "how far the answer reaches", "schema": {"type": "string", "enum": ["process", "os", "disk"]}
        },
        "Preference-Applied": {"description": "which preference was followed", "schema": {"type": "string"}},
    }  # fmt: skip
    key = {
        "name": "Idempotency-Key", "in": "header",
        "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_BYTES, "pattern": "^[ -~]+$"},
        "description": "repeat a request with its key until it is answered: its points become rows once",
    }  # fmt: skip
    return {
        "operationId": name,
        "summary": summary,
        "security": [{}, _BEARER],
        "parameters": [key, *parameters],
        "requestBody": {
            "required": True,
            "description": "plain, or compressed as Content-Encoding says: " + ", ".join(ENCODINGS),
            "content": content,
        },
        "responses": {"202": accepted, **_refusals(*_POSTED, *problems)},
    }


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": schema}}}


def _refusals(*codes: str) -> dict[str, Any]:
    """Return the responses for problems, by status."""
    by_status: dict[str, list[str]] = {}
    for code in codes:
        by_status.setdefault(PROBLEMS[code][0][:3], []).append(code)
    return {
        status: {
            "description": ", ".join(found) + ": nothing is stored",
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, found in sorted(by_status.items())
    }


def _point() -> dict[str, Any]:
    properties = _fields()
    assert set(properties) == {*POINT_FIELDS, "is_anomaly"}
    return {
        "type": "object",
        "required": ["satellite_id", *REQUIRED],
        "properties": properties,
        "additionalProperties": False,
    }


def _columns() -> dict[str, Any]:
    columns = {name: {"type": "array", "items": schema, "minItems": 1} for name, schema in _fields().items()}
    return {
        "type": "object",
        "description": "an array for each field, all of one length",
        "required": ["satellite_id", *REQUIRED],
        "properties": columns,
        "additionalProperties": False,
    }


def _fields() -> dict[str, Any]:
    fields: dict[str, Any] = {
        "satellite_id": {
            "type": "string", "minLength": 1, "maxLength": MAX_ID_BYTES, "pattern": "^[^\\x00-\\x1f\\x7f-\\x9f]+$",
            "description": f"at most {MAX_ID_BYTES} bytes of UTF-8",
        },
        "timestamp": {
            "type": ["string", "null"], "format": "date-time",
            "description": "RFC 3339 with an offset, at most 5 minutes ahead; the time of reception when absent",
        },
        "is_anomaly": {"description": "ignored: the service decides"},
    }  # fmt: skip
    for channel in CHANNELS:
        fields[channel.name] = {
            "type": "number" if channel.required else ["number", "null"],
            "minimum": channel.low,
            "maximum": channel.high,
            "description": channel.unit,
        }
    return fields


def _fault() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["pointer", "code", "detail", "retryable"],
        "properties": {
            "pointer": {"type": "string", "description": "JSON pointer (RFC 6901) into the body"},
            "code": {"type": "string"},
            "detail": {"type": "string"},
            "retryable": {"type": "boolean"},
        },
    }


def _problem() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "RFC 9457",
        "required": ["type", "title", "status", "detail", "instance", "retryable", "accepted"],
        "properties": {
            "type": {"type": "string", "enum": [TYPE_BASE + code for code in PROBLEMS]},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "instance": {"type": "string"},
            "retryable": {"type": "boolean"},
            "accepted": {"type": "integer", "const": 0},
            "errors": {"type": "array", "maxItems": MAX_ERRORS, "items": {"$ref": "#/components/schemas/Fault"}},
        },
    }
