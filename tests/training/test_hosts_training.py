"""Training a model of transformers: data parallel, resumed, translated with, and its data prepared."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.host_runs import modular, prepared, trained
from support.layouts import losses
from support.loops import assert_same_but_rounding, assert_same_end
from support.small_host import END, TEXT, host_recipe, host_settings

from lsmoe_ds.analysis.findings import analyze_weights
from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.data import Prompt
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.prompts import IGNORED, joined
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import load
from lsmoe_ds.training.schedules import learning_rate
from lsmoe_ds.training.start import _notice, check

pytest.importorskip("transformers")
EN_DE, DE_FR = Direction("en", "de"), Direction("de", "fr")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("host-training"), "Qwen2")


def test_a_prompt_that_leaves_no_room_is_named(base, tmp_path):
    recipe = modular(base)
    recipe.data.prompt = Prompt(text="translate " * 60 + "{source}", end=END)
    with pytest.raises(
        UserError, match=r"'data.batch.max_length' 96, of which the prompt takes \d{3}: allow"
    ):
        check(recipe, tmp_path / "run")


@pytest.fixture(scope="module")
def run(pool, base):
    return trained(pool, modular(base), base / "run")


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_two_processes_train_as_one(pool, base, run, stage, tmp_path):
    other = trained(pool, modular(base, stage), tmp_path / "two", 2)
    assert losses(other) == pytest.approx(losses(run), rel=1e-5)
    found, wanted = (read_weights(find_model(each)).tensors for each in (other, run))
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_same_but_rounding(found[name], wanted[name], name)


def test_an_interrupted_run_ends_bit_equal(pool, base, run, tmp_path):
    cut = trained(pool, modular(base), tmp_path / "cut", 1, 3, KeyboardInterrupt())
    trained(pool, modular(base), cut)
    assert_same_end(run, cut, 4)


def test_the_base_is_stored_once_and_only_matrices_train(base, run):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base / "host", dtype=torch.float32)
    found = read_weights(find_model(run)).tensors
    for name, value in theirs.named_parameters():
        assert torch.equal(found[f"host.{name}"], value)
    files = [torch.load(path, weights_only=False) for path in (run / "checkpoints/step-4").glob("mp_rank*")]
    assert files and all("low_rank" in name for each in files for name in each["module"])
    rows = {name: value.shape[0] for name, value in found.items() if name.endswith((".in.flat", ".out.flat"))}
    assert set(rows.values()) == {4}, "of German and French, each of rank 2: English is the pivot"


def test_a_run_needs_the_folder_of_the_model_no_more(pool, base, run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    text = (run / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(text.replace(str(base / "host"), str(tmp_path / "gone")))
    recipe = load_recipe(copied / "recipe.yaml")
    assert recipe.model.huggingface == copied / "host"
    recipe.training.steps = 6
    trained(pool, recipe, copied)
    recipe = modular(base)
    recipe.training.steps = 6
    assert losses(copied) == losses(trained(pool, recipe, shutil.copytree(run, tmp_path / "stayed")))


@pytest.mark.parametrize(("direction", "route"), [(EN_DE, "specific"), (DE_FR, "matrices-1-3")])
def test_it_translates_as_transformers_does_with_merged_weights(base, run, direction, route):
    import transformers

    loaded = load(run, route=route)
    lines = PreparedData.of(loaded.recipe).text(direction, "test")[0][:4]
    sources = [loaded.vocabulary.encode(line) for line in lines]
    found = [best.tokens[:8] for (best,) in loaded.search(sources, direction, Search(beam=1))]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base / "host", dtype=torch.float32).eval()
    (method,) = loaded.model.methods
    products = method.products(read_weights(find_model(run)).tensors, direction, route)
    for at, product in products.items():
        down, up = product.make()
        theirs.get_submodule(loaded.model.outline.modules[at]).weight.data += up @ down
    names = {"en": "English", "de": "German", "fr": "French"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "host" / "tokenizer.json"))
    for line, tokens in zip(lines, found, strict=True):
        text = loaded.recipe.data.prompt.text.replace("{source}", line)
        for place, code in (("{source_language}", direction.source), ("{target_language}", direction.target)):
            text = text.replace(place, names[code])
        asked = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        made = theirs.generate(
            input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], max_new_tokens=8
        )
        assert tokens == made[0, asked["input_ids"].shape[1] :].tolist()


def test_a_mixed_length_batch_translates_as_sentences_alone(run):
    loaded = load(run)
    sources = [loaded.vocabulary.encode(text) for text in ("ba", "de lo mi ba ko ra", "fa ki")]
    together = loaded.search(sources, EN_DE, Search(beam=2))
    alone = [loaded.search([source], EN_DE, Search(beam=2))[0] for source in sources]
    assert [best.tokens for (best,) in together] == [best.tokens for (best,) in alone]


@pytest.mark.parametrize(
    ("search", "boost"),
    [
        (Search(1), 0.0),
        (Search(3, 0.7, n_best=3), 0.0),
        (Search(3, 0.7, n_best=3), 3.5),
        (Search(4, 2.0, n_best=2), 3.5),
    ],
)
def test_what_is_found_is_scored_as_our_search_scores(run, search, boost):
    """With a boost of the end, answers end soon, otherwise at the greatest length."""
    loaded = load(run)
    sources = [loaded.vocabulary.encode(text) for text in ("ba", "de lo mi ba ko ra", "fa ki")]
    end = int(loaded.collate([[5]], [[]], EN_DE).labels[0, -1])
    loaded.model.host.get_output_embeddings().register_forward_hook(
        lambda module, given, logits: logits + boost * (torch.arange(logits.shape[-1]) == end)
    )
    found = loaded.search(sources, EN_DE, search)
    assert [each[:1] for each in found] == loaded.search(sources, EN_DE, replace(search, n_best=1))
    for source, each in zip(sources, found, strict=True):
        assert len(each) == len({tuple(h.tokens) for h in each}) == search.n_best
        assert [h.score for h in each] == sorted((h.score for h in each), reverse=True)
        for hypothesis in each:
            assert (len(hypothesis.tokens) < 3) == (boost > 0)
            batch = loaded.collate([source], [hypothesis.tokens], EN_DE)
            learned = batch.labels[0] != batch.ignored
            logs = loaded.logits_of(batch)[0, learned].log_softmax(1)
            total = float(logs.gather(1, batch.labels[0, learned, None]).sum())
            wanted = total / (len(hypothesis.tokens) + 1) ** search.length_penalty
            assert hypothesis.score == pytest.approx(wanted, abs=1e-3)


def test_it_is_evaluated_by_a_route_of_its_own(run):
    table = evaluate(run, ["de-fr", "en-de"], beam=1, limit=2, route="outputs-1-9", progress=False)
    assert [str(each.direction) for each in table.directions] == ["de-fr", "en-de"]
    assert table.route == "outputs-1-9" and (run / "scores").is_dir()
    with pytest.raises(UserError, match="'sideways' is no route: choose specific, in, out, outputs-W-W or"):
        load(run, route="sideways")


@pytest.fixture(scope="module")
def learned(pool, base, run):
    """Train only the weights by which two directions merge the matrices of :func:`run`; return the run."""
    convert(run, "consolidated", None, base / "start", check=0)
    recipe = host_recipe(base, base / "host", rank=2, index="modular", at="all", merge="learned")
    recipe.training.start_from, recipe.training.trainable = base / "start", ["decoder_low_rank.index"]
    recipe.training.directions, recipe.training.steps = ["de-fr", "en-de"], 3
    check(recipe, base / "learned")
    return trained(pool, recipe, base / "learned")


def test_weights_of_two_matrices_are_learned_from_a_trained_model(run, learned):
    before, after = (read_weights(find_model(each)).tensors for each in (run, learned))
    assert after.keys() - before.keys() == {"decoder_low_rank.index"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    index, numbers = after["decoder_low_rank.index"], load_recipe(learned / "recipe.yaml").data.directions
    moved = [numbers[i] for i, each in enumerate(index) if bool((each != 1.0).any())]
    assert moved == ["en-de", "de-fr"]
    first, second = index[numbers.index("de-fr")].softmax(1).T
    torch.testing.assert_close(first + second, torch.ones(2))


def test_learned_weights_are_drawn_by_direction_and_layer(run, learned, tmp_path):
    """Figure 2 of the paper; what did not train is left out."""
    summary = analyze_weights(learned, "structure", tmp_path / "out")
    assert summary["files"] == ["index.html", "structure.csv", "structure.json", "weights.svg"]
    index = read_weights(find_model(learned)).tensors["decoder_low_rank.index"]
    numbers = load_recipe(learned / "recipe.yaml").data.directions
    with (tmp_path / "out/structure.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    places = [(row["direction"], row["side"], row["layer"]) for row in rows]
    assert places == [(name, "decoder", str(layer)) for name in ("en-de", "de-fr") for layer in range(2)]
    for row in rows:
        w_in, w_out = index[numbers.index(row["direction"]), int(row["layer"])].softmax(0).tolist()
        assert (float(row["in"]), float(row["out"])) == pytest.approx((w_in, w_out))
        assert w_in != 0.5
    (grid,) = json.loads((tmp_path / "out/structure.json").read_text())["grids"]
    assert (grid["rows"], grid["columns"]) == (["English to German", "German to French"], ["1", "2"])
    assert [share for row in grid["values"] for share in row] == pytest.approx(
        [float(r["out"]) for r in rows]
    )
    picture = (tmp_path / "out/weights.svg").read_text()
    for row in rows:
        color = "more" if float(row["out"]) > 0.5 else "less"
        assert f'class="{color}"' in picture and f"{float(row['out']):.2f}</text>" in picture
    with pytest.raises(UserError, match=r"train with 'low_rank\.merge: learned'"):
        analyze_weights(run, "structure", tmp_path / "none")


def test_prompts_that_the_tokenizer_joins_with_the_text_are_counted(base):
    data = PreparedData.of(modular(base))
    assert joined(data, Prompt(text=TEXT, end=END)) == (0, 25)
    wrong, seen = joined(data, Prompt(text="To {target_language} {source}\n", end=END))
    assert 0 < wrong <= seen == 25


def plain_losses(recipe: Recipe, dtype: torch.dtype) -> list[float]:
    """Train transformers' model in plain torch: weights of this type, and a float32 copy that AdamW steps."""
    import transformers

    folder, data = recipe.model.huggingface, PreparedData.of(recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    copies = [torch.nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(copies, lr=0.01, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1)
    stream = BatchStream(
        data,
        recipe.languages,
        data.vocabulary,
        recipe.data.batch,
        recipe.data.temperature,
        recipe.training.seed,
        form=form_of(recipe.data, recipe.languages, data.vocabulary),
        directions=recipe.trained,
    )
    found = []
    for number, step in zip(range(1, recipe.training.steps + 1), stream, strict=False):
        sums = [torch.zeros_like(copy) for copy in copies]
        total = 0.0
        for batch in step.batches:
            real = batch.labels != IGNORED
            logits = model(input_ids=batch.tokens).logits[real].float()
            loss = F.cross_entropy(logits, batch.labels[real], reduction="sum") / step.target_tokens
            loss.backward()
            total += float(loss.detach())
            for each, parameter in zip(sums, model.parameters(), strict=True):
                each += parameter.grad.float()
                parameter.grad = None
        for copy, gradient in zip(copies, sums, strict=True):
            copy.grad = gradient
        torch.nn.utils.clip_grad_norm_(copies, recipe.training.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(
            number, 9, 0.01, recipe.training.warmup, recipe.training.schedule
        )
        optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(copies, model.parameters(), strict=True):
                parameter.copy_(copy)
        found.append(total)
    return found


@pytest.mark.parametrize("stage", (0, 1))
def test_bfloat16_trains_as_plain_torch_does(pool, base, stage, tmp_path):
    """The whole model, in weights of bfloat16 beside a float32 copy."""
    recipe = host_recipe(base, base / "host", stage)
    recipe.training.steps, recipe.training.log_every, recipe.training.weight_decay = 3, 1, 0.1
    recipe.deepspeed |= {"bf16": {"enabled": True}}
    found = losses(trained(pool, recipe, tmp_path / "bf16"))
    same, other = (plain_losses(recipe, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert found == pytest.approx(same, rel=2e-5) != pytest.approx(other, rel=2e-5)


def test_what_is_unusual_of_modular_matrices_is_said(base, tmp_path, capfd):
    recipe = host_recipe(base, base / "host", rank=2, index="modular", merge="learned")
    recipe.training.directions = ["de-fr"]
    _notice(recipe)
    said = capfd.readouterr().err
    assert "no direction that trains leads into or out of low_rank.pivot, which is en" in said
    assert "no training.start_from: matrices and weights train together from the beginning" in said
    recipe.training.directions = ["de-fr", "en-de"]
    recipe.training.start_from = tmp_path
    _notice(recipe)
    assert "low_rank" not in capfd.readouterr().err
    recipe.training.weight_decay = 0.3
    _notice(recipe)
    assert "weight_decay is 0.3: each step shrinks also what low_rank has of dir" in capfd.readouterr().err


def test_weights_of_matrices_that_are_not_trained_are_refused(base, tmp_path):
    """Their gradient is 0: nothing would be learned."""
    settings = host_settings(base, base / "host", rank=2, index="modular", merge="learned")
    settings["training"]["trainable"] = ["*_low_rank.index"]
    with pytest.raises(
        ValueError, match=r"with a product of 0: give the trained model as 'training.start_from'"
    ):
        Recipe.model_validate(settings)
    plain = host_settings(base, base / "host")
    plain["data"]["directions"] = settings["data"]["directions"]
    overrides = [f"data.corpora=[{{path: {base / 'text.tsv'}, format: tsv}}]", "data.batch.max_length=96"]
    overrides += [
        f"data.directions=[{', '.join(plain['data']['directions'])}]",
        f"data.directory={base / 'data'}",
    ]
    convert(base / "host", "consolidated", None, tmp_path / "start", check=0, overrides=overrides)
    settings["training"]["start_from"] = str(tmp_path / "start")
    with pytest.raises(UserError, match=r"and the model in 'training.start_from' has none"):
        check(Recipe.model_validate(settings), tmp_path / "run")
    settings["training"] |= {"start_from": None, "trainable": "methods"}
    assert Recipe.model_validate(settings)
