"""Grown models: what was there computes the same, what is new begins as it should, and a training begins with
them.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from support.conversions import EN_DE, FR_EN, PAIR_TOP2, global_weights, random_loaded
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_run

from lsmoe_ds.checkpoint.stored import Weights, find_model
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.grown import Likeness, grow, grown_recipe
from lsmoe_ds.inference.load import Loaded, build_model, load
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

LINES = ["ba de fi", "ko la mi nobu", "su", "tabi refu gosi kale mo ba"]
MORE = ["data.languages=[de,fr,nl,cs]"]


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("grown"), TARGET_TOP2, PAIR_TOP2)[0]


def changed(sparse: Loaded, **model) -> Loaded:
    """Return a model with changed settings and all of its weights drawn from a wide distribution."""
    value = sparse.recipe.model_dump(exclude_none=True)
    value["model"] |= model
    recipe = Recipe.model_validate(value)
    made = Transformer(recipe, sparse.vocabulary.size, Topology.single())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return replace(sparse, model=made.eval(), recipe=recipe)


def grown_of(sparse: Loaded, overrides: list[str], tmp_path, like: Likeness | None = None) -> Loaded:
    """As ``lsmoe convert --as grown`` makes it, but of a model in memory."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "recipe.yaml").write_text(sparse.recipe.to_yaml())
    sparse.vocabulary.save(home / "vocabulary.model")
    stored = replace(find_model(sparse.home), home=home, recipe=sparse.recipe)
    recipe, vocabulary = grown_recipe(stored, overrides, tmp_path / "out")
    tensors = grow(global_weights(sparse.model), sparse.recipe, recipe, sparse.vocabulary, like or Likeness())
    model = build_model(recipe, recipe.data.vocabulary.size, Weights(tensors, 0, {}), torch.device("cpu"))
    return replace(
        sparse, model=model, recipe=recipe, vocabulary=Vocabulary(vocabulary), languages=recipe.languages
    )


def assert_same(sparse: Loaded, grown: Loaded, exact: bool = True) -> None:
    for direction in (EN_DE, FR_EN):
        found = compare(sparse, grown, direction, LINES)
        assert found.largest_logit_difference <= (1e-5 if exact else 1e-4)


LOW_RANK = {"rank": 3, "index": "pair", "at": "both"}
RANKS = {"rank": {"de": 2, "en": 3, "fr": 4}, "index": "language", "fuse_distillation": True}


@pytest.mark.parametrize(
    ("encoder", "decoder", "parts"),
    [
        (None, None, {}),
        (None, None, {"low_rank": LOW_RANK}),
        (TARGET_TOP2, PAIR_TOP2, {"low_rank": LOW_RANK}),
        (None, None, {"clsr": {"gate": 4}}),
        (None, TARGET_TOP2, {"clsr": {"gate": 4, "shared": False}}),
        (TOKEN_TOP2, PAIR_TOP1, {}),
        (TARGET_TOP2 | {"fuse_distillation": True}, None, {}),
    ],
    ids=["dense", "low rank", "low rank and experts", "CLSR", "CLSR*", "token", "distilled"],
)
def test_directions_that_were_there_translate_as_before(run, tmp_path, encoder, decoder, parts):
    sparse = changed(random_loaded(run, encoder, decoder), **parts)
    grown = grown_of(sparse, MORE, tmp_path)
    assert (
        grown.languages.codes == ("cs", "de", "en", "fr", "nl")
        and grown.vocabulary.size == sparse.vocabulary.size + 4
    )
    assert grown.vocabulary.unused == (142, 143), "for tensor parallelism"
    assert set(grown.vocabulary.codes) == {"cs", "de", "en", "fr", "nl"}
    assert_same(sparse, grown)
    if parts.get("low_rank"):
        banks = [bank for name, bank in grown.model.named_modules() if name.endswith("_low_rank")]
        new = [bank.rows[grown.languages.id("cs")] for bank in banks]
        assert banks and all(
            not bank.flat[rows].any() and bank.vertical[rows].any()
            for bank, rows in zip(banks, new, strict=True)
        )


def test_directions_bring_their_languages(run, tmp_path):
    """The languages that the trained model's recipe lists lack a new one."""
    sparse = random_loaded(run, None, None)
    assert sparse.recipe.data.languages == ["de", "fr"]
    grown = grown_of(sparse, ["data.directions=[en-de,de-en,en-fr,fr-en,en-nl]"], tmp_path)
    assert grown.languages.codes == ("de", "en", "fr", "nl")
    assert Recipe.model_validate(yaml.safe_load(grown.recipe.to_yaml())) == grown.recipe


