"""Make models to convert: of a run, or with random weights that are not trivial."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.checkpoint.stored import VOCABULARY, Weights, write_folder
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.inference.load import Loaded, build_model, load
from lsmoe_ds.languages import EOS
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names, named_state
from lsmoe_ds.parallel.topology import Topology
from support.small_run import PAIR_TOP1, TARGET_TOP2, make_recipe, train_and_save, write_corpus

EN_DE, FR_EN = Direction("en", "de"), Direction("fr", "en")
PAIR_TOP2 = PAIR_TOP1 | {"top_k": 2}
PAIR_TOP3 = PAIR_TOP1 | {"top_k": 3, "every": 2}
LINES = ["ba de fi", "ko la mi nobu", "su", "tabi refu gosi kale mo ba"]
ALPHABET = [
    *"abdegkl aeiou  \t\n\r\u3000\u200b\u00ad\u2581\u2060\u0000\u0085\u00a0\ufeff\u001c\u2028",
    *"<2>/s_\u0301\u0308éß²ﬁ😀全角ＡＢ！日本語한글\u1112\u1161\u11ab",
    *("<2de>", "<2fr>", "</s>", "<unk>", "<pad>", "<s>", "▁<", "👩‍👩‍👧", "ba de", "fike", " ko ", "größer"),
]


def random_loaded(run, encoder, decoder) -> Loaded:
    """Load a model with the run's vocabulary and weights drawn wide, so that neither biases nor gates are
    trivial.
    """
    recipe = make_recipe(run.parent, encoder, decoder)
    base = load(run, "cpu")
    model = Transformer(recipe, base.vocabulary.size)
    initialize(model, 7, Topology.single())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".router." in name:
                parameter.normal_(0, 0.7, generator=generator)
        for name, parameter in model.named_parameters():
            if ".router." in name:  # two tasks with the same experts and gates
                parameter[1] = parameter[0]
    return replace(base, model=model.eval(), recipe=recipe)


def global_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """Return the parameters of a model by global name."""
    names = global_names(model, Topology.single())
    return {names[name]: parameter.detach() for name, parameter in model.named_parameters()}


def dense_of(sparse: Loaded, direction: Direction | None) -> Loaded:
    """Extract the dense model of a direction from one with low-rank matrices."""
    weights, recipe = extract(global_weights(sparse.model), sparse.recipe, direction, sparse.route)
    assert recipe.model.low_rank is None and not list(recipe.model.moe_layers())
    model = build_model(recipe, sparse.vocabulary.size, Weights(weights, 0, {}), torch.device("cpu"))
    return replace(
        sparse, model=model, recipe=recipe, languages=recipe.languages, kind="dense", route="specific"
    )


def random_model(place, encoder, decoder, low_rank=None) -> Loaded:
    """Make a model as sure of itself as a trained one, with biases, gates and matrices that are not
    trivial.
    """
    recipe = make_recipe(place, encoder, decoder)
    if low_rank is not None:
        recipe.model.low_rank = low_rank
    data = prepare(recipe)
    vocabulary = Vocabulary.load(data.folder / "vocabulary.model")
    model = Transformer(recipe, vocabulary.size)
    initialize(model, 7, Topology.single())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".router." in name or "_low_rank." in name:
                parameter.normal_(0, 0.5, generator=generator)
        model.decoder_norm.weight *= 2
        end = model.embedding.tokens.weight[EOS]
        model.decoder_norm.bias += 10 * end / end.square().sum()  # most translations end
    return Loaded(model.eval(), recipe, vocabulary, recipe.languages, 0, "sparse", data.folder)


def write_dense(folder: Path) -> Path:
    """Write a dense folder into ``folder``, as `lsmoe convert` leaves it; the corpus is there."""
    model = random_model(folder, TARGET_TOP2, PAIR_TOP3)
    tensors, recipe = extract(global_weights(model.model), model.recipe, EN_DE)
    provenance = {
        "kind": "dense",
        "run": "small",
        "step": 2,
        "direction": "en-de",
        "route": "specific",
        "sparse_parameters": 1,
    }
    write_folder(folder / "dense", tensors, recipe, model.home / "vocabulary.model", provenance)
    return folder / "dense"


def with_banks(recipe: Recipe, low_rank: dict | None) -> Recipe:
    """Return a recipe with these settings of low-rank matrices."""
    value = recipe.model_dump(exclude_none=True)
    value["model"]["low_rank"] = low_rank
    return Recipe.model_validate(value)


def make_banked_run(pool, folder, low_rank: dict, world: int, **layout):
    """Train and save a dense model with low-rank banks, as ``support.small_run.make_run`` makes others."""
    write_corpus(folder)
    recipe = with_banks(make_recipe(folder, None, None, **layout), low_rank)
    data = prepare(recipe)
    open_run(recipe, folder / "banked", data.folder / "vocabulary.model")
    return folder / "banked", pool.run(
        world, train_and_save, recipe, folder / "banked", data.vocabulary.size, **layout
    )


def whole_model(
    run: Path,
    low_rank: dict[str, Any] | None,
    folder: Path,
    moe: tuple[Any, Any] = (None, None),
    methods: dict[str, Any] | None = None,
    **data: Any,
) -> Path:
    """Write a consolidated model with the run's vocabulary and random weights, matrices and masks."""
    recipe = with_banks(make_recipe(run.parent, *moe), None)
    value = recipe.model_dump(exclude_none=True)
    value["data"] |= data
    value["model"] |= methods or {}
    recipe = with_banks(Recipe.model_validate(value), low_rank)
    base = load(run, "cpu")
    model = Transformer(recipe, base.vocabulary.size)
    initialize(model, 7, Topology.single())
    generator = torch.Generator().manual_seed(2)
    state = dict(named_state(model))
    with torch.no_grad():
        for name, value in state.items():
            if name.endswith("_mask"):
                value.copy_(torch.rand(value.shape, generator=generator) < 0.5)
            elif "_low_rank." in name or name.endswith("bias"):
                value.normal_(std=0.4, generator=generator)
        for name, value in state.items():
            if name.endswith("_mask"):
                state[name.removesuffix("_mask")].mul_(value)
        end = model.embedding.tokens.weight[EOS]
        model.decoder_norm.bias += 5 * end / end.norm()  # an untrained model would not end
    names = global_names(model, Topology.single())
    tensors = {
        names[name]: LazyTensor(
            tuple(value.shape), value.detach().clone, value.dtype, not isinstance(value, nn.Parameter)
        )
        for name, value in state.items()
    }
    provenance = {"kind": "consolidated", "run": "small", "step": 2, "route": "specific"}
    write_folder(folder, Tensors(tensors), recipe, base.home / VOCABULARY, provenance)
    return folder
