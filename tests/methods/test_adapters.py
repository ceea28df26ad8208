"""Adapters against their equation in plain torch, and as layers of a dense model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.language_layers import LANGUAGES, batches_of, ids_of, ids_zero, same_gradients
from support.sameness import VOCABULARY, recipe_for
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, train_and_save, write_corpus
from torch import nn

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.checkpoint.stored import find_model, read_weights, write_folder
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction, Languages, english_centric
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.adapters.method import AdapterBank
from lsmoe_ds.methods.adapters.settings import Adapters
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.plan import plan

HIDDEN, WIDTH, LENGTH = 6, 3, 4
NUMBERS = [0, 3, 3, 5, 2, 0]
FAMILIES = {"west": ["de", "fr"]}
SETTINGS = {
    "pair": Adapters(width=WIDTH),
    "family": Adapters(width=WIDTH, by="family", families=FAMILIES),
    "language": Adapters(width=WIDTH, by="language"),
}


def bank_of(settings: Adapters, side: str) -> AdapterBank:
    holders = settings.holders(LANGUAGES)
    names = list(dict.fromkeys(holders))
    bank = AdapterBank(HIDDEN, WIDTH, [names.index(each) for each in holders], settings.kind(side))
    torch.manual_seed(1)
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


def holder(settings: Adapters, side: str, direction: Direction) -> str:
    """Whose adapter a sentence uses, as the papers say."""
    if settings.by == "language":
        return direction.target if side == "decoder" else direction.source
    if settings.by == "pair":
        return str(direction)
    source, target = ({"de": "west", "fr": "west"}.get(code, code) for code in str(direction).split("-"))
    return f"{source} - {target}"


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("by", SETTINGS)
def test_an_adapter_follows_its_equation(by, side):
    settings, bank, ids = SETTINGS[by], bank_of(SETTINGS[by], side), ids_of(NUMBERS)
    names = list(dict.fromkeys(settings.holders(LANGUAGES)))
    x = torch.randn(len(NUMBERS), LENGTH, HIDDEN, requires_grad=True)

    def equation():
        rows = []
        for sentence, number in enumerate(NUMBERS):
            k = names.index(holder(settings, side, LANGUAGES.directions[number]))
            own = slice(k * WIDTH, (k + 1) * WIDTH)
            normed = F.layer_norm(x[sentence], (HIDDEN,), bank.scale[k], bank.shift[k])
            units = F.relu(F.linear(normed, bank.down[own], bank.inner[k]))
            rows.append(x[sentence] + F.linear(units, bank.up[own].t(), bank.outer[k]))
        return torch.stack(rows)

    same_gradients(lambda: bank(x, LanguageContext(ids)), equation, [x, *bank.parameters()])
    mixed = bank(x, LanguageContext(ids))
    for sentence, number in enumerate(NUMBERS):
        alone = bank(x[sentence : sentence + 1], LanguageContext(ids_of([number])))
        torch.testing.assert_close(mixed[sentence], alone[0])


def test_families_are_those_of_the_table_and_english_is_one_by_itself():
    languages = Languages(tuple(english_centric(["de", "nl", "fr", "ru"])))
    found = dict(zip(map(str, languages.directions), Adapters(by="family").holders(languages), strict=True))
    assert found["en-de"] == found["en-nl"] == "en - Indo-European, Germanic"
    assert found["de-en"] == "Indo-European, Germanic - en"
    assert len(set(found.values())) == 6
    unknown = Languages(tuple(english_centric(["xx", "yy"])))
    assert len(set(Adapters(by="family").holders(unknown))) == 4, "unknown families are not one"
    moved = Languages(LANGUAGES.directions)
    west, east = ({"a": ["de", "fr"], "b": ["ru"]}, {"a": ["de"], "b": ["fr", "ru"]})
    before, after = (Adapters(by="family", families=each).holdings(moved) for each in (west, east))
    assert before != after, "or a language would get the adapter of another family"


def model_of(recipe: Recipe) -> Transformer:
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    return model.eval()


def test_a_new_adapter_changes_nothing():
    value = recipe_for("dense", 1, 1, 0).model_dump(exclude_unset=True)
    plain = model_of(Recipe.model_validate(value))
    value["model"]["adapters"] = {"width": 5}
    adapted = model_of(Recipe.model_validate(value))
    assert any(parameter.any() for name, parameter in adapted.named_parameters() if name.endswith(".down"))
    (batch,) = batches_of(Recipe.model_validate(value), 1)
    wanted = plain.logits(batch.source, batch.decoder_input, batch.ids)
    torch.testing.assert_close(adapted.logits(batch.source, batch.decoder_input, batch.ids), wanted)


EVERYTHING = {
    "adapters": {"width": 5, "at": ["encoder.1", "decoder"]},
    "low_rank": {"rank": 2, "at": "both"},
    "neurons": {"random": 0.5, "remove": "rows"},
}


@pytest.mark.parametrize("routing", ["dense", "target"])
@pytest.mark.parametrize("by", ["pair", "family", "language"])
def test_the_dense_model_of_a_direction_has_adapters_as_layers(routing, by):
    value = recipe_for(routing, 1, 1, 0).model_dump(exclude_unset=True)
    value["model"] |= EVERYTHING
    value["model"]["adapters"] = EVERYTHING["adapters"] | {"by": by}
    recipe = Recipe.model_validate(value)
    model = model_of(recipe).double()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "_adapters." in name or "_low_rank." in name or name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    names = global_names(model, Topology.single())
    weights = {names[name]: value for name, value in model.state_dict().items()}
    (batch,) = batches_of(recipe, 1)
    for number, direction in enumerate(recipe.languages.directions):
        tensors, dense = extract(weights, recipe, direction)
        assert (dense.model.encoder.layers, dense.model.decoder.layers) == (3, 4)
        assert dense.model.encoder.feed_forward[2] == dense.model.decoder.feed_forward[1] == 5
        ids = batch.ids.select(torch.arange(len(batch.source)))
        ids.direction.fill_(number)
        ids.source.fill_(recipe.languages.id(direction.source))
        ids.target.fill_(recipe.languages.id(direction.target))
        wanted = model.logits(batch.source, batch.decoder_input, ids)
        alone = Transformer(dense, VOCABULARY).double().eval()
        alone.load_state_dict(dict(tensors))
        found = alone.logits(batch.source, batch.decoder_input, ids_zero(ids))
        real = batch.decoder_input != PAD
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by", ["pair", "language"])
def test_a_plan_counts_adapters_and_the_layers_that_they_become(by):
    value = recipe_for("dense", 1, 1, 0).model_dump(exclude_unset=True)
    value["model"]["adapters"] = {"width": 5, "by": by, "at": "decoder"}
    recipe = Recipe.model_validate(value)
    model, planned = Transformer(recipe, 2 * VOCABULARY), plan(recipe)
    assert planned.parameters.whole.total == sum(each.numel() for each in model.parameters())
    names = global_names(model, Topology.single())
    weights = {names[name]: value for name, value in model.state_dict().items()}
    tensors, _ = extract(weights, recipe, recipe.languages.directions[0])
    assert planned.serving.whole.total == tensors.numbers


def test_the_sizes_of_the_paper():
    """Compare sizes with "Neuron Specialization", appendix A.2: 3.2M and 6.4M for a pair, 25.3M for a family.

    The paper has two adapters after each of 12 layers; one after each has as much at twice the width.
    """
    for hidden, width, paper in ((512, 128, 3.2), (1024, 128, 6.4), (1024, 512, 25.3)):
        assert 24 * Adapters(width=width).one(hidden) / 1e6 == pytest.approx(paper, abs=0.07)
        assert 12 * Adapters(width=2 * width).one(hidden) / 1e6 == pytest.approx(paper, abs=0.1)


@pytest.fixture(scope="module")
def adapted(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    write_corpus(folder)
    value = make_recipe(folder, None, TARGET_TOP2).model_dump(mode="json", exclude_none=True)
    value["model"]["adapters"] = {"width": 6}
    recipe = Recipe.model_validate(value)
    data = prepare(recipe)
    open_run(recipe, folder / "run", data.folder / "vocabulary.model")
    pool.run(1, train_and_save, recipe, folder / "run", data.vocabulary.size)
    return folder / "run"


@pytest.mark.parametrize("to", ["dense", "huggingface", "ctranslate2"])
def test_exports_of_a_direction_translate_the_same(adapted, to, tmp_path):
    record = convert(adapted, to, Direction("fr", "en"), tmp_path / to, check=20)
    assert record["same_translations"] == record["sentences"] == 20
    assert to == "ctranslate2" or record["largest_logit_difference"] <= 1e-4
    assert find_model(tmp_path / to).recipe.model.encoder.layers == 4


def test_new_directions_get_adapters_and_the_others_keep_theirs(adapted, tmp_path):
    more = ["data.languages=[de, fr, en]", "data.directions=all"]
    convert(adapted, "grown", None, tmp_path / "grown", check=0, overrides=more)
    old, new = (find_model(each) for each in (adapted, tmp_path / "grown"))
    before, after = read_weights(old).tensors, read_weights(new).tensors
    places = [stored.recipe.languages.directions for stored in (old, new)]
    for name in [name for name in before if "_adapters." in name]:
        rows = 6 if name.endswith((".down", ".up")) else 1
        for number, direction in enumerate(places[0]):
            at = places[1].index(direction)
            assert torch.equal(
                before[name][number * rows : (number + 1) * rows], after[name][at * rows : (at + 1) * rows]
            )
        assert len(after[name]) == 6 * rows


@pytest.fixture(scope="module")
def by_family(adapted, tmp_path_factory):
    """Write an untrained model with adapters of two families, and return its folder."""
    stored = find_model(adapted)
    value = stored.recipe.model_dump(mode="json", exclude_none=True)
    value["model"]["adapters"] = {"width": 6, "by": "family", "families": {"a": ["de"], "b": ["fr"]}}
    recipe = Recipe.model_validate(value)
    model = Transformer(recipe, recipe.data.vocabulary.size)
    initialize(model, 1, Topology.single())
    names = global_names(model, Topology.single())
    weights = {names[name]: value for name, value in model.state_dict().items()}
    folder, made = (
        tmp_path_factory.mktemp("families") / "model",
        {"kind": "consolidated", "run": "a", "step": 0},
    )
    write_folder(folder, weights, recipe, stored.vocabulary, made)
    return folder


@pytest.mark.parametrize(
    ("families", "says"),
    [
        ("{a: [fr], b: [de]}", "moves de from the family 'a' to 'b', whose adapters have not learned it"),
        ("{a: [de, fr]}", "moves fr from the family 'b' to 'a'"),
        ("{a: [de]}", "moves fr from the family 'b' to 'fr'"),
    ],
)
def test_a_grown_model_keeps_the_families_of_its_languages(by_family, tmp_path, families, says):
    with pytest.raises(UserError, match=f"'model.adapters' {says}"):
        convert(
            by_family, "grown", None, tmp_path / "grown", overrides=[f"model.adapters.families={families}"]
        )


def test_a_new_language_may_join_a_family(by_family, tmp_path):
    more = ["data.languages=[de, fr, nl]", "model.adapters.families={b: [fr], a: [nl, de]}"]
    convert(by_family, "grown", None, tmp_path / "grown", check=0, overrides=more)
    before, after = (read_weights(find_model(each)).tensors for each in (by_family, tmp_path / "grown"))
    banks = [name for name in before if "_adapters." in name]
    assert banks and all(before[name].shape == after[name].shape for name in banks)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"families": {"west": ["de"]}}, "'families' lists families, but 'by' is pair"),
        ({"by": "family", "families": {"west": ["de", "de"]}}, "'adapters.families' has de twice"),
        ({"by": "family", "families": {"west": ["nl"]}}, "'adapters.families' names nl: it may have de, en"),
        (
            {"by": "family", "families": {"a - b": ["de", "ru"]}},
            "'adapters.families' has a family 'a - b', but ' - ' stands between two families",
        ),
        (
            {"by": "family", "families": {"fr": ["de", "ru"]}},
            "'adapters.families' has a family 'fr', which is",
        ),
        ({"at": "encoder.2"}, r"'encoder\.2' names no layer of the model, which has 2 and 2"),
        ({"at": "attention"}, "'attention' names no layer"),
    ],
)
def test_what_does_not_fit_is_refused(section, says):
    value = recipe_for("dense", 1, 1, 0).model_dump(exclude_unset=True)
    value["model"]["adapters"] = section
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate(value)


def test_directions_that_were_never_trained():
    new, languages = Direction("fr", "de"), Languages((*LANGUAGES.directions, Direction("de", "fr")))
    assert SETTINGS["language"].stand_in(new, languages) is None
    assert SETTINGS["family"].stand_in(new, languages) == Direction("de", "fr"), "of the same families"
    with pytest.raises(ValueError, match="no adapter of fr-de was trained: train it, or use 'by: language'"):
        SETTINGS["pair"].stand_in(new, languages)


def test_no_hybrid_has_them(tmp_path):
    recipe = make_recipe(tmp_path, TOKEN_TOP2, None)
    recipe.model.adapters = Adapters(width=4)
    with pytest.raises(UserError, match=r"'model\.adapters' becomes separate layers"):
        extract({}, recipe, Direction("en", "de"), hybrid=True)