@pytest.mark.parametrize("every", [True, False], ids=["all directions", "some between others"])
def test_new_languages_take_no_direction_away(run, tmp_path, every):
    stored = find_model(run)
    chosen = ["en-de", "de-en", "en-fr", "fr-en", "de-fr", *(["fr-de"] if every else [])]
    value = stored.recipe.model_dump(mode="json", exclude_none=True)
    value["data"]["directions"] = chosen
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "recipe.yaml").write_text(Recipe.model_validate(value).to_yaml())
    (tmp_path / "home" / "vocabulary.model").write_bytes(stored.vocabulary.read_bytes())
    before = replace(stored, home=tmp_path / "home", recipe=Recipe.model_validate(value))
    after, _ = grown_recipe(before, ["data.languages=[en,de,fr,cs]"], tmp_path / "out")
    assert set(after.data.directions) >= {*chosen, "en-cs", "cs-en"}
    assert len(after.data.directions) == (12 if every else 7)


def test_the_comparison_can_fail(run, tmp_path):
    """New languages come before old ones: matrices that stayed in their places would be of other
    languages.
    """
    sparse = changed(random_loaded(run, None, None), low_rank=LOW_RANK)
    grown = grown_of(sparse, MORE, tmp_path)
    with torch.no_grad():
        for module in grown.model.modules():
            if hasattr(module, "flat"):
                module.flat.copy_(module.flat.roll(3, 0))
    with pytest.raises(AssertionError):
        assert_same(sparse, grown)


def test_ranks_by_language(run, tmp_path):
    sparse = changed(random_loaded(run, None, None), low_rank=RANKS)
    grown = grown_of(sparse, [*MORE, "model.low_rank.rank={cs: 1, de: 2, en: 3, fr: 4, nl: 4}"], tmp_path)
    assert_same(sparse, grown)
    shared = [replace(each, route="shared") for each in (sparse, grown)]
    assert compare(*shared, EN_DE, LINES).largest_logit_difference <= 1e-6


def test_what_all_languages_share_is_not_taken_away(run, tmp_path):
    sparse = changed(random_loaded(run, None, None), low_rank=RANKS)
    with pytest.raises(UserError, match=r"matrices of .* for shared have 4 rows, which cannot change"):
        grown_of(sparse, ["model.low_rank.fuse_distillation=false"], tmp_path)


def test_ranks_that_change_are_refused(run, tmp_path):
    sparse = changed(random_loaded(run, None, None), low_rank=RANKS)
    with pytest.raises(UserError, match="for de have 2 rows, which cannot change"):
        grown_of(sparse, [*MORE, "model.low_rank.rank={cs: 1, de: 1, en: 3, fr: 4, nl: 4}"], tmp_path)


@pytest.mark.parametrize(
    ("overrides", "exact"),
    [
        (["model.encoder.moe={experts: 4, every: 1, routing: token}"], False),
        (["model.decoder.moe={experts: 2, every: 2, routing: task, fuse_distillation: true}"], False),
        (["model.low_rank={rank: 4, at: both}"], True),
        (["model.clsr={gate: 4, budget: 0.3}"], True),
    ],
    ids=["token experts", "task experts", "low rank", "CLSR"],
)
def test_a_dense_model_becomes_a_sparse_one(run, tmp_path, overrides, exact):
    dense = changed(random_loaded(run, None, None))
    grown = grown_of(dense, overrides, tmp_path)
    assert grown.parameters > dense.parameters
    assert_same(dense, grown, exact)


def test_new_experts_are_copies_and_old_tasks_keep_theirs(run, tmp_path):
    sparse = random_loaded(run, None, PAIR_TOP2)
    grown = grown_of(sparse, ["model.decoder.moe.experts=6", *MORE], tmp_path, Likeness(1, "de"))
    assert_same(sparse, grown)
    weights, before = global_weights(grown.model), global_weights(sparse.model)
    at = "decoder.0.feed_forward."
    for expert in (4, 5):
        assert torch.equal(
            weights[f"{at}experts.{expert}.expand.weight"], before[f"{at}experts.1.expand.weight"]
        )
    # a new pair chooses as the same pair with the language that it is like
    routes = grown.model.decoder[0].feed_forward.router.of_tasks()
    tasks = grown.languages.tasks("pair")
    assert torch.equal(routes.experts[tasks.index("en-nl")], routes.experts[tasks.index("en-de")])
    assert routes.experts[: len(tasks)].max() < 4
    embedding = weights["embedding.tokens.weight"]
    assert torch.equal(embedding[grown.vocabulary.tag_id("nl")], embedding[grown.vocabulary.tag_id("de")])


