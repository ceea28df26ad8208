"""Plans of models of transformers against what torch counts and what autograd keeps."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from rich.console import Console
from support.kept_memory import Kept
from support.plans import PRODUCTS
from support.small_encoder import encoder_recipe, write_encoder
from support.small_host import host_recipe, write_host
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.model.freezing import freeze
from lsmoe_ds.model.host import Host, HostModel, LabellingModel
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.arithmetic import flops
from lsmoe_ds.planning.devices import DEVICES
from lsmoe_ds.planning.fit import find_fits
from lsmoe_ds.planning.memory import PROCESS, TRANSFORMERS, activations, memory
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.planning.times import Cluster

pytest.importorskip("transformers")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LINEARS = {"rank": 4, "index": "target", "at": "all"}
FUSED = LINEARS | {"index": "language", "fuse_distillation": True}
MODULAR = LINEARS | {"index": "modular"}
CLUSTER = Cluster(2, 2, DEVICES["A100"], 1e9, 0.5)
# Every sequence has so many tokens; in a decoder the second half is learned.
LENGTH, COUNT = 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans")
    for kind, settings in (
        ("Llama", {}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16}),
    ):
        write_host(path / kind, kind, **WIDE, **settings)
    for kind in ("XLMRoberta", "Bert", "DebertaV2"):
        write_encoder(path / kind, kind, **WIDE)
    return path


def recipe_of(folder, kind: str, task: str = "translate", trainable="all", dropout=0.0, **low_rank) -> Recipe:
    if task == "translate":
        recipe = host_recipe(folder, folder / kind, **low_rank)
    else:
        recipe = encoder_recipe(folder, folder / kind, task, **low_rank)
    recipe.training.trainable, recipe.training.dropout = trainable, dropout
    return recipe


def built(recipe: Recipe) -> Host:
    kind = HostModel if recipe.model.task == "translate" else LabellingModel
    model = kind(recipe, recipe.data.vocabulary.size)
    initialize(model, 1, Topology.single())
    freeze(model, recipe, Topology.single())
    return model.train()


def batch_of(recipe: Recipe, count: int, length: int) -> tuple:
    """Return a batch of one direction, in which half of a decoder's positions are learned."""
    tokens = torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(4))
    labels = torch.zeros(count, 2, dtype=torch.long) if recipe.model.task == "answer" else tokens % 3
    if recipe.model.task == "translate":
        labels = tokens.clone()
        labels[:, : length // 2] = -100
    number = torch.zeros(count, dtype=torch.long)
    return tokens, labels, torch.ones_like(tokens), SentenceIds(number, number, number)


def counted(recipe: Recipe, count: int, length: int) -> int:
    """Count the operations of a forward and a backward pass."""
    model = built(recipe)
    if isinstance(model, HostModel):
        model._is_head_plain()  # which reads a token by itself
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = model(*batch_of(recipe, count, length))
        (losses.loss + sum(losses.further.values())).backward()
    return counter.get_total_flops()


TRAINED = [
    ("Llama", "translate", "all", {}),
    ("Qwen2", "translate", "all", {}),
    ("Qwen3", "translate", "all", {}),
    ("Llama", "translate", "all", LINEARS),
    ("Llama", "translate", "methods", LINEARS),
    ("Qwen2", "translate", "methods", LINEARS | {"at": "attention"}),
    ("Qwen2", "translate", "methods", FUSED),
    ("Llama", "translate", ["host.model.layers.1.*"], {}),
    ("Llama", "translate", ["host.lm_head.weight"], {}),
    ("XLMRoberta", "tag", "all", {}),
    ("XLMRoberta", "tag", "all", FUSED),
    ("XLMRoberta", "tag", "methods", FUSED | {"at": "feed_forward"}),
    ("Bert", "answer", "all", {}),
    ("Bert", "answer", ["*qa_outputs*"], {}),
]


@pytest.mark.parametrize(("kind", "task", "trainable", "low_rank"), TRAINED, ids=str)
def test_training_takes_what_torch_counts(folder, kind, task, trainable, low_rank):
    recipe = recipe_of(folder, kind, task, trainable, **low_rank)
    half = LENGTH // 2 if task == "translate" else LENGTH
    found = flops(recipe, half)
    each = found.source_training + (found.target_training if task == "translate" else 0)
    assert counted(recipe, COUNT, LENGTH) == COUNT * half * each


@pytest.mark.parametrize(
    ("kind", "task", "trainable", "low_rank"),
    [each for each in TRAINED if each[3] or each[0] in ("Llama", "Bert")],
    ids=str,
)
def test_layers_that_are_computed_again_take_their_products_once_more(
    folder, kind, task, trainable, low_rank
):
    """But for a product that ends a layer, which keeps nothing: torch stops before it."""
    recipe = recipe_of(folder, kind, task, trainable, **low_rank)
    before = counted(recipe, COUNT, LENGTH)
    recipe.training.activation_checkpointing = True
    half = LENGTH // 2 if task == "translate" else LENGTH
    found = flops(recipe, half)
    each = found.source_training + (found.target_training if task == "translate" else 0)
    took, planned = counted(recipe, COUNT, LENGTH), COUNT * half * each
    assert before <= took <= planned
    spared = 0 if kind in ("Bert", "XLMRoberta") else 2 * COUNT * LENGTH * (2 * 96 * 64)
    only_head = trainable in (["*qa_outputs*"], ["host.lm_head.weight"])
    assert planned - took <= spared and (took == before) == only_head


def kept(recipe: Recipe, count: int, length: int) -> int:
    """Count the bytes that autograd keeps; of layers that are computed again those of the largest, or the
    logits if they are more.
    """
    model, batch, layers = built(recipe), batch_of(recipe, count, length), []
    if isinstance(model, HostModel):
        model._is_head_plain()

    def recompute(layer, again, x, *arguments, **options):
        outside.keep(x)
        with Kept(model) as within:
            y = layer(x, *arguments, **options)
            outside.keep(y if torch.is_tensor(y) else y[0])  # an input too
        layers.append(within)
        return y

    with mock.patch("lsmoe_ds.model.host.recompute", recompute), Kept(model) as outside:
        model(*batch)
    if not layers:
        return outside.bytes
    rows = count * length // 2 if recipe.model.task == "translate" else count * length
    return outside.with_largest(layers, rows * model.outline.around.heads[0][2] * 4)


@pytest.mark.parametrize(
    ("kind", "task", "dropout", "low_rank"),
    [
        ("Llama", "translate", 0.0, {}),
        ("Qwen3", "translate", 0.1, {}),  # which has no dropout but that of attention
        ("Llama", "translate", 0.0, LINEARS),
        ("XLMRoberta", "tag", 0.0, {}),
        ("XLMRoberta", "tag", 0.1, {}),
        ("Bert", "answer", 0.0, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_activations_are_what_autograd_keeps(folder, kind, task, dropout, low_rank, again):
    recipe = recipe_of(folder, kind, task, dropout=dropout, **low_rank)
    recipe.training.attention_dropout, recipe.training.activation_checkpointing = 0.0, again
    recipe.data.batch.tokens = 8 * 32
    assert kept(recipe, 8, 32) == pytest.approx(activations(recipe, 4), rel=0.05)


@pytest.mark.parametrize(("kind", "task"), [("Llama", "translate"), ("XLMRoberta", "tag")])
def test_memory_by_arithmetic(folder, kind, task):
    """Of matrices of rank 3 beside a frozen model, and of the head that trains with them."""
    recipe = recipe_of(folder, kind, task, "methods", **LINEARS)
    host = built(recipe)
    whole = sum(each.numel() for each in host.parameters())
    trained = sum(each.numel() for each in host.parameters() if each.requires_grad)
    half = -(-trained // 2)
    for precision, stage, value in (("float32", 0, 4), ("bfloat16", 1, 2)):
        one = memory(recipe, 1, stage, precision)
        assert (one.weights, one.gradients) == (value * whole, 4 * trained)
        assert one.optimizer == (8 if value == 4 else 12) * trained
        two = memory(recipe, 2, 2, precision)
        assert (two.weights, two.gradients) == (value * whole, 4 * half)
        assert two.optimizer == 12 * half
    assert one.peak == one.total + PROCESS + TRANSFORMERS + round(1.4 * (one.activations + one.buffers))


def shown(recipe: Recipe) -> str:
    console = Console(record=True, width=200)
    console.print(plan(recipe).table())
    return console.export_text()


def test_tables_name_the_tokens_and_the_output_of_a_task(folder):
    llama = shown(recipe_of(folder, "Llama"))
    assert "prompt token" in llama and "target token" in llama and "source token" not in llama
    planned = plan(recipe_of(folder, "Llama"))
    assert planned.parameters.output.total == 64 * built(recipe_of(folder, "Llama")).outline.vocabulary
    (line,) = [line for line in llama.splitlines() if "output" in line]
    assert "tied" not in line
    (line,) = [line for line in shown(recipe_of(folder, "Qwen2")).splitlines() if "output" in line]
    assert "tied" in line
    names = shown(recipe_of(folder, "XLMRoberta", "tag"))
    assert "target token" not in names and "tied" not in names
    assert plan(recipe_of(folder, "XLMRoberta", "tag")).parameters.output.total == 7 * 64 + 7
    assert json.loads(json.dumps(planned.to_dict()))["flops"]["target"] > planned.flops.source


def test_layers_of_another_kind_are_not_planned(folder):
    recipe = recipe_of(folder, "DebertaV2", "tag", **LINEARS | {"at": "feed_forward"})
    assert "memory and arithmetic are not planned: layers of this model are not those of" in shown(recipe)
    assert plan(recipe).memory == [] and plan(recipe).flops is None
    with pytest.raises(UserError, match=r"'model\.huggingface': memory and arithmetic are not planned"):
        find_fits(recipe, CLUSTER)


@pytest.mark.parametrize(("kind", "task"), [("Llama", "translate"), ("XLMRoberta", "tag")])
def test_layouts_that_fit_are_data_parallel(folder, kind, task):
    recipe = recipe_of(folder, kind, task)
    recipe.data.batch.count, recipe.data.batch.tokens = 4, 2048
    fits = find_fits(recipe, CLUSTER)
    assert {each.recipe.parallel.tensor for each in fits} == {1}
    assert {each.memory.stage for each in fits} == {1, 2}, "in bfloat16 Adam does not train at stage 0"
    work = flops(recipe)
    tokens = 4 * 2048 if task == "tag" else 2 * 2048
    wanted = tokens * (work.source_training + (work.target_training if task == "translate" else 0))
    assert fits[0].times.compute == pytest.approx(wanted / 2 / (DEVICES["A100"].half * 0.5))
