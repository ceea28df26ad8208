"""Output tokens per second of decoding: sparse models, their dense sub-networks, and peers.

    python benchmarks/decode.py [--rounds 5] [--parts peers 32 128]

peers: one process, 6 + 6 layers, H 512, F 2048, a vocabulary of 32,000, batches of 1, 16 and 64. Plain torch
with caches and transformers' M2M-100 beside our dense model of their shape; and transformers' NLLB-MoE, whose
every fourth layer has 128 experts, beside our token-level model of its shape and the dense sub-network that
the same model has for a target language when it is routed by that; and that sub-network in transformers'
M2M-100 and, in float32 and int8, in CTranslate2.

32, 128: so many experts in every second layer ("Beyond Distillation", section 4.3), on two processes: the
token-level model with its experts spread over both, and the target language's sub-network, one whole on each.
Each process decodes batches of its own; the best batch size counts for each.

Every sentence gets exactly 32 tokens, encoding included, so ranks stay in step. Weights are random. The most
probable token is chosen, but a random one is read next, the same in all systems: an untrained model soon
repeats itself. (CTranslate2 reads what it chose, with EOS forbidden: in a dense model all tokens cost the
same.) From the routers' weights the mean of the hidden states is taken out, for NLLB-MoE's as for ours:
without that an untrained router sends most tokens to few experts, where a trained one is balanced. How many
experts are in use is reported.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from common import Tags, alternate, argument_parser, in_processes, run_main, write
from torch import Tensor, nn

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import DirectionIds, PairBatch
from lsmoe_ds.languages import EOS
from lsmoe_ds.launch import joining
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.moe.layer import Seen
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.collectives import Traffic
from lsmoe_ds.parallel.topology import Topology

VOCABULARY, LENGTH, TOKENS = 32000, 25, 32
WIDTH, LAYERS, TOP_K = 2048, 6, 2
NLLB_EXPERTS, NLLB_EVERY = 128, 4
PEER_BATCHES = (1, 16, 64)
CALIBRATION = 16  # sentences
BATCHES = (1, 16, 64, 128)


def recipe_of(routing: str | None, experts: int = 0, every: int = 2, expert: int = 1) -> Recipe:
    """``routing`` "token"; "sub-network": what one target language uses of experts routed by it; None:
    dense.
    """
    side: dict[str, Any] = {"layers": LAYERS, "feed_forward": WIDTH}
    if routing == "token":
        side["moe"] = {"experts": experts, "every": every, "top_k": TOP_K, "routing": "token"}
    elif routing == "sub-network":
        side["feed_forward"] = [WIDTH * (1 if (layer + 1) % every else TOP_K) for layer in range(LAYERS)]
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {"corpora": ["none"], "languages": ["de"], "vocabulary": {"size": VOCABULARY}},
            "model": {"hidden": 512, "heads": 8, "encoder": side, "decoder": side},
            "training": {"steps": 1, "learning_rate": 1e-4, "warmup": 1},
            "parallel": {"expert": expert},
        }
    )


def random_sources(vocabulary: int, count: int, seed: int) -> list[list[int]]:
    """``count`` sources of about ``LENGTH`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(LENGTH * 4 // 5, LENGTH * 6 // 5 + 1, (count,), generator=generator).tolist()
    return [torch.randint(8, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def sentences(recipe: Recipe, count: int, seed: int) -> PairBatch:
    texts = random_sources(VOCABULARY, count, seed)
    return DirectionIds.of(recipe.languages, Tags()).collate(texts, None, [0] * count)


def build(recipe: Recipe, topology: Topology) -> Transformer:
    model = Transformer(recipe, VOCABULARY, topology)
    initialize(model, 1, topology)
    model.to(topology.device).eval().requires_grad_(False)
    model.pack()  # as a model that is loaded to translate
    return model


def balance(routers: list[nn.Module], weights: list[nn.Parameter], run: Callable[[], object]) -> None:
    """Project the mean of what each router reads in ``run`` out of its weight [E, H]."""
    seen: dict[int, list[Tensor]] = {}
    hooks = [
        router.register_forward_pre_hook(
            lambda _, given, i=i: seen.setdefault(i, []).append(given[0].reshape(-1, given[0].shape[-1]))
        )
        for i, router in enumerate(routers)
    ]
    run()
    for i, (hook, weight) in enumerate(zip(hooks, weights, strict=True)):
        hook.remove()
        mean = F.normalize(torch.cat(seen[i]).mean(0), dim=0)
        weight.data = weight - (weight @ mean)[:, None] * mean


@torch.inference_mode()
def decode(model: Transformer, batch: PairBatch, forced: Tensor) -> Tensor:
    """Chooses a token for each of the T positions of ``forced`` [B, T], which is read in place of the
    choices.
    """
    state = model.start(batch.source, batch.ids)
    latest, found = torch.full_like(forced[:, :1], EOS), []
    for position in range(forced.shape[1]):
        found.append(model.step(latest, state).argmax(1))
        latest = forced[:, position : position + 1]
    return torch.stack(found, 1)


def forced_tokens(count: int, seed: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(8, vocabulary, (count, TOKENS), generator=torch.Generator().manual_seed(seed))


def ours(model: Transformer, recipe: Recipe, count: int, seed: int) -> Callable[[], object]:
    device = model.topology.device
    return functools.partial(
        decode, model, sentences(recipe, count, seed).to(device), forced_tokens(count, seed).to(device)
    )


def balance_ours(model: Transformer, recipe: Recipe, seed: int) -> None:
    routers = [layer.router for _, layer in model.moe_layers()]
    balance(routers, [router.weight for router in routers], ours(model, recipe, CALIBRATION, seed))


def experts_used(model: Transformer, run: Callable[[], object]) -> float:
    """Experts that have tokens, of one rank, mean over the decoder's sparse layers and steps."""
    used: list[int] = []

    def look(seen: Seen) -> None:
        used.append(int(seen.routes.experts.unique().numel()))

    for side, layer in model.moe_layers():
        layer.observer = look if side == "decoder" else None
    run()
    for _, layer in model.moe_layers():
        layer.observer = None
    return sum(used) / len(used)


def beside_peers(rounds: int) -> dict[str, Any]:
    joining.join()
    Topology.build()
    torch.manual_seed(1)
    dense = recipe_of(None)
    token, small = (recipe_of(routing, NLLB_EXPERTS, NLLB_EVERY) for routing in ("token", "sub-network"))
    mine = {
        name: build(recipe, Topology.single())
        for name, recipe in (("ours, dense", dense), ("ours, token", token), ("ours, sub-network", small))
    }
    others: dict[str, Any] = {"plain torch, dense": peers.PlainTransformer(dense, VOCABULARY).eval()}
    if peers.installed("transformers"):
        others["transformers M2M-100, dense"] = peers.m2m100(dense, VOCABULARY).eval()
        others["transformers M2M-100, sub-network"] = peers.m2m100(
            small, VOCABULARY
        ).eval()  # as wide as when it is exported
        others["transformers NLLB-MoE"] = peers.nllb_moe(dense, VOCABULARY, NLLB_EXPERTS, NLLB_EVERY).eval()
        routers = [
            module for module in others["transformers NLLB-MoE"].modules() if hasattr(module, "classifier")
        ]
        source, forced = sentences(dense, CALIBRATION, 1).source, forced_tokens(CALIBRATION, 1)
        run = functools.partial(others["transformers NLLB-MoE"].decode, source, forced)
        balance(routers, [router.classifier.weight for router in routers], run)
    if peers.installed("ctranslate2"):
        tensors: dict[str, Tensor] = dict(mine["ours, sub-network"].named_parameters())
        for quantization in ("float32", "int8"):
            others[f"CTranslate2 {quantization}, sub-network"] = peers.CTranslate2(
                tensors, small, VOCABULARY, quantization
            )
    balance_ours(mine["ours, token"], dense, 1)
    found: dict[str, Any] = {}
    for count in PEER_BATCHES:
        source, forced = sentences(dense, count, 1).source, forced_tokens(count, 1)
        contestants: dict[str, Callable[[], object]] = {}
        for name, other in others.items():
            contestants[name] = functools.partial(other.decode, source, forced)
        contestants |= {name: ours(model, dense, count, 1) for name, model in mine.items()}
        for contestant in contestants.values():
            contestant()
        seconds = alternate(contestants, rounds)
        rates = {name: round(count * TOKENS / value, 1) for name, value in seconds.items()}
        used = experts_used(mine["ours, token"], ours(mine["ours, token"], dense, count, 1))
        found[f"batch {count}"] = {
            "tokens per second": rates,
            "experts used per step and layer": round(used, 1),
        }
        print(f"batch {count}: {found[f'batch {count}']}", flush=True)
    return found


def spread(experts: int, rounds: int) -> dict[str, Any]:
    """On each of the launched processes; figures of all together."""
    joining.join()
    world = torch.distributed.get_world_size()
    topology = Topology.build(expert=world, device=joining.device())
    compat.seed_tensor_parallel_random(1, 0)
    token, small = recipe_of("token", experts, expert=world), recipe_of("sub-network")
    models = {"token": build(token, topology), "sub-network": build(small, Topology.single(topology.device))}
    balance_ours(models["token"], token, topology.rank + 1)
    for _, layer in models["token"].moe_layers():
        torch.distributed.broadcast(layer.router.weight, 0)
    found: dict[str, Any] = {}
    for count in BATCHES:
        contestants = {name: ours(model, token, count, topology.rank + 1) for name, model in models.items()}
        layers = [layer.deepspeed_moe for _, layer in models["token"].moe_layers()]
        for run in contestants.values():
            run()
        for layer in layers:
            layer.traffic.take()
        seconds = alternate(contestants, rounds)
        traffic = Traffic.sum(layer.traffic.take() for layer in layers)
        sums = torch.tensor(
            [*seconds.values(), traffic.seconds / rounds, traffic.bytes / rounds], dtype=torch.float64
        )
        torch.distributed.all_reduce(sums)
        token_time, small_time, exchange_time, sent = (sums / world).tolist()
        found[str(count)] = {
            "token": round(world * count * TOKENS / token_time, 1),
            "sub-network": round(world * count * TOKENS / small_time, 1),
            "share of the token-level model's time exchanging": round(exchange_time / token_time, 3),
            "bytes a rank sends per output token": round(sent / (count * TOKENS)),
            "experts used per rank's step and layer": round(
                experts_used(models["token"], contestants["token"]), 1
            ),
        }
        if topology.rank == 0:
            print(f"{experts} experts, {count} sentences a process: {found[str(count)]}", flush=True)
    best = {name: max(found.values(), key=lambda each: each[name]) for name in models}
    return {
        "processes": world,
        "peak tokens per second": {name: best[name][name] for name in models},
        "sub-network to token": round(best["sub-network"]["sub-network"] / best["token"]["token"], 2),
        "share exchanging at its peak": best["token"]["share of the token-level model's time exchanging"],
        "sentences a process": found,
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    names = ["peers", "32", "128"]
    about = "beside peers, or models of so many experts on two processes; all by default"
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help=about)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        name = arguments.parts[0]
        result = beside_peers(arguments.rounds) if name == "peers" else spread(int(name), arguments.rounds)
        if os.environ["RANK"] == "0":
            arguments.part.write_text(json.dumps(result), encoding="utf-8")
        return
    parts = {}
    for name in arguments.parts:
        parts[name] = in_processes(
            __file__, ["--rounds", str(arguments.rounds), "--parts", name], 1 if name == "peers" else 2
        )
        print({key: value for key, value in parts[name].items() if key != "sentences a process"}, flush=True)
    write(
        {"rounds": arguments.rounds, "source tokens": LENGTH, "output tokens": TOKENS, "parts": parts},
        arguments.out,
    )


if __name__ == "__main__":
    run_main(main)
