"""The verb ``lsmoe serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lsmoe_ds.cli_options import Route


def serve(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs, checkpoints in them, or converted folders."),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 is all of them.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free. The URL is printed.")] = 5000,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What all loaded models may take, such as 4GB; by default half of the machine's memory.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep sub-networks here; by default until the server stops."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="torch|ctranslate2",
            help="By default ctranslate2 where it is installed and can run the model.",
        ),
    ] = None,
    route: Route = "specific",
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="CTranslate2 only: store weights as float32 (the default), int8 or int8_float32.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each loaded model; by default as many as cores.")
    ] = None,
    beam: Annotated[int, typer.Option(help="Hypotheses kept at each step of the search.")] = 5,
    length_penalty: Annotated[float, typer.Option(help="Scores are divided by length to this power.")] = 1.0,
    batch_wait: Annotated[
        str, typer.Option(metavar="TIME", help="How long a line waits for others of its direction.")
    ] = "5ms",
    batch_size: Annotated[int, typer.Option(help="Lines translated together at most.")] = 32,
    char_limit: Annotated[int, typer.Option(help="Characters of a request; 0: no limit.")] = 20_000,
    batch_limit: Annotated[int, typer.Option(help="Texts of a request; 0: no limit.")] = 100,
    body_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes of a request, as it is sent.")
    ] = "4MB",
    req_limit: Annotated[int, typer.Option(help="Requests a minute of one address; 0: no limit.")] = 0,
    queue_limit: Annotated[
        int, typer.Option(help="Requests that wait or are being translated; further ones get status 503.")
    ] = 256,
    request_timeout: Annotated[
        str, typer.Option(metavar="TIME", help="How long an answer may take, loading included.")
    ] = "2min",
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="How long running requests may take once it is to stop.")
    ] = "30s",
    api_keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answer only those who give one of these keys, one a line."),
    ] = None,
    trusted_proxy: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Believe X-Forwarded-For of this address, for --req-limit."),
    ] = None,
) -> None:
    """Translate over HTTP, as LibreTranslate does, with a page at /. The sub-network of a direction is
    extracted from a task-routed model when it is first requested.
    """
    from lsmoe_ds.serve.command import check_packages, half_of_memory
    from lsmoe_ds.serve.command import serve as serve_models
    from lsmoe_ds.serve.limits import read_keys
    from lsmoe_ds.serve.settings import Settings, read_size, read_time

    check_packages()
    settings = Settings(
        memory=half_of_memory() if memory is None else read_size(memory, "--memory"),
        cache=cache,
        engine=engine,
        route=route,
        quantization=quantization,
        threads=threads,
        beam=beam,
        length_penalty=length_penalty,
        batch_wait=read_time(batch_wait, "--batch-wait"),
        batch_size=batch_size,
        chars=char_limit,
        texts=batch_limit,
        body=read_size(body_limit, "--body-limit"),
        rate=req_limit,
        queue=queue_limit,
        patience=read_time(request_timeout, "--request-timeout"),
        grace=read_time(grace, "--grace"),
        keys=None if api_keys is None else read_keys(api_keys),
        proxies=trusted_proxy,
    )
    serve_models(models, host, port, settings)