def test_new_experts_follow_one_another(run, tmp_path):
    sparse = random_loaded(run, TOKEN_TOP2, None)
    weights = global_weights(grown_of(sparse, ["model.encoder.moe.experts=6"], tmp_path).model)
    before = global_weights(sparse.model)
    at = "encoder.1.feed_forward."
    assert torch.equal(weights[f"{at}experts.5.contract.weight"], before[f"{at}experts.1.contract.weight"])
    assert torch.equal(weights[f"{at}router.weight"][:4], before[f"{at}router.weight"])
    assert weights[f"{at}router.weight"][4:].any()


STATIC = PAIR_TOP2 | {"routing": "static", "task": "target"}
REFUSED = [
    (None, TARGET_TOP2, ["data.languages=[de]"], None, "lacks the language fr"),
    (None, None, ["data.tags=source-target"], None, "the model reads target: a grown model keeps its tags"),
    (None, TARGET_TOP2, ["model.decoder.moe.experts=2"], None, "has 4 experts: they can be more, not 2"),
    (None, TARGET_TOP2, ["model.decoder.moe.task=source"], None, "must stay as they are"),
    (
        None,
        TARGET_TOP2,
        ["model.decoder.layers=4", "model.decoder.feed_forward=24"],
        None,
        "all else must stay as it is",
    ),
    (None, TARGET_TOP2, ["model.hidden=32"], None, "should be"),
    (None, TARGET_TOP2, ["model.decoder.moe.every=3"], None, "has no place for"),
    (None, None, ["model.encoder.moe={experts: 4, top_k: 1}"], None, "need 'top_k' of 2 or more"),
    (None, PAIR_TOP2 | {"expert_groups": 2}, ["model.decoder.moe.experts=6"], None, "stand in groups"),
    (None, STATIC, MORE, None, "static routing would assign other experts"),
    (None, TARGET_TOP2, ["model.decoder.moe.experts=6"], Likeness(7), "there is no expert 7"),
    (None, TARGET_TOP2, MORE, Likeness(None, "pl"), "'pl' is not in this system"),
]


@pytest.mark.parametrize(
    ("encoder", "decoder", "overrides", "like", "message"), REFUSED, ids=[message for *_, message in REFUSED]
)
def test_what_cannot_be_grown(run, tmp_path, encoder, decoder, overrides, like, message):
    with pytest.raises(UserError, match=message):
        grown_of(random_loaded(run, encoder, decoder), overrides, tmp_path, like)


def test_nothing_is_taken_away(run, tmp_path):
    with pytest.raises(UserError, match="has no place for"):
        grown_of(
            changed(random_loaded(run, None, None), low_rank=LOW_RANK), ["model.low_rank=null"], tmp_path
        )


def test_a_training_begins_with_a_grown_run(pool, run, tmp_path, monkeypatch):
    from support.loops import loop

    from lsmoe_ds.data.prepare import prepare

    record = convert(
        run, "grown", None, tmp_path / "more", check=8, overrides=["model.encoder.moe.experts=8"]
    )
    assert (
        record["same_translations"] == record["sentences"] > 0
        and record["parameters"] > load(run, "cpu").parameters
    )
    provenance = json.loads((tmp_path / "more" / "provenance.json").read_text())
    assert (provenance["kind"], provenance["grown_from"], provenance["run"]) == (
        "consolidated",
        "small",
        "more",
    )
    assert "with further experts" in (tmp_path / "more" / "README.md").read_text()
    recipe = load(tmp_path / "more", "cpu").recipe
    assert recipe.training.start_from == tmp_path / "more" and recipe.name == "more"
    prepare(recipe)
    assert pool.run(2, loop, recipe, tmp_path / "run", expert=2) == [None, None]
    assert load(tmp_path / "run", "cpu").recipe.model.encoder.moe.experts == 8
