"""Encoders of transformers that tag words and find answers: losses, methods, data, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_encoder import (
    LANGUAGES,
    encoder_recipe,
    encoder_settings,
    write_encoder,
    write_names,
    write_questions,
)

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import IGNORED, SequenceBatch
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.labels import Labels
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.model.freezing import freeze
from lsmoe_ds.model.host import LabellingModel
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.costs import Parts

transformers = pytest.importorskip("transformers")
KINDS = ("XLMRoberta", "Bert")
CLASSES = {"tag": "AutoModelForTokenClassification", "answer": "AutoModelForQuestionAnswering"}
DE = Direction("de", "de")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with both encoders, both corpora, and what is prepared of them."""
    path = tmp_path_factory.mktemp("encoders")
    write_names(path / "names")
    write_questions(path / "questions")
    for kind in KINDS:
        write_encoder(path / kind, kind)
        for task in CLASSES:
            prepare(recipe_of(path, kind, task))
    return path


def recipe_of(folder, kind: str = "XLMRoberta", task: str = "tag", stage: int = 0, **low_rank) -> Recipe:
    recipe = encoder_recipe(folder, folder / kind, task, stage, **low_rank)
    recipe.data.name = f"{task}-{kind}"
    return recipe


def built(recipe: Recipe) -> LabellingModel:
    """Return a model whose head and low-rank matrices are drawn, in evaluation mode."""
    model = LabellingModel(recipe, recipe.data.vocabulary.size)
    initialize(model, 1, Topology.single())
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "low_rank" in name:
            parameter.data.normal_(0.0, 0.2)
    return model.eval()


def form_and_pairs(recipe: Recipe, split: str = "train"):
    prepared = PreparedData.of(recipe)
    form = form_of(recipe.data, recipe.languages, prepared.vocabulary)
    return form, [prepared.tokens(direction, split) for direction in recipe.languages.directions]


def example(recipe: Recipe, each: int = 2) -> SequenceBatch:
    """Return a batch of training sequences of all languages."""
    form, pairs = form_and_pairs(recipe)
    chosen = [(d, i) for d in range(len(pairs)) for i in range(each)]
    return form.collate(
        [pairs[d].source[i] for d, i in chosen],
        [pairs[d].target[i] for d, i in chosen],
        [d for d, _ in chosen],
    )


def theirs(model: LabellingModel, task: str, folder, kind: str):
    """Load the model as a user of transformers would, with the same head."""
    config = model.host.config
    found = getattr(transformers, CLASSES[task]).from_pretrained(folder / kind, config=config)
    state = {name.removeprefix("host."): value for name, value in model.state_dict().items()}
    found.load_state_dict({name: value for name, value in state.items() if "low_rank" not in name})
    return found.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", CLASSES)
def test_without_methods_the_loss_is_that_of_transformers(folder, kind, task):
    recipe = recipe_of(folder, kind, task)
    model, batch = built(recipe), example(recipe)
    other = theirs(model, task, folder, kind)
    given = {"input_ids": batch.tokens, "attention_mask": (batch.real > 0).long()}
    if kind == "Bert":
        given["token_type_ids"] = (batch.real == 2).long()
    found = model(*batch.inputs)
    if task == "tag":
        logits = other(**given).logits
        wanted = F.cross_entropy(logits[batch.read], batch.labels[batch.read], reduction="sum")
        torch.testing.assert_close(found.loss, other(**given, labels=batch.labels).loss * batch.target_tokens)
    else:
        both, hidden = other(**given), batch.real == 0
        ends = [each.masked_fill(hidden, -1e4) for each in (both.start_logits, both.end_logits)]
        wanted = sum(F.cross_entropy(e, batch.labels[:, i], reduction="sum") for i, e in enumerate(ends))
        assert batch.target_tokens == 2 * len(batch.tokens)
    torch.testing.assert_close(found.nll, wanted)
    assert Parts.of(recipe).whole.total == other.num_parameters()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("shared", (False, True))
