"""Text that a model has translated: a file trains the direction of its name, and none of it is held out."""

from __future__ import annotations

import pickle

import pytest
from support.small_corpora import pairs, recipe, sentence, write_fetched

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.shares import shares_of
from lsmoe_ds.data.summary import show
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError

EN_DE, DE_EN = Direction("en", "de"), Direction("de", "en")
COUNT = 300
MADE = {"en-de": range(0, 200), "de-en": range(100, 160)}  # numbers of the sentences that were translated


def translation(code: str, number: int) -> str:
    return sentence(code, 10_000 + number)


def write_translated(directory, **files: list[tuple[str, str]]) -> dict[str, str]:
    folder = directory / "teacher"
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        text = "".join(f"{source}\t{target}\n" for source, target in rows)
        (folder / f"{name.replace('_', '-')}.tsv").write_text(text, encoding="utf-8")
    return {"path": str(folder), "format": "translated"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("translated")
    write_fetched(directory, "django", {"de-en": pairs("de", "en", COUNT)})
    write_translated(
        directory,
        en_de=[(sentence("en", n), translation("de", n)) for n in MADE["en-de"]],
        de_en=[(sentence("de", n), translation("en", n)) for n in MADE["de-en"]],
    )
    return directory


def recipe_of(home, name: str, corpora: list[object], **data) -> Recipe:
    return recipe(home, name, corpora=corpora, languages=["de"], **data)


def entry(home) -> dict[str, str]:
    return {"path": str(home / "teacher"), "format": "translated"}


def texts(data: PreparedData, direction: Direction, split: str = "train") -> set[tuple[str, str]]:
    found = data.tokens(direction, split)
    decode = data.vocabulary.decode
    return {(decode(found.source[i].tolist()), decode(found.target[i].tolist())) for i in range(len(found))}


def test_each_direction_trains_on_its_own_translations(home):
    alone = prepare(recipe_of(home, "alone", ["django"]))
    data = prepare(recipe_of(home, "both", ["django", entry(home)]))
    # what is held out is that of the text without translations
    for split in ("dev", "test"):
        assert data.text(EN_DE, split) == alone.text(EN_DE, split)
    held_out = {line for split in ("dev", "test") for line in data.text(EN_DE, split)[0]}
    german = {line for split in ("dev", "test") for line in data.text(EN_DE, split)[1]}
    true = {(sentence("en", n), sentence("de", n)) for n in range(COUNT) if sentence("en", n) not in held_out}
    to_german = {(sentence("en", n), translation("de", n)) for n in MADE["en-de"]}
    to_german = {pair for pair in to_german if pair[0] not in held_out}
    to_english = {(sentence("de", n), translation("en", n)) for n in MADE["de-en"]}
    to_english = {pair for pair in to_english if pair[0] not in german}
    assert len(to_german) < 200 and len(to_english) < 60, "sentences that are held out are translated, too"
    assert texts(data, EN_DE) == true | to_german
    assert texts(data, DE_EN) == {pair[::-1] for pair in true} | to_english
    counts = data.manifest["bitexts"]["de-en"]["train"]
    assert counts["one_way"] == [len(to_english), len(to_german)]
    assert counts["pairs"] == len(true) + len(to_german) + len(to_english)
    assert data.lines(EN_DE, "train") == len(data.tokens(EN_DE, "train")) == len(true) + len(to_german)
    assert "one_way" not in alone.manifest["bitexts"]["de-en"]["train"]


def test_everything_that_reads_the_text_reads_the_same_part(home):
    own = recipe_of(home, "both", ["django", entry(home)])
    data = prepare(own)
    again = pickle.loads(pickle.dumps(data.tokens(EN_DE, "train").source))
    whole = data.tokens(EN_DE, "train").source
    assert len(again) == len(whole) and again.tokens == whole.tokens == sum(whole.lengths[0 : len(whole)])
    rows = {(row.direction, row.split): row for row in show(own).rows}
    assert rows["en-de", "train"].pairs == len(whole) > rows["de-en", "train"].pairs
    assert rows["en-de", "train"].source_tokens == whole.tokens
    assert rows["en-de", "test"].pairs == rows["de-en", "test"].pairs == 20
    shares = shares_of(own, data)
    assert shares.source[EN_DE] > shares.target[DE_EN]
    batches = BatchStream(data, own.languages, data.vocabulary, own.data.batch, 1.0, 1)
    assert batches._sizes.tolist() == [len(data.tokens(each, "train")) for each in own.languages.directions]


def test_training_on_translations_alone(home):
    data = prepare(recipe_of(home, "alone-2", ["django", entry(home)], train_on="translated"))
    both = prepare(recipe_of(home, "both", ["django", entry(home)]))
    for split in ("dev", "test"):
        assert data.text(EN_DE, split) == both.text(EN_DE, split)
    left_out = both.manifest["bitexts"]["de-en"]["train"]["pairs"] - sum(
        both.manifest["bitexts"]["de-en"]["train"]["one_way"]
    )
    said = f"'data.train_on' leaves out {left_out} training pairs that no model has translated"
    assert said in data.manifest["notices"] and said not in both.manifest["notices"]
    first, last = data.manifest["bitexts"]["de-en"]["train"]["one_way"]
    assert (first, last) == tuple(both.manifest["bitexts"]["de-en"]["train"]["one_way"])
    assert len(data.tokens(DE_EN, "train")) == first and len(data.tokens(EN_DE, "train")) == last
    assert all(pair[1] == translation("de", number_of(pair[0])) for pair in texts(data, EN_DE))


def test_data_of_all_text_are_not_those_of_translations(home):
    prepare(recipe_of(home, "one-of-both", ["django", entry(home)]))
    with pytest.raises(UserError, match=r"'data.train_on' is translated, but .* was prepared without it"):
        PreparedData.of(recipe_of(home, "one-of-both", ["django", entry(home)], train_on="translated"))


def number_of(english: str) -> int:
    return next(n for n in range(COUNT) if sentence("en", n) == english)


def test_a_translation_that_is_the_true_one_trains_its_direction_twice_over(tmp_path):
    write_fetched(tmp_path, "django", {"de-en": pairs("de", "en", COUNT)})
    same = [(sentence("en", n), sentence("de", n)) for n in range(COUNT)]
    made = write_translated(tmp_path, en_de=[*same, *same])
    data = prepare(recipe_of(tmp_path, "same", ["django", made], held_out={"dev": 0, "test": 0}))
    assert len(data.tokens(DE_EN, "train")) == COUNT
    assert len(data.tokens(EN_DE, "train")) == 2 * COUNT, "its copies are dropped once"


def test_a_direction_without_text_is_named(tmp_path):
    write_fetched(tmp_path, "django", {"de-en": pairs("de", "en", COUNT)})
    made = write_translated(tmp_path, en_de=[(sentence("en", n), translation("de", n)) for n in range(100)])
    data = prepare(recipe_of(tmp_path, "one", ["django", made], train_on="translated"))
    assert len(data.tokens(DE_EN, "train")) == 0 < len(data.tokens(EN_DE, "train"))
    said = " ".join(data.manifest["notices"])
    expected = "no translations train de-en, only the reverse direction: these are only evaluated (zero-shot)"
    assert expected in said


def test_translated_text_is_neither_held_out_nor_joined(tmp_path):
    made = write_translated(
        tmp_path,
        en_de=[(sentence("en", n), translation("de", n)) for n in range(COUNT)],
        en_fr=[(sentence("en", n), translation("fr", n)) for n in range(COUNT)],
    )
    write_fetched(tmp_path, "django", {"en-fr": pairs("en", "fr", 50)})
    own = recipe(
        tmp_path,
        "joined",
        corpora=["django", made],
        languages=["de", "fr"],
        pivot="en",
        directions=["en-de", "en-fr", "fr-en"],
    )
    data = prepare(own)
    assert data.lines(EN_DE, "test") == data.lines(EN_DE, "dev") == 0
    assert data.lines(Direction("en", "fr"), "test") == 5, "a tenth of the text that people have translated"
    with pytest.raises(UserError, match="there is no text for de-fr"):
        prepare(
            recipe(
                tmp_path,
                "no",
                corpora=["django", made],
                languages=["de", "fr"],
                pivot="en",
                directions=["de-fr"],
            )
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"corpora": ["django"], "train_on": "translated"},
            "'train_on' is translated, but no corpus has that",
        ),
        ({"corpora": ["django"], "train_on": "all"}, "translated"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, **data)


def test_a_folder_of_another_layout(tmp_path):
    write_fetched(tmp_path, "django", {"de-en": pairs("de", "en", COUNT)})
    for path in (tmp_path / "empty", tmp_path / "corpora" / "django" / "de-en.tsv"):
        if not path.exists():
            path.mkdir()
        made = {"path": str(path), "format": "translated"}
        with pytest.raises(UserError, match="is not laid out as text that a model translated"):
            prepare(recipe_of(tmp_path, "other", ["django", made]))
