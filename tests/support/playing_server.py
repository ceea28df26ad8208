"""A real server in a thread of this process, at a port of its own, and requests to it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from lsmoe_ds.serve.app import build_app
from lsmoe_ds.serve.command import open_port
from lsmoe_ds.serve.models import find_served
from lsmoe_ds.serve.service import Service
from lsmoe_ds.serve.settings import Settings


class Played:
    """Serves models inside a ``with`` block; running requests may take ``grace`` seconds at its end."""

    def __init__(self, paths: list[Path], settings: Settings, grace: int = 5) -> None:
        self.service = Service(find_served(paths, settings), settings)
        self._socket = open_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            build_app(self.service), log_level="error", lifespan="on", timeout_graceful_shutdown=grace
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="played")

    def __enter__(self) -> Played:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = self.service.stopping = True
        self._thread.join()
        self._socket.close()


def ask(
    server: Played | str,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    whole: bool = False,
) -> Any:
    """Send a request, and return the status and the body of the answer.

    With ``whole``, its headers are returned, too, their names in lower case.
    """
    url = server if isinstance(server, str) else server.url
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        found = answer.status, answer.read()
        return (*found, {name.lower(): value for name, value in answer.getheaders()}) if whole else found
    finally:
        connection.close()


def post(server: Played | str, path: str = "/translate", **fields: Any) -> tuple[int, Any]:
    """Send fields as JSON, and return the status and the decoded JSON of the answer."""
    status, body = ask(
        server, "POST", path, json.dumps(fields).encode(), {"content-type": "application/json"}
    )
    return status, json.loads(body)