def test_matrices_of_languages_and_fuse_distillation(folder, kind, task, shared):
    """LMS language-wise at the feed-forwards, and FD: equations 1, 3 and 4 of the paper in plain torch."""
    recipe = recipe_of(
        folder, kind, task, rank=2, index="language", at="feed_forward", fuse_distillation=shared
    )
    model, batch = built(recipe), example(recipe, 1)
    other = theirs(model, task, folder, kind)
    weights = {name: value for name, value in model.named_parameters() if "low_rank" in name}

    def logits(row: int, language: int) -> torch.Tensor:
        rows = slice(2 * language, 2 * language + 2)
        replaced = {}
        for at, module in model.outline.modules.items():
            if "feed_forward" in at:
                own = model.get_submodule(f"{at}_low_rank")
                product = own.vertical[rows].t() @ own.flat[rows]
                replaced[f"{module}.weight"] = other.get_parameter(f"{module}.weight") + product
        given = {"input_ids": batch.tokens[[row]], "attention_mask": (batch.real[[row]] > 0).long()}
        if kind == "Bert":
            given["token_type_ids"] = (batch.real[[row]] == 2).long()
        found = torch.func.functional_call(other, replaced, (), given)
        if task == "tag":
            return found.logits[0]
        both = torch.stack([found.start_logits[0], found.end_logits[0]])
        return both.masked_fill(batch.real[[row]] == 0, -1e4)

    total = torch.zeros(())
    for row in range(3):
        own, labels = logits(row, row), batch.labels[row]
        specific, labels = own[labels != IGNORED], labels[labels != IGNORED]
        nll = F.cross_entropy(specific, labels, reduction="sum")
        total = total + nll
        if shared:
            common = logits(row, 3)[batch.labels[row] != IGNORED]
            p, q = specific.log_softmax(-1), common.log_softmax(-1)
            divergence = (F.kl_div(p, q, log_target=True, reduction="sum") * 0.5) + (
                F.kl_div(q, p, log_target=True, reduction="sum") * 0.5
            )
            total = total - nll / 2 + F.cross_entropy(common, labels, reduction="sum") / 2 + divergence
    total.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in weights.items()}
    head = {name: p.grad.clone() for name, p in other.named_parameters() if name.startswith(("cl", "qa"))}
    model.zero_grad()
    model.train()
    found = model(*batch.inputs)
    loss = found.loss + sum(found.further.values())
    loss.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    for name, parameter in weights.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=2e-5)
    for name, gradient in head.items():
        torch.testing.assert_close(model.host.get_parameter(name).grad, gradient, rtol=1e-4, atol=2e-5)


