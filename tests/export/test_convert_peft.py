"""Adapters of a run for peft: on their base they compute what the run computes, in peft and transformers."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import PROJECT
from support.alternating import alternating
from support.commands import main
from support.conversions import EN_DE, FR_EN, LINES, whole_model
from support.small_run import PAIR_TOP1, TARGET_TOP2, make_run

from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.checkpoint.tensors import open_tensors
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.export.peft import open_adapted
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import translate

RANKS = {"de": 1, "en": 4, "fr": 2}
SOME_NONE = {"de": 3, "en": 0, "fr": 2}
KINDS: dict[str, dict[str, Any]] = {
    "pair": {"rank": 3, "at": "all"},
    "language": {"rank": RANKS, "index": "language", "at": "all"},
    "target": {"rank": RANKS, "index": "target", "at": ["feed_forward", "decoder.cross_attention"]},
    "learned": {"rank": RANKS, "index": "learned", "at": "all", "zero": "vertical"},
    "by layer": {
        "rank": SOME_NONE,
        "at": "all",
        "index": {"learned": ["encoder.1"], "source": ["encoder"], "target": ["decoder"]},
    },
    "columns": {"rank": SOME_NONE, "index": "learned", "at": "all", "columns": 12},
    "pruned": {
        "rank": RANKS,
        "index": "source",
        "at": "all",
        "prune": {"ratio": 0.5, "epochs": 10, "matrices": "both", "languages": ["en", "fr"]},
    },
}


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory) -> Path:
    return make_run(pool, tmp_path_factory.mktemp("peft"), None, None)[0]


def logits_in_peft(adapter: Path, base: Path, merge: bool = False) -> Any:
    from peft import PeftModel
    from transformers import M2M100ForConditionalGeneration

    found = PeftModel.from_pretrained(M2M100ForConditionalGeneration.from_pretrained(base), adapter)
    return (found.merge_and_unload() if merge else found).eval()


def of_ours(model: Loaded, direction: Direction, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from lsmoe_ds.data.batches import DirectionIds

    ids = DirectionIds.of(model.languages, model.vocabulary, model.recipe.data.tags)
    number = model.languages.direction_id(direction)
    batch = ids.collate(source.tolist(), target.tolist(), [number] * len(source))
    return batch, model.model.logits(batch.source, batch.decoder_input, batch.ids, model.route)


@torch.inference_mode()
def assert_same_logits(model: Loaded, direction: Direction, adapter: Path, base: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, model.vocabulary.size, (2, 3, 6), generator=generator)
    batch, wanted = of_ours(model, direction, *tokens)
    for merge in (False, True):
        theirs = logits_in_peft(adapter, base, merge)
        found = theirs(input_ids=batch.source, decoder_input_ids=batch.decoder_input).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    from transformers import M2M100ForConditionalGeneration

    plain = M2M100ForConditionalGeneration.from_pretrained(base).eval()
    alone = plain(input_ids=batch.source, decoder_input_ids=batch.decoder_input).logits
    assert (alone - wanted).abs().max() > 1e-2, "the comparison can fail"


@pytest.mark.parametrize(("kind", "direction"), alternating(KINDS, [EN_DE, FR_EN]), ids=str)
def test_an_adapter_of_a_direction_computes_what_the_run_computes(run, tmp_path, kind, direction):
    whole, out = whole_model(run, KINDS[kind], tmp_path / "whole"), tmp_path / "out"
    record = convert(whole, "peft", direction, out, check=0)
    assert (record["kind"], record["direction"]) == ("peft", str(direction))
    model = load(whole, "cpu")
    assert_same_logits(model, direction, out, out / "base")
    found = compare(model, open_adapted(find_model(out))(direction), direction, LINES)
    assert found.same == found.sentences >= len(LINES)
    assert found.largest_logit_difference <= 1e-4  # 0 where the products are in the same order
    plain = Exported.load(find_model(out / "base"))
    assert compare(model, plain, direction, LINES).largest_logit_difference > 1e-2, "the comparison can fail"


def test_the_files_are_those_that_peft_writes(run, tmp_path):
    from peft import LoraConfig, PeftModel

    whole, out = whole_model(run, KINDS["by layer"], tmp_path / "whole"), tmp_path / "out"
    convert(whole, "peft", FR_EN, out, check=0)
    model = logits_in_peft(out, out / "base")
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (
        safetensors.torch.load_file(each / "adapter_model.safetensors") for each in (out, tmp_path / "again")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    config, again = (
        json.loads((each / "adapter_config.json").read_text()) for each in (out, tmp_path / "again")
    )
    assert config.keys() <= again.keys() and set(config["target_modules"]) == set(again["target_modules"])
    assert LoraConfig.from_pretrained(str(out)).task_type == "SEQ_2_SEQ_LM"
    # rank 2 of fr in the encoder, and in its second layer joined with the 0 of en; none of en in the decoder
    assert {name.split(".")[1] for name in config["target_modules"]} == {"encoder"}
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == len(config["target_modules"]) == 12
    assert all(layer.scaling == {"default": 1.0} for layer in layers)


def test_ranks_of_both_languages_join(run, tmp_path):
    whole, out = whole_model(run, KINDS["learned"], tmp_path / "whole"), tmp_path / "out"
    record = convert(whole, "peft", FR_EN, out, check=0)
    assert {tuple(ranks) for ranks in record["adapters"][0]["ranks"].values()} == {(6,)}
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 6
    assert json.loads((out / "sizes.json").read_text())["adapters"] == record["adapters"]


def test_a_set_by_direction_and_by_language(run, tmp_path):
    learned = whole_model(run, KINDS["learned"], tmp_path / "learned")
    record = convert(learned, "peft", None, tmp_path / "directions", check=0)
    assert [row["name"] for row in record["adapters"]] == ["en-de", "de-en", "en-fr", "fr-en"]
    for direction in (EN_DE, FR_EN):
        at = tmp_path / "directions"
        assert_same_logits(load(learned, "cpu"), direction, at / str(direction), at / "base")
    assert len(list((tmp_path / "directions").rglob("model.safetensors"))) == 1, "one base"
    target = whole_model(run, KINDS["target"] | {"rank": SOME_NONE}, tmp_path / "target")
    record = convert(target, "peft", None, tmp_path / "languages", check=0)
    rows = {row["name"]: row for row in record["adapters"]}
    assert {name: row["directions"] for name, row in rows.items()} == {
        "de": ["en-de"],
        "en": ["de-en", "fr-en"],
        "fr": ["en-fr"],
    }
    assert_same_logits(
        load(target, "cpu"), EN_DE, tmp_path / "languages" / "de", tmp_path / "languages" / "base"
    )
    assert rows["en"]["ranks"] == {} and not (tmp_path / "languages" / "en").exists()
    model, of = load(target, "cpu"), open_adapted(find_model(tmp_path / "languages"))
    for direction in model.languages.directions:
        assert compare(model, of(direction), direction, LINES).largest_logit_difference <= 1e-4
    card = (tmp_path / "languages" / "README.md").read_text()
    assert rows["fr"]["ranks"].keys() > {"encoder.fc1", "decoder.encoder_attn.k_proj"}
    assert re.search(r"^\| fr \| 2: .*encoder\.fc1.* \| 1,536 \| 1,536 \| 6,272 \|$", card, re.M)
    assert "| en | 0: the base alone | 0 | 0 | 0 |" in card


def test_the_sizes_count_what_is_kept_and_what_is_stored(run, tmp_path):
    whole, out = whole_model(run, KINDS["pruned"], tmp_path / "whole"), tmp_path / "out"
    rows = convert(whole, "peft", None, out, check=0)["adapters"]
    masks = {name: value for name, value in open_tensors(whole).items() if name.endswith("_mask")}
    first = {"de": slice(0, 1), "en": slice(1, 5), "fr": slice(5, 7)}
    for row in rows:
        stored = safetensors.torch.load_file(out / row["name"] / "adapter_model.safetensors")
        assert row["bytes"] == sum(value.nbytes for value in stored.values())
        kept = sum(int(mask[first[row["name"]]].sum()) for mask in masks.values())
        assert row["values_kept"] == kept < row["values"]
        assert row["values"] == sum(mask[first[row["name"]]].numel() for mask in masks.values())


def test_one_base_serves_several_folders(run, tmp_path):
    whole = whole_model(run, KINDS["pair"], tmp_path / "whole")
    convert(whole, "peft", EN_DE, tmp_path / "first", check=0)
    base = tmp_path / "first" / "base"
    convert(whole, "peft", FR_EN, tmp_path / "second", check=0, base=base)
    assert not (tmp_path / "second" / "base").exists()
    assert (
        json.loads((tmp_path / "second" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "../first/base"
    )
    assert_same_logits(load(whole, "cpu"), FR_EN, tmp_path / "second", base)
    engine = open_adapted(find_model(tmp_path / "second"))(FR_EN)
    assert compare(load(whole, "cpu"), engine, FR_EN, LINES).largest_logit_difference <= 1e-4
    command = ["convert", str(whole), "--as", "peft", "--base", str(base), "--out"]
    assert "which is replaced" in refused([*command, str(tmp_path / "first")]) and base.is_dir()
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    tensors["model.encoder.layers.0.fc1.weight"][0, 0] += 1e-6
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = refused([*command, str(tmp_path / "no")])
    assert "has another model.encoder.layers.0.fc1.weight" in said and not (tmp_path / "no").exists()


def test_the_shared_route_is_one_adapter_for_all(run, tmp_path):
    fused = {"rank": RANKS, "index": "language", "fuse_distillation": True}
    whole, out = whole_model(run, fused, tmp_path / "whole"), tmp_path / "out"
    convert(whole, "peft", None, out, check=0, route="shared")
    assert_same_logits(load(whole, "cpu", "shared"), FR_EN, out, out / "base")


def test_beside_experts_of_a_task_the_base_is_of_one_direction(run, tmp_path):
    low_rank = {"rank": 3, "index": "target", "at": "all"}
    whole = whole_model(run, low_rank, tmp_path / "whole", (TARGET_TOP2, PAIR_TOP1))
    convert(whole, "peft", EN_DE, tmp_path / "out", check=0)
    assert_same_logits(load(whole, "cpu"), EN_DE, tmp_path / "out", tmp_path / "out" / "base")
    said = refused(["convert", str(whole), "--as", "peft", "--out", str(tmp_path / "all")])
    assert "no dense model serves all directions" in said


def refused(arguments: list[str]) -> str:
    """Run a command that ends with status 2, and return its one sentence."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(arguments) == 2
    return said.getvalue()


