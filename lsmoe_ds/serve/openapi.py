"""The OpenAPI document of the server, which clients read at ``/openapi.json``.

It is written by hand, because bodies are read by hand (:mod:`lsmoe_ds.serve.requests`). Tests send requests
that it allows, and compare the answers with it.
"""

from __future__ import annotations

from typing import Any

from lsmoe_ds import __version__
from lsmoe_ds.serve.settings import Settings

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
REASONS = {
    400: "the body, a field, a language or a direction is wrong",
    403: "the API key is missing or wrong",
    404: "there is no such path or model",
    408: "the body did not come in time",
    413: "the request is too long",
    429: "too many requests: Retry-After says when there may be one",
    500: "the model computes no numbers, or the server has a fault",
    503: "the queue is full, the answer took too long, a model cannot be loaded, or the server stops",
}


def describe(settings: Settings) -> Schema:
    """Return the document, with the limits of this server."""
    schemas = _schemas(settings)
    paths: Schema = {}
    for prefix, summary in (("", ""), ("/models/{model}", ", by one model")):
        parameters = [_parameter("model", "path")] if prefix else []
        for path, operations in _of_model().items():
            paths[f"{prefix}{path}"] = {
                method: {
                    **operation,
                    "summary": f"{operation['summary']}{summary}",
                    "parameters": [*operation.get("parameters", []), *parameters],
                    "responses": {**operation["responses"], **_refusals(404)},
                }
                for method, operation in operations.items()
            }
    paths |= {
        "/models": {"get": _get("List the models", _array(_ref("Model")))},
        "/health": {"get": _health()},
        "/metrics": {"get": _answers("Count requests, for Prometheus", {"text/plain": TEXT})},
        "/openapi.json": {"get": _get("Describe these paths", {"type": "object"})},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lsmoe serve",
            "version": __version__,
            "description": "Translation by LibreTranslate's API. Languages may be given in any convention.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _of_model() -> dict[str, dict[str, Schema]]:
    """Return the operations that exist for all models together and for each model."""
    events = {"application/x-ndjson": TEXT, "text/event-stream": TEXT}
    asked = (_parameter("source", "query"), _parameter("target", "query"))
    refusals = (400, 403, 408, 413, 429, 500, 503)
    whole = {"application/json": _ref("Translated"), **events}
    return {
        "/translate": {"post": _post("Translate a text or a list of texts", "Asked", whole, refusals)},
        "/translate_stream": {
            "post": _post("Translate, with an event for each finished line", "Asked", events, refusals)
        },
        "/detect": {
            "post": _post(
                "Find the language of a text", "Detects", {"application/json": _ref("Found")}, refusals
            )
        },
        "/languages": {
            method: _get("List the languages", _array(_ref("Language"))) for method in ("get", "post")
        },
        "/frontend/settings": {"get": _get("Return what pages ask for", _ref("Frontend"))},
        "/details": {
            "get": {
                **_get("Say what translates a direction", _ref("Details"), 400),
                "parameters": list(asked),
            }
        },
    }


def _schemas(settings: Settings) -> Schema:
    most = {"maxLength": settings.chars} if settings.chars else {}
    texts = {"maxItems": settings.texts} if settings.texts else {}
    q = {"oneOf": [TEXT | most, _array(TEXT | most) | texts]}
    key = {"api_key": TEXT}
    several = {"oneOf": [TEXT, _array(TEXT)]}
    language = {"language": TEXT, "confidence": {"type": "number"}}
    return {
        "Error": _object({"error": TEXT}),
        "Asked": _object(
            {"q": q, "source": TEXT | {"examples": ["auto"]}, "target": TEXT},
            {
                "format": {"enum": ["text"]},
                "stream": {"type": "boolean"},
                "alternatives": COUNT | {"maximum": settings.beam - 1},
                **key,
            },
        ),
        "Detects": _object({"q": q}, key),
        "Detected": _object(language),
        "Found": {"anyOf": [_array(_ref("Detected")), _array(_array(_ref("Detected")))]},
        "Translated": _object(
            {"translatedText": several},
            {
                "alternatives": {"anyOf": [_array(TEXT), _array(_array(TEXT))]},
                "detectedLanguage": {"oneOf": [_ref("Detected"), _array(_ref("Detected"))]},
            },
        ),
        "Language": _object({"code": TEXT, "name": TEXT, "targets": _array(TEXT)}),
        "Model": _object({"name": TEXT, "engine": TEXT, "directions": _array(TEXT)}),
        "Health": _object({"status": {"enum": ["ok", "stopping"]}}, {"loaded": COUNT, "bytes": COUNT}),
        "Frontend": {"type": "object", "required": ["apiKeys", "charLimit", "language"]},
        "Details": _object(
            {"direction": TEXT, "model": TEXT, "engine": TEXT, "loaded": {"type": "boolean"}},
            {"parameters": COUNT, "bytes": COUNT, "step": COUNT, "experts": {}},
        ),
    }


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
    }


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _parameter(name: str, place: str) -> Schema:
    return {"name": name, "in": place, "required": True, "schema": TEXT}


def _refusals(*statuses: int) -> Schema:
    content = {"application/json": {"schema": _ref("Error")}}
    return {str(each): {"description": REASONS[each], "content": content} for each in statuses}


def _answers(summary: str, content: Schema) -> Schema:
    body = {kind: {"schema": schema} for kind, schema in content.items()}
    return {"summary": summary, "responses": {"200": {"description": summary, "content": body}}}


def _get(summary: str, schema: Schema, *refusals: int) -> Schema:
    found = _answers(summary, {"application/json": schema})
    return {**found, "responses": found["responses"] | _refusals(*refusals)}


def _health() -> Schema:
    found = _get("Say whether the server runs, and what is loaded", _ref("Health"))
    stopping = {**found["responses"]["200"], "description": "the server stops"}
    return {**found, "responses": {**found["responses"], "503": stopping}}


def _post(summary: str, body: str, content: Schema, refusals: tuple[int, ...]) -> Schema:
    found = _answers(summary, content)
    kinds = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")
    return {
        **found,
        "requestBody": {"required": True, "content": {kind: {"schema": _ref(body)} for kind in kinds}},
        "responses": found["responses"] | _refusals(*refusals),
    }
