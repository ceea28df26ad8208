"""Language-specific LoRA ("Exploring Intrinsic Language-specific Subspaces") against its equations in plain
torch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.language_layers import LANGUAGES, batch_of, ids_of, recipe_of, same_gradients
from torch import nn
from torch.nn.utils import prune as torch_prune

from lsmoe_ds.checkpoint.run_folder import find_changes
from lsmoe_ds.checkpoint.stored import Stored
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.places import is_in, parse_place
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import LinearShape
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.low_rank.bank import LearnedBanks, LowRankBank, SideWeights
from lsmoe_ds.methods.low_rank.masks import smallest
from lsmoe_ds.methods.low_rank.pruning import Pruning
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.methods import check_holders
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training import start_from

INPUTS, OUTPUTS, LENGTH = 6, 5, 4
RANKS = {"de": 2, "en": 0, "fr": 3, "ru": 1}
LARGE = {"de": 2, "en": 0, "fr": 20, "ru": 1}  # one above SMALL_RANK: two stacks
NUMBERS = [0, 3, 3, 5, 2, 0]
GROUPED = Languages(LANGUAGES.directions, {"de": "high", "en": "high", "fr": "medium", "ru": "low"})
EVERYWHERE = {"rank": RANKS, "at": "all"}


def site_of(side: str = "encoder", layer: int = 0) -> LinearShape:
    return LinearShape(side, layer, "feed_forward", "expand", INPUTS, OUTPUTS, "column")


def banks_of(settings: LowRank, layer: int = 0) -> nn.Module:
    torch.manual_seed(1)
    banks = [
        LowRankBank(site_of(layer=layer), settings, choice, LANGUAGES, Topology.single())
        for choice in settings.choices(site_of(layer=layer))
    ]
    module = banks[0] if len(banks) == 1 else LearnedBanks(*banks, SideWeights(3), layer)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def delta(bank: LowRankBank, language: int, x: torch.Tensor, columns: int) -> torch.Tensor:
    """B A x of one language, on the first ``columns`` of x and y."""
    rows = bank.rows[language]
    y = x[..., : min(columns, INPUTS)] @ bank.flat[rows].t() @ bank.vertical[rows]
    return F.pad(y, (0, OUTPUTS - y.shape[-1]))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("columns", [None, 4], ids=["whole", "columns"])
@pytest.mark.parametrize("ranks", [RANKS, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("index", ["source", "target"])
def test_equation_3(index, ranks, columns):
    settings = LowRank(rank=ranks, index=index, columns=columns)
    bank, base, ids = banks_of(settings), nn.Linear(INPUTS, OUTPUTS), ids_of(NUMBERS)
    x = torch.randn(len(NUMBERS), LENGTH, INPUTS, requires_grad=True)

    def equation():
        of = ids.task(index).tolist()
        return base(x) + torch.stack([delta(bank, k, x[i], columns or 99) for i, k in enumerate(of)])

    variables = [x, base.weight, bank.flat, bank.vertical]
    same_gradients(lambda: bank(base, x, LanguageContext(ids)), equation, variables)
    english = LANGUAGES.id("en")
    assert bank.rows[english].start == bank.rows[english].stop, "a rank of 0 has no rows"


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("columns", [None, 4], ids=["whole", "columns"])
@pytest.mark.parametrize("ranks", [RANKS, LARGE], ids=["small", "large"])
def test_equation_4(ranks, columns):
    settings = LowRank(rank=ranks, index="learned", columns=columns)
    banks, base, ids = banks_of(settings, layer=1), nn.Linear(INPUTS, OUTPUTS), ids_of(NUMBERS)
    (side,) = banks._side
    nn.init.normal_(side.index)
    x = torch.randn(len(NUMBERS), LENGTH, INPUTS, requires_grad=True)

    def equation():
        weights = side.index[1].softmax(0)
        rows = []
        for i, (source, target) in enumerate(zip(ids.source.tolist(), ids.target.tolist(), strict=True)):
            by_source = delta(banks.source, source, x[i], columns or 99)
            rows.append(
                weights[0] * by_source + weights[1] * delta(banks.target, target, x[i], columns or 99)
            )
        return base(x) + torch.stack(rows)

    matrices = [parameter for bank in (banks.source, banks.target) for parameter in bank.parameters()]
    same_gradients(
        lambda: banks(base, x, LanguageContext(ids)), equation, [x, base.weight, side.index, *matrices]
    )


def test_equation_6():
    prune = Pruning(ratio=0.9, start=2, length=8, epochs=15)
    wanted = [0, 0, *(0.9 - 0.9 * (1 - (e - 2) / 8) ** 3 for e in range(3, 11)), 0.9, 0.9, 0.9, 0.9, 0.9]
    assert [prune.ratio_at(e) for e in range(1, 16)] == pytest.approx(wanted)
    assert [prune.epoch(step, 30) for step in (1, 2, 3, 30)] == [1, 1, 2, 15]
    assert [Pruning(ratio=0.5).epoch(step, 30) for step in (1, 17)] == [1, 17]
    assert [prune.epoch(step, 6) for step in (1, 2, 5, 6)] == [3, 5, 13, 15], "fewer steps than epochs"


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_what_is_pruned_is_what_torch_prunes(ratio):
    modules = [nn.Linear(7, 3), nn.Linear(4, 5)]
    values = [module.weight.detach().clone() for module in modules]
    found = smallest(values, [torch.ones_like(value, dtype=torch.bool) for value in values], ratio)
    torch_prune.global_unstructured(
        [(module, "weight") for module in modules], torch_prune.L1Unstructured, amount=ratio
    )
    for mask, module in zip(found, modules, strict=True):
        assert torch.equal(mask, module.weight_mask.bool())


def test_what_was_pruned_stays_pruned_also_among_equal_values():
    value, mask = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]), torch.tensor([True, True, True, False, True])
    (found,) = smallest([value], [mask], 0.4)
    assert found.tolist() == [False, True, True, False, True]
    (found,) = smallest([value], [mask], 0.0)
    assert torch.equal(found, mask)


PATTERNS = {
    "all": lambda site: True,
    "encoder": lambda site: site.side == "encoder",
    "decoder.1-2.attention": lambda site: (
        site.side == "decoder" and site.layer in (1, 2) and "attention" in site.sublayer
    ),
    "self_attention.query": lambda site: site.sublayer == "attention" and site.name == "query",
    "0.contract": lambda site: site.layer == 0 and site.name == "contract",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_places(pattern):
    sites = [
        LinearShape(side, layer, sublayer, name, 1, 1, "row")
        for side in ("encoder", "decoder")
        for layer in range(4)
        for sublayer, names in (
            ("attention", ("query", "output")),
            ("cross_attention", ("query",)),
            ("feed_forward", ("expand", "contract")),
        )
        for name in names
    ]
    found = [site for site in sites if is_in(site, [pattern])]
    assert found == [site for site in sites if PATTERNS[pattern](site)] != []


@pytest.mark.parametrize("pattern", ["", "encoder.", "query.encoder", "4-2", "attention.dense", "Encoder"])
def test_a_wrong_place_is_refused(pattern):
    with pytest.raises(ValueError, match="names no linear layers"):
        parse_place(pattern)


def model_of(low_rank: dict, groups: dict | None = None) -> tuple[Recipe, Transformer]:
    """Return a recipe and its model in evaluation mode, with random values in all low-rank parameters."""
    recipe = recipe_of(**low_rank)
    model = Transformer(recipe, 96)
    initialize(model, 1, Topology.single())
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "_low_rank." in name:
            nn.init.normal_(parameter, std=0.3)
    return recipe, model.eval()


MERGED = {
    "source": {**EVERYWHERE, "index": "source"},
    "learned": {**EVERYWHERE, "index": "learned"},
    "by layer": {
        **EVERYWHERE,
        "index": {"learned": ["encoder.1"], "source": ["encoder"], "target": ["decoder"]},
    },
    "columns": {**EVERYWHERE, "index": "target", "columns": 16},
    "few places": {"rank": 3, "index": "learned", "at": ["encoder.0.self_attention", "decoder.contract"]},
}


@pytest.mark.parametrize("low_rank", MERGED.values(), ids=MERGED)
def test_the_merged_model_computes_the_same(low_rank):
    recipe, model = model_of(low_rank)
    names = global_names(model, Topology.single())
    weights = {names[name]: value.detach() for name, value in model.state_dict().items() if name in names}
    for number in (0, 3):
        batch = batch_of([number, number])
        dense, changed = extract(weights, recipe, LANGUAGES.directions[number], "specific")
        merged = Transformer(changed, 96)
        merged.load_state_dict(dict(dense), strict=True)
        torch.testing.assert_close(merged.eval().logits(*batch), model.logits(*batch), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("form")
def test_a_mixed_batch_equals_its_homogeneous_parts():
    _, model = model_of({**EVERYWHERE, "index": "learned"})
    source, target, ids = batch_of(NUMBERS)
    mixed = model.logits(source, target, ids)
    for i in range(len(NUMBERS)):
        one = torch.tensor([i])
        torch.testing.assert_close(
            model.logits(source[one], target[one], ids.select(one)), mixed[one], rtol=1e-5, atol=1e-5
        )


def test_only_one_matrix_of_a_pair_begins_at_zero():
    for zero, other in (("flat", "vertical"), ("vertical", "flat")):
        model = Transformer(recipe_of(rank=2, index="learned", zero=zero, init_std=0.5), 96)
        initialize(model, 1, Topology.single())
        values = {name: value for name, value in model.named_parameters() if "_low_rank." in name}
        assert not any(value.any() for name, value in values.items() if name.endswith((zero, "index")))
        others = torch.cat([value.flatten() for name, value in values.items() if name.endswith(other)])
        assert float(others.detach().std()) == pytest.approx(0.5, rel=0.1)


def test_ranks_of_groups():
    settings = LowRank(rank={"high": 2, "medium": 4, "low": 8}, index="language")
    assert settings.needs_groups
    assert [settings.rank_of(code, GROUPED) for code in GROUPED.codes] == [2, 2, 4, 8]
    settings.check_languages(GROUPED)
    with pytest.raises(ValueError, match=r"lacks low: it must have each of the groups high, low"):
        LowRank(rank={"high": 2, "medium": 4}, index="language").check_languages(GROUPED)
    assert Pruning(ratio=0.5, languages=["high", "ru"]).prunes("ru", GROUPED)
    assert not Pruning(ratio=0.5, languages=["high"]).prunes("ru", GROUPED)
    with pytest.raises(ValueError, match="names very_low: it may have de, en, fr, high, low, medium, ru"):
        Pruning(ratio=0.5, languages=["very_low"]).check_languages(GROUPED)


REFUSED = {
    "nowhere": ({"rank": 2, "at": ["encoder.7"]}, "'low_rank' has no place"),
    "no index": ({"rank": 2, "at": "all", "index": {"source": ["encoder"]}}, "decoder.0.attention.query"),
    "wrong place": ({"rank": 2, "at": "attn"}, "'attn' names no linear layers"),
    "all zero": ({"rank": 0}, "adds nothing"),
    "distilled": ({"rank": 2, "index": "learned", "fuse_distillation": True}, "exclude each other"),
    "pruned": (
        {"rank": 2, "prune": {"ratio": 0.5, "epochs": 15}, "fuse_distillation": True},
        "exclude each other",
    ),
    "beyond the epochs": (
        {"rank": 2, "prune": {"ratio": 0.5, "epochs": 9}},
        "reaches its ratio after 10, 'start' and 'length' together, which is more than the 9 of 'epochs'",
    ),
    "beyond the steps": (
        {"rank": 2, "prune": {"ratio": 0.5, "start": 1, "length": 3}},
        "more than the 3 of 'training.steps'",
    ),
    "nothing to prune": (
        {
            "rank": {**RANKS},
            "index": "source",
            "prune": {"ratio": 0.5, "epochs": 15, "languages": ["en"]},
        },
        "nothing to prune",
    ),
    "pattern of nothing": (
        {"rank": 2, "at": ["encoder.0-1", "encoder.cross_attention"]},
        "'encoder.cross_attention' names no linear layer of the model",
    ),
    "ratio": ({"rank": 2, "prune": {"ratio": 1.0}}, "less than 1"),
}


@pytest.mark.parametrize(("low_rank", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(low_rank, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(**low_rank)


def test_frozen_matrices_are_not_pruned():
    recipe = recipe_of(rank=2, index="source", prune={"ratio": 0.5, "epochs": 15, "matrices": "both"})
    model = Transformer(recipe, 96)
    initialize(model, 1, Topology.single())
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad_(not name.endswith("vertical"))
    (method,) = model.methods
    changed = method.prune(0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert changed and all(names[id(parameter)].endswith("flat") for parameter in changed)
    for name, mask in model.named_buffers():
        assert bool(mask.all()) == name.endswith("vertical_mask"), name


def test_the_order_of_indexes_is_a_change_of_the_recipe():
    first = {"source": ["encoder"], "target": ["0", "decoder"]}
    recipes = [recipe_of(rank=2, index=index) for index in (first, dict(reversed(first.items())))]
    assert not list(find_changes(recipes[0], recipes[0]))
    assert [key for key, *_ in find_changes(*recipes)] == ["model.low_rank.index (order)"]


def test_one_direction_of_a_model_with_groups_and_caps():
    value = recipe_of(rank={"high": 2, "low": 3}, index="target").model_dump(mode="json", exclude_none=True)
    value["data"] |= {"groups": {"high": ["de", "en"], "low": ["fr", "ru"]}, "max_pairs": {"ru": 9, "de": 5}}
    recipe = Recipe.model_validate(value)
    model = Transformer(recipe, 96)
    names = global_names(model, Topology.single())
    weights = {names[name]: value for name, value in model.state_dict().items() if name in names}
    _, changed = extract(weights, recipe, Direction("en", "de"), "specific")
    assert changed.data.groups.listed == {"de": "high", "en": "high"}
    assert changed.data.max_pairs == {"de": 5} and changed.data.directions == ["en-de"]


@pytest.mark.parametrize(
    "change", [{"index": "source"}, {"at": ["feed_forward", "encoder.0.query"]}, {"columns": 8}]
)
def test_a_trained_model_keeps_by_which_languages_it_chooses(change):
    before = recipe_of(rank=2, index="target")
    check_holders(before, recipe_of(rank=3, index={"target": ["all"]}))
    (key,) = change
    with pytest.raises(UserError, match=rf"'model\.low_rank\.{key}' is .*, but the model has learned with"):
        check_holders(before, recipe_of(**{"rank": 2, "index": "target", **change}))


def test_rows_of_languages_must_be_those_that_the_model_has(tmp_path):
    ranks = [{"de": 2, "en": 1, "fr": 3, "ru": 1}, {"de": 3, "en": 1, "fr": 2, "ru": 1}]
    before, after = (recipe_of(rank=each, index="target") for each in ranks)
    model = Transformer(before, 96)
    names = global_names(model, Topology.single())
    weights = Tensors.of({names[name]: value for name, value in model.state_dict().items() if name in names})
    stored = Stored("consolidated", tmp_path, tmp_path, before)
    start_from._check_same_model(before, stored, 96, weights)
    with pytest.raises(UserError, match="belong to de 2, en 1, fr 3, ru 1, the recipe's to de 3, en 1, fr 2"):
        start_from._check_same_model(after, stored, 96, weights)