@pytest.mark.parametrize(
    ("low_rank", "more", "message"),
    [
        (None, [], "the model has no matrices beside its linear layers"),
        ({"rank": SOME_NONE, "index": "target"}, ["--direction", "fr-en"], "of fr-en all have rank 0"),
        ({"rank": 2}, ["--as", "dense", "--base", "x"], "--base is for --as peft, not for dense"),
        ({"rank": 2}, ["--base", "nowhere"], "nowhere"),
        ({"rank": 2}, ["--direction", "en-nl"], "nl"),
    ],
)
def test_what_cannot_be_written_is_refused(run, tmp_path, low_rank, more, message):
    whole = whole_model(run, low_rank, tmp_path / "whole")
    kind = [] if "--as" in more else ["--as", "peft"]
    said = refused(["convert", str(whole), "--out", str(tmp_path / "out"), *kind, *more])
    assert message in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tags", ["target", "source-target"])
@pytest.mark.parametrize("direction", [FR_EN, None], ids=["one", "all"])
def test_the_code_of_the_card_translates_as_the_run(run, tmp_path, capsys, tags, direction):
    whole = whole_model(run, KINDS["pair"], tmp_path / "whole", tags=tags)
    out, model = tmp_path / "out", load(whole, "cpu")
    convert(whole, "peft", direction, out, check=0)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    capsys.readouterr()
    for line in LINES[:3]:  # we would cut the fourth, which is longer than a source may be
        with_line = code.replace("FOLDER", str(out)).replace('"Text to translate."', repr(line))
        exec(compile(with_line, "card", "exec"), {})
        (said,) = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
        wanted = next(translate(model, direction or EN_DE, [line]))
        assert said.split() == wanted.replace("⁇", " ").split()


