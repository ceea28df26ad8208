"""Read TMX, the exchange format of translation memories, which OPUS and many translation tools write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lxml import etree

from lsmoe_ds.config.data import Corpus
from lsmoe_ds.data.lines import explained, open_unpacked, plain_or_packed
from lsmoe_ds.data.spelling import Wanted
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.errors import UserError

LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
CODES = frozenset({"bpt", "ept", "ph", "it", "ut"})  # formatting codes of another program, not text


def find_tmx(corpus: Corpus, wanted: Wanted) -> Iterator[TextPart]:
    """Find what a TMX file has for each bitext."""
    path = plain_or_packed(corpus.path)
    codes = [(code, code) for code in languages_of(path)]
    if len(codes) < 2:
        raise UserError(
            f"{path} is no TMX with two languages: no <tu> with two <tuv xml:lang=...> was found in it"
        )
    for bitext, pair in wanted.items():
        first, second = (wanted.choose(codes, code) for code in pair)
        if first is not None and second is not None:
            read = TmxReader(path, first, second)
            yield TextPart(str(corpus.path), bitext, "train", (path,), "pairs", read=read)


@cache
def languages_of(path: Path) -> tuple[str, ...]:
    """List the languages of a TMX file's texts, as it spells them."""
    return tuple(sorted({code for unit in _units(path) for code in unit}))


class TmxReader:
    """Yield the pairs of two languages of a TMX file, which spells them ``first`` and ``second``."""

    def __init__(self, path: Path, first: str, second: str) -> None:
        self.path, self.codes = path, (first, second)

    def __call__(self, tell: Callable[[str], None]) -> Iterator[tuple[str, str]]:
        for unit in _units(self.path):
            if all(code in unit for code in self.codes):
                yield unit[self.codes[0]], unit[self.codes[1]]


def _units(path: Path) -> Iterator[dict[str, str]]:
    """Yield each translation unit as the first text of each language, in constant memory.

    Raises UserError for a file that is not XML. Nothing outside the file is read.
    """
    with explained(path), open_unpacked(path) as file:
        events = etree.iterparse(
            file, tag=("{*}tu",), resolve_entities=False, no_network=True, load_dtd=False, huge_tree=True
        )
        try:
            for _, unit in events:
                yield _texts(unit)
                unit.clear()
                while unit.getprevious() is not None:
                    del unit.getparent()[0]
        except etree.XMLSyntaxError as error:
            raise UserError(f"{path} is no well-formed XML: {error.msg}") from None


def _texts(unit: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for variant in unit.iterchildren("{*}tuv"):
        code = variant.get(LANGUAGE) or variant.get("lang")  # TMX 1.1 has no prefix
        segment = next(variant.iterchildren("{*}seg"), None)
        if code and segment is not None:
            found.setdefault(code, _text(segment))
    return found


def _text(element: Any) -> str:
    """Return the text in an element, without formatting codes."""
    parts = [element.text or ""]
    for child in element:
        if isinstance(child.tag, str) and etree.QName(child).localname not in CODES:
            parts.append(_text(child))
        parts.append(child.tail or "")
    return "".join(parts)
