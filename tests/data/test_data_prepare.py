import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.small_corpora import pairs, recipe, sentence, write_fetched, write_lines, write_three_bitexts

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data import preparation
from lsmoe_ds.data.bitext import Bitext
from lsmoe_ds.data.cleaning import near_duplicate_form
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.summary import show
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_three_bitexts(tmp_path)
    return tmp_path


def train_text(data: PreparedData, bitext: str) -> list[tuple[str, str]]:
    """Training pairs of a bitext, out of their tokens."""
    tokens = data.tokens(Direction(*bitext.split("-")), "train")
    return [
        (data.vocabulary.decode(tokens.source[i]), data.vocabulary.decode(tokens.target[i]))
        for i in range(len(tokens))
    ]


def english_leaks(data: PreparedData) -> set[str]:
    """English strings, without case, punctuation and digits, that are both held out of some bitext and in
    training text of any.
    """
    bitexts = [name for name in data.manifest["bitexts"] if "en" in name.split("-")]
    held, train = set(), set()
    for name in bitexts:
        side = name.split("-").index("en")
        train |= {near_duplicate_form(pair[side]) for pair in train_text(data, name)}
        for split in ("dev", "test"):
            held |= {
                near_duplicate_form(line) for line in data.text(Direction(*name.split("-")), split)[side]
            }
    assert held
    return held & train


def test_from_corpora_to_tokens(root: Path) -> None:
    data = prepare(recipe(root))
    assert data.vocabulary.size == 120 and data.languages.codes == ("de", "en", "fr", "ru")
    for direction in data.languages.directions:
        for split, count in (("dev", 10), ("test", 20)):
            source, target = data.text(direction, split)
            tokens = data.tokens(direction, split)
            assert len(source) == len(target) == len(tokens) == count
            assert [data.vocabulary.decode(tokens.source[i]) for i in range(count)] == source
            reverse = data.tokens(direction.reverse, split)
            assert np.array_equal(tokens.source[3], reverse.target[3])
    tokens = data.tokens(Direction("en", "de"), "train")
    assert (
        len(tokens) == len(tokens.source.lengths) == 300 - 30 - data.manifest["cleaning"]["de-en"]["held out"]
    )
    lengths = tokens.source.lengths[:]
    assert lengths.sum() == len(tokens.source.ids) and lengths.tolist() == [
        len(each) for each in tokens.source
    ]
    assert tokens.source.lengths[np.array([7, 2])].tolist() == [lengths[7], lengths[2]]
    assert tokens.source.lengths[200:].tolist() == lengths[200:].tolist()
    assert tokens.source.lengths[5:5].tolist() == []
    assert isinstance(tokens.source.ids, np.memmap) and tokens.source.ids.dtype == np.uint16
    assert set(train_text(data, "de-en")) <= set(pairs("de", "en", 300))
    copy = pickle.loads(pickle.dumps(tokens))
    assert np.array_equal(copy.target[5], tokens.target[5])
    with pytest.raises(IndexError):
        tokens.source[len(tokens)]
    assert sorted(path.name for path in data.folder.parent.iterdir()) == ["small"]


def with_near_duplicates(root: Path) -> Recipe:
    """Write a second corpus of near-duplicates and return a recipe with both corpora.

    The English sentences are those of the first corpus with other case, digits and punctuation. The German
    ones have one more word.
    """
    noisy = [
        (f"{german[:-1]} ja!", english.upper()[:-1] + "  42 !!") for german, english in pairs("de", "en", 300)
    ]
    write_fetched(root, "wagtail", {"de-en": noisy})
    return recipe(root, corpora=["django", "wagtail"], vocabulary={"size": 200, "character_coverage": 1.0})


def test_no_held_out_sentence_nor_its_near_duplicate_is_trained_on(root: Path) -> None:
    data = prepare(with_near_duplicates(root))
    assert english_leaks(data) == set()
    assert data.manifest["cleaning"]["de-en"]["held out"] >= 30


def test_the_leak_test_can_fail(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bitext, "leave_out", lambda self, held: None)
    assert len(english_leaks(prepare(with_near_duplicates(root)))) >= 30


def test_held_out_sets_are_multi_way_parallel(root: Path) -> None:
    data = prepare(recipe(root))
    english = [set(data.text(Direction("en", code), "test")[0]) for code in ("de", "fr", "ru")]
    assert english[0] == english[1] == english[2]