def test_the_head_begins_at_random_and_trains_with_the_methods(folder):
    recipe = recipe_of(folder, rank=2, at="all")
    one, two = built(recipe), built(recipe)
    assert torch.equal(one.host.classifier.weight, two.host.classifier.weight)
    assert one.host.classifier.weight.std() > 0.05 and not one.host.classifier.bias.any()
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(folder / "XLMRoberta")
    name = "roberta.encoder.layer.1.output.dense.weight"
    assert torch.equal(one.host.get_parameter(name), loaded.get_parameter(name))
    freeze(one, recipe, Topology.single())
    trains = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert {each for each in trains if "low_rank" not in each} == {
        "host.classifier.weight",
        "host.classifier.bias",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_sub_words_are_those_of_transformers(folder, kind):
    """Also of words that have none, and of sentences longer than a window."""
    tokenizer = HostTokenizer.load(folder / kind / "tokenizer.json")
    other = transformers.AutoTokenizer.from_pretrained(folder / kind)
    words = ["Anna", "Berg-Otto", "\u200d", "wohnt", "in", "Bonn"]
    ((ids, starts),) = tokenizer.encode_words(words, 48)
    read = other(words, is_split_into_words=True)
    assert ids == read["input_ids"]
    first = {word: i for i, word in reversed(list(enumerate(read.word_ids()))) if word is not None}
    assert starts == [first.get(i, -1) for i in range(len(words))]
    pieces = list(tokenizer.encode_words(words * 9, 24))
    assert len(pieces) > 3 and all(len(ids) <= 24 for ids, _ in pieces)
    assert sum(len(starts) for _, starts in pieces) == 9 * len(words)
    if kind == "XLMRoberta":  # the other one knows no sub-word of it
        ((ids, starts),) = tokenizer.encode_words(["Anna" * 20], 12)
        assert len(ids) == 12 and starts == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_those_of_transformers(folder, kind):
    tokenizer = HostTokenizer.load(folder / kind / "tokenizer.json")
    other = transformers.AutoTokenizer.from_pretrained(folder / kind)
    context = " ".join(["Anna wohnt in Bonn.", "Otto mag New York."] * 4)
    found = list(tokenizer.encode_windows("wer?", context, 40, 12))
    read = other(
        "wer?",
        context,
        truncation="only_second",
        max_length=40,
        stride=12,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [ids for ids, _, _ in found] == read["input_ids"] and len(found) > 2
    for (ids, begin, spans), offsets in zip(found, read["offset_mapping"], strict=True):
        assert offsets[begin : begin + len(spans)] == spans
        assert len(ids) <= 40 and begin + len(spans) == len(ids) - 1


def test_answers_are_found_in_each_window(folder):
    recipe = recipe_of(folder, task="answer")
    form, pairs = form_and_pairs(recipe)
    assert isinstance(form, Labels)
    file = json.loads((folder / "questions/small.goldp.de.train.json").read_text())
    sequence = seen = 0
    for paragraph in file["data"][0]["paragraphs"]:
        asked = paragraph["qas"][0]
        answer = asked["answers"][0]
        line = json.dumps({"question": asked["question"], "context": paragraph["context"]})
        for window in form.windows(line):
            context, first, last = pairs[0].target[sequence].tolist()
            assert pairs[0].source[sequence].tolist() == window.ids and context == window.context
            start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
            if window.spans[0][0] <= start and end <= window.spans[-1][1]:
                spans = window.spans[first - context][0], window.spans[last - context][1]
                assert spans[0] <= start and end <= spans[1]
                assert paragraph["context"][spans[0] : spans[1]].strip(" .") == answer["text"]
                seen += 1
            else:
                assert (first, last) == (0, 0)
            sequence += 1
    assert sequence == len(pairs[0]) > 20 and seen >= 20


def test_labels_stand_at_first_sub_words(folder):
    recipe = recipe_of(folder)
    batch, tokenizer = example(recipe, 1), HostTokenizer.load(folder / "XLMRoberta/tokenizer.json")
    labels = recipe.data.labels
    lines = (folder / "names/de/train").read_text().split("\n\n")[0].split("\n")
    words = [line.split("\t")[0].removeprefix("de:") for line in lines]
    ((ids, starts),) = tokenizer.encode_words(words, 48)
    assert batch.tokens[0, : len(ids)].tolist() == ids
    wanted = np.full(batch.tokens.shape[1], IGNORED)
    wanted[starts] = [labels.index(line.split("\t")[1]) for line in lines]
    assert batch.labels[0].tolist() == wanted.tolist()


BAD = [
    ({"model": {"task": "answer"}}, "'model.task' is answer, but 'data.corpora' are text to tag"),
    ({"data": {"directions": ["de-en"]}}, "'directions' is for translation, but wikiann is a format"),
    ({"data": {"prompt": {"text": "{source}"}}}, "'prompt' is for translation"),
    ({"data": {"labels": ["B-PER", "O"]}}, "'labels' begins with B-PER: O, of a word in no name"),
    ({"data": {"labels": ["O", "PER"]}}, "'labels' has PER, which is no tag of the BIO scheme"),
    ({"data": {"stride": 9}}, "'stride' is for corpora of the format squad"),
    ({"data": {"languages": []}}, "corpora of the format wikiann are by language: list 'languages'"),
    (
        {"data": {"batch": {"max_length": 65}}},
        "'data.batch.max_length' is 65, more than the 64 tokens that the model reads",
    ),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_what_does_not_fit_is_refused_with_a_sentence(folder, changes, said):
    settings = encoder_settings(folder, folder / "XLMRoberta")
    for section, values in changes.items():
        settings[section].update(values)
    with pytest.raises(ValueError) as error:
        Recipe.model_validate(settings)
    assert said in str(error.value)


def test_places_of_answers_are_not_smoothed(folder):
    settings = encoder_settings(folder, folder / "XLMRoberta", "answer")
    settings["training"]["label_smoothing"] = 0.1
    with pytest.raises(ValueError, match="the places of an answer are not smoothed: set it to 0"):
        Recipe.model_validate(settings)


def test_a_decoder_cannot_tag(folder, tmp_path):
    transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48
    ).save_pretrained(tmp_path)
    shutil.copy(folder / "XLMRoberta/tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="models that are an encoder alone can tag here"):
        encoder_recipe(folder, tmp_path)


BAD_TEXT = [
    ("names/de/train", "de:Anna\tB-MISC\n", r"has the tag B-MISC, which is none of 'data\.labels': O, B-PER"),
    ("names/de/dev", "de:Anna\n", r"line 1: a word and its tag with a tab or space between were expected"),
    ("questions/small.goldp.de.train.json", "{}", r"is not laid out as SQuAD"),
    ("questions/small.goldp.de.train.json", "[", r"cannot be read as JSON"),
    (
        "questions/small.goldp.fr.dev.json",
        json.dumps(
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": "Anna",
                                "qas": [
                                    {
                                        "id": "7",
                                        "question": "q",
                                        "answers": [{"text": "Otto", "answer_start": 1}],
                                    }
                                ],
                            }
                        ]
                    }
                ]
            }
        ),
        r"the answer 'Otto' of question 7 does not stand at character 1 of its context",
    ),
]


