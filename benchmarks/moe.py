"""One MoE layer, forward and backward: ours, DeepSpeed's own, and the dense feed-forward with as many
operations.

    python benchmarks/moe.py [--rounds 9]

128 experts, H 512, F 1024, top-2, 4,096 tokens, float32. The dense feed-forward has width K F. Beside each
figure stands the floor that memory sets: the time of the dense feed-forward's arithmetic plus reading the
used experts' weights twice (forward and backward) and writing their gradients once, at the rate of a copy
measured in the same run. Glibc is told to keep large blocks, as `lsmoe train` does for itself. A rank alone
leaves the gradients of unused experts out of the layer; training writes them once a step.

Beside them stand the products alone, over rows that are sorted by expert already and as many for each,
without routing, biases and the sum of the K outputs: one expert after the other, and as one batched product
for each matrix. On a GPU H 1024, F 4096, 16,384 tokens, bfloat16, and one grouped product for each matrix,
which is what MegaBlocks computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, argument_parser, run_main, write
from torch import Tensor

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.directions import Languages, SentenceIds, english_centric
from lsmoe_ds.launch import joining
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.moe.layer import MixtureOfExperts
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if CUDA else (torch.device("cpu"), torch.float32)
EXPERTS, TOP_K, LENGTH = 128, 2, 32
HIDDEN, WIDTH, SENTENCES = (1024, 4096, 512) if CUDA else (512, 1024, 128)
TASKS = (4, 32)
CODES = [
    "de",
    "fr",
    "es",
    "it",
    "nl",
    "pt",
    "ro",
    "pl",
    "cs",
    "sk",
    "ru",
    "uk",
    "bg",
    "sr",
    "hr",
    "sl",
    "lt",
    "lv",
    "et",
    "fi",
    "hu",
    "el",
    "tr",
    "ar",
    "he",
    "fa",
    "hi",
    "bn",
    "ta",
    "te",
    "ja",
    "ko",
]


def contestant(run: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> Callable[[], object]:
    def once() -> None:
        for tensor in (x, *parameters):
            tensor.grad = None
        out = run(x)
        out.backward(torch.ones_like(out))
        if CUDA:
            torch.cuda.synchronize()

    return once


def ours(routing: str, tasks: int, x: Tensor) -> tuple[Callable[[], object], int]:
    """And how many experts are used."""
    languages, alone = Languages(tuple(english_centric(CODES))), Topology.single()
    settings = MoE(experts=EXPERTS, top_k=TOP_K, routing=routing)  # type: ignore[arg-type]
    layer = MixtureOfExperts(HIDDEN, settings, lambda: FeedForward(HIDDEN, WIDTH, alone), languages, alone)
    torch.nn.init.normal_(layer.router.get_parameter("weight"), std=0.1)
    layer.to(DEVICE, DTYPE)
    directions = torch.arange(SENTENCES, device=DEVICE) % tasks
    target = torch.tensor([languages.id(code) for code in CODES], device=DEVICE)[directions]
    context = LanguageContext(SentenceIds(target, target, directions))
    real = torch.ones(SENTENCES, LENGTH, dtype=torch.bool, device=DEVICE)
    used = int(layer.route(x.detach(), real, context)[2].experts.unique().numel())
    return contestant(lambda y: layer(y, real, context), list(layer.parameters()), x), used


def deepspeeds(x: Tensor, **options: Any) -> Callable[[], object]:
    """``deepspeed.moe.layer.MoE`` on one rank, token-level."""
    layer = compat.import_moe_base()(
        HIDDEN,
        FeedForward(HIDDEN, WIDTH, Topology.single()),
        num_experts=EXPERTS,
        ep_size=1,
        k=TOP_K,
        **options,
    )
    layer.set_deepspeed_parallelism()  # type: ignore[operator]
    layer.to(DEVICE, DTYPE)
    return contestant(lambda y: layer(y)[0], list(layer.parameters()), x)


def products_alone(way: str) -> Callable[[], object]:
    """Return a function that computes only the products of the experts' feed-forwards and of their gradients.

    Each expert has equally many rows. ``way`` is "grouped", "batched", or "one by one".
    """
    rows, each = SENTENCES * LENGTH * TOP_K, SENTENCES * LENGTH * TOP_K // EXPERTS
    ends = torch.arange(each, rows + 1, each, dtype=torch.int32, device=DEVICE)
    x = torch.randn(rows, HIDDEN, device=DEVICE, dtype=DTYPE, requires_grad=True)
    if way == "one by one":
        pairs = [
            [torch.randn(*shape, requires_grad=True) for shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))]
            for _ in range(EXPERTS)
        ]

        def one_by_one(rows: Tensor) -> Tensor:
            parts = zip(rows.split(each), pairs, strict=True)
            return torch.cat([F.linear(F.relu(F.linear(part, up)), down) for part, (up, down) in parts])

        return contestant(one_by_one, [weight for pair in pairs for weight in pair], x)
    expand, contract = (
        torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True)
        for shape in ((EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN))
    )

    def grouped(rows: Tensor) -> Tensor:
        hidden = F.relu(F.grouped_mm(rows, expand, offs=ends))
        return F.grouped_mm(hidden, contract, offs=ends)

    def batched(rows: Tensor) -> Tensor:
        return F.relu(rows.view(EXPERTS, each, HIDDEN) @ expand) @ contract

    return contestant(grouped if way == "grouped" else batched, [expand, contract], x)


def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    arguments = parser.parse_args()
    joining.join()
    Topology.build()
    torch.manual_seed(1)
    x = torch.randn(SENTENCES, LENGTH, HIDDEN, device=DEVICE, dtype=DTYPE, requires_grad=True)
    dense = FeedForward(HIDDEN, TOP_K * WIDTH, Topology.single()).to(DEVICE, DTYPE)
    weights, copy = (torch.zeros(2**27, device=DEVICE).normal_() for _ in range(2))  # 512 MiB each

    def move() -> None:
        copy.copy_(weights)
        if CUDA:
            torch.cuda.synchronize()

    contestants = {"dense": contestant(dense, list(dense.parameters()), x), "copy of 512 MiB": move}
    used = {"dense": 0}
    for name, routing, tasks in [
        ("ours, token", "token", 32),
        *((f"ours, {n} tasks", "task", n) for n in TASKS),
    ]:
        contestants[name], used[name] = ours(routing, tasks, x)
    contestants["DeepSpeed, capacity 1"] = deepspeeds(x, capacity_factor=1.0, min_capacity=1)
    contestants["DeepSpeed, no drop"] = deepspeeds(x, drop_tokens=False)
    for way in ("grouped",) if CUDA else ("one by one", "batched"):
        contestants[f"{way} products alone"] = products_alone(way)
    for run in contestants.values():
        run()
    seconds = alternate(contestants, arguments.rounds)
    rate = 2 * weights.numel() * 4 / seconds.pop("copy of 512 MiB")  # read and written
    of_expert = DTYPE.itemsize * sum(
        p.numel() for p in FeedForward(HIDDEN, WIDTH, Topology.single()).parameters()
    )
    result = {}
    for name, value in seconds.items():
        result[name] = {"milliseconds": round(value * 1e3, 1), "to dense": round(value / seconds["dense"], 2)}
        if used.get(name):
            floor = seconds["dense"] + 3 * used[name] * of_expert / rate
            result[name] |= {"experts used": used[name], "floor to dense": round(floor / seconds["dense"], 2)}
        print(f"{name}: {result[name]}")
    sizes = {
        "experts": EXPERTS,
        "hidden": HIDDEN,
        "width": WIDTH,
        "top_k": TOP_K,
        "tokens": SENTENCES * LENGTH,
    }
    setting = {**sizes, "rounds": arguments.rounds}
    write(
        {
            **setting,
            "threads": torch.get_num_threads(),
            "memory bytes per second": round(rate),
            "layers": result,
        },
        arguments.out,
    )


if __name__ == "__main__":
    run_main(main)
