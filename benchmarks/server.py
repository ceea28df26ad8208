"""Requests that `lsmoe serve` answers in a second, beside the same model in a plain loop.

    python benchmarks/server.py --run RUN [--direction en-de] [--clients 1 16 64] [--faults 10000]

The server is started as a user starts it, on a port of this machine. Clients are coroutines of this process,
each with one connection that it keeps; each asks for one held-out sentence at a time. The loop beside it
translates the same sentences with the same sub-network in CTranslate2 without HTTP, as many at once as there
are clients. Both search with beam 5; they take turns, and medians count. Memory is that of the server's
process with no model, with one direction and with all directions.

With --faults so many requests follow. A third of them hang up before their answer; a tenth are too long, no
JSON, or ask for a language that there is not. Every other answer must be the translation that the loop gives.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import argument_parser, run_main, write

from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.translate import translate_all

SENTENCES = 200
BAD = (
    (b"{no json", 400),
    (b'{"q": 3, "source": "en", "target": "de"}', 400),
    (b'{"q": "x", "source": "en", "target": "tlh"}', 400),
    (json.dumps({"q": "word " * 20_000, "source": "en", "target": "de"}).encode(), 413),
    (b"[" * 50_000, 400),
)


class Server:
    """A running `lsmoe serve`."""

    def __init__(self, run: Path, cache: Path) -> None:
        command = [sys.executable, "-m", "lsmoe_ds", "serve", str(run), "--port", "0", "--cache", str(cache)]
        self.process = subprocess.Popen(
            [*command, "--queue-limit", "1000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        parts = urlsplit(self.process.stdout.readline().strip())
        assert parts.hostname is not None and parts.port is not None
        self.host, self.port = parts.hostname, parts.port

    def resident(self) -> float:
        """Return the GiB that the process holds."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        return round(int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 2**20, 3)

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