@pytest.mark.parametrize(("file", "text", "said"), BAD_TEXT, ids=[said[:30] for *_, said in BAD_TEXT])
def test_bad_text_is_told_before_training(folder, tmp_path, file, text, said):
    corpus = file.split("/")[0]
    shutil.copytree(folder / corpus, tmp_path / corpus)
    (tmp_path / file).write_text(text)
    recipe = encoder_recipe(tmp_path, folder / "XLMRoberta", {"names": "tag"}.get(corpus, "answer"))
    with pytest.raises(UserError, match=said):
        prepare(recipe)


def test_words_with_colons_and_repeated_questions(folder, tmp_path):
    """A word loses its language's prefix alone; two questions are the same whatever their ids."""
    for code in LANGUAGES:
        (tmp_path / "names" / code).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            text = f"um\tO\n12:30\tO\n{code}:http://x.de\tO\n:\tO\n{code}:{code}:\tB-PER\n"
            (tmp_path / "names" / code / split).write_text(text)
    prepared = prepare(encoder_recipe(tmp_path, folder / "XLMRoberta"))
    assert prepared.text(DE, "test") == (["um 12:30 http://x.de : de:"], ["O O O O B-PER"])
    assert "de: the training text has 1 of 1 test example, too" in prepared.manifest["notices"]
    shutil.copytree(folder / "questions", tmp_path / "questions")
    train = tmp_path / "questions/small.goldp.de.train.json"
    value = json.loads(train.read_text())
    for number, paragraph in enumerate(value["data"][0]["paragraphs"][:3]):
        paragraph["qas"][0]["id"] = f"other-{number}"
    value["data"][0]["paragraphs"] = value["data"][0]["paragraphs"][:3]
    (tmp_path / "questions/small.goldp.de.dev.json").write_text(json.dumps(value))
    prepared = prepare(encoder_recipe(tmp_path, folder / "XLMRoberta", "answer"))
    assert "de: the training text has 3 of 3 dev examples, too" in prepared.manifest["notices"]


def test_other_layouts(folder, tmp_path):
    """CoNLL with spaces and further columns; one file of TyDiQA for all languages."""
    for code in LANGUAGES:
        (tmp_path / "names" / code).mkdir(parents=True)
        for split in ("train", "valid", "test"):
            text = f"-DOCSTART- -X- O O\n\nAnna NN B-PER\nlebt VB O\n\n{split} NN O\n"
            (tmp_path / "names" / code / f"{code}.{split}.conll").write_text(text)
    settings = encoder_settings(tmp_path, folder / "XLMRoberta")
    settings["data"]["corpora"][0]["format"] = "conll"
    prepared = prepare(Recipe.model_validate(settings))
    assert prepared.text(DE, "dev") == (["Anna lebt", "valid"], ["B-PER O", "O"])
    questions = {
        "context": "Anna\nlebt in Bonn",
        "qas": [
            {
                "id": f"{name}-{i}-0",
                "question": f"wo {i}",
                "answers": [{"text": "Bonn", "answer_start": 13}] * (i < 2),
            }
            for name in ("german", "english", "french")
            for i in range(3)
        ],
    }
    (tmp_path / "questions").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "questions" / f"tydiqa-goldp-v1.1-{split}.json").write_text(
            json.dumps({"data": [{"paragraphs": [questions]}]})
        )
    prepared = prepare(encoder_recipe(tmp_path, folder / "XLMRoberta", "answer"))
    sources, targets = prepared.text(DE, "dev")
    assert [json.loads(line)["question"] for line in sources] == ["wo 0", "wo 1"]
    assert json.loads(targets[0]) == [{"text": "Bonn", "start": 13}]
    assert any("left out 1 question without an answer" in notice for notice in prepared.manifest["notices"])
