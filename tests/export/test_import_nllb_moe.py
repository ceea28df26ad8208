"""NLLB-MoE of transformers as ours: the same logits for each setting of its routing, or a refusal.

transformers 5 reads the 0 and 1 of a mask as the numbers of two experts, and so computes with experts 0 and 1
only (5.0.0 and 5.23.0; 4.57.6 does not). The logits wanted here are those of its class with that one call put
right; where a token's experts are 1 and 0 anyway, those of the class as it is.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.small_huggingface import DATA, imported, right_experts, shard, write_nllb_moe
from support.small_run import write_corpus
from support.starts import first_steps

from lsmoe_ds.checkpoint.stored import Weights, find_model, read_weights
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.batches import DirectionIds
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import build_model, load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.training import start

LENGTHS = [
    ((9, 4, 7), (5, 8, 2)),
    ((1, 40), (40, 1)),
    ((26, 26), (27, 27)),
    ((3,), (11,)),
    (range(30), range(30, 0, -1)),
]
"""Tokens of the sources and targets of each batch; two batches are without padding."""
EN_DE = Direction("en", "de")


@pytest.fixture
def corrected(monkeypatch) -> None:
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    monkeypatch.setattr(NllbMoeSparseMLP, "forward", right_experts)


def written(folder: Path, **changed: Any) -> Path:
    folder.mkdir()
    write_nllb_moe(folder, **changed)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("home") / "nllb-moe", router_bias=True)


def difference(folder: Path, used: dict[int, set[int]] | None = None) -> float:
    """Return the largest difference of any logit at real positions, over all batches.

    ``used`` gets the experts that our tokens take in each layer with experts.
    """
    from transformers import NllbMoeForConditionalGeneration

    tensors, recipe, vocabulary = imported(folder)
    theirs = NllbMoeForConditionalGeneration.from_pretrained(folder).eval()
    ours = build_model(recipe, vocabulary.size, Weights(tensors, 0, {}), torch.device("cpu"))
    for number, (_, layer) in enumerate(ours.moe_layers()):
        taken: set[int] = (used if used is not None else {}).setdefault(number, set())
        layer.observer = lambda seen, taken=taken: taken.update(seen.routes.experts.flatten().tolist())
    assert vocabulary.size >= theirs.config.vocab_size and len(vocabulary.codes) == 9
    chosen, largest = random.Random(1), 0.0
    direction = recipe.languages.direction_id(recipe.languages.directions[0])
    for lengths in LENGTHS:
        texts = [
            [[chosen.randrange(2, theirs.config.vocab_size) for _ in range(n)] for n in each]
            for each in lengths
        ]
        ids = DirectionIds.of(recipe.languages, vocabulary, recipe.data.tags)
        batch = ids.collate(texts[0], texts[1], [direction] * len(texts[0]))
        real = batch.decoder_input != vocabulary.PAD
        with torch.inference_mode():
            found = ours.logits(batch.source, batch.decoder_input, batch.ids)
            for mask in (None, real):
                wanted = theirs(
                    input_ids=batch.source,
                    attention_mask=batch.source != vocabulary.PAD,
                    decoder_input_ids=batch.decoder_input,
                    decoder_attention_mask=mask,
                ).logits
                assert wanted[real].std() > 0.1
                largest = max(largest, (found[:, :, : wanted.shape[2]] - wanted)[real].abs().max().item())
    return largest


EQUAL: dict[str, dict[str, Any]] = {
    "defaults": {},
    "published": {"normalize_router_prob_before_dropping": True, "router_ignore_padding_tokens": True},
    "prioritized": {"batch_prioritized_routing": True},
    "padding has places": {"router_ignore_padding_tokens": True},
    "normalized before": {"normalize_router_prob_before_dropping": True},
    "bias": {"router_bias": True},
    "no masking": {"moe_token_dropout": 0.0},
    "much masking": {"moe_token_dropout": 0.75},
    "small in training": {"expert_capacity": 1},
    "every layer, and none": {"encoder_sparse_step": 1, "decoder_sparse_step": 0},
    "none, and the last": {"encoder_sparse_step": 5, "decoder_sparse_step": 3},
    "no experts at all": {"encoder_sparse_step": 0, "decoder_sparse_step": 9},
    "two experts": {"num_experts": 2},
    "jitter": {"router_jitter_noise": 0.2},
    "dropout": {"activation_dropout": 0.3, "dropout": 0.2, "encoder_layerdrop": 0.5},
}


@pytest.mark.parametrize("case", EQUAL)
def test_the_same_logits(case, tmp_path, corrected):
    used: dict[int, set[int]] = {}
    assert difference(written(tmp_path / "folder", **EQUAL[case]), used) <= 1e-4
    assert all(len(taken) >= min(4, EQUAL[case].get("num_experts", 6)) for taken in used.values()), used
    layers = {"every layer, and none": 4, "none, and the last": 1, "no experts at all": 0}
    assert len(used) == layers.get(case, 3)


def test_the_class_as_it_is(tmp_path):
    """Each token's first expert is 1 and its second 0, with weights that depend on the token."""
    folder = written(tmp_path / "folder", num_experts=2, router_bias=True)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    routers = [name.removesuffix(".bias") for name in tensors if ".router.classifier.bias" in name]
    assert len(routers) == 3
    for name in routers:
        tensors[f"{name}.bias"] = torch.tensor([0.0, 1.0])
        tensors[f"{name}.weight"] *= 0.1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert difference(folder) <= 1e-4


