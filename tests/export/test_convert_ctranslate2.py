"""CTranslate2: the same probabilities and the same beam search as the model that was converted."""

from __future__ import annotations

import json
import math
import random
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace

import ctranslate2
import numpy as np
import pytest
import sentencepiece
import torch
from support.commands import main
from support.conversions import EN_DE, FR_EN, PAIR_TOP3, global_weights, random_model, write_dense
from support.small_run import TARGET_TOP2, write_corpus

from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.agreement import _logits
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export import vocabulary_map
from lsmoe_ds.export.ctranslate2 import write_files
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.export.vocabulary_map import VocabularyMap, associate
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.ctranslate2 import CTranslate2
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import translate, translate_tokens
from lsmoe_ds.languages import EOS
from lsmoe_ds.methods.low_rank.settings import LowRank


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctranslate2")
    write_corpus(folder)
    return folder


def converted(source: Loaded, direction: Direction, folder, quantization: str = "float32") -> CTranslate2:
    tensors, recipe = extract(global_weights(source.model), source.recipe, direction)
    folder.mkdir(exist_ok=True)
    vocabulary = source.home / "vocabulary.model"
    assert sorted(write_files(folder, tensors, recipe, vocabulary, quantization)) == sorted(
        p.name for p in folder.iterdir()
    )
    return CTranslate2.open(folder, recipe, vocabulary, source.step, source.home)


def sources(loaded: Loaded, count: int) -> list[list[int]]:
    lines = (loaded.recipe.data.corpora[0].path).read_text(encoding="utf-8").splitlines()[1 : count + 1]
    return [loaded.vocabulary.encode(line.split("\t")[0])[: 2 + i % 20] for i, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("encoder", "decoder", "low_rank"),
    [(TARGET_TOP2, PAIR_TOP3, None), (None, None, LowRank(rank=3, at="both"))],
    ids=["experts of several widths", "low-rank matrices"],
)
def test_probabilities_and_translations_are_the_models(place, tmp_path, encoder, decoder, low_rank):
    model = random_model(place, encoder, decoder, low_rank)
    engine = converted(model, EN_DE, tmp_path / "model")
    texts = sources(model, 200)
    search = Search(per_source_token=0.0, extra=40)
    theirs, ours = (translate_tokens(each, EN_DE, texts, search) for each in (engine, model))
    same = [
        a.tokens == b.tokens and a.score == pytest.approx(b.score, abs=1e-4)
        for (a,), (b,) in zip(ours, theirs, strict=True)
    ]
    # CTranslate2 returns of a translation that is cut only as much as the beam has room for.
    ended = [len(a.tokens) < search.extra for (a,) in ours]
    assert all(alike for alike, by_itself in zip(same, ended, strict=True) if by_itself) and sum(same) >= 190
    assert sum(ended) > 100 and len({tuple(a.tokens) for (a,) in ours}) > 5
    wrong = translate_tokens(engine, EN_DE, texts, Search(length_penalty=0.0))
    assert (
        sum(a.tokens == b.tokens for (a,), (b,) in zip(ours, wrong, strict=True)) < 150
    )  # the comparison can fail
    targets = [best.tokens for (best,) in ours[:40]]
    logs = _logits(model, EN_DE, texts[:40], targets).log_softmax(1)
    expected = logs.gather(
        1, torch.tensor([[token] for target in targets for token in [*target, EOS]])
    ).squeeze(1)
    tag = model.vocabulary.tag_id("de")
    found = engine.translator.score_batch(
        [[engine.pieces[i] for i in (tag, *text)] for text in texts[:40]],
        [[engine.pieces[i] for i in target] for target in targets],
    )
    assert torch.tensor([value for each in found for value in each.log_probs]) == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize(("beam", "penalty"), [(1, 1.0), (5, 1.0), (4, 0.0), (3, -0.5)])
def test_what_reaches_its_greatest_length_is_made_to_end(place, tmp_path, beam, penalty):
    """Which is each sentence's own, whatever else is in the batch."""
    model = random_model(place, TARGET_TOP2, PAIR_TOP3)
    engine = converted(model, EN_DE, tmp_path / "model")
    texts, search = sources(model, 200), Search(beam, penalty, per_source_token=0.5, extra=3)
    theirs, ours = (translate_tokens(each, EN_DE, texts, search) for each in (engine, model))
    limits = search.limits(torch.tensor([len(text) + 2 for text in texts])).tolist()
    cut = [len(best.tokens) == limit for (best,), limit in zip(ours, limits, strict=True)]
    assert sum(cut) > 10 and len({limit for limit, reached in zip(limits, cut, strict=True) if reached}) > 2
    same = [
        a.tokens == b.tokens and a.score == pytest.approx(b.score, abs=0.05)
        for (a,), (b,) in zip(ours, theirs, strict=True)
    ]
    # A translation that ends may lose to one that was cut, of which CTranslate2 returns only as much as the
    # beam has room for.
    assert sum(same) >= 195


