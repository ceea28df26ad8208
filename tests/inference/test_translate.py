"""Lines in, lines out: order, blank lines, long lines, streams."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from support.small_run import TARGET_TOP2, make_recipe, write_corpus

from lsmoe_ds.data.vocabulary import train_vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference import stream
from lsmoe_ds.inference import translate as module
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import find_direction
from lsmoe_ds.inference.load import Loaded
from lsmoe_ds.inference.stream import FIRST_CHUNK, LARGEST_CHUNK, read_chunks
from lsmoe_ds.inference.translate import cut_line, translate, translate_chunks, translate_tokens
from lsmoe_ds.languages import tag
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

EN_DE, DE_EN = Direction("en", "de"), Direction("de", "en")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    folder = tmp_path_factory.mktemp("translate")
    write_corpus(folder)
    recipe = make_recipe(folder, None, TARGET_TOP2)
    texts = [cell for row in (folder / "text.tsv").read_text().splitlines()[1:] for cell in row.split("\t")]
    texts += [f"{text}." for text in texts[:50]]
    vocabulary = train_vocabulary(iter(texts), recipe.data.vocabulary, recipe.languages.codes)
    model = Transformer(recipe, vocabulary.size)
    initialize(model, 2, Topology.single())
    with torch.no_grad():
        model.decoder_norm.weight *= 3
    return Loaded(model.eval(), recipe, vocabulary, recipe.languages, 0, "sparse", folder)


def lines_of(loaded: Loaded, count: int) -> list[str]:
    rows = (loaded.home / "text.tsv").read_text().splitlines()[1 : count + 1]
    return [" ".join(row.split("\t")[0].split()[: 1 + i % 5]) for i, row in enumerate(rows)]


def test_order_does_not_depend_on_batches(loaded):
    lines = lines_of(loaded, 30)
    together = list(translate(loaded, EN_DE, lines))
    assert together == [next(translate(loaded, EN_DE, [line])) for line in lines]
    assert together == list(translate(loaded, EN_DE, lines, batch_tokens=1))
    assert len(set(together)) > 5


def test_blank_lines_stay_empty_and_every_line_gives_one(loaded):
    first, second = lines_of(loaded, 2)
    lines = ["", first, "   \t ", "\u200b", second, first + "\u2028" + second, first + "\r", ""]
    found = list(translate(loaded, EN_DE, lines))
    assert [i for i, line in enumerate(found) if not line] == [0, 2, 3, 7]
    assert all(len(line.splitlines()) <= 1 for line in found)
    assert list(translate(loaded, EN_DE, [])) == []


def test_lines_are_translated_while_others_are_still_read(loaded):
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield "ba de"

    stream = translate(loaded, EN_DE, endless())
    next(stream)
    assert len(read) == FIRST_CHUNK
    for _ in range(FIRST_CHUNK):
        next(stream)
    assert len(read) == 3 * FIRST_CHUNK


def test_the_direction_is_checked_at_once(loaded):
    with pytest.raises(UserError, match="'ru' is not in this system"):
        translate(loaded, Direction("en", "ru"), [])
    with pytest.raises(UserError, match="both languages are en: name two different ones"):
        find_direction(loaded, Direction("en", "en"))
    with pytest.raises(UserError, match="the beam is 0"):
        list(translate(loaded, EN_DE, ["ba"], beam=0))


def test_a_long_line_is_cut_at_sentences_and_nothing_is_lost(loaded):
    limit = loaded.recipe.data.batch.max_length - 2
    sentences = [f"{line}." for line in lines_of(loaded, 25)]
    parts = cut_line(" ".join(sentences), loaded)
    assert len(parts) > 1 and all(0 < len(part) <= limit for part in parts)
    texts = [loaded.vocabulary.decode(part) for part in parts]
    assert " ".join(texts) == loaded.vocabulary.decode(loaded.vocabulary.encode(" ".join(sentences)))
    assert all(text.endswith(".") for text in texts)
    found = next(translate(loaded, EN_DE, [" ".join(sentences)]))
    assert found == " ".join(next(translate(loaded, EN_DE, [text])) for text in texts)


@pytest.mark.parametrize("text", ["ba " * 200, "ba" * 300, "ba, de; " * 60, "好的。" * 90, "x", "a.b.c" * 50])
def test_any_text_fits_in_parts_that_hold_all_of_it(loaded, text):
    parts = cut_line(text, loaded)
    assert all(0 < len(part) <= loaded.recipe.data.batch.max_length - 2 for part in parts)
    whole = loaded.vocabulary.decode(loaded.vocabulary.encode(text))
    assert "".join("".join(loaded.vocabulary.decode(part) for part in parts).split()) == "".join(
        whole.split()
    )


def test_sentence_ends_in_several_scripts():
    pattern = module.CUTS[0]
    assert pattern.split("One. Two! (Three?) Four") == ["One.", "Two!", "(Three?", "Four"]
    assert pattern.split("好。「是！」不") == ["好。", "「是！」不"]
    assert pattern.split("एक। दो") == ["एक।", "दो"]
    assert pattern.split("3.5 and a.b") == ["3.5 and a.b"]


def test_specials_and_tags_are_never_generated(loaded):
    silent = {0, 1, 2, *(loaded.vocabulary.tag_id(code) for code in loaded.vocabulary.codes)}
    sources = [loaded.vocabulary.encode(line) for line in lines_of(loaded, 20)]
    weight = loaded.model.embedding.tokens.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[sorted(silent - {2})] *= 20  # a model that would love to
        for beam in (1, 5):
            found = translate_tokens(loaded, EN_DE, sources, Search(beam=beam, extra=3))
            assert not any(silent & set(best.tokens) for (best,) in found)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert tag("de") not in " ".join(translate(loaded, EN_DE, ["<2de> ba"]))


def test_progress_counts_every_line(loaded):
    lines = [*lines_of(loaded, 20), "", "ba. " * 60]
    counts: list[int] = []
    module.translate_all(loaded, DE_EN, lines, Search(beam=1), advance=counts.append)
    assert sum(counts) == len(lines)


def test_what_takes_long_is_told(loaded, capsys, monkeypatch):
    line = "ba. " * 200
    list(translate(loaded, EN_DE, [line], beam=1))
    assert not capsys.readouterr().err
    monkeypatch.setattr(stream, "LINE_EVERY", 0.0)
    list(translate(loaded, EN_DE, [line], beam=1, batch_tokens=2))
    first, *_ = capsys.readouterr().err.splitlines()
    parts = len(cut_line(line, loaded))
    assert parts > 1
    assert first == f"lsmoe: translated 1 of {parts} sentences or parts of long lines"


def lines_in(stream: io.BufferedIOBase) -> list[str]:
    return [line for chunk in read_chunks(stream) for line in chunk]


def test_lines_of_a_stream():
    assert lines_in(io.BytesIO("\ufeffä\r\nb\n\nc\u2028d\ne".encode())) == [
        "ä",
        "b",
        "",
        "c\u2028d",
        "e",
    ]
    assert lines_in(io.BytesIO(b"")) == []
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 \(byte 0xff at position 3\)"):
        lines_in(io.BytesIO(b"good\nab\xff\n"))


@pytest.fixture
def pipe() -> Iterator[tuple[io.FileIO, io.BufferedReader]]:
    """Both ends: what somebody writes into, and what is read as standard input is."""
    out, into = os.pipe()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("nothing came out of the pipe"))
    signal.alarm(60)
    with open(into, "wb", buffering=0) as writer, open(out, "rb") as reader:
        yield writer, reader
    signal.alarm(0)


def test_a_line_is_answered_before_the_next_one_comes(loaded, pipe):
    writer, reader = pipe
    first, second, third = lines_of(loaded, 3)
    wanted = list(translate(loaded, EN_DE, [first, second, third]))
    chunks = translate_chunks(loaded, EN_DE, read_chunks(reader), Search())
    found = (best.text for (best,) in chunks)
    writer.write(f"{first}\n".encode())
    assert next(found) == wanted[0]  # the pipe is still open
    writer.write(f"{second}\n{third}".encode())  # the last line has no end
    assert next(found) == wanted[1]
    writer.close()
    assert list(found) == wanted[2:]


def test_lines_that_come_fast_make_large_chunks(tmp_path):
    (tmp_path / "text").write_text("".join(f"line {number}\n" for number in range(10_000)))
    with (tmp_path / "text").open("rb") as file:
        chunks = list(read_chunks(file))
    assert [line for chunk in chunks for line in chunk] == [f"line {number}" for number in range(10_000)]
    sizes = [len(chunk) for chunk in chunks]
    assert sizes[:4] == [FIRST_CHUNK, 32, 64, 128] and max(sizes) == LARGEST_CHUNK and len(sizes) < 15


@pytest.mark.parametrize("content", ["\ufeffä\r\nb\n\nc\u2028d\ne", "", "\n", "a\n", "a"])
def test_chunks_are_the_lines_of_a_stream(pipe, content):
    writer, reader = pipe
    writer.write(content.encode())
    writer.close()
    assert lines_in(reader) == lines_in(io.BytesIO(content.encode()))


def test_what_stands_before_a_bad_line_is_translated(pipe):
    writer, reader = pipe
    writer.write(b"good\nab\xff\nmore\n")
    chunks = read_chunks(reader)
    assert next(chunks) == ["good"]
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 \(byte 0xff at position 3\)"):
        next(chunks)
