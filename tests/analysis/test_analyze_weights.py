"""`lsmoe analyze structure` and `subspaces`: what trained low-rank matrices tell."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from support.layouts import ONE, train
from support.small_run import make_recipe, write_corpus

from lsmoe_ds.analysis.findings import analyze_weights, find
from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import LinearShape, shapes_of
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.low_rank.analysis import scores, structure
from lsmoe_ds.model.freezing import choose
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.report.report import render_report

LOW_RANK = {
    "rank": {"de": 2, "en": 1, "fr": 3},
    "index": {"source": ["encoder.0.query"], "learned": ["all"]},
    "at": "all",
    "prune": {"ratio": 0.5, "start": 0, "length": 2, "over": "layer"},
}


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyze")
    write_corpus(folder)
    value = make_recipe(folder, None, None).model_dump(mode="json")
    value["model"]["low_rank"] = LOW_RANK
    value["training"] |= {"steps": 3, "checkpoint_every": 3}
    recipe = Recipe.model_validate(value)
    prepare(recipe)
    train(pool, recipe, folder / "run", ONE)
    return folder / "run"


MEANS = ("languages", "layers")  # grids of subspaces


def rows_in(path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_structure_is_the_softmax_of_each_layers_numbers(run, tmp_path):
    summary = analyze_weights(run, "structure", tmp_path / "out")
    weights = read_checkpoint(run / "checkpoints" / "step-3").weights
    rows = rows_in(tmp_path / "out" / "structure.csv")
    assert [(row["side"], row["layer"]) for row in rows] == [
        *(("encoder", str(i)) for i in range(2)),
        *(("decoder", str(i)) for i in range(3)),
    ]
    for row in rows:
        both = torch.softmax(weights[f"{row['side']}_low_rank.index"][int(row["layer"])], 0)
        assert [float(row["source"]), float(row["target"])] == pytest.approx(both.tolist())
        assert float(row["source"]) != 0.5 and row["chosen"] == ("source" if both[0] > both[1] else "target")
    assert set(summary["files"]) == {
        "index.html",
        "weights.svg",
        "structure.json",
        "structure.csv",
        "recipe.yaml",
    }
    places = [f"{row['side']}.{row['layer']}" for row in rows]
    alike = [
        place
        for place, row in zip(places, rows, strict=True)
        if abs(float(row["source"]) - float(row["target"])) < 0.1
    ]
    assert alike and summary["said"].endswith(f"which say little: {', '.join(alike)}")
    again = analyze_weights(run, "structure", tmp_path / "out")
    assert again == summary


def test_the_recipe_with_the_chosen_index_has_no_other_half(run, tmp_path):
    analyze_weights(run, "structure", tmp_path / "out")
    chosen = {
        (row["side"], int(row["layer"])): row["chosen"] for row in rows_in(tmp_path / "out" / "structure.csv")
    }
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    section = recipe.model.low_rank
    for site in shapes_of(recipe.model):
        if isinstance(site, LinearShape):
            alone = (site.side, site.layer, site.sublayer, site.name) == ("encoder", 0, "attention", "query")
            assert section.index_at(site) == ("source" if alone else chosen[site.side, site.layer]), site
    names = [name for name, _ in Transformer(recipe, 96).named_parameters() if "_low_rank." in name]
    assert names and not any(".source." in name or ".target." in name or "index" in name for name in names)


@pytest.mark.parametrize(
    ("trainable", "wanted"),
    [
        ("methods", "methods"),
        (["*low_rank*", "*_norm.*"], ["*low_rank*", "*_norm.*"]),
        (["encoder_low_rank.index", "*.target.*", "encoder.*"], ["encoder.*", "*_low_rank.*"]),
    ],
)
def test_the_recipe_with_the_chosen_index_trains_what_it_has(run, trainable, wanted):
    recipe = load_recipe(run / "recipe.yaml")
    recipe = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"trainable": trainable})}
    )
    weights = read_checkpoint(run / "checkpoints" / "step-3").weights
    found = structure(recipe, recipe.model.low_rank, Tensors.of(weights)).recipe
    assert found.training.trainable == wanted
    names = [name for name, _ in Transformer(found, 96).named_parameters()]
    assert choose(names, found.training.trainable, Transformer(found, 96).methods)


def test_matrices_that_did_not_train_have_no_score(run):
    recipe = load_recipe(run / "recipe.yaml")
    weights = dict(read_checkpoint(run / "checkpoints" / "step-3").weights)
    section, german = recipe.model.low_rank, slice(0, 2)
    for name in [name for name in weights if name.endswith("vertical")]:
        weights[name][german] = 0.0
        weights[f"{name}_mask"][german] = True
    assert {each.code for each in scores(recipe, section, Tensors.of(weights))} == {"en", "fr"}
    for name in [name for name in weights if name.endswith("_mask")]:
        weights[name][:] = True
    with pytest.raises(UserError, match="none of its vertical matrices is pruned yet"):
        find(recipe, weights, "subspaces", "RUN")


def test_scores_in_the_middle_of_the_schedule_are_of_the_ratio_that_is_reached(run):
    recipe = load_recipe(run / "recipe.yaml")
    weights = dict(read_checkpoint(run / "checkpoints" / "step-3").weights)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in weights if name.endswith("_mask")]:
        weights[name] = torch.rand(weights[name].shape, generator=generator) < 0.8
    found = scores(recipe, recipe.model.low_rank, Tensors.of(weights))
    assert all(0.15 < each.ratio < 0.25 for each in found)
    assert sum(each.score for each in found) == pytest.approx(0.0, abs=1e-6)


def test_equal_pruning_is_said_to_tell_nothing(run):
    recipe = load_recipe(run / "recipe.yaml")
    weights = dict(read_checkpoint(run / "checkpoints" / "step-3").weights)
    assert find(recipe, Tensors.of(weights), "subspaces", "RUN").said.startswith("from the largest subspace")
    for name in [name for name in weights if name.endswith("_mask")]:
        weights[name] = torch.arange(weights[name].numel()).view_as(weights[name]) % 2 == 0
    said = find(recipe, Tensors.of(weights), "subspaces", "RUN").said
    assert said.startswith("as much was pruned of each language: languages compete under 'prune.over: layer'")


def test_scores_follow_equation_5(run, tmp_path):
    analyze_weights(run, "subspaces", tmp_path / "out")
    weights = read_checkpoint(run / "checkpoints" / "step-3").weights
    rows = rows_in(tmp_path / "out" / "subspaces.csv")
    assert len(rows) == 3 * (2 * (2 * 6 + 3 * 10) - 1)  # languages, both pairs but at one linear layer
    own = {"de": slice(0, 2), "en": slice(2, 3), "fr": slice(3, 6)}
    of_layers: dict[tuple[str, str], float] = {}
    for row in rows:
        at = f"{row['side']}.{row['layer']}.{row['sublayer']}.{row['linear']}_low_rank."
        mask = weights[f"{at}{row['index']}{'.' if row['index'] else ''}vertical_mask"][own[row["language"]]]
        pruned = int((~mask).sum())
        assert (int(row["pruned"]), int(row["size"])) == (pruned, mask.numel())
        assert float(row["score"]) == pytest.approx(pruned - 0.5 * mask.numel(), abs=1e-5)
        key = row["side"], row["layer"]
        of_layers[key] = of_layers.get(key, 0.0) + float(row["score"])
    assert all(abs(total) <= 0.5 for total in of_layers.values()), "a layer's matrices are pruned together"
    grids = {
        grid["name"]: grid for grid in json.loads((tmp_path / "out" / "subspaces.json").read_text())["grids"]
    }
    assert {"languages", "layers", "layer-encoder-1", "layer-decoder-3", "language-fr"} <= grids.keys()
    means, others = (
        {grid["full"] for grid in grids.values() if (grid["name"] in MEANS) is is_mean}
        for is_mean in (True, False)
    )
    assert len(means) == len(others) == 1, "pictures that are compared have one scale"
    picture = (tmp_path / "out" / "languages.svg").read_text()
    assert f"percentage points; colors are full at ±{100 * means.pop():.0f}<" in picture
    assert ">+0<" not in picture and ">-0<" not in picture
    grid = grids["languages"]
    assert grid["columns"][:2] == ["enc q", "enc k"] and "dec c-v" in grid["columns"]
    assert grid["rows"] == ["German", "English", "French"]
    cells = [
        float(row["share"])
        for row in rows
        if (row["language"], row["side"], row["sublayer"], row["linear"])
        == ("fr", "decoder", "cross_attention", "value")
    ]
    found = grid["values"][2][grid["columns"].index("dec c-v")]
    assert found == pytest.approx(sum(cells) / len(cells), abs=1e-5)
    for name in grids:
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<svg xmlns=")


def test_the_report_shows_both(run):
    page = render_report(run)
    for title in ("Languages by which layers choose their matrices", "Subspaces that languages need"):
        assert f"<h2>{title}</h2>" in page
    assert page.count('<svg class="grid"') == 3


def test_a_model_that_has_nothing_to_analyze_is_refused(run, tmp_path):
    plain = make_recipe(run.parent, None, None)
    from lsmoe_ds.analysis.findings import find

    with pytest.raises(UserError, match="nothing for 'analyze structure': no method of it has"):
        find(plain, {}, "structure", "RUN")
    value = plain.model_dump(mode="json")
    value["model"]["low_rank"] = {"rank": 2}
    for kind, key in (("structure", "low_rank.index: learned"), ("subspaces", "low_rank.prune")):
        with pytest.raises(UserError, match=f"train with '{key}'"):
            find(Recipe.model_validate(value), {}, kind, "RUN")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt"):
        analyze_weights(run, "structure", tmp_path)