class Client:
    """One connection, which is opened again when it was closed."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, body: bytes) -> None:
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.server.host, self.server.port)
        head = "POST /translate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        self.streams[1].write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await self.streams[1].drain()

    async def receive(self) -> tuple[int, dict[str, Any]]:
        assert self.streams is not None
        reader = self.streams[0]
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        if "connection: close" in head:
            await self.close()
        return int(head.split()[1]), body

    async def ask(self, body: bytes) -> tuple[int, dict[str, Any]]:
        await self.send(body)
        return await self.receive()

    async def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def request(text: str, direction: Direction) -> bytes:
    return json.dumps({"q": text, "source": direction.source, "target": direction.target}).encode()


async def load_test(
    server: Server, texts: list[str], direction: Direction, clients: int, requests: int
) -> dict[str, float]:
    """Ask with so many clients at once; return requests a second and the times of answers in milliseconds."""
    queue = iter(range(requests))
    times: list[float] = []

    async def run() -> None:
        client = Client(server)
        for number in queue:
            begun = time.perf_counter()
            status, _ = await client.ask(request(texts[number % len(texts)], direction))
            assert status == 200, status
            times.append(time.perf_counter() - begun)
        await client.close()

    begun = time.perf_counter()
    await asyncio.gather(*(run() for _ in range(clients)))
    seconds = time.perf_counter() - begun
    ordered = sorted(times)
    return {
        "requests per second": round(requests / seconds, 2),
        "p50 ms": round(1000 * ordered[len(ordered) // 2], 1),
        "p99 ms": round(1000 * ordered[int(0.99 * (len(ordered) - 1))], 1),
    }


def loop_test(
    engine: Any, texts: list[str], direction: Direction, at_once: int, requests: int
) -> dict[str, float]:
    """Translate as many sentences in a plain loop, so many at once."""
    wanted = [texts[number % len(texts)] for number in range(requests)]
    times = []
    begun = time.perf_counter()
    for start in range(0, requests, at_once):
        before = time.perf_counter()
        translate_all(
            engine, direction, wanted[start : start + at_once], Search(5), advance=lambda count: None
        )
        times.append(time.perf_counter() - before)
    seconds = time.perf_counter() - begun
    return {
        "sentences per second": round(requests / seconds, 2),
        "p50 ms": round(1000 * statistics.median(times), 1),
    }


async def fault_test(
    server: Server, texts: list[str], expected: list[str], direction: Direction, requests: int
) -> dict[str, Any]:
    """Send requests that hang up or are bad among good ones; count what came back, and what was wrong."""
    chance, queue, found = random.Random(1), iter(range(requests)), Counter[str]()

    async def run() -> None:
        client = Client(server)
        for number in queue:
            kind, place = chance.random(), number % len(texts)
            if kind < 1 / 3:
                await client.send(request(texts[place], direction))
                await asyncio.sleep(chance.random() * 0.05)
                await client.close()
                found["hung up"] += 1
            elif kind < 1 / 3 + 0.1:
                body, wanted = chance.choice(BAD)
                status, _ = await client.ask(body)
                found[
                    "refused as it should be" if status == wanted else f"wrong status {status} for {wanted}"
                ] += 1
            else:
                status, answer = await client.ask(request(texts[place], direction))
                right = status == 200 and answer["translatedText"] == expected[place]
                found["right" if right else f"wrong answer, status {status}"] += 1
        await client.close()

    await asyncio.gather(*(run() for _ in range(16)))
    return dict(found)


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--run", type=Path, help="a run, or a folder that `lsmoe serve` takes")
    parser.add_argument(
        "--direction",
        type=Direction.parse,
        default=Direction("en", "de"),
        metavar="A-B",
        help="the direction that all requests ask for",
    )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 16, 64],
        metavar="N",
        help="how many ask at the same time",
    )
    parser.add_argument("--requests", type=int, default=400, metavar="N", help="of each measurement")
    parser.add_argument(
        "--faults", type=int, default=0, metavar="N", help="so many requests with faults among them"
    )
    arguments = parser.parse_args()
    if arguments.run is None:
        parser.error("--run is needed: a trained run, such as runs/demo")
    with tempfile.TemporaryDirectory() as folder:
        write(measure(arguments, Path(folder)), arguments.out)


def measure(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    direction, stored = arguments.direction, find_model(arguments.run)
    data = open_data(stored)
    texts = list(data.text(direction, "test")[0])[:SENTENCES]
    result: dict[str, Any] = {
        "run": stored.recipe.name,
        "direction": str(direction),
        "rounds": arguments.rounds,
    }
    server = Server(arguments.run, cache)
    try:
        memory = {"no model": server.resident()}
        begun = time.perf_counter()
        asyncio.run(load_test(server, texts, direction, 1, 1))
        result["seconds of the first request, which cuts the sub-network out"] = round(
            time.perf_counter() - begun, 2
        )
        memory["one direction"] = server.resident()
        (cut,) = [path for path in cache.iterdir() if path.is_dir() and (path / "model.bin").is_file()]
        engine = load_engine(cut)
        rounds: dict[str, list[dict[str, Any]]] = {}
        for _ in range(arguments.rounds):
            for clients in arguments.clients:
                served = asyncio.run(load_test(server, texts, direction, clients, arguments.requests))
                looped = loop_test(engine, texts, direction, clients, arguments.requests)
                rounds.setdefault(str(clients), []).append({"served": served, "loop": looped})
        result["clients"] = {clients: middle(found) for clients, found in rounds.items()}
        if arguments.faults:
            expected = translate_all(engine, direction, texts, Search(5), advance=lambda count: None)
            before = {"GiB": server.resident(), "threads": server.threads()}
            found = asyncio.run(fault_test(server, texts, expected, direction, arguments.faults))
            after = {"GiB": server.resident(), "threads": server.threads()}
            result["faults"] = {"requests": arguments.faults, **found, "before": before, "after": after}
        for other in stored.recipe.languages.directions:
            asyncio.run(load_test(server, ["The file."], other, 1, 1))
        memory[f"{len(stored.recipe.languages.directions)} directions"] = server.resident()
        result["GiB of the server"] = memory
    finally:
        status = server.stop()
    return result | {"exit status after SIGTERM": status}


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of several measurements, number by number."""
    return {
        name: {key: round(statistics.median(each[name][key] for each in found), 2) for key in found[0][name]}
        for name in found[0]
    }


if __name__ == "__main__":
    run_main(main)
