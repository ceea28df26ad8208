"""Data prepared with a vocabulary that is there already."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.small_corpora import recipe, write_three_bitexts

from lsmoe_ds.data.fingerprints import reason_to_prepare
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.vocabulary import Vocabulary, add_tags
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.beam_search import never_generated
from lsmoe_ds.languages import BOS, EOS, PAD


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, and ``first.model`` (120 pieces), ``second.model`` (of another seed), ``bpe.model`` and
    ``de-fr.model`` (no tag ru).
    """
    root = tmp_path_factory.mktemp("made")
    write_three_bitexts(root)
    settings: dict[str, dict[str, Any]] = {
        "first": {},
        "second": {"held_out": {"dev": 10, "test": 90}},
        "bpe": {"vocabulary": {"size": 120, "character_coverage": 1.0, "type": "bpe"}},
        "de-fr": {"languages": ["de", "fr"]},
    }
    for name, changed in settings.items():
        shutil.copy(
            prepare(recipe(root, name, **changed)).folder / "vocabulary.model", root / f"{name}.model"
        )
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "corpora", tmp_path / "corpora")
    for model in made.glob("*.model"):
        shutil.copy(model, tmp_path)
    return tmp_path


def with_file(root: Path, file: str, **vocabulary: Any):
    return recipe(root, vocabulary={"file": root / file, "size": 120, **vocabulary})


def test_the_file_is_the_vocabulary(root: Path) -> None:
    data = prepare(with_file(root, "second.model"))
    assert (data.folder / "vocabulary.model").read_bytes() == (root / "second.model").read_bytes()
    assert (root / "second.model").read_bytes() != (root / "first.model").read_bytes()
    direction = data.languages.directions[0]
    vocabulary, text = Vocabulary.load(root / "second.model"), data.text(direction, "test")[0]
    assert [data.tokens(direction, "test").source[i].tolist() for i in range(len(text))] == [
        vocabulary.encode(line) for line in text
    ]


def test_further_tags_than_the_recipes_are_kept(root: Path) -> None:
    data = prepare(recipe(root, languages=["de"], vocabulary={"file": root / "first.model", "size": 120}))
    assert data.languages.codes == ("de", "en") and data.vocabulary.codes == ("de", "en", "fr", "ru")


def test_prepared_again_when_the_file_changes(root: Path) -> None:
    settings = with_file(root, "first.model")
    prepare(settings)
    assert reason_to_prepare(settings) is None
    shutil.copy(root / "first.model", root / "copy.model")
    shutil.copy(root / "copy.model", root / "first.model")  # another time, the same content
    assert reason_to_prepare(settings) is None
    shutil.copy(root / "second.model", root / "first.model")
    assert reason_to_prepare(settings) == f"{root / 'first.model'} has changed"
    prepare(settings)
    assert reason_to_prepare(settings) is None
    (root / "first.model").unlink()
    assert reason_to_prepare(settings) is None
    reason = reason_to_prepare(recipe(root, vocabulary={"size": 120}))
    assert reason is not None and reason.startswith("'data.vocabulary.file' was")


@pytest.mark.parametrize(
    ("file", "settings", "says"),
    [
        (
            "first.model",
            {"size": 121},
            "'data.vocabulary.size' is 121, but .*first.model has 120 pieces: set it to 120",
        ),
        ("bpe.model", {}, "'data.vocabulary.type' is unigram, but .*bpe.model is of the type bpe"),
        ("de-fr.model", {}, "de-fr.model has no tag for 'ru': it has de, en, fr; `lsmoe convert --as grown`"),
        ("none.model", {}, "none.model cannot be read: No such file"),
        ("corpora", {}, "corpora cannot be read: Is a directory"),
        ("corpora/django/de-en.tsv", {}, "de-en.tsv: the vocabulary is damaged"),
    ],
)
def test_what_does_not_fit(root: Path, file: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        prepare(with_file(root, file, **settings))
    assert "\n" not in str(error.value)
    assert not (root / "prepared" / "small").exists()


def test_bpe(root: Path) -> None:
    assert prepare(with_file(root, "bpe.model", type="bpe")).vocabulary.type == "bpe"


def test_what_is_never_generated(made):
    """Special pieces, the tags of all languages, and the pieces that fill a vocabulary up and that no text
    holds.
    """
    grown = Vocabulary(add_tags((made / "first.model").read_bytes(), ["xx"]))
    silent = [index for index in range(grown.size) if grown.decode([index]) == ""]
    assert grown.size % 8 == 0 and len(grown.unused) > 0
    assert {*grown.unused, grown.tag_id("xx"), BOS, PAD} <= set(never_generated(grown)) <= set(silent) - {EOS}