@pytest.mark.parametrize(("beam", "penalty", "n_best"), [(5, 1.0, 4), (3, 0.0, 3), (4, -0.5, 2)])
def test_the_n_best_are_the_same_where_all_end(place, tmp_path, beam, penalty, n_best):
    model = random_model(place, TARGET_TOP2, PAIR_TOP3)
    engine = converted(model, EN_DE, tmp_path / "model")
    texts, search = sources(model, 100), Search(beam, penalty, 0.0, extra=40, n_best=n_best)
    theirs, ours = (translate_tokens(each, EN_DE, texts, search) for each in (engine, model))
    assert all(len(each) == n_best for each in (*theirs, *ours))
    # Where some are cut, CTranslate2 returns only as many as the beam has room for, by sums without an end.
    compared = [
        (wanted, found)
        for wanted, found in zip(ours, theirs, strict=True)
        if max(len(each.tokens) for each in (*wanted, *found)) < search.extra
    ]
    assert len(compared) >= 35 and len({tuple(best.tokens) for (best, *_), _ in compared}) > 3
    for wanted, found in compared:
        assert [each.tokens for each in found] == [each.tokens for each in wanted]
        assert [each.score for each in found] == pytest.approx([each.score for each in wanted], abs=1e-4)


def test_each_of_the_n_best_is_within_the_limit_of_its_sentence(place, tmp_path):
    model = random_model(place, TARGET_TOP2, PAIR_TOP3)
    engine = converted(model, EN_DE, tmp_path / "model")
    texts, search = sources(model, 100), Search(4, per_source_token=0.5, extra=3, n_best=3)
    theirs, ours = (translate_tokens(each, EN_DE, texts, search) for each in (engine, model))
    limits = search.limits(torch.tensor([len(text) + 2 for text in texts])).tolist()
    for found, limit in zip(theirs, limits, strict=True):
        assert 1 <= len(found) <= 3 and all(0 < len(each.tokens) <= limit for each in found)
        assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    alike = sum(a[0].tokens == b[0].tokens for a, b in zip(ours, theirs, strict=True))
    reached = sum(
        len(each.tokens) == limit for found, limit in zip(theirs, limits, strict=True) for each in found
    )
    assert alike >= 95 and reached > 10


@pytest.fixture(scope="module")
def dense(place) -> Path:
    return write_dense(place)


def test_a_folder_is_used_by_the_library_alone(dense, tmp_path, capsys, monkeypatch):
    record = convert(dense, "ctranslate2", None, tmp_path / "model", check=12)
    assert record["same_translations"] >= 0.9 * record["sentences"] > 0
    line = "ba de fi"
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model" / "vocabulary.model"))
    translator = ctranslate2.Translator(str(tmp_path / "model"), device="cpu")
    pieces = ["<2de>", *vocabulary.encode(line, out_type=str)]
    best = translator.translate_batch([pieces], beam_size=5, return_end_token=True)[0].hypotheses[0][:-1]
    wanted = list(translate(load(dense, "cpu"), EN_DE, [line, "", "ko la mi"]))
    assert vocabulary.decode(best) == wanted[0] != ""
    for folder, engine in ((tmp_path / "model", []), (dense, ["--engine", "ctranslate2"]), (dense, [])):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(f"{line}\n\nko la mi\n".encode())))
        assert main(["translate", str(folder), "--from", "en", "--to", "de", *engine]) == 0
        assert capsys.readouterr().out.splitlines() == wanted
    assert main(["evaluate", str(tmp_path / "model"), "--limit", "3"]) == 0
    assert (
        len(
            json.loads((tmp_path / "model" / "scores" / "step-2.test.beam-5.limit-3.json").read_text())[
                "directions"
            ]
        )
        == 1
    )


@pytest.mark.parametrize("quantization", ["int8", "int8_float32"])
def test_quantized_weights_are_smaller_and_translate(dense, tmp_path, quantization):
    for name, options in (("float32", {}), (quantization, {"quantization": quantization})):
        convert(dense, "ctranslate2", None, tmp_path / name, 0, **options)
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("float32", quantization)]
    assert sizes[1] < sizes[0]
    engine = load_engine(tmp_path / quantization)
    assert engine.translator.compute_type == "int8_float32"
    assert all(translate(engine, EN_DE, ["ba de fi", "ko la mi"]))


