"""Translate lines: any number, any length, the best translation or several for each line in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from lsmoe_ds.directions import Direction
from lsmoe_ds.inference.beam_search import Hypothesis, Search
from lsmoe_ds.inference.engine import Engine, own_direction
from lsmoe_ds.inference.stream import in_chunks, telling
from lsmoe_ds.languages import script

BATCH_TOKENS = 10240  # padded source tokens of a batch, counted once for each hypothesis of the beam
LOGITS = 2**26  # limit of one step of a batch: 256 MiB

# Where a line that is too long is cut, best places first: after sentences, after clauses, between words.
CUTS = [
    re.compile(r"(?<=[.!?…։؟۔।])[\"'”’»)\]]*\s+|(?<=[。！？])(?=[^。！？」』”’）])"),
    re.compile(r"(?<=[,;:،؛])\s+|(?<=[，；：、])|\s+[-–—]\s+"),
    re.compile(r"\s+"),
]
UNSPACED = {"Hans", "Hant", "Hani", "Jpan"}  # scripts whose sentences are not separated by spaces


@dataclass(frozen=True)
class Translation:
    """A translation of a line, and its score: the sum of its parts' scores, 0 for a blank line."""

    text: str
    score: float


def translate(
    engine: Engine,
    direction: Direction,
    lines: Iterable[str],
    beam: int = 5,
    length_penalty: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[str]:
    """Yield the best translation of each line, in their order, while lines are still being read
    (:func:`translate_chunks`).
    """
    search = Search(beam, length_penalty)
    found = translate_chunks(engine, direction, in_chunks(lines), search, batch_tokens)
    return (best.text for best, *_ in found)


def translate_chunks(
    engine: Engine,
    direction: Direction,
    chunks: Iterable[Sequence[str]],
    search: Search,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[list[Translation]]:
    """Yield the translations of each line of each chunk (:func:`translate_lines`); the lines of a chunk are
    translated together. Raises UserError for a direction that the model lacks.
    """
    own_direction(engine, direction)  # raises now, not at the first line
    return (
        found for chunk in chunks for found in translate_lines(engine, direction, chunk, search, batch_tokens)
    )


def translate_all(
    engine: Engine,
    direction: Direction,
    lines: Sequence[str],
    search: Search,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the best translation of each line (:func:`translate_lines`)."""
    found = translate_lines(engine, direction, lines, search, batch_tokens, advance)
    return [best.text for best, *_ in found]


def translate_lines(
    engine: Engine,
    direction: Direction,
    lines: Sequence[str],
    search: Search,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] | None = None,
) -> list[list[Translation]]:
    """Translate lines, batched by length: at most ``search.n_best`` translations of each, best first.

    A blank line has one, which is empty. A line with more tokens than the model was trained on is cut at the
    ends of sentences, and the first translations of its parts are joined, then the second, and so on; a part
    that has fewer repeats its last. Different tokens may give the same text. ``advance`` is called with the
    number of lines, or parts of lines, of each batch; by default progress is printed every half minute.
    """
    parts = [cut_line(line, engine) for line in lines]
    flat = [part for each in parts for part in each]
    advance = advance or telling("translated", len(flat), "sentences or parts of long lines")
    found = iter(translate_tokens(engine, direction, flat, search, batch_tokens, advance))
    advance(len(lines) - len(flat))
    joint = "" if script(direction.target) in UNSPACED else " "
    return [_joined(engine, list(islice(found, len(each))), joint) for each in parts]


def _joined(engine: Engine, parts: Sequence[Sequence[Hypothesis]], joint: str) -> list[Translation]:
    """Return the translations of a line, of whose parts the hypotheses are given."""
    texts = [
        [(" ".join(engine.vocabulary.decode(each.tokens).split()), each.score) for each in part]
        for part in parts
    ]
    found = []
    for rank in range(max(map(len, texts), default=0)):
        chosen = [part[min(rank, len(part) - 1)] for part in texts]
        found.append(Translation(joint.join(text for text, _ in chosen), sum(score for _, score in chosen)))
    return found or [Translation("", 0.0)]


def translate_tokens(
    engine: Engine,
    direction: Direction,
    sources: Sequence[Sequence[int]],
    search: Search,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda sources: None,
) -> list[list[Hypothesis]]:
    """Translate N token sequences (without tag and EOS), in batches of like length: at most ``search.n_best``
    hypotheses of each, best first.

    A batch has at most ``batch_tokens`` padded source tokens, counted once for each hypothesis of the beam.
    ``advance`` is called with the number of sequences of each batch when it is done.
    """
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    rows = max(1, LOGITS // (engine.vocabulary.size * search.beam))
    found: dict[int, list[Hypothesis]] = {}
    start = 0
    while start < len(order):
        end = start + 1
        while (
            end < len(order)
            and end - start < rows
            and (len(sources[order[end]]) + 2) * (end + 1 - start) * search.beam <= batch_tokens
        ):
            end += 1
        hypotheses = engine.search([sources[i] for i in order[start:end]], direction, search)
        found.update(zip(order[start:end], hypotheses, strict=True))
        advance(end - start)
        start = end
    return [found[i] for i in range(len(sources))]


def cut_line(line: str, engine: Engine) -> list[list[int]]:
    """Encode a line in parts that fit the model: none for a blank line, one for most lines."""
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
