"""Align translated documents by their blocks of text (paragraphs, titles, cells) and by sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import regex
from lxml import etree

Block = tuple[str, str]  # kind, such as "p", and text on one line
Pair = tuple[str, str]  # English, translation

# A sentence ends after its final mark and closing quotes or brackets, before a letter that is not lower-case,
# but not after a single letter ("e.g.", "z. B.", "J. Doe"). Chinese and Japanese have no blank there.
SENTENCE_BREAK = regex.compile(
    r"""(?<=[.!?…؟।]["”»’)\]]*)(?<!\b\p{L}\.)\s+(?=["“„«‘(\[¿¡]*[\p{Lu}\p{Lo}\p{N}])|(?<=[。！？][」』”）]*)(?![」』”）])\s*(?=\S)"""
)
# The number of a section, and addresses after a paragraph.
NOT_TEXT = regex.compile(r"^\d+(\.\d+)+\.\s+|(\s*→\s*https?://\S+)+$")
BETWEEN = {"keyseq": "+", "guiseq": " ▸ "}  # what is displayed between the keys or menus of such an element


@dataclass(frozen=True)
class Markup:
    """The markup of a kind of document.

    Elements are named ``div``, or ``div.para`` with one of their classes. ``blocks`` are the elements that
    hold text, unless they contain other blocks. ``skipped`` elements are left out with their content, also
    within a block.
    """

    html: bool
    blocks: frozenset[str]
    skipped: frozenset[str]

    def read(self, data: bytes) -> list[Block] | None:
        """Return the blocks of a document in their order, or None if it cannot be parsed."""
        # Nothing outside the document is read, entities are not expanded, and depth and size are limited.
        parser = (
            etree.HTMLParser(
                encoding="utf-8", no_network=True, huge_tree=False, remove_comments=True, remove_pis=True
            )
            if self.html
            else etree.XMLParser(
                resolve_entities=False,
                load_dtd=False,
                no_network=True,
                huge_tree=False,
                remove_comments=True,
                remove_pis=True,
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
            if names & self.blocks and not any(
                _names(inner) & self.blocks for inner in element.iterdescendants()
            ):
                yield min(names), NOT_TEXT.sub("", " ".join("".join(element.itertext()).split()))
            else:
                waiting.extend(reversed(element))


def _names(element: etree._Element) -> set[str]:
    if not isinstance(element.tag, str):  # an entity
        return set()
    name = element.tag.rpartition("}")[2]
    return {name, *(f"{name}.{value}" for value in element.get("class", "").split())}


def align_documents(english: list[Block], translated: list[Block]) -> list[Pair] | None:
    """Align two documents block by block. Returns None if their sequences of block kinds differ."""
    if [kind for kind, _ in english] != [kind for kind, _ in translated]:
        return None
    return [
        pair
        for (_, first), (_, second) in zip(english, translated, strict=True)
        for pair in align_sentences(first, second)
    ]


def align_sentences(english: str, translated: str) -> list[Pair]:
    """Pair the sentences of two texts, or return the whole texts as one pair where that is not safe.

    Pairing is safe if both have the same number of sentences and no two paired ones differ much in length.
    """
    first, second = SENTENCE_BREAK.split(english), SENTENCE_BREAK.split(translated)
    if len(first) == len(second):
        pairs = list(zip(first, second, strict=True))
        ratio = len(translated) / max(1, len(english))
        if all(abs(len(b) - ratio * len(a)) <= 12 + 0.5 * max(len(b), ratio * len(a)) for a, b in pairs):
            return pairs
    return [(english, translated)]
