"""Many-to-many data: all directions of multi-way text, joined through a pivot, capped, and from FLORES."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small_corpora import SYLLABLES, pairs, recipe, sentence, write_fetched, write_lines

from lsmoe_ds.config.data import Corpus
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.fingerprints import state_of
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.summary import show
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError

COUNT = 200
NUMBERS = {code: {sentence(code, n): n for n in range(2 * COUNT)} for code in SYLLABLES}
MANY = {"languages": ["en", "de", "fr", "ru"], "directions": "all"}
NONE = {"dev": 0, "test": 0}


def train_pairs(data: PreparedData, bitext: str) -> list[tuple[str, str]]:
    tokens = data.tokens(Direction.parse(bitext), "train")
    read = data.vocabulary.decode
    return [(read(tokens.source[i].tolist()), read(tokens.target[i].tolist())) for i in range(len(tokens))]


def write_multi_way(folder: Path) -> Recipe:
    codes = list(SYLLABLES)
    rows = ["\t".join(codes)] + ["\t".join(sentence(code, n) for code in codes) for n in range(COUNT)]
    write_lines(folder / "many.tsv", rows)
    return recipe(folder, corpora=[{"path": folder / "many.tsv", "format": "tsv"}], **MANY)


def write_centric(folder: Path) -> Recipe:
    both = {"-".join(sorted(("en", c))): pairs(*sorted(("en", c)), COUNT) for c in ("de", "fr", "ru")}
    write_fetched(folder, "django", both)
    return recipe(folder, pivot="en", **MANY)


@pytest.mark.parametrize("write", [write_multi_way, write_centric])
def test_the_same_sentences_are_held_out_in_all_directions(write, tmp_path: Path) -> None:
    data = prepare(write(tmp_path))
    assert len(data.languages.directions) == 12
    sets = {"dev": set(), "test": set()}
    for split, size in (("dev", 10), ("test", 20)):
        for direction in data.languages.directions:
            found = [
                {NUMBERS[code][text] for text in lines}
                for code, lines in zip(
                    (direction.source, direction.target), data.text(direction, split), strict=True
                )
            ]
            assert found[0] == found[1] and len(found[0]) == size
            sets[split].add(frozenset(found[0]))
    assert len(sets["dev"]) == len(sets["test"]) == 1, "each bitext has other sentences"
    held_out = frozenset().union(*sets["dev"], *sets["test"])
    assert len(held_out) == 30
    for direction in data.languages.directions:
        trained = train_pairs(data, str(direction))
        assert len(trained) == COUNT - 30
        for source, target in trained:
            numbers = NUMBERS[direction.source][source], NUMBERS[direction.target][target]
            assert numbers[0] == numbers[1] and numbers[0] not in held_out


def test_a_pivot_joins_by_the_cleaned_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of two translations of an English sentence is joined, within a corpus only."""
    again = [(sentence("en", n).replace(" ", "  "), sentence("fr", n + COUNT)) for n in range(3)]
    write_fetched(
        tmp_path,
        "django",
        {"de-en": pairs("de", "en", 60), "en-fr": pairs("en", "fr", COUNT, start=20)[::-1]},
    )
    write_fetched(tmp_path, "wagtail", {"de-en": pairs("de", "en", 3), "en-fr": pairs("en", "fr", 3) + again})
    write_lines(tmp_path / "own.de", [sentence("de", n) for n in range(300, 330)])
    write_lines(tmp_path / "own.fr", [sentence("fr", n) for n in range(300, 330)])
    own = {"path": tmp_path / "own", "format": "moses"}
    more = {"languages": ["de", "fr"], "directions": "all", "held_out": NONE, "pivot": "en"}
    settings = recipe(tmp_path, corpora=["django", "wagtail", own], **more)
    data = prepare(settings)
    found = {(NUMBERS["de"][a], NUMBERS["fr"][b]) for a, b in train_pairs(data, "de-fr")}
    assert found == {(n, n) for n in (*range(20, 60), *range(3), *range(300, 330))}
    said = capsys.readouterr().err
    assert "corpus django: 40 pairs were joined by their sentences in English" in said
    assert "corpus wagtail: 3 pairs were joined" in said
    assert any("40 pairs were joined" in text for text in show(settings).notices)
    assert state_of(settings).reason is None
    write_fetched(tmp_path, "django", {"en-fr": pairs("en", "fr", COUNT)})
    assert "en-fr.tsv has changed" in str(state_of(settings).reason)


