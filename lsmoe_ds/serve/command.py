"""``lsmoe serve``: find the models, open the port, answer until a signal, finish running requests."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
import socket
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lsmoe_ds.console import end_at_once
from lsmoe_ds.errors import UserError
from lsmoe_ds.serve.settings import Settings

if TYPE_CHECKING:
    from lsmoe_ds.serve.models import Served

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
BACKLOG = 2048


def check_packages() -> None:
    """Raise UserError for a package that is not installed."""
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"`lsmoe serve` needs {package}, which is not installed: pip install '.[serve]'")


def serve(paths: Sequence[Path], host: str, port: int, settings: Settings) -> None:
    """Serve models until SIGTERM or SIGINT. Raises UserError for an unusable model, option or port."""
    check_packages()
    import torch
    import uvicorn

    from lsmoe_ds.serve.app import build_app
    from lsmoe_ds.serve.models import find_served
    from lsmoe_ds.serve.pool import say
    from lsmoe_ds.serve.service import Service

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    models = find_served(paths, settings)
    for each in models:
        say(each.describe())
    with open_port(host, port) as listening:
        warm_up(models)
        service = Service(models, settings)

        class Server(uvicorn.Server):
            """Stop on a signal, with status 0; on a second signal stop at once."""

            @contextlib.contextmanager
            def capture_signals(self) -> Generator[None, None, None]:
                loop = asyncio.get_running_loop()
                for each in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(each, self.stop, each)
                try:
                    yield
                finally:
                    for each in (signal.SIGTERM, signal.SIGINT):
                        loop.remove_signal_handler(each)

            def stop(self, number: signal.Signals) -> None:
                self.force_exit = self.should_exit
                self.should_exit = service.stopping = True
                say(f"{number.name}: finishing {service.in_progress:,} requests; again: stop at once")

        server = Server(
            uvicorn.Config(
                build_app(service),
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=max(1, round(settings.grace)),
                proxy_headers=settings.proxies is not None,
                forwarded_allow_ips=settings.proxies or "",
            )
        )
        bound = listening.getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        print(f"http://{shown}:{bound[1]}", flush=True)
        server.run(sockets=[listening])
        # Do not wait for translations that still run after the grace period. End at once, because a thread in
        # C++ code would crash a normal exit.
        if not service.pool.close(0.5):
            end_at_once(0)


def warm_up(models: Sequence[Served]) -> None:
    """Import now what building a model needs. It takes seconds, for which the first request would wait."""
    from lsmoe_ds.model.build import outline
    from lsmoe_ds.parallel.topology import Topology

    for each in models:
        if each.stored.kind != "ctranslate2":
            recipe = each.stored.recipe
            outline(recipe, recipe.data.vocabulary.size, Topology.single())
            return


def open_port(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises UserError if the address is wrong or in use."""
    if not 0 <= port < 65536:
        raise UserError(f"--port is {port}: choose 0 to 65535; 0 is any that is free")
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        if listening is not None:
            listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{host}:{port} cannot be opened ({reason}): choose another --port, or --host"
        ) from None
    return listening


def half_of_memory() -> int:
    """Return half of this machine's memory, in bytes."""
    import psutil

    return int(psutil.virtual_memory().total) // 2