def test_the_class_as_it_is_uses_two_experts_only(home):
    """Once this fails, transformers is repaired and ``corrected`` can go."""
    assert difference(home) > 0.01


def test_shards_of_half_precision(home, tmp_path, corrected):
    whole, recipe, _ = imported(home)
    shutil.copytree(home, tmp_path / "shards")
    shard(tmp_path / "shards")
    tensors, same, _ = imported(tmp_path / "shards")
    assert same == recipe and tensors.keys() == whole.keys()
    assert difference(tmp_path / "shards") <= 1e-4


def test_tensors_are_read_when_they_are_asked_for(home, monkeypatch):
    from lsmoe_ds.export import importing

    read: list[str] = []

    def opened(folder: Path) -> Tensors:
        def noted(name: str, entry: LazyTensor) -> LazyTensor:
            def make() -> torch.Tensor:
                read.append(name)
                return entry.make()

            return LazyTensor(entry.shape, make)

        return Tensors({name: noted(name, each) for name, each in opening(folder).entries.items()})

    opening = importing.open_tensors
    monkeypatch.setattr(importing, "open_tensors", opened)
    tensors, _, _ = imported(home)
    assert not read
    assert tensors["encoder.1.feed_forward.experts.4.contract.bias"].shape == (16,)
    assert read == ["model.encoder.layers.1.ffn.experts.expert_4.fc2.bias"]


