"""Translated documents: their blocks of text (paragraphs, titles, cells), and the sentences of two texts side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import regex
from lxml import etree

Block = tuple[str, str]  # kind, such as "p", and text on one line
Pair = tuple[str, str]  # English, translation

# After a mark that ends sentences and what closes behind it, before a letter that is not lower-case. Not after a single letter
# ("e.g.", "z. B.", "J. Doe"). Chinese and Japanese write no blank there.
SENTENCE_BREAK = regex.compile(
    r"""(?<=[.!?…؟।]["”»’)\]]*)(?<!\b\p{L}\.)\s+(?=["“„«‘(\[¿¡]*[\p{Lu}\p{Lo}\p{N}])|(?<=[。！？][」』”）]*)(?![」』”）])\s*(?=\S)"""
)
NOT_TEXT = regex.compile(r"^\d+(\.\d+)+\.\s+|(\s*→\s*https?://\S+)+$")  # the number of a section, addresses behind a paragraph
BETWEEN = {"keyseq": "+", "guiseq": " ▸ "}  # what a reader sees between the keys or menus that such an element holds


@dataclass(frozen=True)
class Markup:
    """How a kind of document is written. Elements are named ``div``, or ``div.para`` with one of their classes.

    ``blocks`` hold text, unless other blocks stand inside them; ``skipped`` are left out with all that they hold, be it within a block.
    """

    html: bool
    blocks: frozenset[str]
    skipped: frozenset[str]

    def read(self, data: bytes) -> list[Block] | None:
        """The blocks of a document in their order, None if it cannot be parsed."""
        # Nothing outside the document is ever read, entities stay as they are, and depth and size are limited.
        parser = (
            etree.HTMLParser(encoding="utf-8", no_network=True, huge_tree=False, remove_comments=True, remove_pis=True)
            if self.html
            else etree.XMLParser(
                resolve_entities=False, load_dtd=False, no_network=True, huge_tree=False, remove_comments=True, remove_pis=True
            )
        )
        try:
            root = etree.fromstring(data, parser)
        except etree.XMLSyntaxError:
            return None
        for element in [element for element in root.iter() if _names(element) & self.skipped]:
            element.clear(keep_tail=True)
        for line_break in root.iter("br"):
            line_break.tail = " " + (line_break.tail or "")
        for name, mark in BETWEEN.items():
            for sequence in root.iter(f"{{*}}{name}"):
                for element in sequence[:-1]:
                    element.tail = mark
        return list(self._blocks(root))

    def _blocks(self, root: etree._Element) -> Iterator[Block]:
        waiting = [root]
        while waiting:
            element = waiting.pop()
            names = _names(element)
            if names & self.blocks and not any(_names(inner) & self.blocks for inner in element.iterdescendants()):
                yield min(names), NOT_TEXT.sub("", " ".join("".join(element.itertext()).split()))
            else:
                waiting.extend(reversed(element))


def _names(element: etree._Element) -> set[str]:
    if not isinstance(element.tag, str):  # an entity
        return set()
    name = element.tag.rpartition("}")[2]
    return {name, *(f"{name}.{value}" for value in element.get("class", "").split())}


def align_documents(english: list[Block], translated: list[Block]) -> list[Pair] | None:
    """Pairs of two documents, block by block; None unless both have the same kinds of blocks in the same order."""
    if [kind for kind, _ in english] != [kind for kind, _ in translated]:
        return None
    return [pair for (_, first), (_, second) in zip(english, translated, strict=True) for pair in align_sentences(first, second)]


def align_sentences(english: str, translated: str) -> list[Pair]:
    """The sentences of two texts, if both have as many and no two differ much in length; otherwise the texts as they are."""
    first, second = SENTENCE_BREAK.split(english), SENTENCE_BREAK.split(translated)
    if len(first) == len(second):
        pairs = list(zip(first, second, strict=True))
        ratio = len(translated) / max(1, len(english))
        if all(abs(len(b) - ratio * len(a)) <= 12 + 0.5 * max(len(b), ratio * len(a)) for a, b in pairs):
            return pairs
    return [(english, translated)]
