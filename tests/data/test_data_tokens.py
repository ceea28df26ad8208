"""The token files of one bitext to the number, and the vocabulary that makes them."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.small_corpora import pairs, recipe, sentence, write_fetched, write_three_bitexts

from lsmoe_ds.data import preparation
from lsmoe_ds.data import tokens as module
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import TokenStore
from lsmoe_ds.data.tokens import write_tokens
from lsmoe_ds.data.vocabulary import Vocabulary, fill_up, parse_model, train_vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import BOS, EOS, PAD, UNK

PAIRS = [("tane shiro", "ver"), ("ta", ""), ("shi ☃ ro", "gen lich kei"), ("", "ung"), ("lem", "☃☃")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vocabulary")
    write_three_bitexts(root, 60)
    return (
        prepare(recipe(root, vocabulary={"size": 100, "character_coverage": 1.0})).folder / "vocabulary.model"
    )


def written(folder: Path, model: Path) -> dict[str, dict[str, int]]:
    return write_tokens(folder, ("en", "de"), PAIRS, Vocabulary.load(model))


@pytest.mark.parametrize("chunk", [1, 2, 5, 10_000])
def test_ids_offsets_and_counts(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    counts = written(tmp_path / "x", model)
    vocabulary = Vocabulary.load(model)
    for side, code in enumerate(("en", "de")):
        expected = [vocabulary.encode(pair[side]) for pair in PAIRS]
        store = TokenStore(tmp_path / "x", code)
        assert [store[number].tolist() for number in range(len(PAIRS))] == expected
        assert store.offsets[0] == 0 and store.lengths[:].tolist() == [len(ids) for ids in expected]
        flat = [index for ids in expected for index in ids]
        assert counts[code] == {
            "tokens": len(flat),
            "unknown": flat.count(UNK),
            "longest": max(map(len, expected)),
        }
        assert (tmp_path / "x" / f"{code}.txt").read_text() == "".join(f"{pair[side]}\n" for pair in PAIRS)
    # one character that the vocabulary lacks on one side, a run of two, which is one piece, on the other
    assert (counts["en"]["unknown"], counts["de"]["unknown"]) == (1, 1)


@pytest.mark.parametrize(("size", "bytes_each"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_as_long_as_they_fit(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, size: int, bytes_each: int
) -> None:
    vocabulary = Vocabulary.load(model)
    monkeypatch.setattr(Vocabulary, "size", size)
    write_tokens(tmp_path / "x", ("en", "de"), PAIRS, vocabulary)
    assert np.load(tmp_path / "x/en.tokens.npy").itemsize == bytes_each


@pytest.mark.parametrize(("pieces", "filled"), [(96, 96), (97, 104), (103, 104), (104, 104)])
def test_vocabularies_are_filled_up_to_a_multiple_of_8(model: Path, pieces: int, filled: int) -> None:
    proto = parse_model(model.read_bytes())
    while len(proto.pieces) > 90:
        proto.pieces.pop()
    while len(proto.pieces) < pieces:
        proto.pieces.add(piece=f"piece{len(proto.pieces)}", score=-1.0)
    fill_up(proto)
    vocabulary = Vocabulary(proto.SerializeToString())
    assert (len(proto.pieces), proto.trainer_spec.vocab_size, vocabulary.size) == (filled, filled, filled)
    assert vocabulary.unused == tuple(range(pieces, filled))


@pytest.mark.parametrize(("temperature", "german", "french"), [(5.0, 842, 335), (1.0, 1000, 10)])
def test_the_vocabulary_is_trained_on_a_sample_by_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, german: int, french: int
) -> None:
    """1,000 and 10 pairs, so 1,010 English sentences; shares as n^(1/T): at T = 5 3.981, 1.585 and 3.989 of
    2,020 sentences.
    """
    seen: list[str] = []

    def train(texts, *rest):
        seen.extend(texts)
        return train_vocabulary(iter(seen), *rest)

    monkeypatch.setattr(preparation, "train_vocabulary", train)
    write_fetched(
        tmp_path, "django", {"de-en": pairs("de", "en", 1000), "en-fr": pairs("en", "fr", 10, start=5000)}
    )
    settings = {"held_out": {"dev": 0, "test": 0}, "vocabulary": {"size": 200, "character_coverage": 1.0}}
    prepare(recipe(tmp_path, languages=["de", "fr"], temperature=temperature, **settings))
    own = {
        "de": {sentence("de", n) for n in range(1000)},
        "fr": {sentence("fr", n) for n in range(5000, 5010)},
    }
    counts = {code: sum(text in texts for text in seen) for code, texts in own.items()}
    assert abs(counts["de"] - german) <= 1 and abs(counts["fr"] - french) <= 1
    assert abs(len(seen) - 2020) <= 2
    # Each sentence of a language comes as often as any other, to one.
    times = Counter(text for text in seen if text in own["fr"])
    assert len(times) == 10 and max(times.values()) - min(times.values()) <= 1


def test_vocabulary(tmp_path: Path) -> None:
    write_three_bitexts(tmp_path)
    data = prepare(recipe(tmp_path))
    vocabulary: Vocabulary = pickle.loads(pickle.dumps(data.vocabulary))
    assert (BOS, PAD, EOS, UNK) == (0, 1, 2, 3)
    assert [vocabulary.tag_id(code) for code in ("de", "en", "fr", "ru")] == [4, 5, 6, 7]
    ids = vocabulary.encode("<2de> tane <s> </s> <pad>")
    assert not set(ids) & {BOS, PAD, EOS, 4, 5, 6, 7}
    text = sentence("ru", 3)
    assert vocabulary.decode([vocabulary.tag_id("de"), *vocabulary.encode(f"  {text}\t"), EOS, PAD]) == text
    with pytest.raises(UserError, match="no tag for 'it'"):
        vocabulary.tag_id("it")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="damaged"):
        Vocabulary.load(tmp_path / "broken.model")
    with pytest.raises(UserError, match="cannot be read"):
        Vocabulary.load(tmp_path / "none.model")
