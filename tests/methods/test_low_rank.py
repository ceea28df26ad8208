"""Language-specific low-rank matrices against the paper's equation, sentence by sentence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.language_layers import LANGUAGES, batch_of, ids_of, recipe_of
from torch import nn

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import LinearShape
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.low_rank.bank import LowRankBank
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

INPUTS, OUTPUTS, LENGTH = 6, 5, 4
PAIR, LANGUAGE = LowRank(rank=3), LowRank(rank=3, index="language")
RANKS = LowRank(rank={"de": 1, "en": 4, "fr": 2, "ru": 3}, index="language")


def bank_of(settings: LowRank, decoder: bool) -> tuple[nn.Linear, LowRankBank]:
    side = "decoder" if decoder else "encoder"
    site = LinearShape(side, 0, "feed_forward", "expand", INPUTS, OUTPUTS, "column")
    torch.manual_seed(1)
    (choice,) = settings.choices(site)
    bank = LowRankBank(site, settings, choice, LANGUAGES, Topology.single())
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return nn.Linear(INPUTS, OUTPUTS), bank


def reference(
    base: nn.Linear, bank: LowRankBank, settings: LowRank, decoder: bool, x: torch.Tensor, ids: SentenceIds
) -> torch.Tensor:
    """Equation 1, with the product formed: (W + V[source] F[target]) x, or V and F of one language."""
    outputs = []
    for sentence in range(x.shape[0]):
        source, target = int(ids.source[sentence]), int(ids.target[sentence])
        own = target if decoder else source
        i, j = (source, target) if settings.index == "pair" else (own, own)
        vertical, flat = bank.vertical[bank.rows[i]].t(), bank.flat[bank.rows[j]]
        outputs.append(F.linear(x[sentence], base.weight + vertical @ flat, base.bias))
    return torch.stack(outputs)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    "numbers", [[0, 0, 1, 3, 3, 5], [4, 0, 4, 2, 0], [1]], ids=["sorted", "unsorted", "one"]
)
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("settings", [PAIR, LANGUAGE, RANKS], ids=["pair", "language", "ranks"])
def test_bank_follows_the_equation(settings, decoder, numbers):
    base, bank = bank_of(settings, decoder)
    ids = ids_of(numbers)
    results = []
    for run in (
        lambda x: bank(base, x, LanguageContext(ids)),
        lambda x: reference(base, bank, settings, decoder, x, ids),
    ):
        x = torch.randn(
            len(numbers), LENGTH, INPUTS, generator=torch.Generator().manual_seed(2)
        ).requires_grad_()
        out = run(x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        gradients = torch.autograd.grad(
            (out * weights).sum(), [x, base.weight, base.bias, bank.flat, bank.vertical]
        )
        results.append([out, *gradients])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("form")
def test_hypotheses_of_a_sentence_share_its_matrices():
    """As a beam search asks: rows [B W, 1, H] seen as [B, W, H]."""
    base, bank = bank_of(PAIR, True)
    x = torch.randn(6, 1, INPUTS)
    context = LanguageContext(ids_of([0, 0, 0, 3, 3, 3]))
    torch.testing.assert_close(
        bank(base, x.view(2, 3, INPUTS), context).view(6, 1, OUTPUTS), bank(base, x, context)
    )


@pytest.mark.parametrize(
    ("index", "encoder", "decoder"),
    [
        ("pair", ("source", "target"), ("source", "target")),
        ("language", ("source", "source"), ("target", "target")),
        ("source", ("source", "source"), ("source", "source")),
        ("target", ("target", "target"), ("target", "target")),
        (
            {"target": ["encoder.1-2", "decoder"], "source": ["all"]},
            ("source", "source"),
            ("target", "target"),
        ),
    ],
)
def test_indexes(index, encoder, decoder):
    settings = LowRank(rank=2, index=index)
    for side, wanted in (("encoder", encoder), ("decoder", decoder)):
        site = LinearShape(side, 0, "feed_forward", "expand", INPUTS, OUTPUTS, "column")
        assert settings.choices(site) == (("", *wanted),)


def model_of(recipe: Recipe, trained: bool) -> Transformer:
    model = Transformer(recipe, 96)
    initialize(model, 1, Topology.single())
    for name, parameter in model.named_parameters():
        if trained and name.endswith("_low_rank.flat"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("at", ["feed_forward", "attention", "both"])
def test_a_new_model_computes_what_the_naive_one_does(at):
    batch = batch_of([0, 1, 2, 3, 4, 5])
    naive, banked = model_of(recipe_of(), False), model_of(recipe_of(rank=3, at=at), False)
    assert torch.equal(naive.logits(*batch), banked.logits(*batch))
    trained = model_of(recipe_of(rank=3, at=at), True)
    assert not torch.allclose(naive.logits(*batch), trained.logits(*batch), atol=1e-2)


def test_where_the_matrices_stand():
    def places(**low_rank):
        names = [
            name
            for name, _ in model_of(recipe_of(**low_rank), False).named_parameters()
            if name.endswith(".flat")
        ]
        return {name.removesuffix("_low_rank.flat") for name in names}

    sides = [f"{side}.{layer}" for side in ("encoder", "decoder") for layer in (0, 1)]
    feed_forward = {f"{layer}.feed_forward.{part}" for layer in sides for part in ("expand", "contract")}
    attention = {
        f"{layer}.attention.{part}" for layer in sides for part in ("query", "key", "value", "output")
    }
    attention |= {
        f"decoder.{i}.cross_attention.{part}" for i in (0, 1) for part in ("query", "key", "value", "output")
    }
    assert places(rank=3) == feed_forward
    assert places(rank=3, at="attention") == attention
    assert places(rank=3, at="both") == feed_forward | attention
    assert places(rank=3, every=2) == {name for name in feed_forward if ".1." in name}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    "low_rank", [{"rank": 3, "at": "both"}, {"rank": RANKS.rank, "index": "language"}], ids=["pair", "ranks"]
)
def test_a_mixed_batch_equals_one_batch_for_each_pair(low_rank):
    model = model_of(recipe_of(**low_rank), True)
    numbers = [3, 0, 5, 0, 2, 3, 1, 4]
    source, target, ids = batch_of(numbers)
    labels = target.roll(-1, 1)

    def loss_and_gradients(rows: list[int]) -> list[torch.Tensor]:
        index = torch.tensor(rows)
        loss = model(source[index], target[index], labels[index], ids.select(index)).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]

    mixed = loss_and_gradients(list(range(len(numbers))))
    parts = [
        loss_and_gradients([i for i, n in enumerate(numbers) if n == number])
        for number in sorted(set(numbers))
    ]
    for found, wanted in zip(mixed, (sum(each) for each in zip(*parts, strict=True)), strict=True):
        # A key's bias has no true gradient: what is there is rounding of others.
        largest = float(wanted.detach().abs().max())
        assert (found - wanted).abs().max() <= 1e-5 * max(largest, 1e-1)


@pytest.mark.parametrize(
    ("low_rank", "message"),
    [
        ({"rank": {"de": 1, "en": 2}, "index": "pair"}, "index: language"),
        ({"rank": {}, "index": "language"}, "names no language"),
        ({"rank": {"de": 1, "en": 2, "fr": 1}, "index": "language"}, "lacks ru"),
        ({"rank": {"de": 1, "en": 2, "fr": 1, "ru": 1, "xx": 1}, "index": "language"}, "names xx"),
        ({"rank": 2, "every": 3}, "choose another 'at' or 'every'"),
        ({"rank": -1}, "greater than or equal to 0"),
        ({"rank": 2, "at": "encoder.0-8"}, "up to 8 of the model, which has 2 and 2 .*: let it end at 1"),
        (
            {"rank": 2, "at": "all", "index": {"source": ["encoder.0-1"], "target": ["1-2", "all"]}},
            "'1-2' names layers up to 2",
        ),
        (
            {"rank": 2, "at": "all", "index": {"source": ["encoder"], "target": ["encoder.1", "all"]}},
            "gives target to 'encoder.1', which decides for no layer: patterns before it do",
        ),
        (
            {"rank": 2, "at": "decoder", "index": {"source": ["encoder"], "target": ["all"]}},
            "gives source to 'encoder', which decides for no layer",
        ),
        ({"rank": 10**9}, r"'rank' is 1000000000, but no layer .* has more than the 24 .*: give at most 24"),
        ({"rank": 9, "columns": 8}, "more than the 8 inputs"),
    ],
)
def test_recipes_that_make_no_sense(low_rank, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(**low_rank)


@pytest.mark.parametrize("numbers", [[0, 0, 1, 3, 3, 5], [1]], ids=["many", "one"])
def test_what_is_left_beyond_a_smaller_rank_is_never_read(monkeypatch, numbers):
    """Memory that is taken without being filled holds NaN here."""
    true_new, true_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: true_new(*a, **o).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: true_like(*a, **o).fill_(float("nan")))
    base, bank = bank_of(RANKS, True)
    x = torch.randn(len(numbers), LENGTH, INPUTS, requires_grad=True)
    out = bank(base, x, LanguageContext(ids_of(numbers)))
    gradients = torch.autograd.grad(out.square().sum(), [x, base.weight, bank.flat, bank.vertical])
    assert all(value.isfinite().all() for value in (out, *gradients))
