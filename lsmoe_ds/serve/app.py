"""The paths of the server, in FastAPI: LibreTranslate's API, a page, and paths for monitoring.

Bodies are read and answers formed here and in :mod:`lsmoe_ds.serve.requests`, not by FastAPI's models,
because a body may be JSON or a form, and every error is ``{"error": "one sentence"}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from importlib.resources import files
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from lsmoe_ds.serve.metrics import CONTENT_TYPE
from lsmoe_ds.serve.models import Catalog
from lsmoe_ds.serve.openapi import describe
from lsmoe_ds.serve.requests import Refused, key_of, read_asked, read_body, read_fields, read_text
from lsmoe_ds.serve.service import STOPPING, Service

PAGE = {"": "page.html", "page.css": "page.css", "page.js": "page.js"}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class WithHeaders:
    """Add headers to every answer that forbid a browser to guess content types or load foreign content."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        await self._app(scope, receive, send_with if scope["type"] == "http" else send)


class Streamed(StreamingResponse):
    """An answer in parts.

    ``ended`` is called at its end, even if the client left before it began and the generator of the parts
    never ran. ``last_words`` returns the final part of an answer that the stopping server cuts off; None if
    the server is not stopping.
    """

    ended: Callable[[], None]
    last_words: Callable[[], str | None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_note(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await super().__call__(scope, receive, send_and_note)
        except asyncio.CancelledError:  # by uvicorn, at the end of the grace period
            text = self.last_words()
            if text is None or not begun:
                raise
            await send({"type": "http.response.body", "body": text.encode(), "more_body": False})
        finally:
            self.ended()


def build_app(service: Service) -> FastAPI:
    """Build the application. It closes the service's pool when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stopping = True
        await asyncio.to_thread(service.pool.close)

    # Without FastAPI's own pages, which load scripts from other servers.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(WithHeaders)
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(HTTPException, _refuse_path)
    app.add_exception_handler(Exception, _fail)
    for path, name in PAGE.items():
        app.add_api_route(f"/{path}", _page(name), methods=["GET"])
    handlers: dict[str, tuple[Callable[[Service, Request], Awaitable[Response]], list[str]]] = {
        "translate": (_translate, ["POST"]),
        "translate_stream": (_translate, ["POST"]),
        "detect": (_detect, ["POST"]),
        "languages": (_languages, ["GET", "POST"]),
        "frontend/settings": (_frontend, ["GET"]),
        "details": (_details, ["GET"]),
    }
    for path, (handler, methods) in handlers.items():
        for prefix in ("", "/models/{model}"):
            app.add_api_route(f"{prefix}/{path}", _with(service, handler), methods=methods)
    app.add_api_route("/models", _with(service, _models), methods=["GET"])
    app.add_api_route("/health", _with(service, _health), methods=["GET"])
    app.add_api_route("/openapi.json", _with(service, _openapi), methods=["GET"])
    app.add_api_route("/metrics", _with(service, _metrics), methods=["GET"])
    return app


def _with(
    service: Service, handler: Callable[[Service, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return await handler(service, request)

    return handle


async def _translate(service: Service, request: Request) -> Response:
    """Answer a translation request, whole or, if requested, line by line."""
    began, direction = time.monotonic(), None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(service.admitted())
            catalog = _catalog(service, request)
            asked = read_asked(await _fields(service, request), service.settings)
            translation = await service.begin(asked, catalog)
            direction = translation.direction
            if asked.stream or request.url.path.endswith("/translate_stream"):
                events = service.stream(asked, translation)
                stack.callback(translation.cancel)
                return _stream(service, request, events, stack.pop_all(), direction, began)
            answer = await _unless_gone(request, service.answer(asked, translation))
        except asyncio.CancelledError:  # by uvicorn, at the end of the grace period
            if not service.stopping:
                raise
            service.metrics.answer(503, direction, None)
            raise Refused(503, STOPPING, 5) from None
        except Refused as refused:
            service.metrics.answer(refused.status, direction, None)
            raise
        service.metrics.answer(200, direction, time.monotonic() - began)
    return _json(answer)


def _stream(
    service: Service,
    request: Request,
    events: AsyncIterator[dict[str, Any]],
    admitted: contextlib.ExitStack,
    direction: str,
    began: float,
) -> Response:
    """Answer with an event for each line: JSON lines, or server-sent events if the client accepts them."""
    is_events = "text/event-stream" in request.headers.get("accept", "")

    def written(event: dict[str, Any]) -> str:
        text = json.dumps(event, ensure_ascii=False)
        return f"data: {text}\n\n" if is_events else f"{text}\n"

    def last_words() -> str | None:
        if not service.stopping:
            return None
        service.metrics.answer(503, direction, None)
        return written({"error": STOPPING})

    async def lines() -> AsyncIterator[str]:
        status = 200
        async for event in events:
            status = 500 if "error" in event else status
            yield written(event)
        service.metrics.answer(status, direction, time.monotonic() - began)

    kind = "text/event-stream" if is_events else "application/x-ndjson"
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    response = Streamed(lines(), media_type=f"{kind}; charset=utf-8", headers=headers)
    response.ended, response.last_words = admitted.close, last_words
    return response


async def _unless_gone(request: Request, answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Wait for an answer; cancel it if the client disconnects, so that its lines are not translated."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    wanted, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({wanted, left}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise Refused(499, "the client has hung up")
        return wanted.result()
    finally:
        for task in (wanted, left):
            task.cancel()


async def _detect(service: Service, request: Request) -> Response:
    try:
        with service.admitted():
            catalog = _catalog(service, request)
            asked = read_asked(await _fields(service, request), service.settings, translates=False)
            found = await service.detect(asked, catalog)
    except Refused as refused:
        service.metrics.answer(refused.status, None, None)
        raise
    service.metrics.answer(200, None, None)
    return _json(found)


async def _languages(service: Service, request: Request) -> Response:
    return _json(service.languages(_catalog(service, request)))


async def _frontend(service: Service, request: Request) -> Response:
    return _json(service.frontend(_catalog(service, request)))


async def _details(service: Service, request: Request) -> Response:
    source, target = (read_text(request.query_params, name) for name in ("source", "target"))
    return _json(service.details(source, target, _catalog(service, request)))


async def _models(service: Service, request: Request) -> Response:
    found = [
        {"name": each.name, "engine": each.engine, "directions": [str(one) for one in each.directions]}
        for each in service.catalog.models.values()
    ]
    return _json(found)


async def _health(service: Service, request: Request) -> Response:
    if service.stopping:
        return _json({"status": "stopping"}, 503)
    return _json({"status": "ok", **service.pool.to_dict()})


async def _openapi(service: Service, request: Request) -> Response:
    return _json(describe(service.settings))


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def _page(name: str) -> Callable[[], Awaitable[Response]]:
    text = files("lsmoe_ds.serve").joinpath("page", name).read_text(encoding="utf-8")
    kind = f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8"

    async def page() -> Response:
        return Response(text, media_type=kind, headers={"cache-control": "no-cache"})

    return page


async def _fields(service: Service, request: Request) -> dict[str, Any]:
    """Check the client's rate limit and key, and read the request's fields. Raises Refused."""
    service.check_asker(request.client.host if request.client else "")
    try:
        # The time limit is that of an answer: a client that sends one byte a minute occupies the queue.
        async with asyncio.timeout(service.settings.patience):
            body = await read_body(
                request.stream(), request.headers.get("content-length"), service.settings.body
            )
    except TimeoutError:
        raise Refused(408, "the request did not come in time") from None
    fields = read_fields(body, request.headers.get("content-type", ""))
    service.check_key(key_of(fields))
    return fields


def _catalog(service: Service, request: Request) -> Catalog:
    """Return the directions of the model in the path, or of all models. Raises Refused (404)."""
    name = request.path_params.get("model")
    if name is None:
        return service.catalog
    if name not in service.only:
        raise Refused(404, f"there is no model '{name[:50]}' here: GET /models lists them")
    return service.only[name]


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(value, status, {"cache-control": "no-store"} | (headers or {}))


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    later = {} if error.retry_after is None else {"retry-after": str(max(1, ceil(error.retry_after)))}
    # The rest of the body is not read, so the connection cannot be used again.
    closes = {"connection": "close"} if error.status in (408, 413) else {}
    return _json({"error": str(error)}, error.status, later | closes)


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing at this path", 405: f"{request.method} is not for this path"}
    return _json(
        {"error": said.get(error.status_code, str(error.detail))},
        error.status_code,
        dict(error.headers or {}),
    )


async def _fail(request: Request, error: Exception) -> Response:
    return _json({"error": "the server failed: its log says why"}, 500)  # uvicorn logs the error