def test_a_pivot_that_joins_nothing_is_refused(tmp_path: Path) -> None:
    other = pairs("en", "fr", COUNT, start=COUNT)
    write_fetched(tmp_path, "django", {"de-en": pairs("de", "en", COUNT), "en-fr": other})
    more = {"languages": ["en", "de", "fr"], "directions": "all", "held_out": NONE, "pivot": "en"}
    with pytest.raises(UserError, match=r"no text for de-fr: 'data.pivot' joins .* in .*de-en.tsv, .*en-fr"):
        prepare(recipe(tmp_path, corpora=["django"], **more))


def test_a_cap_leaves_the_same_sentences_and_the_held_out_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_multi_way(tmp_path)
    full = prepare(whole)
    settings = recipe(tmp_path, "capped", corpora=whole.data.corpora, max_pairs={"de": 50, "fr": 80}, **MANY)
    data = prepare(settings)
    sizes = {name: splits["train"]["pairs"] for name, splits in data.manifest["bitexts"].items()}
    rest = COUNT - 30
    assert sizes == {"de-en": 50, "de-fr": 50, "de-ru": 50, "en-fr": 80, "fr-ru": 80, "en-ru": rest}
    said = "'data.max_pairs' leaves out 540 training pairs; it leaves de-en 50"
    assert said in capsys.readouterr().err and any(said in text for text in show(settings).notices)
    kept = [{NUMBERS["en"][b] for _, b in train_pairs(data, name)} for name in ("de-en", "fr-en")]
    assert kept[0] < kept[1]
    direction = Direction("de", "fr")
    assert data.text(direction, "test") == full.text(direction, "test")
    every = recipe(tmp_path, "every", corpora=whole.data.corpora, max_pairs=9, **MANY)
    assert {splits["train"]["pairs"] for splits in prepare(every).manifest["bitexts"].values()} == {9}


def test_the_dev_set_of_flores_trains_and_devtest_tests(tmp_path: Path) -> None:
    for code, name in (("en", "eng_Latn"), ("de", "deu_Latn"), ("fr", "fra_Latn")):
        write_lines(tmp_path / "flores" / "dev" / f"{name}.dev", [sentence(code, n) for n in range(100)])
        test = [sentence(code, n) for n in range(100, 130)]
        write_lines(tmp_path / "flores" / "devtest" / f"{name}.devtest", test)
    corpus = {"path": tmp_path / "flores", "format": "flores", "train": "dev"}
    many = {"languages": ["en", "de", "fr"], "directions": "all"}
    data = prepare(recipe(tmp_path, corpora=[corpus], vocabulary={"size": 100}, **many))
    for splits in data.manifest["bitexts"].values():
        assert [splits[split]["pairs"] for split in ("train", "dev", "test")] == [90, 10, 30]
    assert data.text(Direction("de", "fr"), "test")[1][0] == sentence("fr", 100)


@pytest.mark.parametrize(
    ("format", "train", "said"),
    [
        ("tsv", "dev", "'train' is dev, but the format tsv has training text of its own"),
        ("ntrex", "dev", "'train' is dev, but the format ntrex has only the set test"),
    ],
)
def test_only_layouts_of_held_out_text_choose_what_trains(format: str, train: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Corpus(path=Path("x"), format=format, train=train)
    assert Corpus(path=Path("x"), format="ntrex", train="test")


def test_codes_of_other_conventions_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe(tmp_path, **MANY).to_yaml())
    read = load_recipe(tmp_path / "r.yaml", ["data.pivot=eng_Latn", "data.max_pairs={deu: 5, fra_Latn: 7}"])
    assert (read.data.pivot, read.data.max_pairs) == ("en", {"de": 5, "fr": 7})
    assert [read.data.most_pairs(codes) for codes in (("de", "fr"), ("en", "fr"), ("en", "ru"))] == [
        5,
        7,
        None,
    ]
    with pytest.raises(UserError, match=r"'data\.pivot': 'English' is not a language code"):
        load_recipe(tmp_path / "r.yaml", ["data.pivot=English"])


def test_caps_of_other_languages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'max_pairs' names nl, which is no language of the recipe"):
        recipe(tmp_path, max_pairs={"nl": 5})
