"""Describe a model of transformers from its configuration: its linear layers as sites, and its sizes.

The model is built without weights, so this works for any size and any class whose layers are known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsmoe_ds.config.host import (
    CLASSES,
    CONFIG,
    Task,
    import_transformers,
    read_config,
    set_head,
    window_of,
)
from lsmoe_ds.config.host_surroundings import Surroundings
from lsmoe_ds.config.shapes import LinearShape, SideName, Split, Sublayer
from lsmoe_ds.errors import UserError

# Linear layers by their names in a layer of Llama, Qwen2 and similar; BERT and XLM-R; M2M-100; GPT-NeoX.
ATTENTIONS: tuple[tuple[str, Sublayer], ...] = (
    ("self_attn", "attention"),
    ("encoder_attn", "cross_attention"),
)
PLACES: dict[str, tuple[Sublayer, str]] = {
    **{
        f"{at}.{theirs}": (sublayer, ours)
        for at, sublayer in ATTENTIONS
        for theirs, ours in (
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("o_proj", "output"),
            ("out_proj", "output"),
        )
    },
    "mlp.gate_proj": ("feed_forward", "gate"),
    "mlp.up_proj": ("feed_forward", "expand"),
    "mlp.down_proj": ("feed_forward", "contract"),
    **{f"attention.self.{name}": ("attention", name) for name in ("query", "key", "value")},
    "attention.output.dense": ("attention", "output"),
    "intermediate.dense": ("feed_forward", "expand"),
    "output.dense": ("feed_forward", "contract"),
    "fc1": ("feed_forward", "expand"),
    "fc2": ("feed_forward", "contract"),
}
# Names of the parts of a layer that are sublayers, for linear layers of unknown names.
ATTENTION = re.compile("att(entio)?n")
FEED_FORWARD = ("mlp", "ffn", "feed_forward", "intermediate", "output")
# Types of models whose labels of a text depend on the padding beside it, or on the padded length.
READ_PADDING = ("canine", "convbert", "fnet", "nystromformer", "reformer", "yoso")
SIDE: dict[Task, SideName] = {"translate": "decoder", "tag": "encoder", "answer": "encoder"}
ROWS = ("output", "contract")  # what a tensor-parallel model would split by its inputs
LAYER = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True)
class HostOutline:
    """A model without its weights.

    ``modules`` maps each site (:attr:`LinearShape.at`) to its module's name in transformers. A sublayer with
    a linear layer of unknown kind has no sites; ``unknown`` lists its linear layers, with their names in a
    layer.
    """

    hidden: int
    heads: int
    layers: Mapping[SideName, int]
    widths: Mapping[SideName, int]  # of the feed-forwards
    sites: tuple[LinearShape, ...]
    modules: Mapping[str, str]
    unknown: tuple[LinearShape, ...]
    around: Surroundings
    vocabulary: int  # rows of the embedding
    window: int | None


def read_outline(folder: Path, task: Task, labels: Sequence[str] = ()) -> HostOutline:
    """Describe the model in a folder, with a head for ``labels`` if the task is to tag.

    Raises UserError if transformers cannot load it, or the task cannot use it.
    """
    stamp = (folder / CONFIG).stat().st_mtime_ns if (folder / CONFIG).is_file() else 0
    return _read(folder, task, tuple(labels), stamp)


@cache
def _read(folder: Path, task: Task, labels: tuple[str, ...], _stamp: int) -> HostOutline:
    config = read_config(folder)
    set_head(config, task, labels)
    if config.model_type in READ_PADDING:
        raise UserError(
            f"{folder} holds a model of the type {config.model_type}, whose labels of a text depend on the "
            "padding beside it, so that batches change them: models with BERT's attention can be used"
        )
    with torch.device("meta"):
        model = empty_host(folder, task, config)
    sites, modules, unknown = list[LinearShape](), dict[str, str](), list[LinearShape]()
    layers: Counter[SideName] = Counter()
    widths: dict[SideName, int] = {}
    for side, number, name, layer in layers_of(model):
        layers[side] = max(layers[side], number + 1)
        strange = _unknown(side, number, layer)
        unknown += strange
        for inside, module in layer.named_modules():
            if (place := PLACES.get(inside)) is None or not isinstance(module, nn.Linear):
                continue
            if place == ("feed_forward", "expand"):
                widths[side] = max(widths.get(side, 0), module.out_features)
            if any(each.sublayer == place[0] for each in strange):
                continue
            split: Split = "row" if place[1] in ROWS else "column"
            site = LinearShape(side, number, *place, module.in_features, module.out_features, split)
            sites.append(site)
            modules[site.at] = f"{name}.{inside}"
    if not sites:
        raise UserError(
            f"the linear layers of the {type(model).__name__} in {folder} are not known: models with the "
            f"layers of {'Llama or Qwen2' if task == 'translate' else 'BERT'} can be used"
        )
    if layers.keys() != {SIDE[task]}:
        other = "encoder" if SIDE[task] == "decoder" else "decoder"
        raise UserError(
            f"{folder} holds a {type(model).__name__}, which has a{'n' * (other == 'encoder')} {other}: "
            f"models that are a{'n' * (SIDE[task] == 'encoder')} {SIDE[task]} alone can {task} here"
        )
    text = config.get_text_config()
    return HostOutline(
        hidden=int(text.hidden_size),
        heads=int(text.num_attention_heads),
        layers=dict(layers),
        widths=widths,
        sites=tuple(sites),
        modules=modules,
        unknown=tuple(unknown),
        around=Surroundings.of(model, task, list(layers_of(model)), sites),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        window=_window(model, text),
    )


def _unknown(side: SideName, number: int, layer: nn.Module) -> list[LinearShape]:
    """List the linear layers of sublayers that may compute something else: one of their kinds is unknown."""
    found = []
    for inside, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or inside in PLACES:
            continue
        sublayer: Sublayer
        if ATTENTION.search(inside):
            sublayer = "attention"
        elif inside.split(".")[0] in FEED_FORWARD:
            sublayer = "feed_forward"
        else:
            continue
        found.append(
            LinearShape(side, number, sublayer, inside, module.in_features, module.out_features, "column")
        )
    return found


def _window(model: nn.Module, config: Any) -> int | None:
    """Return the largest number of tokens that a model can read.

    RoBERTa and XLM-R count positions from the id of padding + 1.
    """
    padded = [
        module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    window, first = window_of(config), next((number for number in padded if number is not None), -1) + 1
    return None if window is None else window - first


def empty_host(folder: Path, task: Task, config: Any) -> Any:
    """Build the model of a configuration, on torch's default device.

    Raises UserError if transformers has no model of this type for the task.
    """
    transformers = import_transformers()
    try:
        return getattr(transformers, CLASSES[task]).from_config(config)
    except Exception as error:  # whatever transformers raises of what it does not like
        raise UserError(
            f"{folder} holds a model of the type {config.model_type}, which cannot {task}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None


def layers_of(model: nn.Module) -> Iterator[tuple[SideName, int, str, nn.Module]]:
    """Yield side, number, name and module of each layer: the members of the outermost lists of modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in lists:
        if any(name.startswith(f"{other}.") for other in lists):
            continue
        side: SideName = "encoder" if "encoder" in name.split(".") else "decoder"
        for number, layer in enumerate(model.get_submodule(name).children()):
            if any(isinstance(module, nn.Linear) for module in layer.modules()):
                yield side, number, f"{name}.{number}", layer
