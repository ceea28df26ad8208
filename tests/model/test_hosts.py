"""Models of transformers as hosts: sites, prompts, losses, and matrices beside their linear layers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small_host import (
    END,
    LANGUAGES,
    START,
    TEXT,
    built,
    example,
    host_recipe,
    host_settings,
    write_host,
)

from lsmoe_ds.analysis.findings import find
from lsmoe_ds.config.data import Prompt
from lsmoe_ds.config.host import count_tokens
from lsmoe_ds.config.host_outline import read_outline
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import shapes_of
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.prompts import IGNORED, Prompts
from lsmoe_ds.directions import Direction
from lsmoe_ds.methods.low_rank.bank import LowRankBank
from lsmoe_ds.model.build import outline
from lsmoe_ds.model.host import HostModel
from lsmoe_ds.planning.costs import Parts
from lsmoe_ds.planning.trained import count_trained

pytest.importorskip("transformers")
PRUNE = {"ratio": 0.5, "start": 0, "length": 2}
MODELS = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},  # biases at queries, keys and values
    "Granite": {"logits_scaling": 3.0},  # logits are no plain product
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    return {kind: write_host(folder / kind, kind, **settings) for kind, settings in MODELS.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_without_methods_it_computes_what_transformers_does(hosts, kind, tmp_path):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(hosts[kind], dtype=torch.float32)
    model = built(host_recipe(tmp_path, hosts[kind]))
    tokens, labels, ids = example(model, [0, 1])
    wanted = theirs(input_ids=tokens).logits
    torch.testing.assert_close(model.logits(tokens, ids), wanted)
    losses = model(tokens, labels, torch.ones_like(tokens), ids)
    real = labels != IGNORED
    torch.testing.assert_close(losses.nll, F.cross_entropy(wanted[real], labels[real], reduction="sum"))
    torch.testing.assert_close(losses.loss, losses.nll)
    assert model._head_is_plain is (kind != "Granite")
    assert Parts.of(host_recipe(tmp_path, hosts[kind])).whole.total == theirs.num_parameters()


@pytest.mark.parametrize("kind", MODELS)
def test_label_smoothing_of_any_output_layer(hosts, kind, tmp_path):
    settings = host_settings(tmp_path, hosts[kind])
    settings["training"]["label_smoothing"] = 0.1
    model = built(Recipe.model_validate(settings))
    tokens, labels, ids = example(model, [0, 1])
    found = model.train()(tokens, labels, torch.ones_like(tokens), ids).loss
    real = labels != IGNORED
    logits = model.logits(tokens, ids)[real]
    torch.testing.assert_close(
        found, F.cross_entropy(logits, labels[real], label_smoothing=0.1, reduction="sum")
    )


def test_sites_are_its_linear_layers_under_our_names(hosts, tmp_path):
    model = host_recipe(tmp_path, hosts["Llama"], rank=2, at=["attention.query", "1.feed_forward.gate"]).model
    sizes = {site.at: (site.inputs, site.outputs) for site in shapes_of(model) if model.low_rank.is_at(site)}
    assert sizes == {
        "decoder.0.attention.query": (32, 32),
        "decoder.1.attention.query": (32, 32),
        "decoder.1.feed_forward.gate": (32, 48),
    }
    names = dict.fromkeys(site.name for site in read_outline(model.huggingface, model.task).sites)
    assert list(names) == ["query", "key", "value", "output", "gate", "expand", "contract"]
    assert (model.hidden, model.heads, model.encoder.layers, model.decoder.layers) == (32, 4, 0, 2)


def test_an_outline_has_the_names_and_shapes_of_the_model(hosts, tmp_path):
    recipe = host_recipe(tmp_path, hosts["Qwen2"], rank=2, index="source", at="all")
    tokens = count_tokens(recipe.data.vocabulary.file)
    whole, empty = HostModel(recipe, tokens), outline(recipe, tokens)
    assert [(name, value.shape) for name, value in empty.named_parameters()] == [
        (name, value.shape) for name, value in whole.named_parameters()
    ]
    assert all(value.is_meta for value in empty.parameters())
    assert Parts.of(recipe).whole.total == sum(value.numel() for value in whole.parameters())


MERGED = {  # route: weights (in, out) of directions, and by what
    "specific": {"en-de": (0, 1), "de-en": (1, 0), "en-fr": (0, 1), "fr-en": (1, 0), "de-fr": (0.5, 0.5)},
    "in": dict.fromkeys(("en-de", "de-en", "de-fr"), (1, 0)),
    "out": dict.fromkeys(("en-de", "de-en", "de-fr"), (0, 1)),
    "outputs-1-9": dict.fromkeys(("en-de", "fr-en", "de-fr"), (0.1, 0.9)),
    "matrices-3-1": dict.fromkeys(("en-de", "fr-en", "de-fr"), (0.75, 0.25)),
}


def merged_weight(model: HostModel, at: str, direction: Direction, weights, route: str) -> torch.Tensor:
    """Return W of the host plus what equations 3 and 4 of the paper say."""
    bank = model.get_submodule(f"{at}_low_rank")
    pairs = []
    for choice, code in (("in", direction.source), ("out", direction.target)):
        own = bank.get_submodule(choice)
        rows = {"de": slice(0, 2), "en": slice(0, 0), "fr": slice(2, 4)}[code]  # the pivot has none
        pairs.append((own.vertical[rows].t(), own.flat[rows]))
    (b_in, a_in), (b_out, a_out) = pairs
    base = model.host.get_submodule(model.outline.modules[at]).weight
    if route.startswith("matrices") and "en" not in (direction.source, direction.target):
        first, second = (weight**0.5 for weight in weights)
        return base + (first * b_in + second * b_out) @ (first * a_in + second * a_out)
    return base + weights[0] * b_in @ a_in + weights[1] * b_out @ a_out


@pytest.mark.parametrize("kind", ("Llama", "Qwen2"))
@pytest.mark.parametrize("route", MERGED)
def test_modular_matrices_merge_as_the_paper_says(hosts, kind, route, tmp_path):
    """Equations 2, 3 and 4, in a mixed batch, forward and gradient."""
    recipe = host_recipe(tmp_path, hosts[kind], rank=2, index="modular", at="all")
    model = built(recipe)
    directions = list(MERGED[route])
    tokens, labels, ids = example(model, [list(map(str, LANGUAGES.directions)).index(d) for d in directions])
    trained = {n: p for n, p in model.named_parameters() if "low_rank" in n}
    logits = model.logits(tokens, ids, route)
    real = labels != IGNORED
    F.cross_entropy(logits[real], labels[real], reduction="sum").backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()
    total, sites = 0.0, list(model.outline.modules)
    for number, (name, weights) in enumerate(MERGED[route].items()):
        replaced = {
            f"{model.outline.modules[at]}.weight": merged_weight(
                model, at, Direction.parse(name), weights, route
            )
            for at in sites
        }
        for at in sites:  # the host's own layers alone, without banks
            model.host.get_submodule(model.outline.modules[at]).__dict__.pop("forward", None)
        wanted = torch.func.functional_call(model.host, replaced, (), {"input_ids": tokens[[number]]}).logits
        torch.testing.assert_close(logits[[number]], wanted, atol=1e-5, rtol=1e-5)
        own = labels[number] != IGNORED
        total = total + F.cross_entropy(wanted[0, own], labels[number, own], reduction="sum")
    total.backward()
    for name, parameter in trained.items():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("names", "route", "banks"),
    [
        (["en-de", "en-fr"], "specific", 1),
        (["de-en", "fr-en"], "specific", 1),
        (["en-de", "de-en"], "specific", 2),
        (["de-fr", "de-fr"], "specific", 2),
        (["de-fr", "en-de"], "in", 1),
        (["de-fr", "en-de"], "out", 1),
        (["de-fr", "fr-en"], "outputs-1-9", 2),
    ],
)
def test_one_bank_computes_what_both_do(hosts, names, route, banks, tmp_path, monkeypatch):
    """Where all sentences use matrices of one kind, inference leaves the others out."""
    model = built(host_recipe(tmp_path, hosts["Llama"], rank=2, index="modular", at="all"))
    tokens, _, ids = example(model, [list(map(str, LANGUAGES.directions)).index(name) for name in names])
    wanted = model.logits(tokens, ids, route)
    multiply, used = LowRankBank.multiply, []
    monkeypatch.setattr(
        LowRankBank, "multiply", lambda bank, *arguments: used.append(bank) or multiply(bank, *arguments)
    )
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens, ids, route), wanted)
    assert len(used) == banks * 2 * 7, "in two layers of seven linear layers"


def test_learned_weights_begin_equal_and_are_those_of_direction_and_layer(hosts, tmp_path):
    """Equation 5."""
    recipe = host_recipe(tmp_path, hosts["Llama"], rank=2, index="modular", merge="learned", at="attention")
    model = built(recipe)
    index = model.get_parameter("decoder_low_rank.index")
    assert index.shape == (5, 2, 2) and bool((index == 1.0).all())
    tokens, _, ids = example(model, [0, 4])
    torch.testing.assert_close(model.logits(tokens, ids), model.logits(tokens, ids, "outputs-1-1"))
    index.data[4, :, 0] += torch.tensor(9.0).log()  # 9 to 1 in both layers of de-fr
    found = model.logits(tokens, ids)
    torch.testing.assert_close(
        found[:1], model.logits(tokens[:1], ids.select(torch.tensor([0])), "outputs-1-1")
    )
    torch.testing.assert_close(
        found[1:], model.logits(tokens[1:], ids.select(torch.tensor([1])), "outputs-9-1")
    )
    found[1:].sum().backward()
    assert bool(index.grad[4].any()) and not bool(index.grad[:4].any())


def test_subspaces_beside_all_linear_layers_of_a_host(hosts, tmp_path):
    """The gate of the feed-forward among them, which our own models lack."""
    recipe = host_recipe(tmp_path, hosts["Llama"], rank=2, index="target", at="all", prune=PRUNE)
    weights = dict(built(recipe).state_dict())
    for name, value in weights.items():
        if name.endswith("gate_low_rank.vertical_mask"):
            value.zero_()
    records = find(recipe, weights, "subspaces", "RUN").records
    pruned = {each["linear"] for each in records if each["pruned"] == each["size"]}
    assert pruned == {"gate"} and len({each["linear"] for each in records}) == 7


def test_a_sublayer_with_linear_layers_of_other_names_has_no_matrices(tmp_path):
    """Rather than half of them without a word."""
    host = write_host(tmp_path / "Starcoder2", "Starcoder2")  # whose feed-forward is c_fc and c_proj
    assert host_recipe(tmp_path, host, rank=2, index="target", at="attention")
    with pytest.raises(
        ValueError, match=r"'low_rank' names the feed_forward .* mlp.c_fc is of no known kind"
    ):
        host_recipe(tmp_path, host, rank=2, index="target", at="all")
    with pytest.raises(ValueError, match=r"the linear layers of the Phi3ForCausalLM in .* are not known"):
        host_recipe(tmp_path, write_host(tmp_path / "Phi3", "Phi3", pad_token_id=0))


def test_prompts(hosts):
    tokenizer = HostTokenizer.load(hosts["Llama"] / "tokenizer.json")
    form = Prompts.of(LANGUAGES, tokenizer, Prompt(text=TEXT, end=END))
    texts = ("bade leise", "le\nbad", f"{START}x{END}")
    sources = [tokenizer.encode(text) for text in texts]
    targets = [tokenizer.encode(text) for text in ("dab", "a b", "c")]
    batch = form.collate(sources, targets, [0, 2, 4])
    names = [("English", "German"), ("English", "French"), ("German", "French")]
    start, end = (tokenizer.encode_markup(each) for each in (START, END))
    for row, labels, real, text, source, target, (first, second) in zip(
        batch.tokens.tolist(),
        batch.labels.tolist(),
        batch.real.tolist(),
        texts,
        sources,
        targets,
        names,
        strict=True,
    ):
        prompt = [*start, *tokenizer.encode_markup(f"{first} to {second}:\n"), *source]
        prompt += [*tokenizer.encode_markup("\n"), *start]
        whole = [*prompt, *target, *end]
        count = len(whole) - 1
        assert row[:count] == whole[:-1] and real[:count] == [1] * count and not any(real[count:])
        learned = [*target, *end]
        assert labels[: len(prompt) - 1] == [IGNORED] * (len(prompt) - 1)
        assert labels[len(prompt) - 1 : count] == learned and set(labels[count:]) <= {IGNORED}
        assert tokenizer.decode(source) == " ".join(text.split()), "special tokens of a text are text"
    assert batch.target_tokens == sum(map(len, targets)) + 3
    asked = form.collate(sources, None, [0, 2, 4])
    for real in asked.real:
        assert real.tolist() == sorted(real.tolist()), "padded at the beginning"
    prompts = [len(source) + form.overhead(d)[0] for source, d in zip(sources, (0, 2, 4), strict=True)]
    assert asked.real.sum(1).tolist() == prompts
    assert np.array_equal(asked.labels.unique(), [IGNORED])


@pytest.mark.parametrize("groups", [None, {"high": ["en"], "low": ["de", "fr"]}])
def test_a_pivot_needs_no_rank_and_counts_nothing(hosts, tmp_path, groups):
    settings = host_settings(tmp_path, hosts["Llama"], rank={"low": 3} if groups else {"de": 3, "fr": 3})
    settings["model"]["low_rank"] |= {"index": "modular", "at": "attention.query"}
    settings["data"]["groups"] = groups
    recipe = Recipe.model_validate(settings)
    banks = {name: p for name, p in built(recipe).named_parameters() if "low_rank" in name}
    assert {tuple(each.shape) for each in banks.values()} == {(6, 32)} and len(banks) == 2 * 2 * 2
    assert count_trained(recipe).total == 8 * 6 * 32
