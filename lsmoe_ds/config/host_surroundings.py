"""Describe all that a plan counts in a model of transformers beside its sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lsmoe_ds.config.host import DROPOUTS, Task, is_in_head
from lsmoe_ds.config.shapes import LinearShape, SideName

LINEARS = {"query", "key", "value", "output", "expand", "contract"}  # of a layer; some have a gate, too
Layers = Sequence[tuple[SideName, int, str, nn.Module]]  # side, number, name and module of each


@dataclass(frozen=True)
class Surroundings:
    """Parameters that belong to no site, by their names in transformers.

    ``norms`` are within a layer, ``below`` are before all layers, ``above`` after them. ``heads`` are the
    linear layers that compute the logits, with their inputs and outputs; they are not in ``above``.
    ``parameters`` counts those of the vocabulary, of each side, and of an output not tied to the vocabulary.
    """

    norms: Mapping[tuple[SideName, int], tuple[str, ...]]
    below: tuple[str, ...]
    above: tuple[str, ...]
    heads: tuple[tuple[str, int, int], ...]
    parameters: Mapping[str, int]
    kept: Mapping[tuple[SideName, int], int]  # values per token that each layer's norms keep
    kept_outside: int  # values per token that other norms keep for the backward pass
    drops: bool  # whether hidden states have dropout
    is_plain: bool  # whether the products of all layers are those of their sites and of plain attention

    @classmethod
    def of(cls, model: Any, task: Task, layers: Layers, sites: Sequence[LinearShape]) -> Surroundings:
        side, config = layers[0][0], model.config.get_text_config()
        inside = {
            f"{at}.{name}": (each, number)
            for each, number, at, layer in layers
            for name, _ in layer.named_parameters()
        }
        linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        heads, read = _heads(model, task, linears), model.get_input_embeddings().weight
        norms: dict[tuple[SideName, int], tuple[str, ...]] = {}
        ends: tuple[list[str], list[str]] = ([], [])  # before and after all layers
        parameters: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            of_head = name.rpartition(".")[0] in heads
            part = "vocabulary" if parameter is read else "output" if of_head else side
            parameters[part] += parameter.numel()
            if name not in inside:
                if not of_head:
                    ends[bool(norms)].append(name)
                continue
            norms.setdefault(inside[name], ())
            if name.rpartition(".")[0] not in linears:
                norms[inside[name]] += (name,)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        beside = {f"{at}." for _, _, at, _ in layers}
        kept = {name: _kept(model, name, each, config.hidden_size) for name, each in model.named_modules()}
        within = {
            (each, number): sum(count for name, count in kept.items() if name.startswith(f"{at}."))
            for each, number, at, _ in layers
        }
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        strange = [n for n in linears if n not in heads and not n.startswith(tuple(beside))]
        return cls(
            norms=norms,
            below=tuple(ends[0]),
            above=tuple(ends[1]),
            heads=tuple(
                (names[id(each.weight)], each.in_features, each.out_features) for each in heads.values()
            ),
            parameters=dict(parameters),
            kept=within,
            kept_outside=sum(kept.values()) - sum(within.values()),
            drops=any(hasattr(config, name) for name in DROPOUTS),
            is_plain=not capped and not strange and all(_is_plain(*each, sites) for each in layers),
        )


def _heads(model: Any, task: Task, linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Return the linear layers that compute the logits, by name."""
    if task == "translate":
        output = model.get_output_embeddings()
        return {name: each for name, each in linears.items() if each is output}
    return {name: each for name, each in linears.items() if is_in_head(name, model)}


def _kept(model: nn.Module, name: str, module: nn.Module, hidden: int) -> int:
    """Count the values per token that a norm keeps for the backward pass.

    These are its input and output, and for a norm written in Python also the normalized input. The output of
    a norm of queries or keys is not kept, because it is rotated.
    """
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("Norm") or weight is None:
        return 0
    if isinstance(module, nn.LayerNorm) or weight.numel() == hidden:
        return (2 if isinstance(module, nn.LayerNorm) else 3) * int(weight.numel())
    above, _, own = name.rpartition(".")
    before = dict(model.named_modules()).get(f"{above}.{own[0]}_proj")
    return 2 * (before.out_features if isinstance(before, nn.Linear) else int(weight.numel()))


def _is_plain(side: SideName, number: int, at: str, layer: nn.Module, sites: Sequence[LinearShape]) -> bool:
    """Tell whether the sites of a layer are all of its matrices."""
    found = {site.name for site in sites if (site.side, site.layer) == (side, number)}
    own = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() > 1]
    return found - {"gate"} == LINEARS and len(own) == len(found) == len(matrices)