def test_published_sets_serve_whole_and_are_not_trained_on(root: Path) -> None:
    dev = [(sentence("de", n), sentence("en", n)) for n in range(60, 75)]
    for side, code in enumerate(("deu_Latn", "eng_Latn")):
        write_lines(root / f"flores/dev/{code}.dev", [f"{pair[side]}" for pair in dev])
        write_lines(
            root / f"flores/devtest/{code}.devtest", ["A short %s one <b>", *(pair[side] for pair in dev[:5])]
        )
    data = prepare(recipe(root, corpora=["django", {"path": str(root / "flores"), "format": "flores"}]))
    german, english = data.text(Direction("de", "en"), "dev")
    assert list(zip(german, english, strict=True)) == dev
    assert data.text(Direction("de", "en"), "test")[1][0] == "A short %s one <b>"
    assert len(data.text(Direction("fr", "en"), "dev")[0]) == 10
    held = {pair[1] for pair in dev}
    for name in ("de-en", "en-fr", "en-ru"):
        side = name.split("-").index("en")
        assert not held & {pair[side] for pair in train_text(data, name)}
        for split in ("dev", "test") if name != "de-en" else ():
            assert not held & set(data.text(Direction(*name.split("-")), split)[side])


def test_a_zero_shot_direction_has_a_test_set_only(root: Path) -> None:
    for side, code in enumerate(("de", "fr")):
        write_lines(
            root / f"opus/zero-shot/de-fr/opus.de-fr-test.{code}",
            [pair[side] for pair in pairs("de", "fr", 7)],
        )
    corpora = ["django", {"path": str(root / "opus"), "format": "opus100"}]
    data = prepare(recipe(root, corpora=corpora, languages=[], directions=["de-en", "en-fr", "de-fr"]))
    sizes = [len(data.tokens(Direction("de", "fr"), split)) for split in ("train", "dev", "test")]
    assert sizes == [0, 0, 7]
    assert data.text(Direction("fr", "de"), "test")[0] == [sentence("fr", n) for n in range(7)]
    german = {sentence("de", n) for n in range(7)}
    assert not german & {pair[0] for pair in train_text(data, "de-en")}


def test_two_prepares_are_the_same_to_the_byte(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(recipe(root, "one"))
    monkeypatch.setattr(preparation, "SMALL", 0)
    monkeypatch.setattr(preparation, "cores", lambda: 2)
    second = prepare(recipe(root, "two"))
    assert first.manifest["files"] == second.manifest["files"]
    assert len(first.manifest["files"]) == 1 + 3 * (4 + 6 + 6)
    PreparedData.open(second.folder, verify=True)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            {"vocabulary": {"size": 110, "character_coverage": 1.0}},
            "'data.vocabulary.size' was 120 and is 110",
        ),
        ({"held_out": {"dev": 5, "test": 20}}, "'data.held_out.dev' was 10 and is 5"),
        ({"cleaning": {"max_words": 9}}, "'data.cleaning.max_words' was 200 and is 9"),
        ({"languages": ["de", "fr"]}, "'data.directions' was"),
    ],
)
def test_prepares_once_and_says_why_again(
    root: Path, capsys: pytest.CaptureFixture[str], data: dict, says: str
) -> None:
    first = prepare(recipe(root))
    assert "it is not there yet" in capsys.readouterr().err
    before = (first.folder / "manifest.json").stat().st_mtime_ns
    prepare(recipe(root, temperature=5.0, batch={"tokens": 64}))
    assert "up to date" in capsys.readouterr().err
    assert (first.folder / "manifest.json").stat().st_mtime_ns == before
    prepare(recipe(root, **data))
    assert says in " ".join(capsys.readouterr().err.split())
    assert (first.folder / "manifest.json").stat().st_mtime_ns != before


def test_a_changed_corpus_or_a_damaged_file_prepares_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reason() -> str:
        capsys.readouterr()
        prepare(settings)
        return " ".join(capsys.readouterr().err.split())

    write_lines(root / "x.tsv", ["de\ten", *("\t".join(pair) for pair in pairs("de", "en", 50, start=500))])
    settings = recipe(root, corpora=["django", {"path": str(root / "x.tsv"), "format": "tsv"}])
    data = prepare(settings)
    os.utime(root / "x.tsv")
    assert "up to date" in reason()
    write_lines(root / "x.tsv", ["de\ten", *("\t".join(pair) for pair in pairs("de", "en", 50, start=501))])
    assert "x.tsv has changed" in reason()
    write_fetched(root, "django", {"de-en": pairs("de", "en", 250)})
    assert "django/de-en.tsv has changed" in reason()
    (data.folder / "train/de-en/de.tokens.npy").write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes where"):
        PreparedData.open(data.folder)
    assert "has 5 bytes where" in reason()
    (data.folder / "manifest.json").write_text("{")
    assert "manifest.json is missing or damaged" in reason()
    shutil.rmtree(root / "corpora")
    assert "up to date" in reason()


