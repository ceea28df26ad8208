"""Models whose tokens choose experts as NLLB-MoE of transformers: the same logits, translations and weights,
or a refusal.

transformers 5 is mended, since it uses experts 0 and 1 only (test_import_nllb_moe.py).
"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from support.commands import main
from support.conversions import EN_DE, LINES, global_weights, random_model
from support.small_huggingface import right_experts
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, write_corpus
from support.snippets import blocks, run

from lsmoe_ds.checkpoint.m2m_100 import NEVER, count_padding, rename
from lsmoe_ds.checkpoint.stored import VOCABULARY, find_model, read_weights, write_folder
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.export.importing import Asked, read_huggingface
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

TOKEN_TOP1 = TOKEN_TOP2 | {"top_k": 1}
ONLY = TOKEN_TOP1 | {"experts": 1}
THREE = TOKEN_TOP2 | {"experts": 3, "router_bias": True}
EVERY = TOKEN_TOP2 | {"experts": 5, "every": 1}
LAST = TOKEN_TOP2 | {"every": 3}


@pytest.fixture(autouse=True)
def _mended(monkeypatch) -> None:
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    monkeypatch.setattr(NllbMoeSparseMLP, "forward", right_experts)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nllb-moe")
    write_corpus(folder)
    return folder


def whole(place: Path, folder: Path, encoder: dict | None, decoder: dict | None) -> Loaded:
    """Write a consolidated folder of a random model with these experts, and load it."""
    model = random_model(place, encoder, decoder)
    provenance = {"kind": "consolidated", "run": "small", "step": 2, "route": "specific", "direction": "all"}
    tensors = Tensors.of(global_weights(model.model))
    write_folder(folder, tensors, model.recipe, model.home / VOCABULARY, provenance)
    return load(folder, "cpu")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def check_same(ours: Loaded, folder: Path) -> None:
    """Compare logits and translations in transformers, and those of the folder here."""
    theirs = Exported.load(find_model(folder))
    assert type(theirs.model).__name__ == "NllbMoeForConditionalGeneration"
    for other in (theirs, load(folder, "cpu")):
        found = compare(ours, other, EN_DE, LINES)
        assert found.same == found.sentences >= len(LINES), type(other)
        assert found.largest_logit_difference <= 1e-4


CASES: dict[str, tuple[dict | None, dict | None, int]] = {
    "whole": (TOKEN_TOP2, LAST, 4),
    "narrow experts": (TOKEN_TOP2, TOKEN_TOP2, 4),
    "other numbers": (EVERY, THREE, 5),
    "bias on one side": (THREE, TOKEN_TOP2 | {"experts": 3}, 3),
    "one side": (None, TOKEN_TOP2, 4),
    "the only expert": (EVERY, ONLY, 5),
    "only experts": (ONLY, ONLY, 2),
    "others joined": (TOKEN_TOP2, PAIR_TOP1, 4),
    "dropping in training": (TOKEN_TOP2 | {"capacity": {"training": 0.5}}, None, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_translations(place, tmp_path, case):
    encoder, decoder, experts = CASES[case]
    ours = whole(place, tmp_path / "whole", encoder, decoder)
    direction = EN_DE if decoder is PAIR_TOP1 else None
    record = convert(tmp_path / "whole", "huggingface", direction, tmp_path / "out", check=4)
    assert record["same_translations"] == record["sentences"] == 4
    assert record["largest_logit_difference"] <= 1e-4
    check_same(ours, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["model_type"], config["num_experts"]) == ("nllb-moe", experts)
    every = {"encoder": encoder, "decoder": None if decoder is PAIR_TOP1 else decoder}
    for side, moe in every.items():
        assert config[f"{side}_sparse_step"] == (0 if moe is None else moe["every"])
    recipe = find_model(tmp_path / "out").recipe
    assert len(recipe.languages.directions) == (4 if direction is None else 1)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        numbers = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert numbers == record["parameters"] + count_padding(recipe)
    assert numbers == record.get("padded_parameters", record["parameters"])


def test_experts_that_were_added_are_never_chosen(place, tmp_path):
    """Those of a layer with one expert get a weight of 0, and ours all of it."""
    whole(place, tmp_path / "whole", EVERY, ONLY)
    convert(tmp_path / "whole", "huggingface", None, tmp_path / "out", check=0)
    model = Exported.load(find_model(tmp_path / "out")).model
    router = model.model.decoder.layers[1].ffn.router
    assert router.classifier.bias.tolist() == [0.0, *[NEVER] * 4]
    weights = router(torch.randn(50, 16) * 100)[1]
    assert torch.equal(weights, torch.tensor([1.0, 0, 0, 0, 0]).expand(50, 5))
    half = router.classifier.half().bias
    assert half.isfinite().all()


def test_pruned_models(place, tmp_path):
    """Sides that keep other numbers of experts, one of them a single one, in one step or two."""
    whole(place, tmp_path / "whole", EVERY, TOKEN_TOP1)
    made = convert(tmp_path / "whole", "hybrid", EN_DE, tmp_path / "kept", check=0, keep="0.3")
    kept = load(tmp_path / "kept", "cpu")
    experts = {side: getattr(kept.recipe.model, side).moe.experts for side in ("encoder", "decoder")}
    assert experts == {"encoder": 2, "decoder": 1}
    record = convert(tmp_path / "kept", "huggingface", None, tmp_path / "two", check=4)
    assert record["largest_logit_difference"] <= 1e-4 and record["same_translations"] == 4
    assert record["parameters"] == made["parameters"] < record["padded_parameters"]
    check_same(kept, tmp_path / "two")
    convert(tmp_path / "whole", "huggingface", EN_DE, tmp_path / "one", check=0, keep="0.3")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for folder in ("one", "two"):
        provenance = json.loads((tmp_path / folder / "provenance.json").read_text())
        assert provenance["kept_experts"]["decoder"]["kept"] == 1
        card = (tmp_path / folder / "README.md").read_text()
        assert "keep those that the direction's dev text uses most" in card
        assert "| experts of the decoder | 1 of 4 in each layer" in card
        assert "in this folder, filled up to one width a side and one number of experts" in card


def test_four_of_five_and_all_three(place, tmp_path):
    whole(place, tmp_path / "whole", EVERY, THREE)
    convert(tmp_path / "whole", "hybrid", EN_DE, tmp_path / "kept", check=0, keep="4")
    kept = load(tmp_path / "kept", "cpu")
    assert kept.recipe.model.encoder.moe.experts > kept.recipe.model.decoder.moe.experts == 3
    convert(tmp_path / "kept", "huggingface", None, tmp_path / "out", check=0)
    check_same(kept, tmp_path / "out")
    # Read back, it is pruned further, or as it was.
    convert(tmp_path / "out", "hybrid", None, tmp_path / "again", check=0)
    before, after = (read_weights(find_model(tmp_path / name)).tensors for name in ("kept", "again"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    convert(tmp_path / "out", "huggingface", EN_DE, tmp_path / "two", check=0, keep="2")
    assert config_of(tmp_path / "two")["num_experts"] == 2
    with pytest.raises(UserError, match="the encoder routes by token in layers 1, 2"):
        convert(tmp_path / "out", "dense", None, tmp_path / "dense")


def test_keeping_all_changes_no_weight(place, tmp_path):
    ours = whole(place, tmp_path / "whole", TOKEN_TOP2, LAST)
    before = read_weights(find_model(tmp_path / "whole")).tensors
    convert(tmp_path / "whole", "huggingface", EN_DE, tmp_path / "out", check=0, keep="4")
    stored = find_model(tmp_path / "out")
    assert stored.kind == "huggingface" and not stored.is_dense
    found = read_weights(stored).tensors
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    # By an import too, except that the second layer of the decoder is as wide as the others.
    asked = Asked(["data.corpora=[none]", "data.languages=[de,fr]"])
    imported, recipe, _ = read_huggingface(tmp_path / "out", asked, tmp_path / "import")
    assert imported.keys() == before.keys()
    for name in before:
        if not name.startswith("decoder.1.feed_forward."):
            assert torch.equal(imported[name], before[name]), name
    for side in ("encoder", "decoder"):
        assert getattr(recipe.model, side).moe == getattr(ours.recipe.model, side).moe


def test_an_import_has_what_was_added(place, tmp_path):
    """A training that begins with it has experts that no token chooses."""
    ours = whole(place, tmp_path / "whole", EVERY, ONLY)
    convert(tmp_path / "whole", "huggingface", None, tmp_path / "out", check=0)
    corpus = json.dumps([{"path": str(place / "text.tsv"), "format": "tsv"}])
    overrides = [f"data.corpora={corpus}", "data.languages=[de,fr]"]
    convert(tmp_path / "out", "consolidated", None, tmp_path / "base", overrides=overrides)
    base = load(tmp_path / "base", "cpu")
    assert base.recipe.model.decoder.moe.experts == 5 and base.recipe.model.decoder.moe.router_bias
    assert list(translate(base, EN_DE, LINES)) == list(translate(ours, EN_DE, LINES))


@pytest.mark.parametrize("version", ["5.23.0", "4.57.6"])
def test_the_cards_code(place, tmp_path, capsys, monkeypatch, version):
    """It mends transformers 5 and leaves earlier versions as they are."""
    import transformers
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    ours = whole(place, tmp_path / "whole", TOKEN_TOP2, LAST)
    convert(tmp_path / "whole", "huggingface", EN_DE, tmp_path / "out", check=0)
    card = (tmp_path / "out" / "README.md").read_text()
    use, _ = blocks(card)
    assert "It computes what that model computes for this direction." in card
    monkeypatch.setattr(transformers, "__version__", version)
    unmended = lambda *_: pytest.fail("not mended")  # noqa: E731
    monkeypatch.setattr(NllbMoeSparseMLP, "forward", unmended if version[0] == "5" else right_experts)
    for line in LINES[:2]:
        run(use.replace("FOLDER", str(tmp_path / "out")).replace('"Text to translate."', repr(line)), {})
        (said,) = ast.literal_eval(capsys.readouterr().out)
        assert said == " ".join(next(translate(ours, EN_DE, [line])).replace("⁇", " ").split())
    assert (NllbMoeSparseMLP.forward is right_experts) == (version[0] == "4")


def test_tensors_are_read_when_they_are_written(place):
    model = random_model(place, EVERY, THREE)
    read: list[str] = []

    def noted(name: str, value: torch.Tensor) -> LazyTensor:
        return LazyTensor(tuple(value.shape), lambda: read.append(name) or value)

    weights = {name: noted(name, value) for name, value in global_weights(model.model).items()}
    renamed = rename(Tensors(weights), model.recipe, model.vocabulary.size)
    at = "model.decoder.layers.1.ffn."
    assert renamed[f"{at}experts.expert_4.fc1.weight"].shape == (24, 16) and not read
    assert renamed[f"{at}router.classifier.weight"].shape == (5, 16)
    assert read == ["decoder.1.feed_forward.router.weight"]


REFUSED: dict[str, tuple[dict | None, dict | None, str]] = {
    "top-1": (TOKEN_TOP1, None, r"the encoder gives each token 1 of 4 experts \('top_k'\): .* it 2, or"),
    "top-3": (None, TOKEN_TOP2 | {"top_k": 3}, r"the decoder gives each token 3 of 4 experts \('top_k'\)"),
    "sentence": (TOKEN_TOP2 | {"routing": "sentence"}, None, "the encoder routes by sentence: .* token only"),
    "dropping": (
        TOKEN_TOP2,
        TOKEN_TOP2 | {"capacity": {"evaluation": 1.0}},
        r"the decoder drops tokens in evaluation \('capacity.evaluation' is 1.0\): .* can only drop none",
    ),
    "no direction": (TOKEN_TOP2, TARGET_TOP2, "name one, as in --direction en-de"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(place, tmp_path, capsys, case):
    encoder, decoder, says = REFUSED[case]
    whole(place, tmp_path / "whole", encoder, decoder)
    arguments = ["convert", str(tmp_path / "whole"), "--as", "huggingface", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    with pytest.raises(UserError, match=says) as error:
        convert(tmp_path / "whole", "huggingface", None, tmp_path / "out")
    assert f"lsmoe: {error.value}\n" in capsys.readouterr().err
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_experts_are_kept_for_a_direction(place, tmp_path):
    whole(place, tmp_path / "whole", TOKEN_TOP1, None)
    with pytest.raises(UserError, match="by their use in one direction: name it, as in --direction en-de"):
        convert(tmp_path / "whole", "huggingface", None, tmp_path / "out", keep="2")
    with pytest.raises(UserError, match="gives each token 1 of 2 experts"):
        convert(tmp_path / "whole", "huggingface", EN_DE, tmp_path / "out", keep="2")


def test_feed_forwards_that_all_languages_share(place, tmp_path):
    """By each route the model is what lsmoe_ds computes by it: with experts, or dense."""
    model = random_model(place, None, None)
    value = model.recipe.model_dump(exclude_none=True)
    value["model"]["encoder"]["moe"] = TOKEN_TOP2 | {"fuse_distillation": True}
    recipe = Recipe.model_validate(value)
    sparse = Transformer(recipe, model.vocabulary.size)
    initialize(sparse, 7, Topology.single())
    ours = replace(model, model=sparse.eval(), recipe=recipe)
    provenance = {"kind": "consolidated", "run": "small", "step": 2, "route": "specific", "direction": "all"}
    weights = Tensors.of(global_weights(sparse))
    write_folder(tmp_path / "whole", weights, recipe, model.home / VOCABULARY, provenance)
    for route, kind in (("specific", "nllb-moe"), ("shared", "m2m_100")):
        convert(tmp_path / "whole", "huggingface", None, tmp_path / route, check=0, route=route)
        assert config_of(tmp_path / route)["model_type"] == kind
        theirs = Exported.load(find_model(tmp_path / route))
        found = compare(replace(ours, route=route), theirs, EN_DE, LINES)
        assert found.largest_logit_difference <= 1e-4
