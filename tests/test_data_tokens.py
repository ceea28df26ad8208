"""The token files of one bitext, to the number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_corpora import recipe, write_three_bitexts

from lsmoe_ds.data import tokens as module
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import TokenStore
from lsmoe_ds.data.tokens import write_tokens
from lsmoe_ds.data.vocabulary import Vocabulary, fill_up, parse_model
from lsmoe_ds.data.workers import Workers
from lsmoe_ds.languages import UNK

PAIRS = [("tane shiro", "ver"), ("ta", ""), ("shi ☃ ro", "gen lich kei"), ("", "ung"), ("lem", "☃☃")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vocabulary")
    write_three_bitexts(root, 60)
    return prepare(recipe(root, vocabulary={"size": 100, "character_coverage": 1.0})).folder / "vocabulary.model"


def written(folder: Path, model: Path, size: int = 100) -> dict[str, dict[str, int]]:
    return write_tokens(folder, ("en", "de"), iter(PAIRS), model, size, True, Workers(0))


@pytest.mark.parametrize("chunk", [1, 2, 5, 10_000])
def test_ids_offsets_and_counts(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    counts = written(tmp_path / "x", model)
    vocabulary = Vocabulary.load(model)
    for side, code in enumerate(("en", "de")):
        expected = [vocabulary.encode(pair[side]) for pair in PAIRS]
        store = TokenStore(tmp_path / "x", code)
        assert [store[number].tolist() for number in range(len(PAIRS))] == expected
        assert store.offsets[0] == 0 and store.lengths.tolist() == [len(ids) for ids in expected]
        flat = [index for ids in expected for index in ids]
        assert counts[code] == {"tokens": len(flat), "unknown": flat.count(UNK), "longest": max(map(len, expected))}
        assert (tmp_path / "x" / f"{code}.txt").read_text() == "".join(f"{pair[side]}\n" for pair in PAIRS)
    # one character that the vocabulary lacks on one side, a run of two, which is one piece, on the other
    assert (counts["en"]["unknown"], counts["de"]["unknown"]) == (1, 1)


@pytest.mark.parametrize(("size", "bytes_each"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_as_long_as_they_fit(tmp_path: Path, model: Path, size: int, bytes_each: int) -> None:
    written(tmp_path / "x", model, size)
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
