"""Translate lines: any number, any length, one line out for each line in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from lsmoe_ds.directions import Direction
from lsmoe_ds.inference.beam_search import Hypothesis, Search
from lsmoe_ds.inference.engine import Engine, own_direction
from lsmoe_ds.inference.stream import in_chunks, telling
from lsmoe_ds.languages import script

BATCH_TOKENS = 2048
LOGITS = 2**26  # of one step of a batch: 256 MiB

# Where a line that is too long is cut, best places first: after sentences, after clauses, between words.
CUTS = [
    re.compile(r"(?<=[.!?…։؟۔।])[\"'”’»)\]]*\s+|(?<=[。！？])(?=[^。！？」』”’）])"),
    re.compile(r"(?<=[,;:،؛])\s+|(?<=[，；：、])|\s+[-–—]\s+"),
    re.compile(r"\s+"),
]
UNSPACED = {"Hans", "Hant", "Hani", "Jpan"}  # scripts whose sentences are not separated by spaces


def translate(
    engine: Engine,
    direction: Direction,
    lines: Iterable[str],
    beam: int = 5,
    length_penalty: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[str]:
    """Yield the translation of each line, in their order, while lines are still being read
    (:func:`translate_chunks`).
    """
    return translate_chunks(engine, direction, in_chunks(lines), beam, length_penalty, batch_tokens)


def translate_chunks(
    engine: Engine,
    direction: Direction,
    chunks: Iterable[Sequence[str]],
    beam: int = 5,
    length_penalty: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[str]:
    """Yield the translation of each line of each chunk; the lines of a chunk are translated together.

    A blank line gives an empty one. A line of more tokens than the model was trained on is cut at the ends of
    sentences, and its parts' translations are joined. Raises UserError for a direction that is not the
    model's.
    """
    own_direction(engine, direction)  # now, not when the first line is asked for
    search = Search(beam, length_penalty)
    return (
        text for chunk in chunks for text in translate_all(engine, direction, chunk, search, batch_tokens)
    )


def translate_all(
    engine: Engine,
    direction: Direction,
    lines: Sequence[str],
    search: Search,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Translate lines, batched by length over all of them. ``advance`` is told how many more lines or parts
    of lines are done; without it that is said every half minute.
    """
    parts = [cut_line(line, engine) for line in lines]
    flat = [part for each in parts for part in each]
    advance = advance or telling("translated", len(flat), "sentences or parts of long lines")
    found = iter(translate_tokens(engine, direction, flat, search, batch_tokens, advance))
    advance(len(lines) - len(flat))
    joint = "" if script(direction.target) in UNSPACED else " "
    texts = [
        [engine.vocabulary.decode(hypothesis.tokens) for hypothesis in islice(found, len(each))]
        for each in parts
    ]
    return [joint.join(" ".join(text.split()) for text in each) for each in texts]


def translate_tokens(
    engine: Engine,
    direction: Direction,
    sources: Sequence[Sequence[int]],
    search: Search,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda sources: None,
) -> list[Hypothesis]:
    """Translate N token sequences (without tag and EOS), in batches of like length with at most
    ``batch_tokens`` padded source tokens.

    ``advance`` is told the number of sequences of each batch when it is done.
    """
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    rows = max(1, LOGITS // (engine.vocabulary.size * search.beam))
    found: dict[int, Hypothesis] = {}
    start = 0
    while start < len(order):
        end = start + 1
        while (
            end < len(order)
            and end - start < rows
            and (len(sources[order[end]]) + 2) * (end + 1 - start) <= batch_tokens
        ):
            end += 1
        hypotheses = engine.search([sources[i] for i in order[start:end]], direction, search)
        found.update(zip(order[start:end], hypotheses, strict=True))
        advance(end - start)
        start = end
    return [found[i] for i in range(len(sources))]


def cut_line(line: str, engine: Engine) -> list[list[int]]:
    """Encode a line in parts that the model can take: none for a blank line, one for most."""
    return _cut(line.strip(), engine, engine.recipe.data.batch.max_length - 2)  # tag and EOS


def _cut(text: str, engine: Engine, limit: int) -> list[list[int]]:
    ids = engine.vocabulary.encode(text)
    if len(ids) <= limit:
        return [ids] if ids else []
    for pattern in CUTS:
        places = [match.end() for match in pattern.finditer(text) if 0 < match.end() < len(text)]
        if places:
            middle = min(places, key=lambda place: abs(2 * place - len(text)))
            return _cut(text[:middle].rstrip(), engine, limit) + _cut(text[middle:].lstrip(), engine, limit)
    return [ids[start : start + limit] for start in range(0, len(ids), limit)]