def test_the_code_of_the_documentation(run, tmp_path, capsys):
    page = (PROJECT / "docs" / "convert.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page.partition("\n## PEFT\n")[2].partition("\n## ")[0], re.S)
    whole = whole_model(run, KINDS["pair"], tmp_path / "whole")
    convert(whole, "peft", None, tmp_path / "ALL", check=0)
    capsys.readouterr()
    exec(compile(code.replace("ALL", str(tmp_path / "ALL")), "page", "exec"), {})
    said = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    wanted = translate(load(whole, "cpu"), EN_DE, ["First sentence.", "Second sentence."])
    assert [each.split() for each in said] == [each.replace("⁇", " ").split() for each in wanted]


def test_the_command_compares_and_shows_the_sizes(run, tmp_path, capsys):
    whole = whole_model(run, KINDS["language"], tmp_path / "whole")
    assert main(["convert", str(whole), "--as", "peft", "--out", str(tmp_path / "out"), "--check", "8"]) == 0
    said = capsys.readouterr().out
    assert "same translations: 8" in said and "sentences: 8" in said
    assert "de-en" in said and "not pruned" in said
    assert load(tmp_path / "out" / "base", "cpu").recipe.model.low_rank is None
    said = refused(["translate", str(tmp_path / "out"), "--from", "en", "--to", "de"])
    assert "was made by `lsmoe convert --as peft`" in said
