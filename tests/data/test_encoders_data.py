"""Labelled text for encoders: layouts, sub-words, windows, places of answers, and what is refused."""

import gzip
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small_encoder import (
    DE,
    KINDS,
    LANGUAGES,
    encoder_recipe,
    encoder_settings,
    example,
    form_and_pairs,
    recipe_of,
    write_all,
)

from lsmoe_ds.config.groups import Groups
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import IGNORED
from lsmoe_ds.data.formats import find_parts
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.labels import Labels, Window, places_of
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.summary import show
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.label import label_all

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("encoders"))


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


PLACES = [  # context, answer, where it starts, the characters of the tokens that are learned
    ("Anna lives", "Anna", 0, "Anna"),
    ("x Anna", "Anna", 2, "Anna"),
    (" Anna lives", " Anna", 0, "Anna"),
    ("in Bonn ", "Bonn ", 3, "Bonn"),
    ("in Bonn\u200b", "Bonn\u200b", 3, "Bonn"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("context", "answer", "start", "learned"), PLACES, ids=[repr(c) for c, *_ in PLACES])
def test_places_of_answers_at_the_edges(folder, kind, context, answer, start, learned):
    form, _ = form_and_pairs(recipe_of(folder, kind, "answer"))
    (window,) = form.windows(json.dumps({"question": "wer?", "context": context}))
    first, last = (place - window.context for place in places_of(window, start, answer))
    assert 0 <= first <= last < len(window.spans)
    assert context[window.spans[first][0] : window.spans[last][1]].strip("\u200b ") == learned


def test_a_character_of_several_tokens_is_learned_whole():
    spans = [(0, 4), (5, 6), (5, 6), (5, 6), (6, 7), (6, 7)]
    window = Window([0] * 9, 2, spans, 0, 7)
    assert places_of(window, 5, "\U0001f999") == (3, 5)
    assert places_of(window, 5, "\u6771\u4eac") == (3, 7)
    assert places_of(Window([0] * 9, 2, spans, 5, 7), 4, "a\u6771") == (0, 0)  # it begins before the window


def test_of_several_answers_the_first_is_learned(folder):
    form, _ = form_and_pairs(recipe_of(folder, task="answer"))
    source = json.dumps({"question": "wer?", "context": "Anna und Otto"})
    answers = [{"text": "Otto", "start": 9}, {"text": "Anna", "start": 0}]
    (learned,) = (target for _, target in form.read(source, json.dumps(answers)))
    (other,) = (target for _, target in form.read(source, json.dumps(answers[::-1])))
    assert learned[1:] != other[1:] and learned[1] > other[2]


def test_labels_of_a_long_sentence_stay_with_their_words(folder):
    recipe = recipe_of(folder)
    form, _ = form_and_pairs(recipe)
    words, tags = ["Anna", "Otto", "Bonn"] * 20, ["B-PER", "I-PER", "B-LOC"] * 20
    found = []
    for ids, target in form.read(" ".join(words), " ".join(tags)):
        places, numbers = np.divmod(target, len(recipe.data.labels))
        tokens = [ids[place] for place in places]
        found += [(token, recipe.data.labels[number]) for token, number in zip(tokens, numbers, strict=True)]
    assert len(found) == 60 and found[:3] * 20 == found
    assert [tag for _, tag in found] == tags


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


def test_a_tokenizer_that_joins_words_cannot_tag(folder, tmp_path):
    from support.small_host import write_host

    write_host(tmp_path / "bytes")
    with pytest.raises(UserError, match="reads words as parts of one: save it with"):
        Labels.of(
            encoder_recipe(folder, folder / "XLMRoberta").data,
            encoder_recipe(folder, folder / "XLMRoberta").languages,
            HostTokenizer.load(tmp_path / "bytes/tokenizer.json"),
        )


def test_what_is_prepared_is_shown_in_words_of_the_task(folder):
    table = show(recipe_of(folder)).table()
    assert [column.header for column in table.columns][:4] == ["language", "text", "with", "group"]
    assert [column.header for column in table.columns][8:12] == [
        "tokens",
        "labels",
        "mean tokens",
        "mean labels",
    ]
    assert set(table.columns[3]._cells) == {""}, "nothing says which languages are rich"
    recipe = recipe_of(folder)
    recipe.data.groups = Groups(high=["de", "en"], low=["fr"])
    assert show(recipe).table().columns[3]._cells == ["high", "high", "low"]


def test_compressed_text_is_read_like_any_other(folder, tmp_path):
    """Of two files that differ by it alone the plain one is read."""
    for name, kind, task in (("names", "XLMRoberta", "tag"), ("questions", "Bert", "answer")):
        shutil.copytree(folder / name, tmp_path / name)
        for path in [path for path in (tmp_path / name).rglob("*") if path.is_file()]:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        recipe = recipe_of(folder, kind, task)
        recipe.data.corpora[0].path = tmp_path / name
        bitexts = [direction.bitext for direction in recipe.languages.directions]
        found, wanted = (
            {(part.bitext, part.split): list(part.pairs()) for part in find_parts(corpora, folder, bitexts)}
            for corpora in (recipe.data.corpora, recipe_of(folder, kind, task).data.corpora)
        )
        assert found == wanted != {}
    (tmp_path / "names/de/train").write_text("de:Otto\tB-PER\n")
    recipe = recipe_of(folder)
    recipe.data.corpora[0].path = tmp_path / "names"
    (part,) = (part for part in find_parts(recipe.data.corpora, folder, ["de-de"]) if part.split == "train")
    assert list(part.pairs()) == [("Otto", "B-PER")]
    (tmp_path / "one.train.json.gz").write_bytes(b"\x1f\x8bno")
    recipe = recipe_of(folder, "Bert", "answer")
    recipe.data.corpora[0].path, recipe.data.corpora[0].source = tmp_path / "one.train.json", "de"
    (part,) = find_parts(recipe.data.corpora, folder, ["de-de"])
    with pytest.raises(UserError, match=r"one\.train\.json\.gz is damaged: gzip cannot read it"):
        list(part.pairs())


def squad(answers):
    """Return the text of a SQuAD file with one question."""
    question = {"id": "7", "question": "q", "answers": answers}
    return json.dumps({"data": [{"paragraphs": [{"context": "Anna", "qas": [question]}]}]})


BAD_TEXT = [
    (
        "names/de/train",
        "de:mag\tO\n\nde:Otto\tB-PER\nde:Anna\tI-MISC\nde:in\tB-X\n",
        r"names/de/train, line 4: the tag I-MISC is none of 'data\.labels': O, B-PER",
    ),
    ("names/de/train", "de:Anna\tO O\n", r"line 1: a word and its tag with a tab or space between were"),
    (
        "questions/small.goldp.de.train.json",
        '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "1", "question": "q", "answers": '
        '[{"text": "a", "answer_start": "0"}]}]}]}]}',
        r"is not laid out as SQuAD: TypeError an answer_start is no whole number",
    ),
    ("names/de/dev", "de:Anna\n", r"line 1: a word and its tag with a tab or space between were expected"),
    ("questions/small.goldp.de.train.json", "{}", r"is not laid out as SQuAD"),
    ("questions/small.goldp.de.train.json", "[", r"cannot be read as JSON"),
    (
        "questions/small.goldp.fr.dev.json",
        squad([{"text": "Otto", "answer_start": 1}]),
        r"the answer 'Otto' of question 7 does not stand at character 1 of its context",
    ),
    (
        "questions/small.goldp.de.dev.json",
        squad([{"text": " ", "answer_start": 0}]),
        r"question 7 has an empty answer: a question that its context does not answer has none",
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


def test_questions_without_answers_are_no_text(folder, tmp_path):
    shutil.copytree(folder / "questions", tmp_path / "questions")
    for split in ("train", "dev", "test"):
        (tmp_path / f"questions/small.goldp.de.{split}.json").write_text(squad([]))
    with pytest.raises(
        UserError, match=r"no text for de in .*train\.json: left out 1 question without an answer"
    ):
        prepare(encoder_recipe(tmp_path, folder / "XLMRoberta", "answer"))


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


def test_a_word_without_sub_words_is_in_no_name(folder):
    recipe = recipe_of(folder, "Bert")

    def logits_of(batch):
        return torch.eye(len(recipe.data.labels))[1].expand(*batch.tokens.shape, -1)

    vocabulary = HostTokenizer.load(folder / "Bert/tokenizer.json")
    engine = SimpleNamespace(
        recipe=recipe, vocabulary=vocabulary, languages=recipe.languages, device="cpu", logits_of=logits_of
    )
    assert label_all(engine, DE, ["Anna \u200d wohnt"]) == ["B-PER O B-PER"]


def test_data_prepared_with_other_settings_are_refused(folder):
    for task, changes in (("tag", {"labels": ["O", "B-X", "I-X"]}), ("answer", {"stride": 8})):
        recipe = recipe_of(folder, "XLMRoberta", task)
        for key, value in changes.items():
            setattr(recipe.data, key, value)
            with pytest.raises(UserError, match=f"'data.{key}' is .* was prepared with"):
                PreparedData.of(recipe)
        recipe = recipe_of(folder, "XLMRoberta", task)
        recipe.data.batch.max_length = 40
        with pytest.raises(UserError, match=r"'data\.batch\.max_length' is 40, but .* was prepared with 48"):
            PreparedData.of(recipe)


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
    (tmp_path / "names/de/.train.swp").write_text("x")
    for split in ("train", "dev"):
        (tmp_path / "questions" / f"tydiqa-goldp-v1.1-{split}.json").write_text(
            json.dumps({"data": [{"paragraphs": [questions]}]})
        )
    prepared = prepare(encoder_recipe(tmp_path, folder / "XLMRoberta", "answer"))
    sources, targets = prepared.text(DE, "dev")
    assert [json.loads(line)["question"] for line in sources] == ["wo 0", "wo 1"]
    assert json.loads(targets[0]) == [{"text": "Bonn", "start": 13}]
    assert any("left out 1 question without an answer" in notice for notice in prepared.manifest["notices"])


def test_questions_by_codes_of_any_convention(folder, tmp_path):
    names = {"de": "x.deu_Latn.{}.json", "en": "{}/en/x.json", "fr": "x-FR-{}.json"}
    for code, name in names.items():
        for split in ("train", "dev"):
            file = tmp_path / "questions" / name.format(split)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = (folder / f"questions/small.goldp.{code}.{split}.json").read_text()
            file.write_text("\ufeff" + text, encoding="utf-8")
    prepared = prepare(encoder_recipe(tmp_path, folder / "XLMRoberta", "answer"))
    wanted = PreparedData.of(recipe_of(folder, task="answer"))
    for direction in wanted.languages.directions:
        assert prepared.text(direction, "dev") == wanted.text(direction, "dev")


def test_a_recipe_that_was_written_out_is_read_again(folder):
    """With or without the keys that are not set, as `convert` and a run's `recipe.yaml` have them."""
    recipe = encoder_recipe(folder, folder / next(iter(KINDS)))
    for exclude_none in (False, True):
        for mode in ("python", "json"):
            assert Recipe.model_validate(recipe.model_dump(mode=mode, exclude_none=exclude_none)) == recipe