def test_what_cannot_be_done_is_refused(dense, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"'int9' is no quantization \(did you mean 'int8'\?\)"):
        convert(dense, "ctranslate2", None, tmp_path / "model", 0, quantization="int9")
    assert not (tmp_path / "model").exists()
    convert(dense, "ctranslate2", None, tmp_path / "model", 0)
    with pytest.raises(UserError, match="was made by `lsmoe convert --as ctranslate2`"):
        load(tmp_path / "model")
    with pytest.raises(UserError, match="was made by `lsmoe convert --as ctranslate2`"):
        load_engine(tmp_path / "model", engine="torch")
    with pytest.raises(UserError, match="'torhc' is no engine"):
        load_engine(dense, engine="torhc")
    with pytest.raises(UserError, match="has no parameters for the route 'shared'"):
        load_engine(tmp_path / "model", "shared")
    with pytest.raises(UserError, match="'fr' is not in this system"):
        translate(load_engine(tmp_path / "model"), FR_EN, [])
    data = bytearray((tmp_path / "model" / "model.bin").read_bytes())
    data[-3] ^= 1
    (tmp_path / "model" / "model.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: .*model\.bin"):
        load_engine(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match="pip install ctranslate2"):
        load_engine(dense, engine="ctranslate2", direction=EN_DE)


def test_a_vocabulary_map_scores_the_candidates_of_a_sentence_alone(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vocabulary_map, "FREQUENT", 4)
    lines = ["ba de fi", "ko la mi", "fi fi ba ko"]
    command = ["convert", str(dense), "--as", "ctranslate2", "--out", str(tmp_path / "model")]
    assert main([*command, "--check", "4", "--vocabulary-map", "1"]) == 0
    assert "pieces of the references among the candidates, %: " in capsys.readouterr().out
    engine = load_engine(tmp_path / "model")
    found, size = VocabularyMap.of(open_data(engine), EN_DE, 1), engine.vocabulary.size
    tokens = [engine.vocabulary.encode(line) for line in lines]
    for source in tokens:
        known = set(found.candidates(source).tolist())
        ((best,),) = engine.search([source], EN_DE, Search(5, 1.0))
        assert known >= set(best.tokens) and len(known) < size / 2
    card = (tmp_path / "model" / "README.md").read_text()
    assert '"use_vmap": True' in card and "1 candidates for each piece of a source, of en-de alone; " in card
    assert "vmap.txt" in json.loads((tmp_path / "model" / "provenance.json").read_text())["files"]


def test_a_vocabulary_map_of_all_pieces_changes_nothing(dense, tmp_path):
    lines = ["ba de fi", "ko la mi", "fi fi ba ko"]
    loaded, recipe = load(dense, "cpu"), load_recipe(dense / "recipe.yaml")
    size = loaded.vocabulary.size
    everything = VocabularyMap(np.arange(size), [np.zeros(0, np.int64)] * size)
    tensors = read_weights(find_model(dense)).tensors
    names = write_files(tmp_path, tensors, recipe, dense / "vocabulary.model", candidates=everything)
    engine = CTranslate2.open(tmp_path, recipe, dense / "vocabulary.model", 2, tmp_path, "specific", EN_DE)
    assert "vmap.txt" in names
    assert list(translate(engine, EN_DE, lines)) == list(translate(loaded, EN_DE, lines))


def test_candidates_go_together_more_than_by_chance():
    """Against the four cells written out for each pair of pieces."""
    generator = random.Random(3)
    source = [[generator.randrange(4, 12) for _ in range(5)] for _ in range(60)]
    target = [[20 + each for each in line if generator.random() < 0.8] + [30] for line in source]
    found = associate(stored_pairs(source, target), 40, 2)
    both = [(set(one), set(other)) for one, other in zip(source, target, strict=True)]
    for piece in range(4, 12):
        scores = {}
        for other in range(40):
            k = sum(piece in a and other in b for a, b in both)
            a, b = sum(piece in a for a, _ in both), sum(other in b for _, b in both)
            cells = [(k, a, b), (a - k, a, 60 - b), (b - k, 60 - a, b), (60 - a - b + k, 60 - a, 60 - b)]
            if k * 60 > a * b:
                scores[other] = sum(n * math.log(n * 60 / (r * c)) for n, r, c in cells if n)
        best = sorted(scores, key=scores.get, reverse=True)[:2]
        assert set(found.by_piece[piece].tolist()) == {*best, piece}
    assert found.by_piece[0].tolist() == [0], "a piece that never occurs brings itself"
    assert 30 in found.always


def stored_pairs(source, target):
    """Token pairs that are not on disk."""

    def store(lines):
        offsets = np.cumsum([0, *map(len, lines)])
        return SimpleNamespace(ids=np.concatenate(lines).astype(np.uint16), offsets=offsets)

    sides = SimpleNamespace(source=store(source), target=store(target))
    return type("Pairs", (), {"__len__": lambda self: len(source), **vars(sides)})()


def test_a_map_needs_one_direction_and_training_text(place, dense, tmp_path):
    with pytest.raises(UserError, match="--vocabulary-map is for --as ctranslate2, not for dense"):
        convert(dense, "dense", None, tmp_path / "model", 0, vocabulary_map=3)