def test_the_recipe(tmp_path):
    given = {"router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.5, "router_jitter_noise": 0.1}
    _, recipe, _ = imported(written(tmp_path / "folder", router_bias=True, **given))
    wanted = {"balance_loss_weight": 0.02, "z_loss_weight": 0.5, "jitter": 0.1, "router_bias": True}
    for side, every in (("encoder", 2), ("decoder", 3)):
        found = getattr(recipe.model, side).moe
        assert found == MoE(experts=6, every=every, top_k=2, routing="token", **wanted), side


DROPPING = [(0.95, 1, True), (-1.0, 1000, True), (-1.0, 2, False), (0.1, 1000, False)]


@pytest.mark.parametrize(("fraction", "places", "equal"), DROPPING)
def test_dropping_at_evaluation_is_said(fraction, places, equal, tmp_path, capsys, corrected):
    """As long as no expert overflows all is the same."""
    settings = {"moe_eval_capacity_token_fraction": fraction, "expert_capacity": places}
    folder = written(tmp_path / f"folder{fraction}-{places}", **settings)
    found = difference(folder)
    assert found <= 1e-4 if equal else found > 0.01
    said = capsys.readouterr().err
    assert f"{folder} drops tokens at evaluation ('moe_eval_capacity_token_fraction' is {fraction})" in said
    assert said.count("drops tokens at evaluation") == 1


def in_config(**changed: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def in_weights(**changed: torch.Tensor | None) -> Any:
    def change(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors") | changed
        kept = {name: value for name, value in tensors.items() if value is not None}
        safetensors.torch.save_file(kept, folder / "model.safetensors")

    return change


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "sampled": ({"second_expert_policy": "sampling"}, "'second_expert_policy' in .* random.*'sampling'"),
    "random": ({"second_expert_policy": "random"}, "'second_expert_policy' in .* be 'all': .*found 'random'"),
    "half precision": ({"router_dtype": "bfloat16"}, "'router_dtype' in .* which experts .*found 'bfloat16'"),
    "one expert": ({"num_experts": 1}, "'num_experts' in .* should be a number from 2 to .*, found 1$"),
    "no number": ({"num_experts": True}, "'num_experts' in config.json should be a number .*, found True"),
    "many experts": ({"num_experts": 10**9}, r"should have 3,000,000,000 experts .* but has \d+ tensors$"),
    "a step back": ({"decoder_sparse_step": -1}, "'decoder_sparse_step' in .* from 0 to .*, found -1"),
    "all masked": ({"moe_token_dropout": 1.0}, "'moe_token_dropout' in .* be from 0 to below 1, found 1.0"),
    "masked by a word": ({"moe_token_dropout": "x"}, "'moe_token_dropout' in .* be a number, found 'x'"),
    "fraction": ({"moe_eval_capacity_token_fraction": None}, "'moe_eval_.*' in .* be a number, found None"),
    "bias": ({"router_bias": "yes"}, "'router_bias' in config.json should be true or false, found 'yes'"),
    "loss": ({"router_aux_loss_coef": -1}, "moe.balance_loss_weight.*found -1"),
    "jitter": ({"router_jitter_noise": 2}, "moe.jitter.*found 2"),
    "another step": ({"encoder_sparse_step": 4}, "has: model.encoder.layers.1.ffn.experts.expert_0"),
    "fewer experts": ({"num_experts": 5}, "no NLLB-MoE of this .* has: .*2.ffn.experts.expert_5.fc1.bias"),
    "more experts": ({"num_experts": 7}, "lacks model.decoder.layers.2.ffn.experts.expert_6.fc1.bias"),
    "no bias": ({"router_bias": False}, "has: model.decoder.layers.2.ffn.router.classifier.bias"),
    "gelu": ({"activation_function": "gelu"}, "'activation_function' 'gelu' .*: lsmoe_ds has 'relu' only"),
}
EXPERT, ROUTER = "model.decoder.layers.2.ffn.experts.expert", "model.encoder.layers.1.ffn.router.classifier"
WEIGHTS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "an expert less": ({f"{EXPERT}_3.fc2.weight": None}, f"lacks {EXPERT}_3.fc2.weight"),
    "an expert more": ({f"{EXPERT}_6.fc2.bias": torch.zeros(16)}, f"has: {EXPERT}_6.fc2.bias"),
    "a wide expert": ({f"{EXPERT}_3.fc1.weight": torch.zeros(48, 16)}, r"be \(40, 16\) .* found \(48, 16\)"),
    "a narrow router": ({f"{ROUTER}.weight": torch.zeros(5, 16)}, r"be \(6, 16\) .* found \(5, 16\)"),
}
REFUSED = {case: (in_config(**changed), says) for case, (changed, says) in CONFIGS.items()}
REFUSED |= {case: (in_weights(**changed), says) for case, (changed, says) in WEIGHTS.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(home, tmp_path, case):
    shutil.copytree(home, tmp_path / "folder")
    change, says = REFUSED[case]
    change(tmp_path / "folder")
    with pytest.raises(UserError, match=says) as error:
        imported(tmp_path / "folder")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.fixture(scope="module")
def base(home, tmp_path_factory) -> Path:
    """Import the model as the command does, prepare data for it, and return its folder."""
    folder = tmp_path_factory.mktemp("base")
    write_corpus(folder)
    settings = {
        "data.corpora": json.dumps([{"path": str(folder / "text.tsv"), "format": "tsv"}]),
        "data.directory": str(folder / "data"),
        "data.held_out": "{dev: 5, test: 20}",
        "data.batch": "{tokens: 256, count: 2}",
        "training": (
            "{steps: 6, learning_rate: 0.01, warmup: 1, label_smoothing: 0, max_grad_norm: 0, dropout: 0}"
        ),
        "deepspeed": "{zero_optimization: {stage: 0}}",
    }
    overrides = [DATA[1], *(f"{key}={value}" for key, value in settings.items())]
    record = convert(home, "consolidated", None, folder / "base", overrides=overrides)
    assert record["parameters"] == read_weights(find_model(folder / "base")).parameters
    prepare(load_recipe(folder / "base" / "recipe.yaml"))
    return folder / "base"


def test_a_training_begins_with_it_and_learns(pool, home, base, tmp_path):
    recipe = load_recipe(base / "recipe.yaml")
    start.check(recipe, tmp_path / "run")
    found, wanted = pool.run(1, first_steps, recipe, tmp_path / "run")[0], imported(home)[0]
    assert found["weights"].keys() == wanted.keys()
    assert all(np.array_equal(found["weights"][name][0], value.numpy()) for name, value in wanted.items())
    assert len(found["losses"]) == 6 and found["losses"][-1] < found["losses"][0] - 0.1


def test_what_comes_after(base, tmp_path):
    recipe, held = load_recipe(base / "recipe.yaml"), read_weights(find_model(base)).parameters
    assert plan(recipe).parameters.whole.total == held
    lines = ["ba de fi", "ko la"]
    wanted = list(translate(load(base, "cpu"), EN_DE, lines))
    assert len(wanted) == 2
    record = convert(base, "hybrid", EN_DE, tmp_path / "hybrid", check=4)
    assert record["same_translations"] == record["sentences"] == 4
    assert record["largest_logit_difference"] <= 1e-4
    assert list(translate(load(tmp_path / "hybrid", "cpu"), EN_DE, lines)) == wanted
    for kind in ("dense", "ctranslate2"):
        with pytest.raises(UserError, match="the encoder routes by token in layers 2, 4: tokens choose"):
            convert(base, kind, EN_DE, tmp_path / kind)
        assert not (tmp_path / kind).exists()


def test_the_way_there_and_back_keeps_logits(home, base, tmp_path, corrected):
    """And the tokenizer; the share of masked outputs is in the weights."""
    from transformers import AutoTokenizer, NllbMoeForConditionalGeneration

    record = convert(base, "huggingface", None, tmp_path / "out", check=4)
    assert record["same_translations"] == 4 and record["largest_logit_difference"] <= 1e-4
    assert "padded_parameters" not in record
    first, second = (
        NllbMoeForConditionalGeneration.from_pretrained(folder).eval() for folder in (home, tmp_path / "out")
    )
    generator, rows = torch.Generator().manual_seed(1), first.config.vocab_size
    source, target = (torch.randint(4, rows, (3, length), generator=generator) for length in (7, 5))
    with torch.inference_mode():
        wanted, found = (
            model(input_ids=source, decoder_input_ids=target).logits for model in (first, second)
        )
    assert (found[:, :, :rows] - wanted).abs().max() <= 1e-4
    assert type(AutoTokenizer.from_pretrained(tmp_path / "out")).__name__ == "NllbTokenizer"


def test_it_grows(base, tmp_path):
    convert(base, "grown", None, tmp_path / "grown", check=0, overrides=["model.encoder.moe.experts=8"])
    before, after = (read_weights(find_model(folder)).tensors for folder in (base, tmp_path / "grown"))
    for kind, shape in (("weight", (8, 16)), ("bias", (8,))):
        router = f"encoder.1.feed_forward.router.{kind}"
        assert after[router].shape == shape and torch.equal(after[router][:6], before[router])
    assert not after["encoder.1.feed_forward.router.bias"][6:].any()