def test_a_flipped_bit_is_found_when_asked(root: Path) -> None:
    data = prepare(recipe(root))
    path = data.folder / "train/de-en/de.tokens.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    PreparedData.open(data.folder)
    with pytest.raises(UserError, match="sha256 differs"):
        PreparedData.open(data.folder, verify=True)


def bad(root: Path, case: str) -> Recipe:
    match case:
        case "vocabulary too large":
            return recipe(root, vocabulary={"size": 30000})
        case "bpe too large":
            return recipe(root, vocabulary={"size": 30000, "type": "bpe"})
        case "vocabulary too small":
            write_fetched(
                root,
                "django",
                {"de-en": [(sentence("de", n), sentence("en", n) + chr(0x4E00 + n)) for n in range(300)]},
            )
            return recipe(root, vocabulary={"size": 64, "character_coverage": 1.0})
        case "no such bitext":
            return recipe(root, languages=["de", "it"])
        case "nothing left":
            return recipe(root, cleaning={"min_words": 50})
        case "not fetched":
            return recipe(root, corpora=["weblate"])
        case "corpus damaged":
            (root / "corpora/django/de-en.tsv").write_text("cut off")
            return recipe(root)
        case "encoding":
            (root / "x.tsv").write_bytes(b"de\ten\nein Haus\tone \xc3( house\n")
            return recipe(root, corpora=["django", {"path": str(root / "x.tsv"), "format": "tsv"}])
        case _:
            (root / "prepared").write_text("a file where a folder should be")
            return recipe(root)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (
            "vocabulary too large",
            r"'data.vocabulary.size' is 30000, but the text is too small for more than \d+ pieces",
        ),
        ("bpe too large", r"'data.vocabulary.size' is 30000, but the text is too small"),
        ("vocabulary too small", r"characters and tags alone need \d+ pieces"),
        ("no such bitext", r"no text for en-it in the corpora of the recipe \(django\)"),
        ("nothing left", r"no training pair of de-en is left after cleaning \(.*short 300\)"),
        ("not fetched", r"run 'lsmoe data fetch weblate'"),
        ("corpus damaged", r"de-en.tsv has 7 bytes where"),
        ("encoding", r"x.tsv, line 2: not UTF-8"),
        ("in the way", r"cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(root: Path, case: str, says: str) -> None:
    settings = bad(root, case)
    with pytest.raises(UserError, match=says) as error:
        prepare(settings)
    assert "\n" not in str(error.value)
    kept = [".small.work"]  # finished shards, where the text was not to blame
    assert not (root / "prepared").is_dir() or [p.name for p in (root / "prepared").iterdir()] in ([], kept)


def test_the_size_named_in_the_error_works(root: Path) -> None:
    with pytest.raises(UserError) as error:
        prepare(recipe(root, vocabulary={"size": 30000}))
    largest = int(str(error.value).split("set it to at most ")[1])
    assert prepare(recipe(root, vocabulary={"size": largest})).vocabulary.size == largest


def test_nothing_prepared_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run 'lsmoe data prepare'"):
        PreparedData.open(tmp_path)


def test_show(root: Path) -> None:
    settings = recipe(root, groups={"high": 260, "medium": 100})
    prepare(settings)
    summary = show(settings)
    rows = {(row.direction, row.split): row for row in summary.rows}
    assert len(rows) == 6 * 3
    assert rows["en-de", "train"].source_tokens == rows["de-en", "train"].target_tokens > 0
    assert rows["en-de", "test"].pairs == 20
    assert rows["en-de", "train"].group == settings.data.groups.of(rows["en-de", "train"].pairs)
    assert [settings.data.groups.of(pairs) for pairs in (260, 259, 9)] == ["high", "medium", "low"]
    assert json.loads(json.dumps(summary.to_dict()))["vocabulary"] == 120
    assert summary.table().row_count == 6
