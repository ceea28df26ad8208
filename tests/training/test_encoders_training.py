"""Training encoders of transformers: data parallel, resumed, evaluated, converted and compared in a study."""

import json

import pytest
import torch
from support import encoder_runs
from support.encoder_runs import DE, recipe_of
from support.host_runs import trained
from support.layouts import losses
from support.loops import assert_same_but_rounding, assert_same_end

from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.inference.label import best_span, label_all
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate

base, run, task = encoder_runs.base, encoder_runs.run, encoder_runs.task  # fixtures


transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("stage", (0, 2))
def test_two_processes_train_as_one(pool, base, task, run, stage, tmp_path):
    other = trained(pool, recipe_of(base, task, stage), tmp_path / "two", 2)
    assert losses(other) == pytest.approx(losses(run), rel=1e-5)
    found, wanted = (read_weights(find_model(each)).tensors for each in (other, run))
    assert found.keys() == wanted.keys()
    for name in wanted:
        # These change no loss, such as a bias of keys, or what is added to the logits of all places of an
        # answer: their gradients are rounding, of which Adam makes whole steps.
        same_everywhere = ("qa_outputs.bias", "1.output.LayerNorm.bias") if task == "answer" else ()
        if not name.endswith(("self.key.bias", *same_everywhere)):
            assert_same_but_rounding(found[name], wanted[name], name)


def test_an_interrupted_run_ends_bit_equal(pool, base, task, run, tmp_path):
    cut = trained(pool, recipe_of(base, task), tmp_path / "cut", 1, 3, KeyboardInterrupt())
    trained(pool, recipe_of(base, task), cut)
    assert_same_end(run, cut, 4)


@pytest.mark.parametrize("route", ("specific", "shared"))
def test_scores_of_labels_by_language(base, task, run, route, tmp_path):
    """Those of seqeval, or of the words, computed from the files of text beside them."""
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.data.directions == ["de-de", "en-en", "fr-fr"]
    split = "test" if task == "tag" else "dev"
    table = evaluate(run, None, split=split, route=route, progress=False, out=tmp_path)
    assert [score.direction.label for score in table.directions] == ["de", "en", "fr"]
    assert list(table.averages()) == ["all"], "no text has bitexts to count resources by"
    text = tmp_path / "scores" / table.question
    for score in table.directions:
        source, found, wanted = (
            (text / f"{score.direction}.{side}").read_text().split("\n")[:-1]
            for side in ("source", "hypothesis", "reference")
        )
        assert score.sentences == len(source) == {"tag": 9, "answer": 6}[task]
        if task == "tag":
            from seqeval.metrics import f1_score

            f1 = f1_score([line.split() for line in wanted], [line.split() for line in found])
            assert score.metrics["f1"] == pytest.approx(100 * f1)
            assert [len(line.split()) for line in found] == [len(line.split()) for line in source]
        else:
            same = sum(a.rstrip(".") == b for a, b in zip(found, wanted, strict=True))
            assert score.metrics["exact"] == pytest.approx(100 * same / 6)
            assert all(a in b for a, b in zip(found, source, strict=True))


def test_it_learns_to_label(pool, base, task, tmp_path):
    """Four steps give an F1 of 3 to 20, 200 give 70 of names and 55 of answers, a few points either way with
    the processor's rounding.
    """
    recipe = recipe_of(base, task, steps=200, fuse_distillation=False)
    recipe.training.learning_rate, recipe.training.validate_every = 3e-3, 0
    recipe.training.log_every, recipe.training.warmup = 100, 20
    recipe.training.checkpoint_every = 200
    run = trained(pool, recipe, tmp_path / "run")
    table = evaluate(run, ["de", "fr"], split="dev", progress=False)
    assert [score.direction.label for score in table.directions] == ["de", "fr"]
    assert table.averages()["all"].metrics["f1"] > {"tag": 50, "answer": 35}[task]


def test_labels_are_those_of_transformers_on_each_sequence(base, task, run):
    """In batches of other lengths, too; long texts are cut."""
    loaded = load(run)
    sources, _ = PreparedData.of(loaded.recipe).text(DE, "dev")
    if task == "tag":
        sources = [*sources, " ".join(sources)]
    found = label_all(loaded, DE, sources)
    assert found == [label_all(loaded, DE, [line])[0] for line in sources]
    assert found == label_all(loaded, DE, sources, batch_tokens=1)
    (method,) = loaded.model.methods
    products = method.products(read_weights(find_model(run)).tensors, DE, "specific")
    kind = {"tag": "AutoModelForTokenClassification", "answer": "AutoModelForQuestionAnswering"}[task]
    theirs = getattr(transformers, kind).from_config(loaded.model.host.config).eval()
    theirs.load_state_dict(
        {
            name.removeprefix("host."): value
            for name, value in loaded.model.state_dict().items()
            if name.startswith("host.")
        }
    )
    for at, product in products.items():
        down, up = product.make()
        theirs.get_submodule(loaded.model.outline.modules[at]).weight.data += up @ down
    tokenizer = transformers.AutoTokenizer.from_pretrained(base / task)
    for line, labels in zip(sources[:6], found, strict=False):
        if task == "tag":
            words = line.split(" ")
            read = tokenizer(words, is_split_into_words=True, return_tensors="pt")
            numbers = theirs(**read).logits[0].argmax(-1).tolist()
            first = {word: i for i, word in reversed(list(enumerate(read.word_ids()))) if word is not None}
            assert labels.split() == [loaded.recipe.data.labels[numbers[first[i]]] for i in range(len(words))]
            continue
        value = json.loads(line)
        read = tokenizer(
            value["question"],
            value["context"],
            truncation="only_second",
            max_length=48,
            stride=16,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            padding=True,
            return_tensors="pt",
        )
        spans = read.pop("offset_mapping").tolist()
        read.pop("overflow_to_sample_mapping")
        with torch.no_grad():
            both, best = theirs(**read), (-1e9, "")
        for row, (start, end) in enumerate(zip(both.start_logits, both.end_logits, strict=True)):
            inside = [i for i, which in enumerate(read.encodings[row].sequence_ids) if which == 1]
            for i in inside:
                for j in (k for k in inside if i <= k < i + 30):
                    text = value["context"][spans[row][i][0] : spans[row][j][1]]
                    best = max(best, (float(start[i] + end[j]), " ".join(text.split())))
        assert labels == best[1]


def test_what_is_for_translations_is_refused(run, task):
    found = load(run)
    for options in ({"beam": 3}, {"tokenize": "13a"}, {"test": ["x.de"]}):
        with pytest.raises(UserError, match=f"is for translations, but the task of the model is to {task}"):
            evaluate(run, split="dev", progress=False, **options)
    with pytest.raises(UserError, match=f"the task of the model is to {task}: use `lsmoe label`"):
        translate(found, DE, ["Anna"])
    if task == "answer":
        with pytest.raises(UserError, match="have no test set; `--split dev` scores the dev set"):
            evaluate(run, progress=False)


def test_the_best_span_ends_after_it_begins():
    import numpy as np

    from lsmoe_ds.data.labels import Window

    window = Window([0] * 8, 2, [(0, 1), (2, 3), (4, 5), (6, 7)], 0, 7)
    logits = np.zeros((2, 8))
    logits[0, 5], logits[1, 2] = 9.0, 9.0  # the end before the beginning
    logits[0, 3], logits[1, 4] = 2.0, 8.0
    logits[0, 0], logits[1, 0] = 99.0, 99.0  # outside of the context
    assert best_span(logits, window) == (10.0, (2, 5))
    assert best_span(logits, Window([0] * 8, 8, [], 0, 0)) is None
