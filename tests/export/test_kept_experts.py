"""Models routed by token with the experts that a direction uses most, and dense ones with one a layer."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from sacrebleu.metrics import CHRF
from support.commands import main
from support.conversions import EN_DE, global_weights, random_loaded
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_run

from lsmoe_ds.analysis.measuring import measure_use
from lsmoe_ds.checkpoint.stored import Weights, find_model, read_weights
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.kept_experts import Keep, keep_one, keep_used
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.inference.load import build_model, load
from lsmoe_ds.inference.translate import translate

TOKEN_TOP1 = TOKEN_TOP2 | {"top_k": 1}
SENTENCE = TOKEN_TOP2 | {"routing": "sentence"}


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("kept"), TOKEN_TOP2, TOKEN_TOP1, 4, tensor=2, expert=2)[0]


def data_of(run) -> PreparedData:
    return PreparedData.of(find_model(run).recipe, run)


def loaded_with(run, encoder, decoder):
    """Return a model with widely spread weights, and the weights and recipe of en-de with all experts."""
    sparse = random_loaded(run, encoder, decoder)
    generator = torch.Generator().manual_seed(5)
    for _, layer in sparse.model.moe_layers():
        with torch.no_grad():  # no two experts with the same row, or either may be chosen
            layer.router.weight.normal_(0, 2.0, generator=generator)
    weights, recipe = extract(global_weights(sparse.model), sparse.recipe, EN_DE, hybrid=True)
    return sparse, weights, recipe


def built(sparse, weights, recipe):
    model = build_model(recipe, sparse.vocabulary.size, Weights(weights, 0, {}), torch.device("cpu"))
    return replace(sparse, model=model, recipe=recipe, languages=recipe.languages, kind="hybrid")


def logits_of(loaded, data) -> torch.Tensor:
    from lsmoe_ds.data.forms import form_of

    pairs, number = data.tokens(EN_DE, "dev"), loaded.languages.direction_id(EN_DE)
    form = form_of(loaded.recipe.data, loaded.languages, loaded.vocabulary)
    batch = form.collate(
        [pairs.source[i] for i in range(5)], [pairs.target[i] for i in range(5)], [number] * 5
    )
    with torch.inference_mode():
        return loaded.logits_of(batch)[batch.read]


@pytest.mark.parametrize("routing", [TOKEN_TOP2, TOKEN_TOP1, SENTENCE], ids=["top-2", "top-1", "sentence"])
def test_use_is_the_mean_weight_of_a_token(run, routing):
    sparse, data = random_loaded(run, routing, TARGET_TOP2), data_of(run)
    found = measure_use(sparse, data, EN_DE)
    layer = sparse.model.get_submodule("encoder.1.feed_forward")
    total, tokens = torch.zeros(routing["experts"], dtype=torch.float64), 0
    original = layer.forward

    def forward(x, real, context):
        nonlocal tokens
        for states in (x[row][real[row]] for row in range(len(x))):
            read = states.mean(0, keepdim=True).expand_as(states) if routing is SENTENCE else states
            probabilities = (read @ layer.router.weight.t()).softmax(-1)
            for row in probabilities:
                weights, experts = row.topk(routing["top_k"])
                share = weights / weights.sum() if routing["top_k"] > 1 else weights
                for expert, weight in zip(experts.tolist(), share.tolist(), strict=True):
                    total[expert] += weight
                tokens += 1
        return original(x, real, context)

    layer.forward = forward
    again = measure_use(sparse, data, EN_DE)
    torch.testing.assert_close(found["encoder", 1], total / tokens, rtol=1e-5, atol=1e-6)
    assert torch.equal(again["encoder", 1], found["encoder", 1])
    assert float(found["encoder", 1].sum()) == pytest.approx(1.0) or routing is TOKEN_TOP1


@pytest.mark.parametrize("keep", [Keep(number=4), Keep(share=1.0)], ids=["number", "share"])
def test_keeping_all_changes_nothing(run, keep):
    sparse, weights, recipe = loaded_with(run, TOKEN_TOP2, TARGET_TOP2)
    uses = {place: torch.rand(4, dtype=torch.float64) + 0.1 for place in [("encoder", 1)]}
    kept, changed, said = keep_used(weights, recipe, uses, keep)
    assert changed == recipe and said == {"encoder": {"kept": 4, "of": 4, "least_use": 1.0}}
    assert kept.keys() == weights.keys() and all(torch.equal(kept[name], weights[name]) for name in kept)
    data = data_of(run)
    assert torch.equal(
        logits_of(built(sparse, kept, changed), data), logits_of(built(sparse, weights, recipe), data)
    )


@pytest.mark.parametrize("routing", [TOKEN_TOP2, TOKEN_TOP1, SENTENCE], ids=["top-2", "top-1", "sentence"])
def test_tokens_choose_among_the_experts_that_are_left(run, routing):
    """The same as the whole model in which the others have no probability."""
    sparse, weights, recipe = loaded_with(run, routing, routing)
    data = data_of(run)
    uses = measure_use(sparse, data, EN_DE)
    kept, changed, said = keep_used(weights, recipe, uses, Keep(number=2))
    assert changed.model.encoder.moe.experts == 2 == said["decoder"]["kept"]
    assert Tensors.of(kept).numbers < Tensors.of(weights).numbers
    pruned = logits_of(built(sparse, kept, changed), data)
    whole = built(sparse, weights, recipe)
    least = {"encoder": [], "decoder": []}
    for (side, _), (name, layer) in zip(uses, whole.model.moe_layers(), strict=True):
        assert side == name
        use = uses[side, int(layer_number(whole, layer))]
        left = use.argsort(descending=True, stable=True)[:2]
        least[side].append(float(use[left].sum() / use.sum()))
        hide = torch.ones(4, dtype=torch.bool)
        hide[left] = False
        layer.router.bias = torch.nn.Parameter(torch.zeros(4).masked_fill(hide, -1e9), requires_grad=False)
    torch.testing.assert_close(logits_of(whole, data), pruned, rtol=1e-5, atol=1e-5)
    for side, each in said.items():
        assert each["least_use"] == pytest.approx(min(least[side]), abs=1e-4)
    assert (pruned - logits_of(built(sparse, weights, recipe), data)).abs().max() > 1e-3, (
        "or nothing is shown"
    )


def layer_number(loaded, layer) -> str:
    (name,) = [name for name, module in loaded.model.named_modules() if module is layer]
    return name.split(".")[1]


@pytest.mark.parametrize(
    ("share", "second", "both"),
    [(0.3, 1, 2), (0.5, 1, 2), (0.75, 2, 3), (0.76, 3, 3), (0.95, 3, 4), (1.0, 3, 4)],
)
def test_a_share_is_covered_in_every_layer(share, second, both):
    uses = [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.0, 0.25, 0.25])]
    uses = [each.double() for each in uses]
    assert Keep(share=share).count(uses[1:], 1) == second
    assert Keep(share=share).count(uses, 2) == both


def test_one_expert_for_all(run):
    sparse, weights, recipe = loaded_with(run, TOKEN_TOP2, TOKEN_TOP1)
    uses = measure_use(sparse, data_of(run), EN_DE)
    place = next(place for place in uses if place[0] == "decoder")
    at = f"decoder.{place[1]}.feed_forward."
    use = uses[place]
    used, dense = keep_one(weights, recipe, uses, "used")
    mean, _ = keep_one(weights, recipe, uses, "mean")
    assert dense.model.encoder.moe is dense.model.decoder.moe is None
    best = int(use.argmax())
    torch.testing.assert_close(used[f"{at}expand.weight"], weights[f"{at}experts.{best}.expand.weight"])
    torch.testing.assert_close(
        used[f"{at}contract.bias"], weights[f"{at}experts.{best}.contract.bias"] * float(use.sum())
    )
    wanted = sum(float(use[e]) * weights[f"{at}experts.{e}.contract.weight"] for e in range(4))
    torch.testing.assert_close(mean[f"{at}contract.weight"], wanted)
    shares = use / use.sum()
    wanted = sum(float(shares[e]) * weights[f"{at}experts.{e}.expand.bias"] for e in range(4))
    torch.testing.assert_close(mean[f"{at}expand.bias"], wanted)
    assert logits_of(built(sparse, used, dense), data_of(run)).isfinite().all()


def test_experts_are_read_one_at_a_time(run, monkeypatch):
    whole = load(run, "cpu")
    streamed = load(run, "cpu", streamed=True)
    experts = [
        expert
        for _, layer in streamed.model.moe_layers()
        for expert in layer.deepspeed_moe.experts.deepspeed_experts
    ]
    assert all(parameter.is_meta for expert in experts for parameter in expert.parameters())
    most = 0
    forward = type(experts[0]).forward

    def counted(self, *arguments):
        nonlocal most
        most = max(most, sum(not each.expand.weight.is_meta for each in experts))
        return forward(self, *arguments)

    monkeypatch.setattr(type(experts[0]), "forward", counted)
    data = data_of(run)
    found, wanted = (measure_use(each, data, EN_DE) for each in (streamed, whole))
    assert most == 1 and found.keys() == wanted.keys()
    assert all(torch.equal(found[place], wanted[place]) for place in found)
    assert all(parameter.is_meta for expert in experts for parameter in expert.parameters())


def test_folders_of_both_kinds(run, tmp_path):
    record = convert(run, "hybrid", EN_DE, tmp_path / "kept", check=4, keep="0.5")
    whole = convert(run, "hybrid", EN_DE, tmp_path / "all", check=4)
    assert record["parameters"] < whole["parameters"] and record["sentences"] == 4
    provenance = json.loads((tmp_path / "kept" / "provenance.json").read_text())
    number = provenance["kept_experts"]["encoder"]["kept"]
    assert load(tmp_path / "kept", "cpu").recipe.model.encoder.moe.experts == number
    card = (tmp_path / "kept" / "README.md").read_text()
    assert f"| experts of the encoder | {number} of 4 in each layer, with" in card and "keep those" in card
    record = convert(run, "dense", EN_DE, tmp_path / "one", check=4, experts="used")
    assert record["approximates"] == "the most used expert stands for all of a layer"
    assert not (run / "conversion.json").exists(), "the report tells of models that are equal"
    assert "a start for training" in (tmp_path / "one" / "README.md").read_text()
    convert(tmp_path / "one", "huggingface", None, tmp_path / "theirs", check=0)
    provenance = json.loads((tmp_path / "theirs" / "provenance.json").read_text())
    assert provenance["approximates"] == record["approximates"]
    assert len(read_weights(find_model(tmp_path / "theirs")).tensors)


def test_cards_of_what_was_pruned_before(run, tmp_path):
    """Cards tell the whole history, and whether scores are of the model itself or of the one before."""

    def card(source: str, to: str, name: str, direction: Direction | None = EN_DE, **options: Any) -> str:
        convert(tmp_path / source, to, direction, tmp_path / name, check=0, **options)
        return (tmp_path / name / "README.md").read_text()

    def evaluated(name: str) -> None:
        assert main(["evaluate", str(tmp_path / name), "--directions", "en-de", "--limit", "2"]) == 0

    (tmp_path / "run").symlink_to(run)
    evaluated("run")
    alike, pruned, whole = "It computes what that model computes", "not exactly\nalike", "as it was trained"
    before = "They are of the model before experts were removed from it."
    same = card("run", "hybrid", "all", keep="4")
    assert alike in same and pruned not in same and before not in same
    assert whole in card("run", "consolidated", "whole", None)
    three = card("run", "hybrid", "three", keep="3")
    assert pruned in three and before in three
    first, parameters = (
        re.search(rf"\| {name} \| (.*) \|", three)[1] for name in ("experts of the encoder", "parameters")
    )
    assert first.startswith("3 of 4 in each layer, with ")

    evaluated("three")
    for name, text in (
        ("again", card("three", "hybrid", "again", keep="3")),
        ("consolidated", card("three", "consolidated", "consolidated", None)),
        ("twice", card("consolidated", "hybrid", "twice")),
    ):
        assert f"| experts of the encoder | {first} |" in text and f"| parameters | {parameters} |" in text, (
            name
        )
        assert pruned in text and whole not in text and before not in text, name
    two = card("three", "hybrid", "two", keep="2")
    assert load(tmp_path / "two", "cpu").recipe.model.encoder.moe.experts == 2
    assert re.search(rf"\| 2 of 3 in each layer, with .* or more; before that, {re.escape(first)} \|", two)
    assert before in two
    grown = card("three", "grown", "grown", None, overrides=["model.encoder.moe.experts=4"])
    assert f"| experts of the encoder before it was grown | {first} |" in grown
    assert f"(before: {parameters.split()[0]})" in grown
    one = card("three", "dense", "one", experts="mean")
    assert f"| experts of the encoder before they were joined | {first} |" in one and before in one
    assert "a start for training" in card("one", "consolidated", "one-whole", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("hybrid", "--keep", "1"), "--keep is 1: layers can keep 2 to 4 experts"),
        (("hybrid", "--keep", "5"), "--keep is 5: layers can keep 2 to 4 experts"),
        (("hybrid", "--keep", "1.5"), "--keep is '1.5': give the number of experts of a layer, as in 16"),
        (("hybrid", "--keep", "0"), "--keep is '0': give the number"),
        (("hybrid", "--keep", "many"), "--keep is 'many': give the number"),
        (("hybrid", "--keep", ""), "--keep is '': give the number"),
        (("dense", "--keep", "2"), "--keep is for --as hybrid or huggingface, not for dense"),
        (("hybrid", "--experts", "used"), "--experts is for --as dense, not for hybrid"),
        (("dense", "--experts", "all"), "--experts is 'all': choose used or mean"),
    ],
)
def test_options_that_do_not_fit(run, tmp_path, capsys, options, message):
    arguments = ["convert", str(run), "--direction", "en-de", "--out", str(tmp_path / "out"), "--as"]
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_with_a_plain_equal_needs_neither(run):
    plain = random_loaded(run, TARGET_TOP2, PAIR_TOP1)
    with pytest.raises(UserError, match="of this one --as dense makes an exact dense model"):
        extract(global_weights(plain.model), plain.recipe, EN_DE, hybrid=True)
    dense = random_loaded(run, None, None)
    with pytest.raises(UserError, match="the model is dense: there are no experts to keep"):
        extract(global_weights(dense.model), dense.recipe, EN_DE, hybrid=True)


def test_the_curve_of_fewer_experts(run, tmp_path, capsys):
    out = tmp_path / "curve"
    options = ["--direction", "en-de", "--limit", "6", "--beam", "2", "--split", "test", "--out", str(out)]
    assert main(["analyze", "experts", str(run), *options]) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    rows = list(csv.DictReader((out / "experts.csv").open()))
    assert [row["kept"] for row in rows] == ["4", "2"], "the decoder's tokens choose one, the encoder's two"
    sources, targets = (side[:6] for side in data_of(run).text(EN_DE, "test"))
    whole = load(run, "cpu")
    for row in rows:
        folder = tmp_path / row["kept"]
        made = convert(run, "hybrid", EN_DE, folder, check=0, keep=row["kept"])
        assert int(row["parameters"]) == made["parameters"]
        engine = whole if row["kept"] == "4" else load(folder, "cpu")
        lines = list(translate(engine, EN_DE, sources, beam=2))
        score = CHRF(word_order=2).corpus_score(lines, [targets]).score
        assert float(row["chrfpp"]) == pytest.approx(score, abs=0.01)
    picture = (out / "experts.svg").read_text()
    assert picture.count("<circle") == 2 and "million parameters" in picture
    capsys.readouterr()
    assert main(["analyze", "experts", str(run), *options, "--keep", "3", "--keep", "9"]) == 2
    assert "--keep is 9: layers can keep 2 to 4 experts" in capsys.readouterr().err
    # It could be translated, but has no text by which use is measured.
    assert main(["analyze", "experts", str(run), "--direction", "fr-de", "--out", str(out)]) == 2
    assert "lsmoe: there is no prepared text for fr-de in" in capsys.readouterr().err


def test_a_curve_is_of_experts_that_tokens_choose(pool, tmp_path, capsys):
    run = make_run(pool, tmp_path, TARGET_TOP2, None)[0]
    options = ["--direction", "en-de", "--out", str(tmp_path / "curve")]
    assert main(["analyze", "experts", str(run), *options]) == 2
    assert "are kept in models that route by token or sentence" in capsys.readouterr().err
